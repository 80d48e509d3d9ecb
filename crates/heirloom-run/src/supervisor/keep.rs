//! Keeping what the command stores: puts and removals, the limits on them, and who fetches it.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use super::{Core, FETCH, REFUSALS, STORED};
use crate::above::PAGE;
use crate::clock::Moment;
use crate::error::RunError;
use crate::fetch::{AGAIN, Fetch, Progress};
use crate::notify::message::Message;
use crate::start::LONGEST_NAMES;
use crate::store::check_name;

/// The name of what is stored under none, as in systemd.
const DEFAULT_NAME: &str = "stored";

/// How many descriptors are kept free for this process itself: connections at the control socket, what comes with one
/// message, and what starting a process takes.
const RESERVE: u64 = 420;

/// How many may fetch at a time.
const MOST_FETCHES: usize = 16;

/// What has happened since the first start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Counters {
    pub(super) puts: u64,
    pub(super) removes: u64,
    pub(super) duplicates: u64,
    pub(super) hung_up: u64,
    pub(super) refused: u64,
    pub(super) strangers: u64,
    pub(super) fetches: u64,
    pub(super) restarts: u64,
    pub(super) reaped: u64,
}

/// How many descriptors may be stored.
pub(super) fn store_max(wanted: Option<u64>, listening: usize, vault: bool) -> Result<u64, RunError> {
    let limit = heirloom::descriptors::limit();
    // Both ends of each, and they may be half empty.
    let pages = if vault { limit / (PAGE as u64 / 4) } else { 0 };
    let possible = limit.saturating_sub((RESERVE + pages + listening as u64).min(limit / 2));
    match wanted {
        Some(wanted) if wanted > possible => Err(RunError::StoreMax { wanted, limit, possible }),
        wanted => Ok(wanted.unwrap_or(possible)),
    }
}

impl Core {
    /// Holds the descriptors that came with a message, all or none of them.
    pub(super) fn put(&mut self, message: &Message, descriptors: Vec<OwnedFd>, sender: u32) {
        let name = message.name.as_deref().unwrap_or(DEFAULT_NAME);
        let count = descriptors.len();
        if count == 0 {
            return self.refuse(format!("pid {sender}: FDSTORE=1 came without a descriptor"));
        }
        if let Err(why) = check_name(name) {
            return self.refuse(format!("pid {sender}: {name:?} cannot be a name (FDNAME): it {why}"));
        }
        let held = self.store.len() as u64;
        if held + count as u64 > self.store_max {
            let limit = self.store_max;
            return self.refuse(format!(
                "pid {sender}: no room for {count} more under the name {name:?}: {held} are stored, at most {limit} may be (--store-max)"
            ));
        }
        let names = self.name_bytes() + count * (name.len() + 1);
        if names > LONGEST_NAMES && !self.known.fetches {
            return self.refuse(format!(
                "pid {sender}: with {name:?} the names would have {names} bytes together, and LISTEN_FDNAMES has at most \
                 {LONGEST_NAMES}: give shorter names, or let the program fetch (X_HEIRLOOM_FETCH=1)"
            ));
        }
        for descriptor in descriptors {
            self.hold(name, descriptor, sender, !message.unpolled);
        }
    }

    fn hold(&mut self, name: &str, descriptor: OwnedFd, sender: u32, polled: bool) {
        let number = self.next_id;
        if !self.store.put(number, name, descriptor, sender, polled) {
            self.counters.duplicates += 1;
            tracing::trace!(name, sender, "is stored already");
            return;
        }
        self.next_id += 1;
        self.counters.puts += 1;
        if polled {
            self.watch_for_hang_up(number);
        }
        self.keep_above(number);
    }

    /// Hears when the other end of what is stored hangs up. Not everything can be polled; that is simply kept.
    pub(super) fn watch_for_hang_up(&self, number: u64) {
        if let Some(held) = self.store.get(number) {
            let token = epoll::EventData::new_u64(STORED | number);
            let _ = epoll::add(&self.epoll, &held.descriptor, token, epoll::EventFlags::empty());
        }
    }

    pub(super) fn hung_up(&mut self, number: u64) {
        if let Some(held) = self.store.get(number) {
            tracing::debug!(name = &*held.name, "hung up, and is stored no longer");
            self.let_go(number);
            self.counters.hung_up += 1;
        }
    }

