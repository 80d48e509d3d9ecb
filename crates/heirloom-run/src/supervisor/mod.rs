//! The supervisor: one loop over signals, notifications, the control socket, what is stored, and time.
//!
//! [`Core`] knows everything and decides; what is here waits, and lends it the control socket.

mod above;
mod carry;
mod control;
mod keep;
mod life;
mod messages;
mod process;
mod signals;
mod upgrade;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use heirloom::control::path::default_path;
use heirloom::{Config, ConnectionId, Delegate, Incumbent, Replace, Service, Start};
use heirloom_sys::{SignalFd, SignalMask};
use rustix::event::epoll;

use crate::above::{Above, Inherited};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::error::RunError;
use crate::exit::Ended;
use crate::fetch::Fetch;
use crate::notify::socket::{NotifySocket, path_beside};
use crate::options::{Command, Options};
use crate::seldom::Seldom;
use crate::store::Store;
use above::{Announced, Ending, Noted};
use carry::Carried;
use control::{Answer, Ask};
use keep::Counters;
use life::{Known, Phase};
use process::Process;
use upgrade::{Lost, Upgrading};

const SIGNALS: u64 = 0;
const NOTIFY: u64 = 1;
const CONTROL: u64 = 2;
const MAIN: u64 = 3;
const ABOVE: u64 = 4;
/// A process of before this one.
const PREVIOUS: u64 = 5;
/// What is added to a fetch's number, and to that of what is stored.
const FETCH: u64 = 1 << 62;
const STORED: u64 = 1 << 63;

/// How many messages are read in one turn, so that a flood of them does not keep the rest waiting.
const MESSAGES: usize = 256;

/// How many refusals are remembered for status.
const REFUSALS: usize = 8;

/// Everything but the control socket.
struct Core {
    options: Options,
    control: PathBuf,
    notify_path: PathBuf,
    /// What is run; an upgrade may have changed it since the start.
    command: Command,
    epoll: OwnedFd,
    signals: SignalFd,
    /// The signal mask and the soft limit on open files that this process was started with: they are the command's.
    signal_mask: SignalMask,
    open_files: u64,
    notify: NotifySocket,
    notify_id: u64,
    listening: Vec<Listening>,
    store: Store,
    store_max: u64,
    /// The next number of anything that is held; none is used twice.
    next_id: u64,
    /// The numbers that the two ends of each page of the vault are carried over with.
    page_ids: BTreeMap<u64, (u64, u64)>,
    fetches: BTreeMap<u64, Fetch>,
    /// Fetches that wait for others to receive what is on its way.
    retry_fetches: Option<Moment>,
    known: Known,
    main: Option<Process>,
    /// Tells the end of a main process that is not our child.
    main_pidfd: Option<OwnedFd>,
    phase: Phase,
    upgrade: Option<Upgrading>,
    lost: Option<Lost>,
    backoff: Backoff,
    counters: Counters,
    refused: VecDeque<String>,
    text: String,
    ended: Option<Ended>,
    answers: Vec<(ConnectionId, Answer)>,
    /// Children have ended, and are to be waited for.
    reap: bool,
    /// Some may be the control socket's own: only those that are known are waited for.
    reap_known_only: bool,
    queue: usize,
    strangers: Seldom,
    refusals: Seldom,
    complaints: Seldom,
    over: Option<u8>,
    above: Option<Above>,
    noted: Noted,
    announced: Announced,
    /// The vault lacks something until the one above reads, and messages wait for that; no longer than this.
    behind_until: Option<Moment>,
    impatient: bool,
    deaf: bool,
    ending: Option<Ending>,
    /// The vault is left as it is at the end: somebody may start this again.
    leaves: bool,
    /// A signal that is passed on at this time, unless the command shows that it has got it.
    put_off: Option<(i32, Moment)>,
}

/// A socket that the command gets from the start.
#[derive(Debug)]
struct Listening {
    id: u64,
    name: String,
    /// The option that asked for it; empty if somebody else holds it for the command.
    option: String,
    socket: OwnedFd,
}

/// Runs the command until there is nothing more to run, and returns the code to end with.
///
/// Takes charge of the whole process: all signals, all children, the limit on open files. It is to be called from the
/// only thread. Where this process was started by an upgrade, it does its part in that: goes on with what its predecessor
/// left, or answers whether it could.
///
/// # Errors
///
/// See [`RunError`]. Nothing is left running then that this has started, unless it was an upgrade in place that failed.
pub fn run(options: Options) -> Result<u8, RunError> {
    let control = control_path(&options)?;
    let signal_mask = signals::block().map_err(RunError::io("block signals"))?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| RunError::io("become a subreaper")(error.into()))?;
    let (open_files, _) =
        heirloom::descriptors::raise_limit().map_err(RunError::io("raise the limit on open files"))?;
    let config = Config { delegate: Delegate { upgrade: true, status: true }, ..Config::default() };
    match heirloom::start::<Ask>(&control, service(&control), config, Replace::Never)? {
        Start::Fresh(incumbent) => {
            let inherited =
                Inherited::take().map_err(RunError::io("take the descriptors that were passed"))?;
            let core = Core::fresh(options, control, signal_mask, open_files, inherited)?;
            let mut supervisor = Supervisor::new(core, incumbent)?;
            if let Err(failure) = supervisor.core.begin(Moment::now()) {
                supervisor.retire();
                return Err(RunError::Command { code: failure.code, message: failure.to_string() });
            }
            supervisor.serve()
        }
        Start::InPlace(taken) => {
            // The rest of what was taken is let go of here, not when all is over.
            let (bundle, incumbent) = {
                let taken = *taken;
                (taken.bundle, taken.incumbent)
            };
            let core = Core::carried(options, control, bundle)?;
            Supervisor::new(core, incumbent)?.serve()
        }
        Start::Preflight(preflight) => {
            let answered = match preflight.state::<Carried>() {
                Ok(Some(carried)) if carried.is_readable() => preflight.pass(),
                Ok(_) => preflight.refuse("what it would be handed is not the state of a heirloom run"),
                Err(error) => preflight.refuse(error),
            };
            answered.map(|()| 0).map_err(RunError::io("answer the preflight"))
        }
        Start::Successor(_) | Start::Older(_) => {
            Err(RunError::Carried("it was started to take over, which only works in place".into()))
        }
    }
}

