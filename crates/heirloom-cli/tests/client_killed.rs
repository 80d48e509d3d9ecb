//! The client is killed again and again under `heirloom run`, and not a byte is lost, repeated or out of order.

mod support;

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use heirloom::{Config, NoRequests, Replace, Service, StartError};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, OutputModes, tcgetattr, tcsetattr};
use support::generations::*;
use support::proc::{children, only_child, signal};
use support::random::Random;
use support::upgrading::Place;
use support::*;

/// How often a client is killed; HEIRLOOM_KILLS says otherwise.
const KILLS: u64 = 50;
/// How many lines pass through it meanwhile, at least; HEIRLOOM_KILLS_LINES says otherwise. 4,000,000 are 31 MB.
const LINES: u64 = 4_000_000;
/// How long a client lives at most, to be killed at any moment of its life.
const LIFE: Duration = Duration::from_millis(30);

/// `heirloom run -- heirloom chat`, and a server that the chat has connected to.
struct Supervised {
    run: Process,
    /// The process that the chat is a child of: `heirloom run`, whatever has started that.
    keeper: u32,
    control: PathBuf,
    listener: TcpListener,
    server: TcpStream,
    random: Random,
    killed: Option<u32>,
    scratch: Scratch,
}

impl Supervised {
    /// With pipes of the test's for stdin and stdout.
    fn start() -> Self {
        Self::start_by(Process::start)
    }

    fn start_between(stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Self {
        Self::start_by(|run| Process::start_between(run, stdin, stdout))
    }

    fn start_by(start: impl FnOnce(&mut Command) -> Process) -> Self {
        Self::start_with(&[], |_, chat| chat.to_vec(), start)
    }

    /// With further options of `heirloom run`, and another command than the chat's, which may use a file in a scratch directory.
    fn start_with(
        options: &[&str],
        command: impl FnOnce(&Scratch, &[OsString]) -> Vec<OsString>,
        start: impl FnOnce(&mut Command) -> Process,
    ) -> Self {
        let scratch = Scratch::new();
        let (listener, address) = listen();
        let control = scratch.path("chat.sock");
        let chat = chat(&address, &control, &[]);
        let chat: Vec<OsString> =
            [chat.get_program()].into_iter().chain(chat.get_args()).map(ToOwned::to_owned).collect();
        let mut run = heirloom();
        run.arg("run").arg("--control").arg(scratch.path("run.sock"));
        run.args(["--tries", "0", "--restart-delay", "0ms"]).args(options).arg("--");
        run.args(command(&scratch, &chat));
        let run = start(&mut run);
        let server = accept(&listener);
        let random = Random::seeded();
        let keeper = run.id();
        let supervised = Supervised { run, keeper, control, listener, server, random, killed: None, scratch };
        // From here on it is kept.
        supervised.wait_until_connected();
        supervised
    }

    fn wait_until_connected(&self) {
        wait_for("a connection", || {
            try_status(&self.control)
                .is_some_and(|status| status.items.iter().any(|item| item.name == "server"))
        });
    }

    fn server(&self) -> TcpStream {
        self.server.try_clone().expect("dup")
    }

    /// The main process of the service.
    fn chat(&self) -> u32 {
        let mut chat = None;
        wait_for("a chat that was not killed", || {
            chat = children(self.keeper).split_whitespace().filter_map(|pid| pid.parse().ok()).next_back();
            chat.is_some() && chat != self.killed
        });
        chat.expect("waited for")
    }

    /// Kills the one that runs, at a random moment of its life.
    fn kill(&mut self) {
        let chat = self.chat();
        std::thread::sleep(LIFE * self.random.below(1000) as u32 / 1000);
        kill_process(Pid::from_raw(chat as i32).expect("no zero"), Signal::KILL).expect("it is run's child");
        self.killed = Some(chat);
    }

    fn kill_often(&mut self) {
        for _ in 0..kills() {
            self.kill();
        }
    }

    /// The bytes that have come in and gone out over all processes, as status tells.
    fn wait_until_counted(&self, bytes_in: usize, bytes_out: usize) {
        let mut last = Default::default();
        wait_for("everything to be on its way", || {
            let Some(status) = try_status(&self.control) else { return false };
            let count = |name| status.counters.get(name).copied().unwrap_or(0) as usize;
            last = (count("bytes_in"), count("bytes_out"));
            last == (bytes_in, bytes_out)
        });
    }

    /// Stops it all. Returns the listener, at which nobody else has come, and the server's end of the connection.
    fn stop(mut self) -> String {
        self.run.signal(Signal::TERM);
        self.run.wait_for_code(0);
        nobody_else_came(self.listener);
        self.run.stderr()
    }
}

fn number(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).map_or(usual, |number| number.parse().expect("a number"))
}

