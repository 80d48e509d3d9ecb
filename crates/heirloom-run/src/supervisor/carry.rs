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

use super::above::{Announced, Ending, Left, Noted, unreadable};
use super::keep::{Counters, store_max};
use super::life::{Known, Phase};
use super::process::Process;
use super::{Core, Listening, signals};
use crate::above::{Above, CarriedPage, Inherited};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::error::RunError;
use crate::exit::Ended;
use crate::notify::socket::{NotifySocket, longest_queue, path_beside};
use crate::options::{Command, Options};
use crate::seldom::Seldom;
use crate::store::Store;

/// The form of the state that this version writes and reads.
const FORM: u32 = 2;

/// The oldest form that this version reads: without pages.
const OLDEST: u32 = 1;

/// The name of the notify socket among the items.
const NOTIFY_NAME: &str = "heirloom.notify";

/// That of both ends of a page of the vault.
const PAGE_NAME: &str = "heirloom.page";

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
    /// Of the pages of the vault: their ids, and those of the items that are their inboxes and pens.
    #[serde(default)]
    pages: Vec<(u64, u64, u64)>,
    #[serde(default)]
    announced: Announced,
    #[serde(default)]
    ending: Option<Ending>,
}

impl Carried {
    /// Whether this version can go on with it.
    pub(super) fn is_readable(&self) -> bool {
        (OLDEST..=FORM).contains(&self.form)
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
        inherited: Inherited,
    ) -> Result<Core, RunError> {
        let notify_path = path_beside(&control);
        heirloom::control::path::check_length(&notify_path)?;
        let mut above = Above::from_environment(options.store_above, Moment::now());
        let mut left = Left::default();
        if let Some(above) = &mut above {
            left = Left::of(above.restore(inherited.pages).map_err(|error| unreadable(&error))?);
            above.discard(&inherited.stale);
        }
        let (number, notify) = match Core::adopt_notify(&notify_path, left.notify.take()) {
            Some((number, notify)) => (Some(number), notify),
            None => {
                let bound = NotifySocket::bind(&notify_path);
                (None, bound.map_err(|source| RunError::Notify { path: notify_path, source })?)
            }
        };
        let mut listening = std::mem::take(&mut left.listening);
        let mut core = Core::bare(options, control, notify, signal_mask, open_files, above)?;
        core.take_left(left);
        core.notify_id = number.unwrap_or_else(|| core.new_id());
        if let Err(error) = core.listen(&mut listening) {
            let _ = std::fs::remove_file(&core.notify_path);
            return Err(error);
        }
        core.take_activated(inherited.sockets);
        core.reconcile_vault();
        Ok(core)
    }

