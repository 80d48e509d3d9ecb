//! What run carries over when it is upgraded in place: all that it holds, and what it knows of its children, which stay
//! its children over an execve.
//!
//! Times are CLOCK_MONOTONIC, so that timers go on. Options are the new command line's; the command is, too, unless an
//! upgrade has changed it since and the command line is the same as before.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use heirloom::codec::CodecError;
use heirloom::manifest::Base;
use heirloom::{Bundle, Cbor, Codec, Entry, ItemId, Kind};
use heirloom_sys::{SignalFd, SignalMask};
use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use super::keep::{Counters, store_max};
use super::life::{Known, Phase};
use super::process::Process;
use super::{Core, Listening, signals};
use crate::backoff::Backoff;
use crate::error::RunError;
use crate::exit::Ended;
use crate::notify::socket::{NotifySocket, longest_queue, path_beside};
use crate::options::{Command, Options};
use crate::seldom::Seldom;
use crate::store::Store;

/// The form of the state that this version writes and reads.
const FORM: u32 = 1;

/// The name of the notify socket among the items.
const NOTIFY_NAME: &str = "heirloom.notify";

/// The state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    form: u32,
    /// The command of the command line, and the one that is run.
    asked: Command,
    command: Command,
    main: Option<Process>,
    phase: Phase,
    known: Known,
    backoff: Backoff,
    counters: Counters,
    refused: VecDeque<String>,
    text: String,
    ended: Option<Ended>,
    signal_mask: u64,
    open_files: u64,
    notify: u64,
    /// The ids of the sockets that the command gets from the start; all other items are stored.
    listening: Vec<u64>,
}

impl Carried {
    /// Whether this version can go on with it.
    pub(super) fn is_readable(&self) -> bool {
        self.form == FORM
    }
}

/// What is known of something stored.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Stored {
    put_by: u32,
    polled: bool,
}

impl Core {
    /// A core that nothing runs under yet, with its sockets bound.
    pub(super) fn fresh(
        options: Options,
        control: PathBuf,
        signal_mask: SignalMask,
        open_files: u64,
    ) -> Result<Core, RunError> {
        let notify_path = path_beside(&control);
        heirloom::control::path::check_length(&notify_path)?;
        let notify = NotifySocket::bind(&notify_path)
            .map_err(|source| RunError::Notify { path: notify_path.clone(), source })?;
        let mut core = Core::bare(options, control, notify, signal_mask, open_files)?;
        core.notify_id = core.new_id();
        for listen in core.options.listen.clone() {
            match listen.bind() {
                Ok(socket) => {
                    let id = core.new_id();
                    core.listening.push(Listening { id, name: listen.name, socket });
                }
                Err(error) => {
                    let _ = std::fs::remove_file(&core.notify_path);
                    return Err(error.into());
                }
            }
        }
        Ok(core)
    }

    /// A core that goes on where another program in this process has stopped.
    pub(super) fn carried(options: Options, control: PathBuf, mut bundle: Bundle) -> Result<Core, RunError> {
        let wrong = |error: &dyn std::fmt::Display| RunError::Carried(error.to_string());
        let carried: Carried =
            bundle.state().map_err(|error| wrong(&error))?.ok_or_else(|| wrong(&"there is no state"))?;
        let mut take = |id: u64| {
            bundle.take_id::<OwnedFd>(ItemId(id)).map_err(|error| RunError::Carried(error.to_string()))
        };
        let notify = NotifySocket::adopt(take(carried.notify)?.descriptor);
        let mut listening = Vec::new();
        for &id in &carried.listening {
            let taken = take(id)?;
            listening.push(Listening { id, name: taken.name, socket: taken.descriptor });
        }
        let signal_mask = SignalMask(carried.signal_mask);
        let asked = options.command.clone();
        let mut core = Core::bare(options, control, notify, signal_mask, carried.open_files)?;
        core.notify_id = carried.notify;
        core.listening = listening;
        core.next_id = bundle.next_id().0;
        let ids: Vec<ItemId> = bundle.entries().map(|entry| entry.id).collect();
        for id in ids {
            let taken = bundle.take_id::<OwnedFd>(id).map_err(|error| wrong(&error))?;
            let stored: Stored = Cbor::decode(&taken.state).map_err(|error| wrong(&error))?;
            core.store.put(id.0, &taken.name, taken.descriptor, stored.put_by, stored.polled);
            if stored.polled {
                core.watch_for_hang_up(id.0);
            }
        }
        if asked == carried.asked {
            core.command = carried.command;
        }
        core.main = carried.main;
        core.phase = carried.phase;
        core.known = carried.known;
        core.backoff = carried.backoff;
        core.counters = carried.counters;
        core.refused = carried.refused;
        core.text = carried.text;
        core.ended = carried.ended;
        core.watch_main();
        tracing::info!(stored = core.store.len(), "upgraded in place");
        Ok(core)
    }