fn kills() -> u64 {
    number("HEIRLOOM_KILLS", KILLS)
}

/// What a test has gone through, for the documentation.
fn print(what: &str, kills: u64, sent: &[u8], typed: &[u8]) {
    println!("{what}: {kills} kills, {} bytes from the server, {} from stdin", sent.len(), typed.len());
}

fn at_least() -> u64 {
    number("HEIRLOOM_KILLS_LINES", LINES)
}

#[test]
fn into_a_pipe_and_out_of_a_pipe() {
    let mut chat = Supervised::start();
    let sender = Sender::start(chat.server(), at_least());
    let typist = Sender::start(chat.run.stdin.take().expect("a pipe"), at_least() / 4);
    let heard = read_all(chat.server());
    chat.kill_often();
    let (sent, typed) = (sender.finish(), typist.finish());
    wait_for("everything on stdout", || chat.run.stdout_len() >= sent.len());
    chat.wait_until_counted(sent.len(), typed.len());
    assert_same(&chat.run.stdout(), &sent);
    print("pipes", kills(), &sent, &typed);
    // Once its stdin has ended it is not read again.
    chat.kill();
    chat.server.write_all(b"more").expect("it is connected");
    wait_for("more", || chat.run.stdout_len() == sent.len() + 4);
    chat.stop();
    assert_same(&heard.join().expect("no panic"), &typed);
}

/// `heirloom run` is PID 1 of a container, and is upgraded in between.
#[test]
fn in_a_pid_namespace_whose_first_process_is_run() {
    let unshare = ["--pid", "--fork", "--mount-proc", "--kill-child"];
    let can = Command::new("unshare").args(unshare).arg("true").stderr(Stdio::null()).status();
    if !can.is_ok_and(|status| status.success()) {
        return skip("no pid namespace can be made here (unshare needs root)");
    }
    let mut chat = Supervised::start_by(|run| {
        let mut namespace = Command::new("unshare");
        namespace.args(unshare).arg(run.get_program()).args(run.get_args());
        Process::start(&mut namespace)
    });
    chat.keeper = only_child(chat.run.id());
    let sender = Sender::start(chat.server(), at_least() / 2);
    let typist = Sender::start(chat.run.stdin.take().expect("a pipe"), at_least() / 8);
    let heard = read_all(chat.server());
    let keeper = chat.scratch.path("run.sock");
    assert_eq!(status(&keeper).pid, 1);
    for round in 1..=3 {
        for _ in 0..kills() / 4 {
            chat.kill();
        }
        let mut upgrade = heirloom();
        upgrade.args(["upgrade", "--self", "--control"]).arg(&keeper);
        Process::start(&mut upgrade).wait_for_code(0);
        assert_eq!((status(&keeper).pid, status(&keeper).generation), (1, round));
    }
    chat.kill();
    let (sent, typed) = (sender.finish(), typist.finish());
    wait_for("everything on stdout", || chat.run.stdout_len() >= sent.len());
    chat.wait_until_counted(sent.len(), typed.len());
    print("PID 1", 3 * (kills() / 4) + 1, &sent, &typed);
    signal(chat.keeper, Signal::TERM);
    chat.run.wait_for_code(0);
    assert_same(&chat.run.stdout(), &sent);
    assert_same(&heard.join().expect("no panic"), &typed);
    nobody_else_came(chat.listener);
}

#[test]
fn into_a_file_and_out_of_a_file() {
    files(|path| File::create(path).expect("a file"));
}

