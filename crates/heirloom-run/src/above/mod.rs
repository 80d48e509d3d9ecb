//! The supervisor above this one, if there is one: systemd, or another `heirloom run`. What it is told, and the *vault*, which
//! is what it keeps so that what is held here survives a SIGKILL of this process.
//!
//! Descriptors are not put there one by one: systemd compares each with all that it has, and gives all their names in one string.
//! They are packed. A [`page`] is a UNIX SEQPACKET pair in whose queue descriptors are in flight, one or many a message. Its
//! receiving end, the *inbox*, is one descriptor, and that is what the one above stores. This process keeps duplicates of both
//! ends: it writes to a page, and takes out of it, without a word to the one above. The sending end, the *pen*, is itself in
//! flight in the page, so that the next process can go on with a page as it is.
//!
//! # What always holds
//!
//! Let an entry be anything that is held here, and let its page be in the store above.
//!
//! - **An entry that is in the vault is in a page at every moment**, from the sendmsg(2) that put it there until it is
//!   forgotten. A page is a queue, from which only the oldest message can be taken: what comes before a forgotten entry is
//!   appended to a page again (as is the pen, to its own) before anything is taken out. So an entry may be in two pages, or twice
//!   in one; numbers, of which none is used twice, tell.
//! - **A forgotten entry is in no page when [`settle`](Above::settle) returns**: no duplicate lingers in flight that would keep a
//!   connection open. Messages that are taken out are let go of by the kernel then and there; the one above need not do anything.
//! - **A page is written to only when the message that stores it has been sent**, and whoever waits for a barrier waits for that
//!   ([`is_behind`](Above::is_behind)).
//! - **A restore takes nothing out**: it looks (MSG_PEEK), and gets duplicates.
//!
//! An entry for which there is no page (the store above is full, or too many descriptors are in flight for an unprivileged user)
//! is *missing*: it is held here all the same, and put when there is room. Where there is no room, what is to be appended
//! again is missing, too, from the moment in which it is taken out until it is put again: the only exception to the first rule.
//!
//! Nothing here waits, and nothing of it can make this process fail: a supervisor that does not read, or is gone, is said
//! once in the log.

mod flight;
mod inherited;
mod page;
mod record;
mod vault;
mod voice;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use heirloom::notify::{self, Message};
use rustix::event::epoll;

use crate::clock::Moment;
use crate::options::StoreAbove;

pub(crate) use inherited::{Inherited, StoredPage};
pub(crate) use page::{CAPACITY as PAGE, PageError};
pub(crate) use record::{Lent, Record, Role};
use vault::Vault;
pub(crate) use vault::{CarriedPage, Holder};
use voice::Voice;

/// The variable in which a supervisor says how many descriptors it stores at most.
const FDSTORE: &str = "FDSTORE";

/// The variable by which it says that it is a `heirloom run`.
const HEIRLOOM_STORE: &str = "HEIRLOOM_STORE";

/// Between two texts that are told, at least.
const TEXT_PAUSE: Duration = Duration::from_millis(200);

/// Between two looks at the limit on what is in flight.
const LIMIT_PAUSE: Duration = Duration::from_secs(1);

/// What the event loop is told is ready: the voice, or a page's trial, by its id.
const VOICE: u64 = u64::MAX;

/// The supervisor above.
#[derive(Debug)]
pub(crate) struct Above {
    voice: Voice,
    vault: Option<Vault>,
    /// What is waited for, as one descriptor.
    epoll: OwnedFd,
    voice_waits: bool,
    watchdog: Option<Watchdog>,
    text: String,
    next_text: Option<Moment>,
    /// Whose limit was looked at, and when it may be looked at again.
    limit_of: Option<u32>,
    next_limit: Option<Moment>,
}

#[derive(Debug)]
struct Watchdog {
    every: Duration,
    next: Moment,
}

impl Above {
    /// The supervisor that this process was started by, if it has one that wants to be told.
    pub(crate) fn from_environment(store: StoreAbove, now: Moment) -> Option<Above> {
        let voice = Voice::from_environment()?;
        let none = std::env::var(FDSTORE).is_ok_and(|limit| limit == "0");
        let vault = (store == StoreAbove::Auto && !none).then(Vault::default);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
        let waits = epoll::EventData::new_u64(VOICE);
        epoll::add(&epoll, &voice, waits, epoll::EventFlags::empty()).ok()?;
        // Twice as often as is asked for.
        let watchdog = notify::watchdog_interval().map(|every| Watchdog { every: every / 2, next: now });
        let mut above = Above {
            voice,
            vault,
            epoll,
            voice_waits: false,
            watchdog,
            text: String::new(),
            next_text: None,
            limit_of: None,
            next_limit: None,
        };
        if let Some(vault) = &mut above.vault {
            vault.limit(flight::most(None));
        }
        Some(above)
    }

    /// Whether a signal that ends this process has probably been sent to the command as well: systemd does so, unless the
    /// unit says `KillMode=mixed`.
    pub(crate) fn signals_everybody(&self) -> bool {
        std::env::var_os(HEIRLOOM_STORE).is_none()
    }

    /// Says something that is no more than a message.
    pub(crate) fn say(&mut self, message: &Message) {
        self.voice.say(message, &[]);
    }

    /// Says what this process does, when it has changed, and not too often.
    pub(crate) fn say_text(&mut self, text: String, now: Moment) {
        if self.text == text || self.next_text.is_some_and(|at| now < at) || !self.voice.is_idle() {
            return;
        }
        self.voice.say(&Message::new().status(&text), &[]);
        self.text = text;
        self.next_text = Some(now.after(TEXT_PAUSE));
    }

