//! A proxy that is replaced in every way there is while others talk through it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use heirloom::control::Status;
use rustix::process::Signal;

use super::proc::{has_ended, naming, program, settled_footprint, signal, threads};
use super::upgrading::{EndsServing, this_program, upgrade};
use super::{LONG, Process, Scratch, status, try_status, wait_for};

/// A way in which one proxy becomes the next, or is to and does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handover {
    /// SIGHUP.
    Reload,
    /// `heirloom upgrade`.
    Upgrade,
    /// `heirloom upgrade --in-place`.
    InPlace,
    /// Somebody starts another one, with another number of threads.
    Takeover,
    /// SIGHUP with a configuration that has a mistake: the incumbent serves on.
    Refused,
}

impl Handover {
    pub(crate) const EACH: [Handover; 5] =
        [Handover::Reload, Handover::Upgrade, Handover::InPlace, Handover::Takeover, Handover::Refused];
}

/// How many threads those have that are started by hand, in turn. The first proxy has [`THREADS`].
const OTHER_THREADS: [usize; 4] = [3, 1, 4, 2];
/// How many threads a proxy has unless somebody says otherwise.
pub(crate) const THREADS: usize = 2;
/// A mistake, and what is said of it.
const MISTAKE: (&str, &str) = ("no_such_key = 1\n", "no_such_key");

/// What is logged of an upgrade that does not come about.
const FAILED: &str = "upgrade failed";

/// A proxy at a control socket of its own, and those that come after it.
pub(crate) struct Proxy {
    /// Those that were started by hand, the last one at the end. What they start themselves has their stderr.
    started: Vec<Process>,
    control: PathBuf,
    config: PathBuf,
    /// Where `main` listens, if there is one.
    main: Option<String>,
    /// How often somebody else has been started by hand.
    takeovers: usize,
    _ends: EndsServing,
    scratch: Scratch,
}

impl Proxy {
    /// One that listens at [`Proxy::address`] and passes everything on to this address.
    pub(crate) fn to(backend: &str) -> Proxy {
        Proxy::start(&format!(
            "[[listener]]\nname = \"main\"\nlisten = \"127.0.0.1:0\"\nto = [\"{backend}\"]\n"
        ))
    }

    /// One with this configuration.
    pub(crate) fn start(config: &str) -> Proxy {
        let scratch = Scratch::new();
        let control = scratch.path("proxy.sock");
        let mut proxy = Proxy {
            started: Vec::new(),
            config: scratch.path("proxy.toml"),
            main: None,
            takeovers: 0,
            _ends: EndsServing(control.clone()),
            control,
            scratch,
        };
        proxy.configure(config);
        proxy.started.push(Process::start(&mut proxy.command(this_program(), THREADS)));
        wait_for("a proxy that serves", || {
            assert!(proxy.started[0].is_running(), "it has ended:\n{}", proxy.log());
            try_status(&proxy.control).is_some()
        });
        proxy.main = proxy.listens_at("main");
        proxy
    }

    /// The command that starts one with the same control socket and configuration.
    pub(crate) fn command(&self, program: &Path, threads: usize) -> Command {
        let mut command = Command::new(program);
        command.args(["proxy", "--config"]).arg(&self.config).arg("--control").arg(&self.control);
        command.args(["--threads", &threads.to_string()]);
        command
    }

    /// Where [`Proxy::to`] listens, for as long as it does.
    pub(crate) fn address(&self) -> String {
        self.main.clone().expect("a listener that is called main")
    }

    /// Where the listener with this name listens, once it does.
    pub(crate) fn address_of(&self, listener: &str) -> String {
        let mut address = None;
        wait_for("the listener's address", || {
            address = self.listens_at(listener);
            address.is_some()
        });
        address.expect("waited for")
    }

    /// Where it listens, by its status: what is last in the log may be of a listener that was removed and added again.
    fn listens_at(&self, listener: &str) -> Option<String> {
        let report = self.status().application.expect("a report");
        let named = report["listeners"].as_array()?.iter().find(|one| one["name"] == listener);
        Some(named?["address"].as_str()?.to_owned())
    }

    /// Writes its configuration anew, in one go. It takes effect at the next handover.
    pub(crate) fn configure(&self, config: &str) {
        let fresh = self.scratch.path("proxy.toml.new");
        std::fs::write(&fresh, config)
            .and_then(|()| std::fs::rename(&fresh, &self.config))
            .expect("the configuration");
    }

