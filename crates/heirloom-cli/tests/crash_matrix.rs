//! A process dies, hangs or is stopped at every point of a takeover and of an upgrade: as the tables of
//! `docs/guarantees.md` say, one process serves afterwards and not a byte is missing, or the only server was the one that
//! died. It prints what came of each.
//!
//! It needs the feature `crash-points`: `cargo test -p heirloom-cli --features crash-points --test crash_matrix`.

mod crash {
    pub(crate) mod table;
    pub(crate) mod talk;
}
mod stream;
mod support;

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crash::table::{Act, IN_PLACE, Outcome, Row, Sees, Serves, TAKEOVER};
use crash::talk::{Program, Talk};
use heirloom::NoRequests;
use heirloom::control::{Client, ClientError, Hello, LastTakeover, Request, VersionRange};
use heirloom::crash::Point;
use heirloom::lock::{LockFile, lock_path};
use heirloom::protocol::VERSIONS;
use rustix::process::Signal;
use support::proc::{has_ended, signal};
use support::upgrading::{EndsServing, Place};
use support::*;

/// How many cells are played at the same time: most of them wait for a time limit of the takeover.
const AT_ONCE: usize = 32;
/// How long a cell may take on a loaded machine; the longest time limit in it is 30 s.
const DEADLINE: Duration = Duration::from_secs(120);
/// What a successor can cause, 6 s, and as much again for a loaded machine.
const LONGEST_PAUSE_US: u64 = 12_000_000;

/// What is played: a row with an act, on a program.
struct Cell {
    way: Way,
    row: &'static Row,
    act: Act,
    program: Program,
}

/// How the service changes hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The successor was started by hand.
    Takeover,
    /// The incumbent becomes the successor.
    InPlace,
    /// The incumbent starts the successor.
    Beside,
}

impl Cell {
    fn expected(&self) -> Outcome {
        match self.way {
            Way::Takeover | Way::InPlace => self.row.expected(self.act),
            Way::Beside => self.row.expected_beside(self.act),
        }
    }

    /// Plays it, and says what came of it.
    fn play(&self) -> String {
        match self.way {
            Way::Takeover => take_over(self),
            Way::InPlace => in_place(self),
            Way::Beside => beside(self),
        }
    }

    /// Its place in the printed table.
    fn place(&self) -> (Option<usize>, u8, u8, u8) {
        let point = Point::ALL.iter().position(|point| *point == self.row.point);
        (point, self.way as u8, self.act as u8, self.program as u8)
    }
}

/// A cell that was played, what came of it or why it failed, and how long it took.
type Played = (Cell, Result<String, String>, Duration);

#[test]
fn at_every_point_one_serves_or_the_only_server_has_died() {
    heirloom::descriptors::raise_limit().expect("setrlimit");
    let mut played = play(cells());
    played.sort_by_key(|(cell, ..)| cell.place());
    for (cell, came, took) in &played {
        let Cell { way, row, act, program } = cell;
        let (serves, sees) = cell.expected();
        let came = match came {
            Ok(came) => format!("{serves:?}, {sees:?}: {came}"),
            Err(why) => format!("FAILED, instead of {serves:?}, {sees:?}: {why}"),
        };
        let what = format!("{:<27} {way:?}, {act:?}, {program:?}", row.point.name());
        println!("{what:<56} {came} ({:.1} s)", took.as_secs_f32());
    }
    let failed = played.iter().filter(|(_, came, _)| came.is_err()).count();
    println!("{} cells, {failed} failed", played.len());
    assert_eq!(failed, 0);
}

/// Everything that is played; what waits for a time limit comes first.
fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for act in Act::ALL {
        let cell = |way, row, program| Cell { way, row, act, program };
        // Which of two that are continued at once is the faster is not settled.
        for row in TAKEOVER.iter().filter(|row| act != Act::Pause || !row.incumbent_gives_up()) {
            let crowded = matches!(row.point, Point::BatchSent | Point::BatchRead);
            let server = if crowded { Program::Crowded } else { Program::Server };
            let programs = [Program::Client, server, Program::Proxy];
            cells.extend(programs.map(|program| cell(Way::Takeover, row, program)));
        }
        for row in IN_PLACE {
            let programs = [Program::Client, Program::Server, Program::Proxy];
            cells.extend(programs.map(|program| cell(Way::InPlace, row, program)));
        }
        if act != Act::Pause {
            // A proxy is asked first only in place.
            let preflight = IN_PLACE.iter().filter(|row| !row.point.name().starts_with("in-place"));
            cells.extend(preflight.map(|row| cell(Way::Beside, row, Program::Client)));
            for row in TAKEOVER.iter().filter(|row| !row.incumbent_gives_up()) {
                let programs = [Program::Client, Program::Proxy];
                cells.extend(programs.map(|program| cell(Way::Beside, row, program)));
            }
        }
    }
    cells.sort_by_key(|cell| matches!(cell.act, Act::Kill | Act::Pause));
    cells
}

