//! The thread of a proxy that serves its control socket and hears its signals, beside those that relay.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use heirloom::notify::{Message, Notifier, watchdog_interval};
use heirloom::runtime::mio::timeout;
use heirloom::upgrade::Upgrade;
use heirloom::{Delegated, Incumbent, NoRequests, Outcome, Turn, courtesy};
use heirloom_proxy::Engine;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::exit::Exit;
use crate::failure::Failure;
use crate::reloads::Reloads;
use crate::signals::Signals;

const INCUMBENT: Token = Token(0);
const SIGNALS: Token = Token(1);
const STOPPING: &str = "the incumbent is stopping";
/// How long ended connections may take to be written to the access log when the process ends.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);
/// The same before the process becomes another program: it is said to have paused meanwhile.
const FLUSH_IN_PLACE_WITHIN: Duration = Duration::from_millis(100);
/// The same while nobody serves.
const FLUSH_FROZEN_WITHIN: Duration = Duration::from_millis(20);
/// How long in all the end of a process that was replaced waits for those that serve, on a busy machine.
const LEAVE_PATIENCE: Duration = Duration::from_millis(20);

pub(super) struct Server {
    poll: Poll,
    incumbent: Incumbent<NoRequests>,
    engine: Engine,
    signals: Signals,
    supervisor: Supervisor,
}

/// Whom to tell how this process is, if there is somebody.
struct Supervisor {
    notifier: Option<Notifier>,
    reloads: Reloads,
    watchdog: Option<(Duration, Instant)>,
}

/// The loop goes on, or the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Go,
    /// Ends; nobody serves any more.
    Stop,
    /// Ends; everything is somebody else's, and is closed plainly.
    Replaced,
}

impl Server {
    pub(super) fn new(
        mut incumbent: Incumbent<NoRequests>,
        engine: Engine,
        signals: Signals,
    ) -> Result<Server, Failure> {
        let poll = Poll::new().context("cannot wait for anything")?;
        let registry = poll.registry();
        registry.register(&mut incumbent, INCUMBENT, Interest::READABLE)?;
        for signal in [signals.stop(), signals.upgrade()] {
            registry.register(&mut SourceFd(&signal.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        }
        for listener in engine.report().listeners.iter().filter(|listener| listener.pool.is_some()) {
            tracing::info!(listener = %listener.name, address = %listener.address, "listening");
        }
        tracing::info!(control = %incumbent.path().display(), "serving");
        let supervisor = Supervisor::new(incumbent.path());
        Ok(Server { poll, incumbent, engine, signals, supervisor })
    }

    /// Serves until the proxy is replaced, stopped, or fails.
    pub(super) fn run(mut self) -> Result<Exit, Failure> {
        let next = self.serve();
        let Server { incumbent, mut engine, supervisor, .. } = self;
        match next {
            // Also after a failure everything may be somebody else's.
            Ok(Next::Replaced) | Err(_) => {
                courtesy::give_way_for(LEAVE_PATIENCE);
                engine.leave(FLUSH_WITHIN);
                courtesy::step_back();
                // The end of the process closes what is left in less time.
                std::mem::forget(engine);
            }
            Ok(_) => {
                supervisor.tell(Message::new().stopping());
                engine.stop(FLUSH_WITHIN);
            }
        }
        // Does nothing if somebody else serves by now.
        incumbent.retire();
        next.map(|_| Exit::Done)
    }

    fn serve(&mut self) -> Result<Next, Failure> {
        let mut events = Events::with_capacity(64);
        loop {
            self.wait(&mut events)?;
            self.engine.tick();
            let mut next = match events.iter().any(|event| event.token() == SIGNALS) {
                true => self.signalled(),
                false => Next::Go,
            };
            let due = self.incumbent.deadline().is_some_and(|at| at <= Instant::now());
            if next == Next::Go && (due || events.iter().any(|event| event.token() == INCUMBENT)) {
                next = self.answer()?;
            }
            if next != Next::Go {
                return Ok(next);
            }
            if !self.incumbent.is_being_replaced() {
                self.engine.reclaim();
            }
            self.supervisor.turn(&self.incumbent, &self.engine);
        }
    }

    fn wait(&mut self, events: &mut Events) -> Result<(), Failure> {
        let now = Instant::now();
        let timers = [Some(self.engine.next_tick()), self.supervisor.watchdog.map(|(_, at)| at)];
        let timers = timers.into_iter().flatten().map(|at| at.saturating_duration_since(now));
        let patience = timers.chain(timeout(&self.incumbent)).min();
        match self.poll.poll(events, patience) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                Err(anyhow!(error).context("cannot wait").into())
            }
            _ => Ok(()),
        }
    }