    pub(crate) fn configuration(&self) -> String {
        std::fs::read_to_string(&self.config).expect("the configuration")
    }

    pub(crate) fn status(&self) -> Status {
        status(&self.control)
    }

    /// What all of them have logged so far.
    pub(crate) fn log(&self) -> String {
        self.started.iter().map(Process::stderr).collect()
    }

    /// How many descriptors the one that serves has, but for the pipes that it keeps to use them again.
    pub(crate) fn descriptors(&self) -> usize {
        let status = self.status();
        let pipes = status.application.expect("a report")["pipes"].as_u64().expect("a number");
        settled_footprint(status.pid).descriptors().saturating_sub(2 * pipes as usize)
    }

    /// Hands over in this way, and looks at what has become of it: the next generation serves, alone.
    #[track_caller]
    pub(crate) fn hand_over(&mut self, how: Handover) {
        match how {
            Handover::Reload => self.becomes(how, |proxy| signal(proxy.status().pid, Signal::HUP)),
            Handover::Upgrade => self.becomes(how, |proxy| drop(upgrade::<&str>(&proxy.control, &[]).done())),
            Handover::InPlace => {
                self.becomes(how, |proxy| drop(upgrade(&proxy.control, &["--in-place"]).done()))
            }
            Handover::Takeover => {
                let threads = OTHER_THREADS[self.takeovers % OTHER_THREADS.len()];
                self.takeovers += 1;
                self.take_over(this_program(), threads);
            }
            Handover::Refused => {
                let broken = format!("{}{}", MISTAKE.0, self.configuration());
                self.refuses(&broken, &[MISTAKE.1]);
            }
        }
    }

    /// Starts this program by hand, with so many threads, and waits until it serves.
    #[track_caller]
    pub(crate) fn take_over(&mut self, with: &Path, threads: usize) {
        self.becomes(Handover::Takeover, |proxy| {
            let successor = Process::start(&mut proxy.command(with, threads));
            proxy.started.push(successor);
        });
        let pid = self.status().pid;
        assert_eq!(pid, self.started.last().expect("just started").id());
        // A thread gives itself its name when it first runs.
        wait_for("its loops", || threads_that_serve(pid) == threads);
    }

    /// Upgrades to another program.
    pub(crate) fn upgrade_to(&mut self, with: &Path, in_place: bool) {
        let how = if in_place { Handover::InPlace } else { Handover::Upgrade };
        let mut options = vec!["--program", with.to_str().expect("UTF-8")];
        options.extend(in_place.then_some("--in-place"));
        self.becomes(how, |proxy| drop(upgrade(&proxy.control, &options).done()));
        assert_eq!(program(self.status().pid), with);
    }