    /// Has the sockets that the options ask for: those that a run before has left, where it is the same option.
    fn listen(&mut self, left: &mut Vec<(u64, String, OwnedFd)>) -> Result<(), RunError> {
        let listen = self.options.listen.clone();
        let mut adopted = Vec::new();
        for listen in &listen {
            let option = listen.to_string();
            let place = left.iter().position(|(_, was, _)| *was == option).filter(|_| listen.is_there());
            adopted.push(place.map(|place| left.remove(place)));
        }
        // What nobody wants any more may be in the way of what is to be bound.
        left.clear();
        for (listen, adopted) in listen.into_iter().zip(adopted) {
            let option = listen.to_string();
            let (id, socket) = match adopted {
                Some((id, _, socket)) => (id, socket),
                None => (self.new_id(), listen.bind()?),
            };
            self.listening.push(Listening { id, name: listen.name, option, socket });
        }
        Ok(())
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
            let option = String::from_utf8_lossy(&taken.state).into_owned();
            listening.push(Listening { id, name: taken.name, option, socket: taken.descriptor });
        }
        let mut pages = Vec::new();
        for &(id, inbox, pen) in &carried.pages {
            pages.push(CarriedPage { id, inbox: take(inbox)?.descriptor, pen: take(pen)?.descriptor });
        }
        let mut above = Above::from_environment(options.store_above, Moment::now());
        if let Some(above) = &mut above {
            above.adopt(pages).map_err(|error| unreadable(&error))?;
        }
        let signal_mask = SignalMask(carried.signal_mask);
        let asked = options.command.clone();
        let mut core = Core::bare(options, control, notify, signal_mask, carried.open_files, above)?;
        core.notify_id = carried.notify;
        core.listening = listening;
        core.next_id = bundle.next_id().0;
        core.page_ids = carried.pages.iter().map(|&(id, inbox, pen)| (id, (inbox, pen))).collect();
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
        core.announced = carried.announced;
        core.ending = carried.ending;
        core.watch_main();
        // Before anything is taken out: whenever a kill comes, the next run is to know the process and what was learned.
        core.note();
        core.reconcile_vault();
        tracing::info!(stored = core.store.len(), "upgraded in place");
        Ok(core)
    }

    fn bare(
        options: Options,
        control: PathBuf,
        mut notify: NotifySocket,
        signal_mask: SignalMask,
        open_files: u64,
        above: Option<Above>,
    ) -> Result<Core, RunError> {
        if above.as_ref().is_some_and(Above::has_vault) {
            notify.look_only().map_err(RunError::io("look at messages"))?;
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| RunError::io("wait for events")(error.into()))?;
        Ok(Core {
            store_max: store_max(
                options.store_max,
                options.listen.len(),
                above.as_ref().is_some_and(Above::has_vault),
            )?,
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
            page_ids: BTreeMap::new(),
            fetches: BTreeMap::new(),
            retry_fetches: None,
            main: None,
            main_pidfd: None,
            phase: Phase::Up,
            upgrade: None,
            lost: None,
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
            above,
            noted: Noted::default(),
            announced: Announced::default(),
            behind_until: None,
            impatient: false,
            deaf: false,
            ending: None,
            leaves: true,
            put_off: None,
        })
    }

    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Everything, written down.
    pub(super) fn base(&mut self) -> Result<Base, CodecError> {
        self.number_pages();
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
            pages: self.page_items().map(|(id, inbox, pen, ..)| (id, inbox, pen)).collect(),
            announced: self.announced,
            ending: self.ending,
        };
        // What is stored may change its kind at any time, a socket that begins to listen for instance: it is anything.
        let entry =
            |id, name: &str, state| Entry { id: ItemId(id), name: name.into(), kind: Kind::Other, state };
        let mut items = vec![entry(self.notify_id, NOTIFY_NAME, Vec::new())];
        items.extend(
            self.listening.iter().map(|socket| entry(socket.id, &socket.name, socket.option.clone().into())),
        );
        for (number, held) in self.store.iter() {
            let state = Cbor::encode(&Stored { put_by: held.put_by, polled: held.polled })?;
            items.push(entry(number, &held.name, state));
        }
        for (_, inbox, pen, ..) in self.page_items() {
            items.extend([inbox, pen].map(|id| entry(id, PAGE_NAME, Vec::new())));
        }
        items.sort_by_key(|item| item.id);
        let next_id = self.next_id;
        Ok(Base { state: Some(Cbor::encode(&carried)?), items, next_id, ..Base::default() })
    }

    /// Gives the pages of the vault ids as items, where they have none yet. They keep them: what is put between an offer and its
    /// delta has other ones.
    fn number_pages(&mut self) {
        let pages: Vec<u64> = self.above.iter().flat_map(Above::pages).map(|(id, ..)| id).collect();
        self.page_ids.retain(|id, _| pages.contains(id));
        for id in pages {
            if !self.page_ids.contains_key(&id) {
                let ends = (self.new_id(), self.new_id());
                self.page_ids.insert(id, ends);
            }
        }
    }

    /// The pages of the vault with the ids that their ends have as items: id, inbox's, pen's, and the two.
    fn page_items(&self) -> impl Iterator<Item = (u64, u64, u64, BorrowedFd<'_>, BorrowedFd<'_>)> {
        let pages = self.above.iter().flat_map(Above::pages);
        pages.filter_map(|(id, inbox, pen)| {
            let (inbox_id, pen_id) = *self.page_ids.get(&id)?;
            Some((id, inbox_id, pen_id, inbox, pen))
        })
    }

    /// Lends what has this id.
    pub(super) fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        if id.0 == self.notify_id {
            return Some(self.notify.as_fd());
        }
        let listening = self.listening.iter().find(|socket| socket.id == id.0);
        let listening = listening.map(|socket| socket.socket.as_fd());
        let stored = listening.or_else(|| self.store.get(id.0).map(|held| held.descriptor.as_fd()));
        stored.or_else(|| {
            self.page_items().find_map(|(_, inbox_id, pen_id, inbox, pen)| match id.0 {
                id if id == inbox_id => Some(inbox),
                id if id == pen_id => Some(pen),
                _ => None,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            pages: vec![(1, 8, 9)],
            announced: Announced::Reloading,
            ending: Some(Ending::Signal),
        };
        let back: Carried = Cbor::decode(&Cbor::encode(&carried).unwrap()).unwrap();
        assert_eq!(format!("{back:?}"), format!("{carried:?}"));
    }
}