#[test]
fn appended_to_a_file() {
    files(|path| File::options().append(true).create(true).open(path).expect("a file"));
}

fn files(open: impl Fn(&Path) -> File) {
    let scratch = Scratch::new();
    let typed = lines(0..at_least() / 4);
    std::fs::write(scratch.path("in"), &typed).expect("a file");
    let path = scratch.path("out");
    let mut chat =
        Supervised::start_between(File::open(scratch.path("in")).expect("it is there"), open(&path));
    let sender = Sender::start(chat.server(), at_least());
    let heard = read_all(chat.server());
    chat.kill_often();
    let sent = sender.finish();
    wait_for("everything in the file", || path.metadata().is_ok_and(|file| file.len() >= sent.len() as u64));
    chat.wait_until_counted(sent.len(), typed.len());
    chat.stop();
    assert_same(&std::fs::read(&path).expect("it is there"), &sent);
    assert_same(&heard.join().expect("no panic"), &typed);
    print("files", kills(), &sent, &typed);
}

#[test]
fn at_a_terminal() {
    let (keyboard, terminal) = terminal();
    let stdin = terminal.try_clone().expect("dup");
    let mut chat = Supervised::start_between(stdin, terminal);
    // A terminal is slow.
    let sender = Sender::start(chat.server(), at_least() / 40);
    let typist = Sender::start(File::from(keyboard.try_clone().expect("dup")), at_least() / 80);
    let heard = read_all(chat.server());
    let shown = Screen::watch(keyboard.into());
    chat.kill_often();
    let (sent, typed) = (sender.finish(), typist.finish());
    chat.wait_until_counted(sent.len(), typed.len());
    shown.wait_for(sent.len());
    chat.stop();
    assert_same(&shown.contents(), &sent);
    assert_same(&heard.join().expect("no panic"), &typed);
    print("a terminal", kills(), &sent, &typed);
}

/// What is in the pipes when it is replaced, by another process or in place, is what a kill right afterwards finds.
#[test]
fn replaced_with_bytes_in_the_pipes_and_killed() {
    const ROUNDS: usize = 6;
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut chat = Supervised::start_between(Stdio::piped(), stdout);
    let mut keyboard = chat.run.stdin.take().expect("a pipe");
    let sender = Sender::start(chat.server(), 100_000);
    let mut typed = Vec::new();
    let mut shown = Vec::new();
    let mut generation = 0;
    for round in 0..ROUNDS {
        // Neither stdout nor the server takes anything: everything on the way is full.
        let line = format!("typed in round {round}\n").into_bytes();
        keyboard.write_all(&line).expect("it is taken");
        typed.extend(line);
        wait_for("a full stdout", || ioctl_fionread(&screen).is_ok_and(|waiting| waiting > 30_000));
        let place = Place::BOTH[round % 2];
        let mut upgrade = heirloom();
        upgrade.arg("upgrade").args(place.options()).arg("--control").arg(&chat.control);
        let mut upgrade = Process::start(&mut upgrade);
        upgrade.wait_for_code(0);
        generation += 1;
        let status = status(&chat.control);
        assert_eq!(status.generation, generation, "{place:?}");
        assert!(status.items.iter().any(|item| item.name == "from-server"), "{:?}", status.items);
        if round % 3 == 1 {
            generation = 0;
            let pid = Pid::from_raw(status.pid as i32).expect("no zero");
            kill_process(pid, Signal::KILL).expect("it is run's descendant");
            wait_for("the next one", || {
                try_status(&chat.control).is_some_and(|now| now.pid != status.pid && now.generation == 0)
            });
        }
        // A part of it, so that the next round begins with bytes in the pipes.
        let mut part = vec![0; 50_000];
        (&screen).read_exact(&mut part).expect("a pipe");
        shown.extend(part);
    }
    let rest = read_all(screen);
    let heard = read_all(chat.server());
    let sent = sender.finish();
    chat.wait_until_counted(sent.len(), typed.len());
    let log = chat.stop();
    shown.extend(rest.join().expect("no panic"));
    assert_same(&shown, &sent);
    assert_same(&heard.join().expect("no panic"), &typed);
    assert!(!log.contains("closed an item"), "{log}");
}