    /// Does what signals ask for.
    fn signalled(&mut self) -> Next {
        if self.signals.take_upgrade()
            && let Err(refusal) = self.incumbent.upgrade(Upgrade::default())
        {
            let generation = self.incumbent.generation();
            tracing::warn!(generation, reason = refusal.message, "no upgrade");
        }
        if self.signals.take_stop() {
            self.incumbent.withdraw(Instant::now(), STOPPING);
            return Next::Stop;
        }
        Next::Go
    }

    /// Answers at the control socket until there is nothing more to answer.
    fn answer(&mut self) -> Result<Next, Failure> {
        self.incumbent.set_item_count(self.engine.item_count());
        let generation = self.incumbent.generation();
        loop {
            match self.incumbent.turn(Instant::now()).context("the control socket fails")? {
                Turn::Idle => return Ok(Next::Go),
                Turn::Offer(offer) => {
                    let base = self.engine.offer();
                    if let Err(error) = offer.begin(base) {
                        tracing::error!("serving on: {error}");
                    }
                }
                Turn::Batch(batch) => batch.send(|id| self.engine.descriptor(id)),
                // A stop would be lost in an upgrade in place: the new program knows nothing of it.
                Turn::Freeze(freeze) if self.signals.stop_waits() => freeze.resume(STOPPING),
                Turn::Freeze(freeze) => {
                    let in_place = freeze.is_in_place();
                    if in_place {
                        // Most of it while the loops still run.
                        self.engine.flush_access_log(FLUSH_IN_PLACE_WITHIN);
                    }
                    courtesy::take_turns();
                    let mut frozen = self.engine.freeze();
                    if in_place {
                        frozen.write_access_log(FLUSH_FROZEN_WITHIN);
                    }
                    let delta = frozen.delta();
                    // From here to the outcome nothing is touched: the loops stand still.
                    let outcome = freeze.release(delta, |id| frozen.descriptor(id));
                    courtesy::give_way();
                    match outcome {
                        Ok(Outcome::Taken(by)) => {
                            tracing::info!(
                                peer_pid = by.pid,
                                generation,
                                items = by.items,
                                "replaced by {by}"
                            );
                            return Ok(Next::Replaced);
                        }
                        Ok(Outcome::Superseded(reason)) => {
                            let what = "another process holds the service lock, so that this one may not serve; the takeover ended";
                            return Err(Failure::new(Exit::Failed, anyhow!("{what} {reason}")));
                        }
                        Ok(Outcome::Resumed(reason)) => {
                            frozen.thaw();
                            tracing::warn!(generation, step = %reason.step, reason = %reason.cause, "serving on");
                        }
                        Err(error) => {
                            frozen.thaw();
                            tracing::error!("serving on: {error}");
                        }
                    }
                }
                Turn::Request(asked) => asked.refuse("a proxy has no requests of its own"),
                Turn::Quit(_) => return Ok(Next::Stop),
                Turn::Delegated(Delegated::Status(asked)) => {
                    let mut status = asked.status();
                    status.application = serde_json::to_value(self.engine.report()).ok();
                    asked.answer(status);
                }
                Turn::Delegated(Delegated::Upgrade(asked)) => asked.of_this_process(),
                Turn::Closed(_) => {}
            }
        }
    }
}

impl Supervisor {
    fn new(control: &Path) -> Supervisor {
        let notifier = Notifier::from_environment().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot speak to the supervisor");
            None
        });
        let watchdog = notifier.as_ref().and_then(|_| watchdog_interval());
        let supervisor = Supervisor {
            notifier,
            reloads: Reloads::default(),
            watchdog: watchdog.map(|every| (every, Instant::now())),
        };
        // `heirloom run` then starts the next one beside this one.
        supervisor.tell(Message::new().assign("X_HEIRLOOM_CONTROL", control.display()));
        supervisor.tell(Message::new().ready().main_pid(std::process::id()));
        supervisor
    }

    fn tell(&self, message: Message) {
        if let Some(notifier) = &self.notifier
            && let Err(error) = notifier.send(&message)
        {
            tracing::debug!(%error, "the supervisor was not told");
        }
    }

    fn turn<A>(&mut self, incumbent: &Incumbent<A>, engine: &Engine) {
        if self.notifier.is_none() {
            return;
        }
        for message in self.reloads.turn(incumbent) {
            let status = format!("connections: {}", engine.connections());
            self.tell(message.status(&self.reloads.status(&status)));
        }
        if let Some((every, at)) = &mut self.watchdog
            && *at <= Instant::now()
        {
            *at = Instant::now() + *every;
            self.tell(Message::new().watchdog());
        }
    }
}