    fn bare(
        options: Options,
        control: PathBuf,
        notify: NotifySocket,
        signal_mask: SignalMask,
        open_files: u64,
    ) -> Result<Core, RunError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| RunError::io("wait for events")(error.into()))?;
        Ok(Core {
            store_max: store_max(options.store_max, options.listen.len())?,
            notify_path: path_beside(&control),
            command: options.command.clone(),
            known: Known { says_ready: options.expect_ready, ..Known::default() },
            options,
            control,
            epoll,
            signals: SignalFd::new(signals::watched()).map_err(RunError::io("watch for signals"))?,
            signal_mask,
            open_files,
            notify,
            notify_id: 0,
            listening: Vec::new(),
            store: Store::default(),
            next_id: ItemId::FIRST.0,
            fetches: BTreeMap::new(),
            retry_fetches: None,
            main: None,
            main_pidfd: None,
            phase: Phase::Up,
            upgrade: None,
            backoff: Backoff::default(),
            counters: Counters::default(),
            refused: VecDeque::new(),
            text: String::new(),
            ended: None,
            answers: Vec::new(),
            reap: false,
            reap_known_only: false,
            queue: longest_queue(),
            strangers: Seldom::default(),
            refusals: Seldom::default(),
            complaints: Seldom::default(),
            over: None,
        })
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Everything, written down.
    pub(super) fn base(&self) -> Result<Base, CodecError> {
        let carried = Carried {
            form: FORM,
            asked: self.options.command.clone(),
            command: self.command.clone(),
            main: self.main.clone(),
            phase: self.phase.clone(),
            known: self.known.clone(),
            backoff: self.backoff,
            counters: self.counters.clone(),
            refused: self.refused.clone(),
            text: self.text.clone(),
            ended: self.ended,
            signal_mask: self.signal_mask.0,
            open_files: self.open_files,
            notify: self.notify_id,
            listening: self.listening.iter().map(|socket| socket.id).collect(),
        };
        // What is stored may change its kind at any time, a socket that begins to listen for instance: it is anything.
        let entry =
            |id, name: &str, state| Entry { id: ItemId(id), name: name.into(), kind: Kind::Other, state };
        let mut items = vec![entry(self.notify_id, NOTIFY_NAME, Vec::new())];
        items.extend(self.listening.iter().map(|socket| entry(socket.id, &socket.name, Vec::new())));
        for (number, held) in self.store.iter() {
            let state = Cbor::encode(&Stored { put_by: held.put_by, polled: held.polled })?;
            items.push(entry(number, &held.name, state));
        }
        Ok(Base { state: Some(Cbor::encode(&carried)?), items, next_id: self.next_id, ..Base::default() })
    }

    /// Lends what has this id.
    pub(super) fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        if id.0 == self.notify_id {
            return Some(self.notify.as_fd());
        }
        let listening = self.listening.iter().find(|socket| socket.id == id.0);
        let listening = listening.map(|socket| socket.socket.as_fd());
        listening.or_else(|| self.store.get(id.0).map(|held| held.descriptor.as_fd()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Moment;

    #[test]
    fn everything_comes_back_as_it_was() {
        let now = Moment::now();
        let carried = Carried {
            form: FORM,
            asked: Command::new("a", ["b"]),
            command: Command::new("c", [""; 0]),
            main: Some(Process::new(7, now, Some(std::time::Duration::from_secs(2)))),
            phase: Phase::Stopping { kill_at: Some(now), then: super::super::life::Then::Fail },
            known: Known { says_ready: true, fetches: true, control: Some("/run/x".into()) },
            backoff: Backoff::default(),
            counters: Counters { puts: 3, ..Counters::default() },
            refused: VecDeque::from(["no".to_string()]),
            text: "fine".into(),
            ended: Some(Ended::Signal(9)),
            signal_mask: u64::MAX,
            open_files: 1024,
            notify: 1,
            listening: vec![2],
        };
        let back: Carried = Cbor::decode(&Cbor::encode(&carried).unwrap()).unwrap();
        assert_eq!(format!("{back:?}"), format!("{carried:?}"));
    }
}