/// As `systemctl restart` does. What is in the pipes is the next one's, whose stdin and stdout are the same here.
#[test]
fn told_to_stop_and_started_again() {
    let restart = ["--restart", "always"];
    let mut chat = Supervised::start_with(&restart, |_, chat| chat.to_vec(), Process::start);
    let sender = Sender::start(chat.server(), at_least());
    let typist = Sender::start(chat.run.stdin.take().expect("a pipe"), at_least() / 4);
    let heard = read_all(chat.server());
    for round in 0..kills() {
        let told = chat.chat();
        std::thread::sleep(LIFE * chat.random.below(1000) as u32 / 1000);
        signal(told, if round % 2 == 0 || is_ignored(Signal::INT) { Signal::TERM } else { Signal::INT });
        chat.killed = Some(told);
    }
    let (sent, typed) = (sender.finish(), typist.finish());
    wait_for("everything on stdout", || chat.run.stdout_len() >= sent.len());
    chat.wait_until_counted(sent.len(), typed.len());
    assert_same(&chat.run.stdout(), &sent);
    print("told to stop", kills(), &sent, &typed);
    chat.stop();
    assert_same(&heard.join().expect("no panic"), &typed);
}

/// Whether this process ignores a signal, as one started by `nohup` or in the background of a script does with SIGINT: then its
/// children do so, too, until they have a handler of their own.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a line of it");
    let ignored = u64::from_str_radix(ignored.trim(), 16).expect("a mask");
    ignored & (1 << (signal.as_raw() - 1)) != 0
}

/// Neither stdout nor the server takes anything: what waits in the pipes is not written within the time that there is for that.
#[test]
fn told_to_stop_with_bytes_in_the_pipes() {
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut chat = Supervised::start_with(
        &["--restart", "always"],
        |_, chat| chat.to_vec(),
        |run| Process::start_between(run, Stdio::piped(), stdout),
    );
    let sender = Sender::start(chat.server(), 100_000);
    let typist = Sender::start(chat.run.stdin.take().expect("a pipe"), 4_000_000);
    for _ in 0..2 {
        wait_for("a full stdout", || ioctl_fionread(&screen).is_ok_and(|waiting| waiting > 60_000));
        let told = chat.chat();
        signal(told, Signal::TERM);
        chat.killed = Some(told);
        chat.chat();
    }
    let shown = read_all(screen);
    let heard = read_all(chat.server());
    let (sent, typed) = (sender.finish(), typist.finish());
    chat.wait_until_counted(sent.len(), typed.len());
    let log = chat.stop();
    assert_same(&shown.join().expect("no panic"), &sent);
    assert_same(&heard.join().expect("no panic"), &typed);
    assert!(log.contains("what nobody took is left in the store"), "{log}");
}

/// For good: the next one makes a connection of its own.
#[test]
fn a_quit_leaves_nothing_in_the_store() {
    let restart = ["--restart", "always"];
    let mut chat = Supervised::start_with(&restart, |_, chat| chat.to_vec(), Process::start);
    Process::start(heirloom().args(["quit", "--control"]).arg(&chat.control)).wait_for_code(0);
    assert_eq!(chat.server.read(&mut [0]).expect("an orderly end"), 0);
    let mut server = accept(&chat.listener);
    server.write_all(b"hello").expect("it is connected");
    wait_for("hello", || chat.run.stdout() == b"hello");
    let log = chat.stop();
    assert!(!log.contains("goes on where a process was"), "{log}");
}