/// Plays them, many at a time.
fn play(cells: Vec<Cell>) -> Vec<Played> {
    let queue = Mutex::new(VecDeque::from(cells));
    let next = || queue.lock().expect("no panic while taking").pop_front();
    let play_some = || -> Vec<Played> {
        std::iter::from_fn(next)
            .map(|cell| {
                let began = Instant::now();
                let came = catch_unwind(AssertUnwindSafe(|| cell.play())).map_err(why);
                let took = began.elapsed();
                let came = came.and_then(|came| if took < DEADLINE { Ok(came) } else { Err("late".into()) });
                (cell, came, took)
            })
            .collect()
    };
    std::thread::scope(|scope| {
        let players: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(play_some)).collect();
        players.into_iter().flat_map(|player| player.join().expect("it catches panics")).collect()
    })
}

/// What a panic says.
fn why(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// An incumbent that has been replaced, and has only not read so yet, answers nobody any more: it neither tells a former status
/// nor admits another successor, nor lets it believe, by a `Pong` alone, that it speaks protocol 0.
#[test]
fn whoever_asks_one_that_was_replaced_hears_nothing() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let committing = Plan::new(Point::Committing, Act::Stop, &scratch);
    let (talk, mut incumbent) = Talk::start(Program::Client, &control, |_| {});
    // They are accepted before the successor's, which comes later.
    let [mut asks, mut looks] = [(), ()].map(|()| {
        let mut client = Client::connect(&control).expect("it listens");
        client.set_timeout(DEADLINE);
        client
    });
    let hello = Hello {
        protocol: VERSIONS,
        service: status(&control).name,
        program: "tester".into(),
        version: "1".into(),
        pid: std::process::id(),
        schema: VersionRange::new(1, 1),
        room: 1000,
        generation: None,
        force: false,
    };
    let mut successor = talk.process(&control, "must", |command| committing.give(command));
    committing.wait();
    // It waits for `Taken`, and finds what is asked here before it.
    wait_for("the incumbent to wait", || proc::is_asleep(incumbent.id()));
    incumbent.signal(Signal::STOP);
    wait_for("it to be stopped", || proc::is_stopped(incumbent.id()));
    asks.send(&Request::<NoRequests>::Takeover(hello)).expect("send");
    asks.send(&Request::<NoRequests>::Ping).expect("send");
    looks.send(&Request::<NoRequests>::Status).expect("send");
    successor.signal(Signal::CONT);
    wait_for_generation(&control, 1);
    incumbent.signal(Signal::CONT);
    for client in [&mut asks, &mut looks] {
        match client.receive() {
            Err(ClientError::Closed { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    incumbent.wait_for_code(0);
    talk.goes_on();
    talk.ends_exact();
}

/// No point is left out, and none is in the program by another name.
#[test]
fn every_point_is_in_the_tables_and_in_the_program() {
    let rows: Vec<Point> = TAKEOVER.iter().chain(IN_PLACE).map(|row| row.point).collect();
    assert!(rows == Point::ALL);
    let program = std::fs::read(env!("CARGO_BIN_EXE_heirloom")).expect("a program");
    let program = String::from_utf8_lossy(&program);
    for name in Point::ALL.iter().map(|point| point.name()).chain(["HEIRLOOM_CRASH_POINT"]) {
        assert!(program.contains(name), "{name} is not in the program");
    }
}

#[test]
fn the_guarantees_say_the_same() {
    let documentation = include_str!("../../../docs/guarantees.md");
    let documented: Vec<&str> = documentation.lines().filter(|line| line.starts_with("| `")).collect();
    let ours: Vec<String> = TAKEOVER.iter().chain(IN_PLACE).map(Row::documented).collect();
    assert!(documented == ours, "they are to say:\n{}", ours.join("\n"));
}

/// Where a process is to act, and how.
struct Plan {
    point: Point,
    act: Act,
    report: PathBuf,
}

impl Plan {
    fn new(point: Point, act: Act, scratch: &Scratch) -> Plan {
        Plan { point, act, report: scratch.path(point.name()) }
    }

    fn give(&self, command: &mut Command) {
        command.env("HEIRLOOM_CRASH_POINT", format!("{}:{}", self.point.name(), self.act.name()));
        command.env("HEIRLOOM_CRASH_REPORT", &self.report);
    }

    /// Waits until a process has come to the point, and acts. Returns its pid.
    fn wait(&self) -> u32 {
        let mut pid = None;
        wait_for(self.point.name(), || {
            let report = std::fs::read_to_string(&self.report).unwrap_or_default();
            pid = report.strip_suffix('\n').and_then(|pid| pid.parse().ok());
            pid.is_some()
        });
        let pid = pid.expect("waited for");
        match self.act {
            Act::Kill => wait_for("its end", || has_ended(pid)),
            Act::Stop | Act::Pause => wait_for("it to be stopped", || proc::is_stopped(pid)),
            Act::Hang => {}
        }
        pid
    }
}

/// The incumbent and the successor of a takeover.
struct Two {
    control: PathBuf,
    incumbent: Process,
    successor: Process,
}

/// Plays a cell of [`TAKEOVER`].
fn take_over(cell: &Cell) -> String {
    let (point, act) = (cell.row.point, cell.act);
    let (serves, sees) = cell.expected();
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let plan = Plan::new(point, act, &scratch);
    let at_incumbent = point.name().starts_with("incumbent");
    // Why the incumbent gives up, where it does.
    let provoked = cell.row.incumbent_gives_up().then(|| Plan::new(Point::LockTaken, Act::Stop, &scratch));

    let (talk, incumbent) = Talk::start(cell.program, &control, |command| {
        if at_incumbent {
            plan.give(command);
        }
    });
    talk.goes_on();
    let successor = talk.process(&control, "must", |command| match &provoked {
        Some(provoked) => provoked.give(command),
        None if !at_incumbent => plan.give(command),
        None => {}
    });
    let mut two = Two { control, incumbent, successor };
    let actor = plan.wait();
    assert_eq!(actor, if at_incumbent { two.incumbent.id() } else { two.successor.id() });
    if sees == Sees::Nothing {
        talk.goes_on();
    }
    if provoked.is_some() && two.successor.is_running() {
        two.successor.signal(Signal::CONT);
    }
    // Nobody waits for one that has asked for nothing.
    if act == Act::Stop && point != Point::Connected {
        if at_incumbent { two.successor_decides() } else { two.incumbent_decides() }
    }
    // One that held the lock has been ended for it.
    if matches!(act, Act::Stop | Act::Pause) && !has_ended(actor) {
        signal(actor, Signal::CONT);
    }
    match serves {
        Serves::Incumbent => {
            if !at_incumbent && point != Point::Connected {
                two.incumbent_decides();
            }
            two.incumbent_serves();
            let pause = status(&two.control).last_takeover.and_then(|last| last.pause_us);
            // One that dies right behind `Ready` may be found to be dead before the freeze.
            let may_be_missed = point == Point::ReadySent && act == Act::Kill;
            if !at_incumbent && !may_be_missed {
                assert_eq!(pause.is_some(), sees == Sees::Pause, "{}", two.incumbent.stderr());
                assert!(pause.unwrap_or(0) < LONGEST_PAUSE_US, "{pause:?}: {}", two.incumbent.stderr());
            }
            if at_incumbent || act != Act::Hang {
                two.successor_fails();
            }
        }
        Serves::Successor => two.successor_serves(if at_incumbent { act } else { Act::Stop }),
        Serves::Nobody => {
            if at_incumbent {
                two.successor_fails();
            } else {
                two.incumbent.wait_for_code(0);
            }
            if act == Act::Hang {
                signal(actor, Signal::KILL);
            }
            talk.breaks_off();
            return two.starts_again(cell.program);
        }
    }
    talk.goes_on();
    let before = status(&two.control);
    // Whoever hangs is there all the while, and touches nothing.
    let mut next = talk.process(&two.control, "must", |_| {});
    let replaced = if serves == Serves::Successor { &mut two.successor } else { &mut two.incumbent };
    replaced.wait_for_code(0);
    let now = status(&two.control);
    assert_eq!((now.pid, now.generation), (next.id(), before.generation + 1));
    talk.goes_on();
    talk.ends_exact();
    assert!(next.is_running());
    came(before.last_takeover)
}

impl Two {
    /// Waits until the successor has failed, or has seen that it serves.
    fn successor_decides(&mut self) {
        wait_for("the successor to decide", || {
            !self.successor.is_running() || self.successor.stderr().contains("took over")
        });
    }

    /// Waits until the incumbent has ended, or serves on.
    fn incumbent_decides(&mut self) {
        wait_for("the incumbent to decide", || {
            !self.incumbent.is_running() || {
                let status = try_status(&self.control).filter(|status| !status.takeover_running);
                let last = status.and_then(|status| status.last_takeover);
                last.is_some_and(|last| last.peer_pid == Some(self.successor.id()))
            }
        });
    }

    fn incumbent_serves(&mut self) {
        // While it takes its lock again it answers already.
        wait_for("the end of the takeover", || {
            try_status(&self.control).is_some_and(|status| !status.takeover_running)
        });
        let status = status(&self.control);
        assert!(self.incumbent.is_running(), "{}", self.incumbent.stderr());
        assert_eq!((status.pid, status.generation), (self.incumbent.id(), 0));
        assert!(is_locked(&self.control));
    }

    /// It has ended by itself, or was ended for the lock that it held, and has not served.
    fn successor_fails(&mut self) {
        let ended = self.successor.wait();
        let said = self.successor.stderr();
        assert!(matches!(ended.code(), Some(1 | 3 | 5) | None), "{ended}: {said}");
        assert!(!said.contains("took over"), "{said}");
    }

    /// It does, and the incumbent has ended, as far as what it did lets it.
    fn successor_serves(&mut self, incumbent: Act) {
        // Until it has read `Taken` an incumbent answers as well.
        match incumbent {
            Act::Hang => assert!(self.incumbent.is_running()),
            Act::Kill => assert_eq!(self.incumbent.wait().code(), None),
            Act::Stop | Act::Pause => self.incumbent.wait_for_code(0),
        }
        wait_for_generation(&self.control, 1);
        let status = status(&self.control);
        assert_eq!((status.pid, status.generation), (self.successor.id(), 1));
        assert!(self.successor.is_running(), "{}", self.successor.stderr());
        assert!(is_locked(&self.control));
    }

    /// Nobody serves, and whoever is started now does.
    fn starts_again(mut self, program: Program) -> String {
        self.incumbent.wait();
        self.successor.wait();
        assert!(try_status(&self.control).is_none() && !is_locked(&self.control));
        let (_talk, fresh) = Talk::start(program, &self.control, |_| {});
        let status = status(&self.control);
        assert_eq!((status.pid, status.generation), (fresh.id(), 0));
        last_line(&self.successor)
    }
}

/// Plays a cell of [`IN_PLACE`].
fn in_place(cell: &Cell) -> String {
    let (point, act) = (cell.row.point, cell.act);
    let (serves, sees) = cell.expected();
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let plan = Plan::new(point, act, &scratch);
    let (talk, mut process) = Talk::start(cell.program, &control, |command| plan.give(command));
    talk.goes_on();
    let mut upgrade = upgrade(&control, Place::InPlace);
    let actor = plan.wait();
    let in_preflight = point.name().starts_with("preflight");
    assert_eq!(actor != process.id(), in_preflight);
    if sees == Sees::Nothing {
        talk.goes_on();
    }
    if in_preflight && act == Act::Stop {
        upgrade.wait();
    }
    if matches!(act, Act::Stop | Act::Pause) && !has_ended(actor) {
        signal(actor, Signal::CONT);
    }
    if serves == Serves::Nobody {
        if act == Act::Hang {
            process.kill();
        }
        process.wait();
        upgrade.wait_for_code(1);
        assert!(try_status(&control).is_none() && !is_locked(&control));
        talk.breaks_off();
        let (_talk, fresh) = Talk::start(cell.program, &control, |_| {});
        assert_eq!(status(&control).pid, fresh.id());
        return last_line(&upgrade);
    }
    let generation = u64::from(serves == Serves::Successor);
    upgrade.wait_for_code(if serves == Serves::Successor { 0 } else { 5 });
    let status = status(&control);
    assert_eq!((status.pid, status.generation), (process.id(), generation));
    assert!(is_locked(&control));
    if sees == Sees::Nothing {
        assert_eq!(status.last_takeover.and_then(|last| last.pause_us), None);
    }
    talk.goes_on();
    assert_eq!(proc::children(process.id()), "");
    // The same program, with the same plan, which is done with.
    self::upgrade(&control, Place::InPlace).wait_for_code(0);
    assert_eq!(support::status(&control).generation, generation + 1);
    talk.goes_on();
    talk.ends_exact();
    assert!(process.is_running());
    last_line(&upgrade)
}

/// Plays a cell of [`TAKEOVER`], or the preflight of one, in which the incumbent starts the successor.
fn beside(cell: &Cell) -> String {
    let (point, act) = (cell.row.point, cell.act);
    let (serves, sees) = cell.expected();
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let plan = Plan::new(point, act, &scratch);
    let (talk, mut incumbent) = Talk::start(cell.program, &control, |command| plan.give(command));
    let _ends = EndsServing(control.clone());
    talk.goes_on();
    let mut asked = upgrade(&control, Place::Beside);
    let actor = plan.wait();
    let at_incumbent = actor == incumbent.id();
    if sees == Sees::Nothing {
        talk.goes_on();
    }
    // The preflight goes by itself.
    let awaited = at_incumbent && act != Act::Kill && point != Point::PreflightStarted;
    if awaited && serves != Serves::Successor {
        let successor = proc::only_child(incumbent.id());
        wait_for("the successor to give up", || has_ended(successor));
    } else if act == Act::Stop && at_incumbent && awaited {
        wait_for("the successor to serve", || incumbent.stderr().contains("took over"));
    } else if act == Act::Stop && !at_incumbent {
        wait_for("the incumbent to decide", || !asked.is_running() || !incumbent.is_running());
    }
    if act == Act::Stop && !has_ended(actor) {
        signal(actor, Signal::CONT);
    }
    if serves == Serves::Nobody {
        if !at_incumbent {
            assert_eq!(incumbent.wait_for_exit().code(), Some(0), "{}", incumbent.stderr());
        }
        if act == Act::Hang {
            signal(actor, Signal::KILL);
        }
        // The connection ends with the last process that has it.
        talk.breaks_off();
        incumbent.wait_for_exit();
        asked.wait_for_code(1);
        assert!(try_status(&control).is_none() && !is_locked(&control));
        let (_talk, fresh) = Talk::start(cell.program, &control, |_| {});
        assert_eq!(status(&control).pid, fresh.id());
        return last_line(&asked);
    }
    let hangs = at_incumbent && act == Act::Hang;
    // Whoever asked the one that hangs waits for it.
    if hangs {
        wait_for_generation(&control, 1);
    } else {
        asked.wait_for_code(if serves == Serves::Successor { 0 } else { 5 });
    }
    if hangs || serves == Serves::Incumbent {
        assert!(incumbent.is_running(), "{}", incumbent.stderr());
    } else {
        // The successor may answer before the incumbent has ended.
        let killed = at_incumbent && act == Act::Kill;
        assert_eq!(incumbent.wait_for_exit().code(), (!killed).then_some(0), "{}", incumbent.stderr());
    }
    let before = status(&control);
    assert_eq!(before.generation, u64::from(serves == Serves::Successor));
    assert!(is_locked(&control));
    talk.goes_on();
    // The same program, with the same plan, which is done with.
    upgrade(&control, Place::Beside).wait_for_code(0);
    assert_eq!(status(&control).generation, before.generation + 1);
    talk.goes_on();
    talk.ends_exact();
    came(before.last_takeover)
}

fn upgrade(control: &Path, place: Place) -> Process {
    let mut command = heirloom();
    command.arg("upgrade").args(place.options()).arg("--control").arg(control).stdin(Stdio::null());
    Process::start(&mut command)
}

/// The last thing that a process has said.
fn last_line(process: &Process) -> String {
    let said = [process.stdout(), process.stderr().into_bytes()].concat();
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().last().unwrap_or_default();
    last.split_once("ERROR").unwrap_or(("", last)).1.trim().to_owned()
}

/// What a takeover has come to, as whoever serves says.
fn came(last: Option<LastTakeover>) -> String {
    let Some(last) = last else { return "was not asked".into() };
    let pause = last.pause_us.map_or("no pause".into(), |pause| format!("{:.1} ms", pause as f64 / 1000.0));
    let reason = last.reason.map_or(String::new(), |reason| format!(", {reason}"));
    format!("{pause}{reason}")
}

/// Whether somebody holds the service lock.
fn is_locked(control: &Path) -> bool {
    LockFile::open(lock_path(control)).expect("the lock file").try_lock().is_err()
}