fn control_path(options: &Options) -> Result<PathBuf, RunError> {
    if let Some(path) = &options.control {
        return Ok(path.clone());
    }
    let name = Path::new(&options.command.program).file_name().unwrap_or_default();
    Ok(default_path(&format!("run-{}", name.to_string_lossy()))?)
}

fn service(control: &Path) -> Service {
    let name = control.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Service::new(name).program("heirloom-run", env!("CARGO_PKG_VERSION"))
}

/// The core, and the control socket.
struct Supervisor {
    core: Core,
    incumbent: Incumbent<Ask>,
}

impl Supervisor {
    fn new(core: Core, mut incumbent: Incumbent<Ask>) -> Result<Supervisor, RunError> {
        // Its children cannot be handed to another process.
        let launch = heirloom::upgrade::Launch { in_place: true, ..heirloom::upgrade::Launch::current() };
        incumbent.set_launch(launch);
        let watch = |descriptor: &dyn std::os::fd::AsFd, token| {
            epoll::add(
                &core.epoll,
                descriptor.as_fd(),
                epoll::EventData::new_u64(token),
                epoll::EventFlags::IN,
            )
            .map_err(|error| RunError::io("wait for events")(error.into()))
        };
        watch(&core.signals, SIGNALS)?;
        watch(&core.notify, NOTIFY)?;
        watch(&incumbent, CONTROL)?;
        if let Some(above) = &core.above {
            watch(above, ABOVE)?;
        }
        Ok(Supervisor { core, incumbent })
    }

    fn serve(mut self) -> Result<u8, RunError> {
        // What ended while this process became another program is told by no signal that is sure to be left.
        self.core.reap = true;
        let mut events = Vec::with_capacity(256);
        let mut control_ready = true;
        loop {
            if control_ready || self.incumbent.deadline().is_some_and(|at| at <= Instant::now()) {
                self.hear_control();
            }
            if self.core.is_sweeping() {
                self.incumbent.withdraw(Instant::now(), "heirloom run ends");
            }
            self.core.reap_known_only = self.incumbent.takeover_running();
            self.core.catch_up();
            self.core.run_timers(Moment::now());
            self.core.report(Moment::now());
            self.answer();
            if let Some(code) = self.core.over {
                self.retire();
                return Ok(code);
            }
            control_ready = false;
            events.clear();
            let timeout = self.timeout().and_then(|timeout| timeout.try_into().ok());
            match epoll::wait(&self.core.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref())
            {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(RunError::io("wait for events")(error.into())),
            }
            for event in &events {
                match event.data.u64() {
                    CONTROL => control_ready = true,
                    token => self.core.handle(token, event.flags),
                }
            }
        }
    }

    /// Lets go of everything, and of what lies in the file system.
    fn retire(mut self) {
        self.core.clean_up();
        self.incumbent.retire();
    }

    /// How long nothing is to be done unless something happens.
    fn timeout(&self) -> Option<Duration> {
        let control = self.incumbent.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let now = Moment::now();
        let own = self.core.next_timer().map(|at| at.since(now));
        [control, own].into_iter().flatten().min()
    }
}

impl Core {
    fn handle(&mut self, token: u64, flags: epoll::EventFlags) {
        match token {
            SIGNALS => self.read_signals(),
            NOTIFY => self.read_messages(MESSAGES),
            MAIN => self.main_pidfd_ready(),
            ABOVE => {
                if let Some(above) = &mut self.above {
                    above.ready();
                }
            }
            PREVIOUS => self.previous_ended(Moment::now()),
            token if token & STORED != 0 => {
                if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                    self.hung_up(token & !STORED);
                }
            }
            token => self.continue_fetch(token & !FETCH, Moment::now()),
        }
    }

    /// What was put off until all events were looked at.
    fn catch_up(&mut self) {
        if self.reap {
            // Children may have sent messages before they ended; those count.
            self.read_messages(self.queue);
            self.reap_children();
        }
    }

    /// Lets go of what is held, and of what lies in the file system, unless the vault is left for another run.
    fn clean_up(&mut self) {
        self.announce(Announced::Stopping);
        let leaves = self.leaves && self.above.as_ref().is_some_and(Above::has_vault);
        self.store = Store::default();
        if leaves {
            tracing::info!("what is held is left with the supervisor above");
            return;
        }
        if let Some(above) = &mut self.above {
            above.empty();
        }
        self.listening.clear();
        let _ = std::fs::remove_file(path_beside(&self.control));
        for listen in &self.options.listen {
            listen.clean_up();
        }
    }
}