/// As in `>>log 2>&1`: what the supervisor and the chats log comes between, and is no part of what was appended.
#[test]
fn appended_to_a_file_to_which_others_append() {
    let scratch = Scratch::new();
    let path = scratch.path("log");
    let log = || File::options().append(true).create(true).open(&path).expect("a file");
    let mut chat = Supervised::start_by(|run| {
        // Through a shell that becomes it, as a `Process` has a stderr of its own.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$@\" 2>&1", "sh"]).arg(run.get_program()).args(run.get_args());
        Process::start_between(&mut shell, Stdio::null(), log())
    });
    let sender = Sender::start(chat.server(), at_least() / 4);
    chat.kill_often();
    let sent = sender.finish();
    let appended = || without_log(&std::fs::read(&path).expect("it is there"));
    wait_for("everything in the file", || {
        path.metadata().is_ok_and(|file| file.len() >= sent.len() as u64) && appended().0.len() >= sent.len()
    });
    chat.stop();
    let (appended, logged) = appended();
    assert_same(&appended, &sent);
    assert!(logged > kills(), "{logged} lines of a log");
    print("a file with a log", kills(), &sent, &[]);
}

/// What is left of a file without the lines of a log, which begin with the time, and how many they were. There is no
/// hyphen but in those.
fn without_log(file: &[u8]) -> (Vec<u8>, u64) {
    const YEAR: usize = 4;
    let (mut rest, mut left, mut lines) = (file, Vec::new(), 0);
    while let Some(hyphen) = rest.iter().position(|byte| *byte == b'-') {
        let end =
            rest[hyphen..].iter().position(|byte| *byte == b'\n').map_or(rest.len(), |end| hyphen + end + 1);
        left.extend_from_slice(&rest[..hyphen - YEAR]);
        rest = &rest[end..];
        lines += 1;
    }
    left.extend_from_slice(rest);
    (left, lines)
}

/// Whoever serves is killed at any moment of an upgrade, when it is one process or another that may go on, or none but the next.
#[test]
fn killed_while_it_is_replaced() {
    /// How long an upgrade takes, about.
    const UPGRADE: Duration = Duration::from_millis(60);
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut chat = Supervised::start_between(Stdio::piped(), stdout);
    let typist = Sender::start(chat.run.stdin.take().expect("a pipe"), at_least() / 16);
    let sender = Sender::start(chat.server(), at_least());
    let (shown, heard) = (read_all(screen), read_all(chat.server()));
    for round in 0..kills() as usize {
        let mut incumbent = None;
        wait_for("somebody who serves", || {
            // By a descriptor, as its pid may be another's by the time it is killed.
            incumbent = try_status(&chat.control)
                .and_then(|status| pidfd_open(Pid::from_raw(status.pid as i32)?, PidfdFlags::empty()).ok());
            incumbent.is_some()
        });
        let incumbent = incumbent.expect("waited for");
        let mut upgrade = heirloom();
        upgrade.arg("upgrade").args(Place::BOTH[round % 2].options()).arg("--control").arg(&chat.control);
        let mut upgrade = Process::start(&mut upgrade);
        std::thread::sleep(UPGRADE * chat.random.below(1000) as u32 / 1000);
        // It may have been replaced, and have ended.
        let _ = pidfd_send_signal(&incumbent, Signal::KILL);
        upgrade.wait();
    }
    chat.wait_until_connected();
    let (sent, typed) = (sender.finish(), typist.finish());
    chat.wait_until_counted(sent.len(), typed.len());
    chat.stop();
    assert_same(&shown.join().expect("no panic"), &sent);
    assert_same(&heard.join().expect("no panic"), &typed);
    print("replaced all the while", kills(), &sent, &typed);
}

/// It would lose what is in the pipes, and leave behind a store with what is no longer so.
#[test]
fn a_program_that_knows_no_pipes_is_refused() {
    let chat = Supervised::start();
    let address = chat.listener.local_addr().expect("bound");
    let service = Service::new(format!("chat {address}")).program("heirloom", "0.1.0");
    let started = heirloom::start::<NoRequests>(&chat.control, service, Config::default(), Replace::Must);
    let error = started.expect_err("it is refused");
    assert!(matches!(error, StartError::Refused(_)), "{error}");
    assert!(error.to_string().contains("schema 2"), "{error}");
    chat.stop();
}