    /// Holds no longer what has this name.
    pub(super) fn remove(&mut self, name: Option<&str>, sender: u32) {
        let Some(name) = name else {
            return self.refuse(format!("pid {sender}: FDSTOREREMOVE=1 came without a name (FDNAME)"));
        };
        for number in self.store.named(name) {
            self.let_go(number);
            self.counters.removes += 1;
        }
    }

    fn let_go(&mut self, number: u64) {
        self.forget_above(number);
        if let Some(held) = self.store.remove(number)
            && held.polled
        {
            // Others hold duplicates, so that closing it would not end the watch.
            let _ = epoll::delete(&self.epoll, &held.descriptor);
        }
    }

    /// The length of all names in `LISTEN_FDNAMES`, each with a separator.
    fn name_bytes(&self) -> usize {
        self.store.name_bytes() + self.listening.iter().map(|socket| socket.name.len() + 1).sum::<usize>()
    }

    /// A program is told that it misbehaves: in the log, and in status.
    pub(super) fn refuse(&mut self, why: String) {
        self.counters.refused += 1;
        if let Some(unsaid) = self.refusals.now(Moment::now()) {
            let more =
                if unsaid > 0 { format!(" ({unsaid} more were refused before)") } else { String::new() };
            tracing::warn!("refused: {why}{more}");
        }
        if self.refused.len() == REFUSALS {
            self.refused.pop_front();
        }
        self.refused.push_back(why);
    }

    /// Begins to send all that is stored; gives how much that is, and the end of the channel for whoever asked.
    pub(super) fn begin_fetch(&mut self) -> Result<(usize, OwnedFd), String> {
        if self.fetches.len() >= MOST_FETCHES {
            return Err(format!("{MOST_FETCHES} fetch at the moment; try again later"));
        }
        let now = Moment::now();
        let held: Vec<_> = self.store.iter().map(|(_, held)| Rc::clone(held)).collect();
        let count = held.len();
        let (fetch, theirs) =
            Fetch::new(held, now).map_err(|error| format!("cannot make a channel: {error}"))?;
        let id = self.next_id;
        self.next_id += 1;
        let token = epoll::EventData::new_u64(FETCH | id);
        epoll::add(&self.epoll, &fetch, token, epoll::EventFlags::empty())
            .map_err(|error| format!("cannot wait for the channel: {error}"))?;
        self.fetches.insert(id, fetch);
        self.counters.fetches += 1;
        self.continue_fetch(id, now);
        Ok((count, theirs))
    }

    pub(super) fn continue_fetch(&mut self, id: u64, now: Moment) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        let interest = match fetch.go_on(now) {
            Progress::Full => epoll::EventFlags::OUT,
            Progress::InFlight => {
                self.retry_fetches = Some(now.after(AGAIN));
                epoll::EventFlags::empty()
            }
            Progress::Done => return self.end_fetch(id),
            Progress::Failed(why) => {
                tracing::warn!(why, "a fetch ended before it was complete");
                return self.end_fetch(id);
            }
        };
        let token = epoll::EventData::new_u64(FETCH | id);
        if let Err(error) = epoll::modify(&self.epoll, fetch.as_fd(), token, interest) {
            tracing::error!(%error, "cannot go on with a fetch");
            self.end_fetch(id);
        }
    }

    pub(super) fn end_fetch(&mut self, id: u64) {
        if let Some(fetch) = self.fetches.remove(&id) {
            let _ = epoll::delete(&self.epoll, &fetch);
        }
    }

    /// Drops those that read nothing, and tries again those that could not be sent to.
    pub(super) fn run_fetch_timers(&mut self, now: Moment) {
        let late: Vec<u64> =
            self.fetches.iter().filter(|(_, fetch)| fetch.until <= now).map(|(&id, _)| id).collect();
        for id in late {
            tracing::warn!("a fetcher reads nothing, and is dropped");
            self.end_fetch(id);
        }
        if self.retry_fetches.take_if(|at| *at <= now).is_some() {
            for id in self.fetches.keys().copied().collect::<Vec<_>>() {
                self.continue_fetch(id, now);
            }
        }
    }
}