    /// Does what is due.
    pub(crate) fn run_timers(&mut self, now: Moment) {
        self.next_text.take_if(|at| *at <= now);
        if let Some(watchdog) = &mut self.watchdog
            && watchdog.next <= now
        {
            watchdog.next = now.after(watchdog.every);
            // What waits to be said is a sign of life enough, once it can be.
            if self.voice.is_idle() {
                self.voice.say(&Message::new().watchdog(), &[]);
            }
        }
    }

    /// When there is something to do, whatever happens.
    pub(crate) fn next_timer(&self) -> Option<Moment> {
        let watchdog = self.watchdog.as_ref().map(|watchdog| watchdog.next);
        [watchdog, self.next_text].into_iter().flatten().min()
    }

    /// Does what the events are about that made its descriptor readable.
    pub(crate) fn ready(&mut self) {
        self.voice.flush();
        if let Some(vault) = &mut self.vault {
            vault.look_at_trials(&mut self.voice);
        }
    }

    /// Has the event loop woken for what is waited for by now.
    pub(crate) fn watch(&mut self) {
        let waits = !self.voice.is_idle();
        if waits != self.voice_waits {
            let interest = if waits { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            if epoll::modify(&self.epoll, &self.voice, epoll::EventData::new_u64(VOICE), interest).is_ok() {
                self.voice_waits = waits;
            }
        }
        for (id, barrier) in self.vault.iter_mut().flat_map(Vault::new_trials) {
            // Only its hanging up is waited for, which is always told; closing it ends the watch.
            let _ =
                epoll::add(&self.epoll, barrier, epoll::EventData::new_u64(id), epoll::EventFlags::empty());
        }
    }

    /// Finds out how much may be in the vault while this is the command's process, if it would be more than it was.
    pub(crate) fn look_at_limit(&mut self, command: Option<u32>, now: Moment) {
        let Some(vault) = &mut self.vault else { return };
        let is_new = self.limit_of != command;
        if is_new || vault.is_limited() && self.next_limit.is_none_or(|at| at <= now) {
            self.limit_of = command;
            self.next_limit = Some(now.after(LIMIT_PAUSE));
            vault.limit(flight::most(command));
        }
    }

    /// Whether there is a vault, full or not.
    pub(crate) fn has_vault(&self) -> bool {
        self.vault.as_ref().is_some_and(|vault| !vault.is_refused())
    }

    /// Goes on with the pages of the process before, and gives what is in them, in the order of the numbers.
    pub(crate) fn restore(
        &mut self,
        pages: Vec<StoredPage>,
    ) -> Result<Vec<(Record<'static>, OwnedFd)>, PageError> {
        match &mut self.vault {
            Some(vault) => vault.restore(pages),
            None => {
                for page in pages {
                    self.voice.say(&Message::new().remove(&page.name()), &[]);
                }
                Ok(Vec::new())
            }
        }
    }

    /// Removes what a process before has left above beside its pages.
    pub(crate) fn discard(&mut self, names: &[String]) {
        for name in names {
            self.voice.say(&Message::new().remove(name), &[]);
        }
    }

    /// Goes on with the pages that were carried over an upgrade in place.
    pub(crate) fn adopt(&mut self, pages: Vec<CarriedPage>) -> Result<(), PageError> {
        match &mut self.vault {
            Some(vault) => vault.adopt(pages),
            None => {
                for page in pages {
                    self.voice.say(&Message::new().remove(&page.name()), &[]);
                }
                Ok(())
            }
        }
    }

    /// Makes ready for an upgrade in place.
    pub(crate) fn pause(&mut self) {
        if let Some(vault) = &mut self.vault {
            vault.end_trials(&mut self.voice);
        }
    }

    /// The pages, to be carried over: id, inbox and pen.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.vault.iter().flat_map(Vault::pages)
    }

    /// Makes the vault keep what `holder` has, and nothing else.
    pub(crate) fn reconcile(&mut self, numbers: &[u64], holder: &impl Holder) {
        if let Some(vault) = &mut self.vault {
            vault.reconcile(numbers);
            vault.settle(holder, &mut self.voice);
        }
    }

    /// Puts an entry into the vault.
    pub(crate) fn keep(&mut self, lent: &Lent<'_>) {
        if let Some(vault) = &mut self.vault {
            vault.keep(lent, &mut self.voice);
        }
    }

    /// An entry is not to be in the vault any longer; [`settle`](Above::settle) sees to that.
    pub(crate) fn forget(&mut self, number: u64) {
        if let Some(vault) = &mut self.vault {
            vault.forget(number);
        }
    }

    /// Takes out what was forgotten, and puts what was missing if there is room.
    pub(crate) fn settle(&mut self, holder: &impl Holder) {
        if let Some(vault) = &mut self.vault {
            vault.settle(holder, &mut self.voice);
        }
    }

    /// Whether something is not in the vault yet that will be when the one above has read what it is sent.
    pub(crate) fn is_behind(&self) -> bool {
        self.vault.as_ref().is_some_and(Vault::is_behind)
    }

    /// Whether this entry is in the vault.
    pub(crate) fn keeps(&self, number: u64) -> bool {
        self.vault.as_ref().is_some_and(|vault| vault.keeps(number))
    }

    /// Takes everything out of the vault: nothing is to come back.
    pub(crate) fn empty(&mut self) {
        if let Some(vault) = &mut self.vault {
            vault.empty(&mut self.voice);
        }
    }
}

impl AsFd for Above {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