/// Who started it decides whether there is a next one; if so, it has a stdin of its own again.
#[test]
fn ended_in_order_it_leaves_the_connection_for_a_restart() {
    let always = &["--restart", "always"];
    let mut chat = Supervised::start_with(always, |_, chat| chat.to_vec(), Process::start);
    chat.run.write(b"one");
    let mut heard = [0; 3];
    chat.server.read_exact(&mut heard).expect("it is connected");
    for round in 0..3 {
        let first = chat.chat();
        chat.server.write_all(b"in order").expect("it is connected");
        kill_process(Pid::from_raw(first as i32).expect("no zero"), Signal::TERM).expect("it is run's child");
        wait_for("the next one", || try_status(&chat.control).is_some_and(|status| status.pid != first));
        chat.run.write(b"two");
        chat.server.read_exact(&mut heard).expect("it is connected");
        assert_eq!(&heard, b"two");
        wait_for("all of it", || chat.run.stdout() == b"in order".repeat(round + 1));
    }
    chat.stop();
}

/// Such as one whose server's address was changed before a restart: it is not to go on with the old server.
#[test]
fn what_another_service_has_left_is_closed() {
    let (second, address) = listen();
    let mut chat = Supervised::start_with(
        &[],
        |scratch, chat| {
            let file = scratch.path("address");
            std::fs::write(&file, chat[2].as_encoded_bytes()).expect("a file");
            let script = r#"file=$1; shift; exec "$1" "$2" "$(cat "$file")" "$4" "$5""#;
            let shell = ["sh", "-c", script, "sh"].map(OsString::from);
            shell.into_iter().chain([file.into()]).chain(chat.iter().cloned()).collect()
        },
        Process::start,
    );
    std::fs::write(chat.scratch.path("address"), address).expect("a file");
    chat.kill();
    accept(&second).write_all(b"from the second").expect("it is connected");
    wait_for("the second", || chat.run.stdout() == b"from the second");
    assert_eq!(chat.server.read(&mut [0]).expect("an end"), 0, "the first connection has ended");
    chat.stop();
}

/// A successor without a store goes on with what is in the pipes.
#[test]
fn a_successor_outside_of_the_store_takes_what_is_in_the_pipes() {
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut chat = Supervised::start_between(Stdio::null(), stdout);
    let sender = Sender::start(chat.server(), 300_000);
    wait_for("a full stdout", || ioctl_fionread(&screen).is_ok_and(|waiting| waiting > 30_000));
    let address = chat.listener.local_addr().expect("bound").to_string();
    let successor = Process::start(&mut support::chat(&address, &chat.control, &["--replace", "must"]));
    let first = read_all(screen);
    // The one that was replaced has ended as it should, so that run has nothing to run any more.
    chat.run.wait_for_code(0);
    let sent = sender.finish();
    let first = first.join().expect("no panic");
    assert!(first.len() < sent.len());
    wait_for("the rest", || first.len() + successor.stdout_len() >= sent.len());
    assert_same(&[first, successor.stdout()].concat(), &sent);
    nobody_else_came(chat.listener);
}

/// A terminal that changes nothing and does not echo: what types and shows, and what programs have.
fn terminal() -> (OwnedFd, OwnedFd) {
    let keyboard =
        openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    unlockpt(&keyboard).expect("it is ours");
    let name = ptsname(&keyboard, Vec::new()).expect("it has a name");
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = open(name, flags, Mode::empty()).expect("it is ours");
    let mut modes = tcgetattr(&terminal).expect("a terminal");
    modes.local_modes.remove(LocalModes::ECHO);
    modes.output_modes.remove(OutputModes::OPOST);
    tcsetattr(&terminal, OptionalActions::Now, &modes).expect("a terminal");
    (keyboard, terminal)
}

/// What a terminal shows.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    fn watch(mut terminal: File) -> Screen {
        let screen = Screen::default();
        let shown = screen.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // An error: nobody has the terminal any more.
            while let Ok(count @ 1..) = terminal.read(&mut buffer) {
                shown.0.lock().expect("no panic").extend_from_slice(&buffer[..count]);
            }
        });
        screen
    }

    fn contents(&self) -> Vec<u8> {
        self.0.lock().expect("no panic").clone()
    }

    fn wait_for(&self, length: usize) {
        wait_for("the screen", || self.0.lock().expect("no panic").len() >= length);
    }
}