    /// Has this done, and waits until the next generation serves, alone.
    #[track_caller]
    fn becomes(&mut self, how: Handover, act: impl FnOnce(&mut Proxy)) {
        let (before, logged) = (self.status(), self.log().len());
        act(self);
        let give_up = Instant::now() + LONG;
        let now = loop {
            let now = self.status();
            if now.generation > before.generation {
                break now;
            }
            let log = self.log();
            let failed = log[logged..].contains(FAILED) || Instant::now() > give_up;
            assert!(!failed, "{how:?}: nobody takes over:\n{log}");
            let last = self.started.last_mut().expect("there is a first one");
            let failed = how == Handover::Takeover && last.id() != before.pid && !last.is_running();
            assert!(!failed, "the successor has ended:\n{}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        assert_eq!(now.generation, before.generation + 1, "{how:?}");
        assert_eq!(now.pid == before.pid, how == Handover::InPlace, "{how:?}: {before:?}\n{now:?}");
        let last = now.last_takeover.as_ref().expect("it was handed over");
        assert_eq!(last.outcome, "taken", "{how:?}");
        if how != Handover::InPlace {
            wait_for("the old one's end", || has_ended(before.pid));
            if let Some(old) = self.started.iter_mut().find(|process| process.id() == before.pid) {
                assert_eq!(old.wait_for_exit().code(), Some(0), "{how:?}:\n{}", old.stderr());
            }
        }
        self.is_alone();
    }

    /// A reload with this configuration does not come about, and all of this is said of it. The configuration is then what it
    /// was before.
    #[track_caller]
    pub(crate) fn refuses(&mut self, broken: &str, says: &[&str]) {
        let (before, good, logged) = (self.status(), self.configuration(), self.log().len());
        self.configure(broken);
        signal(before.pid, Signal::HUP);
        let give_up = Instant::now() + LONG;
        // Only the one process that serves writes to this log.
        while !says.iter().all(|part| self.log()[logged..].contains(part)) {
            assert!(Instant::now() < give_up, "{says:?} is not in\n{}", &self.log()[logged..]);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // Whoever asks is told as well, and has an answer: the refusal is over then.
        let says: Vec<&str> = says.to_vec();
        wait_for("the refusal's end", || !self.status().takeover_running);
        upgrade::<&str>(&self.control, &[]).failed(5, &says);
        self.configure(&good);
        let now = self.status();
        assert_eq!((now.pid, now.generation), (before.pid, before.generation), "{}", &self.log()[logged..]);
        self.is_alone();
    }

    /// Waits until the process that serves is the only one that knows of the control socket.
    #[track_caller]
    pub(crate) fn is_alone(&self) {
        let pid = self.status().pid;
        let give_up = Instant::now() + LONG;
        while naming(&self.control) != [pid] {
            assert!(Instant::now() < give_up, "not just {pid}: {:?}\n{}", naming(&self.control), self.log());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Hands over in each way, and calls `between` after each.
    #[track_caller]
    pub(crate) fn hand_over_in_each_way(&mut self, mut between: impl FnMut(Handover)) {
        for how in Handover::EACH {
            self.hand_over(how);
            between(how);
        }
    }

    /// Hands over in each way, so many times around, while something passes the gate: with each handover a further portion of
    /// `length`, which is all.
    #[track_caller]
    pub(crate) fn hand_over_during(&mut self, gate: &Gate, length: u64, rounds: u64) {
        let portion = length / (rounds * Handover::EACH.len() as u64 + 1);
        for _ in 0..rounds {
            for how in Handover::EACH {
                gate.let_pass(portion);
                self.hand_over(how);
                gate.wait_until_passed();
            }
        }
        gate.open();
    }

    /// Ends it, and returns what all of them have logged.
    pub(crate) fn finish(mut self) -> String {
        self.is_alone();
        let pid = self.status().pid;
        signal(pid, Signal::TERM);
        wait_for("the last one's end", || has_ended(pid));
        // Nobody writes to a stderr any more.
        for process in &mut self.started {
            process.wait_for_code(0);
        }
        assert_eq!(naming(&self.control), [0; 0]);
        self.log()
    }
}

/// How many loops the process has.
fn threads_that_serve(pid: u32) -> usize {
    threads(pid).iter().filter(|name| name.starts_with("loop ")).count()
}

/// What a stream has to pass, so that it is still under way when it is to be.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<Passing>,
    changed: Condvar,
}

#[derive(Default)]
struct Passing {
    passed: u64,
    may_pass: u64,
}

impl Gate {
    /// Lets so much more pass.
    fn let_pass(&self, portion: u64) {
        let mut state = self.state.lock().expect("no panic");
        state.may_pass = state.may_pass.saturating_add(portion);
        self.changed.notify_all();
    }

    /// Lets all pass.
    fn open(&self) {
        self.let_pass(u64::MAX);
    }

    /// Waits until all has passed that may.
    #[track_caller]
    fn wait_until_passed(&self) {
        let state = self.state.lock().expect("no panic");
        let waits = |state: &mut Passing| state.passed < state.may_pass;
        let (state, waited) = self.changed.wait_timeout_while(state, LONG, waits).expect("no panic");
        assert!(!waited.timed_out(), "it stands still: {} of {} bytes", state.passed, state.may_pass);
    }

    /// Counts what has passed.
    pub(crate) fn pass(&self, count: usize) {
        self.state.lock().expect("no panic").passed += count as u64;
        self.changed.notify_all();
    }

    /// How much may pass now, at most so much; waits until it is something.
    pub(crate) fn wait(&self, most: usize) -> usize {
        let state = self.state.lock().expect("no panic");
        let shut = |state: &mut Passing| state.passed >= state.may_pass;
        let state = self.changed.wait_while(state, shut).expect("no panic");
        usize::try_from(state.may_pass - state.passed).unwrap_or(usize::MAX).min(most)
    }
}
