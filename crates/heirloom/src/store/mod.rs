//! The fd store: how connections outlive a process that nobody replaced, because it was killed.
//!
//! A supervisor (systemd, or `heirloom run`) keeps duplicates of the descriptors and gives them to the next process. A
//! [`Store`] tells it which, over `sd_notify(3)`; [`restore`] makes a [`Bundle`] of what the last process has left.
//!
//! What it promises: once [`Store::holds`] says so, an item is there in the next process, with the last state that was set,
//! whatever moment this one is killed at. Nothing here blocks: what the supervisor does not take at once waits inside. A
//! supervisor that has gone is said once, in the log, and then nothing is kept any more.
//!
//! An item is stored under the name `h` and its id: names have to be short (LISTEN_FDNAMES is one string of at most 128 KiB)
//! and unique. What else there is to know of it, its name, kind and state, is in the ledger: a [`Journal`] that is in the store
//! itself, as `hl`. A record without a descriptor is a put that did not happen, a descriptor without a record a removal that
//! did: so the record is written before the one and after the other.
//!
//! Rules for the program: only who serves writes to a store. Nothing is read from a connection before the store holds it. An
//! item is removed before its descriptor is closed, or the duplicate in the store keeps the connection open.

mod fetch;
mod inherited;
mod journal;
mod ledger;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::bundle::{Bundle, BundleError};
use crate::item::{Entry, ItemId};
use crate::limits::Limits;
use crate::manifest::Base;
use crate::notify::{Message, Notifier, NotifyError};
use ledger::{Ledger, LedgerError};

pub use fetch::{END, FetchError, FetchReply, FetchRequest, HEIRLOOM_STORE};
pub use inherited::{Activated, activated};
pub use journal::{Journal, JournalError};

/// The ledger's name in the store.
const LEDGER: &str = "hl";

/// The name under which a ledger is handed over in a takeover.
pub const LEDGER_NAME: &str = "heirloom.ledger";

/// What a process finds that starts while nobody serves.
///
/// ```
/// use heirloom::{Limits, store::{Restored, restore}};
///
/// // Nobody has started this process with anything.
/// let Restored { bundle, activated, store } = restore(None, &Limits::default())?;
/// assert!(bundle.is_empty() && activated.is_empty() && store.is_none());
/// # Ok::<(), heirloom::store::RestoreError>(())
/// ```
#[derive(Debug)]
pub struct Restored {
    /// What the last process has left; empty at the first start.
    pub bundle: Bundle,
    /// What else the supervisor gives: sockets that it listens at, and what was stored by others.
    pub activated: Vec<Activated>,
    /// The store, where there is a supervisor.
    pub store: Option<Store>,
}

/// Why what the last process has left cannot be had. It is still stored.
///
/// ```
/// use heirloom::store::RestoreError;
///
/// let error = RestoreError::NoLedger { items: 3 };
/// assert!(error.to_string().contains("3 descriptors"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The descriptors that this process was started with cannot be taken.
    #[error("cannot take the descriptors of LISTEN_FDS: {0}")]
    Inherited(io::Error),
    /// What `heirloom run` keeps cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// There are items without a ledger.
    #[error("{items} descriptors are stored, but not the ledger that says what they are")]
    NoLedger {
        /// How many there are.
        items: usize,
    },
    /// The ledger cannot be read.
    #[error("cannot read the ledger of the store: {0}")]
    Ledger(Box<dyn std::error::Error + Send + Sync>),
    /// What is stored is not what the ledger says.
    #[error("what is stored is not what its ledger says: {0}")]
    Bundle(#[from] BundleError),
}

/// Why an item is not in the store.
///
/// ```
/// use heirloom::store::StoreError;
///
/// let error = StoreError::Ledger(std::io::ErrorKind::StorageFull.into());
/// assert!(error.to_string().contains("ledger"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The ledger cannot be written.
    #[error("cannot write the ledger of the store: {0}")]
    Ledger(io::Error),
    /// A descriptor has to wait until the supervisor takes it, and cannot be duplicated for that.
    #[error("cannot duplicate a descriptor for the store: {0}")]
    Duplicate(io::Error),
    /// No such item was put.
    #[error("there is no item {0} in the store")]
    NoSuchId(ItemId),
}

/// Takes what the last process has left, and the sockets that a supervisor listens at. To be called once, by whoever serves:
/// after [`Start::Fresh`](crate::Start::Fresh), under the service lock.
///
/// `control` is where this program can be asked for a takeover: `heirloom run` upgrades it by one.
///
/// # Errors
///
/// See [`RestoreError`]. Everything is still stored; but a descriptor of LISTEN_FDS can be taken once only, so that it is for
/// the next process.
pub fn restore(control: Option<&Path>, limits: &Limits) -> Result<Restored, RestoreError> {
    let mut all: Vec<(String, OwnedFd)> = activated()
        .map_err(RestoreError::Inherited)?
        .into_iter()
        .map(|activated| (activated.name, activated.descriptor))
        .collect();
    // One that does not know yet that we fetch gives all of it at once.
    if let Some(keeper) = fetches()
        && !all.iter().any(|(name, _)| Name::parse(name).is_some())
    {
        all.extend(fetch::fetch(&keeper)?);
    }
    let (mut ledger, mut items, mut activated) = (None, BTreeMap::new(), Vec::new());
    for (name, descriptor) in all {
        match Name::parse(&name) {
            Some(Name::Ledger) => ledger = Some(descriptor),
            Some(Name::Item(id)) => drop(items.insert(id, descriptor)),
            None => activated.push(Activated { name, descriptor }),
        }
    }
    if ledger.is_none() && !items.is_empty() {
        return Err(RestoreError::NoLedger { items: items.len() });
    }
    let is_new = ledger.is_none();
    let ledger = match ledger {
        Some(file) => Ledger::open(file, limits),
        None => Ledger::create().map_err(|error| LedgerError::Journal(error.into())),
    };
    let mut ledger = ledger.map_err(|error| RestoreError::Ledger(error.into()))?;

    let listed: Vec<Entry> = ledger.entries().cloned().collect();
    let (stored, missing): (Vec<Entry>, Vec<Entry>) =
        listed.into_iter().partition(|entry| items.contains_key(&entry.id));
    for entry in &missing {
        tracing::debug!(item = %entry, "was not stored any more, or not yet");
        let _ = ledger.remove(entry.id);
    }
    let known: BTreeSet<ItemId> = stored.iter().map(|entry| entry.id).collect();
    let removed: Vec<ItemId> = items.keys().filter(|id| !known.contains(id)).copied().collect();
    items.retain(|id, _| known.contains(id));

    let base = Base {
        state: ledger.application().map(<[u8]>::to_vec),
        items: stored,
        next_id: ledger.next_id(),
        ..Base::default()
    };
    let bundle = Bundle::from_parts(base, items)?;
    let store = supervisor().map(|notifier| {
        let mut store = Store::new(notifier, ledger, control);
        if is_new {
            store.put_ledger();
        }
        store.held = known;
        for id in removed {
            store.send(Message::new().remove(&Name::Item(id).to_string()), None, None);
        }
        store
    });
    Ok(Restored { bundle, activated, store })
}

/// The way to keep things: see the [module](self).
///
/// ```
/// use heirloom::{Entry, ItemId, Kind, store::Store};
/// use std::net::TcpStream;
///
/// /// Lets nothing be read before it is safe.
/// fn accepted(store: &mut Store, id: ItemId, connection: &TcpStream) -> Result<bool, heirloom::store::StoreError> {
///     let entry = Entry { id, name: "client".into(), kind: Kind::TcpStream, state: vec![] };
///     store.put(entry, connection)?;
///     Ok(store.holds(id)) // if not: when the store is writable, `flush`, and look again
/// }
/// ```
#[derive(Debug)]
pub struct Store {
    notifier: Option<Notifier>,
    ledger: Ledger,
    held: BTreeSet<ItemId>,
    waiting: VecDeque<Waiting>,
}

/// What the supervisor has not taken yet.
#[derive(Debug)]
struct Waiting {
    message: Message,
    descriptor: Option<OwnedFd>,
    /// Which item is held once this is sent.
    puts: Option<ItemId>,
}

impl Store {
    /// The store of a process that has taken over, or was upgraded in place: it goes on with the incumbent's `ledger`, which was
    /// handed over as [`LEDGER_NAME`]. Where the incumbent had none, or another supervisor, everything is still to be put. `None`
    /// without a supervisor.
    ///
    /// # Errors
    ///
    /// The ledger cannot be read, or a new one not be made.
    pub fn resume(
        ledger: Option<OwnedFd>,
        control: Option<&Path>,
        limits: &Limits,
    ) -> Result<Option<Store>, RestoreError> {
        let Some(notifier) = supervisor() else { return Ok(None) };
        let ledger = ledger.map(|file| Ledger::open(file, limits)).transpose();
        let ledger = ledger.map_err(|error| RestoreError::Ledger(error.into()))?;
        let (ledger, is_new) = match ledger {
            Some(ledger) if ledger.may_be_of(&notifier.supervisor()) => (Ok(ledger), false),
            Some(of_another) => (of_another.anew(), true),
            None => (Ledger::create(), true),
        };
        let ledger =
            ledger.map_err(|error| RestoreError::Ledger(LedgerError::Journal(error.into()).into()))?;
        let mut store = Store::new(notifier, ledger, control);
        if is_new {
            // What another one says, if there is one, is not ours.
            store.send(Message::new().remove(LEDGER), None, None);
            store.put_ledger();
        }
        store.held = store.ledger.entries().map(|entry| entry.id).collect();
        Ok(Some(store))
    }

    fn new(notifier: Notifier, mut ledger: Ledger, control: Option<&Path>) -> Store {
        if let Err(error) = ledger.set_supervisor(&notifier.supervisor()) {
            tracing::warn!(%error, "cannot say in the ledger with whom everything is stored");
        }
        let (held, waiting) = (BTreeSet::new(), VecDeque::new());
        let mut store = Store { notifier: Some(notifier), ledger, held, waiting };
        let mut introduction = Message::new();
        if fetches().is_some() {
            introduction = introduction.assign("X_HEIRLOOM_FETCH", "1");
        }
        if let Some(control) = control {
            introduction = introduction.assign("X_HEIRLOOM_CONTROL", control.display());
        }
        if !introduction.as_str().is_empty() {
            store.send(introduction, None, None);
        }
        store
    }

    /// Keeps an item. Its id must not have been used for another one, ever.
    ///
    /// # Errors
    ///
    /// It is not kept, and serving it means that a kill ends it.
    pub fn put(&mut self, entry: Entry, descriptor: impl AsFd) -> Result<(), StoreError> {
        let id = entry.id;
        self.ledger.put(entry).map_err(StoreError::Ledger)?;
        self.send_with(Message::new().store(&Name::Item(id).to_string()), descriptor.as_fd(), Some(id))
    }

    /// Sets an item's state, which replaces the one before.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchId`] or [`StoreError::Ledger`]; the state is what it was.
    pub fn set_item_state(&mut self, id: ItemId, state: &[u8]) -> Result<(), StoreError> {
        match self.ledger.set_item_state(id, state).map_err(StoreError::Ledger)? {
            true => Ok(()),
            false => Err(StoreError::NoSuchId(id)),
        }
    }

    /// Sets the application's state, which replaces the one before.
    ///
    /// # Errors
    ///
    /// [`StoreError::Ledger`]; the state is what it was.
    pub fn set_state(&mut self, state: &[u8]) -> Result<(), StoreError> {
        self.ledger.set_application(state).map_err(StoreError::Ledger)
    }

    /// Keeps an item no longer. To be called before its descriptor is closed.
    ///
    /// # Errors
    ///
    /// [`StoreError::Ledger`]. The descriptor is not kept in any case.
    pub fn remove(&mut self, id: ItemId) -> Result<(), StoreError> {
        self.held.remove(&id);
        self.send(Message::new().remove(&Name::Item(id).to_string()), None, None);
        self.ledger.remove(id).map(drop).map_err(StoreError::Ledger)
    }

    /// Whether an item is kept: from then on it survives this process. Also when there is nobody any more who could keep it:
    /// that is no reason not to serve it.
    #[must_use]
    pub fn holds(&self, id: ItemId) -> bool {
        self.held.contains(&id) || self.notifier.is_none()
    }

    /// Whether there is still a supervisor that keeps what is put.
    #[must_use]
    pub fn has_supervisor(&self) -> bool {
        self.notifier.is_some()
    }

    /// Tells the supervisor something, after all that was put before.
    pub fn notify(&mut self, message: Message) {
        self.send(message, None, None);
    }

    /// Whether the supervisor has not taken everything yet. Then poll the store for writing, and [`flush`](Store::flush).
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends what waits, as far as the supervisor takes it.
    pub fn flush(&mut self) {
        while let Some(next) = self.waiting.pop_front() {
            let descriptor = next.descriptor.as_ref().map(AsFd::as_fd);
            if !self.try_send(&next.message, descriptor) {
                self.waiting.push_front(next);
                return;
            }
            self.held.extend(next.puts);
        }
    }

    /// Waits until the supervisor has taken everything, for this long at most: for a process that is about to end. Whether it has.
    pub fn settle(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            self.flush();
            let left = until.saturating_duration_since(Instant::now());
            if !self.is_waiting() || left.is_zero() {
                return !self.is_waiting();
            }
            let timeout = left.try_into().ok();
            // An error shows at the next flush.
            let _ = poll(&mut [PollFd::new(self, PollFlags::OUT)], timeout.as_ref());
        }
    }

    /// Has the supervisor close everything that was put, and waits for this long at most until it has taken that in: who serves now is
    /// an [outsider](crate::TakenBy::outsider), for whom the store is of no use.
    pub fn abandon(mut self, limit: Duration) {
        self.waiting.clear();
        for id in std::mem::take(&mut self.held) {
            self.send(Message::new().remove(&Name::Item(id).to_string()), None, None);
        }
        self.send(Message::new().remove(LEDGER), None, None);
        if !self.settle(limit) {
            tracing::warn!("the supervisor does not close what it keeps: it does not read what it is told");
        }
    }

    /// The ledger, to be handed over in a takeover as an item called [`LEDGER_NAME`].
    #[must_use]
    pub fn ledger(&self) -> BorrowedFd<'_> {
        self.ledger.as_fd()
    }

    fn put_ledger(&mut self) {
        let file = self.ledger.as_fd().try_clone_to_owned();
        match file {
            Ok(file) => self.send(Message::new().store(LEDGER), Some(file), None),
            Err(error) => {
                tracing::error!(%error, "cannot duplicate the ledger of the store");
                self.lose();
            }
        }
    }

    fn send_with(
        &mut self,
        message: Message,
        descriptor: BorrowedFd<'_>,
        puts: Option<ItemId>,
    ) -> Result<(), StoreError> {
        if self.waiting.is_empty() && self.try_send(&message, Some(descriptor)) {
            self.held.extend(puts);
            return Ok(());
        }
        let descriptor = Some(descriptor.try_clone_to_owned().map_err(StoreError::Duplicate)?);
        self.waiting.push_back(Waiting { message, descriptor, puts });
        Ok(())
    }

    fn send(&mut self, message: Message, descriptor: Option<OwnedFd>, puts: Option<ItemId>) {
        self.waiting.push_back(Waiting { message, descriptor, puts });
        self.flush();
    }

    /// Whether it is sent. To a supervisor that has gone everything is.
    fn try_send(&mut self, message: &Message, descriptor: Option<BorrowedFd<'_>>) -> bool {
        let Some(notifier) = &self.notifier else { return true };
        match notifier.send_with(message, descriptor.as_slice()) {
            Ok(()) => {}
            Err(NotifyError::Full) => return false,
            Err(error) => {
                tracing::error!(%error, "nobody keeps the descriptors any more: a kill of this process would end its connections");
                self.lose();
            }
        }
        true
    }

    fn lose(&mut self) {
        self.notifier = None;
    }
}

/// What to poll for writing while the store [waits](Store::is_waiting).
impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // Without a supervisor nothing waits, and it is not polled.
        self.notifier.as_ref().map_or(self.ledger.as_fd(), AsFd::as_fd)
    }
}

/// What is called what in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Ledger,
    Item(ItemId),
}

impl Name {
    /// `None`: it is not ours.
    fn parse(name: &str) -> Option<Name> {
        if name == LEDGER {
            return Some(Name::Ledger);
        }
        let id: u64 = name.strip_prefix('h')?.parse().ok()?;
        let parsed = Name::Item(ItemId(id));
        (parsed.to_string() == name).then_some(parsed)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Name::Ledger => f.write_str(LEDGER),
            Name::Item(id) => write!(f, "h{id}"),
        }
    }
}

/// The supervisor, if it can be reached: a program serves without one, too.
fn supervisor() -> Option<Notifier> {
    Notifier::from_environment().unwrap_or_else(|error| {
        tracing::warn!(%error, "serving without a store");
        None
    })
}

/// The control socket of the `heirloom run` that keeps everything, if that is who does.
fn fetches() -> Option<OsString> {
    std::env::var_os(HEIRLOOM_STORE).filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::descriptors::{Wait, receive_with};
    use crate::kind::Kind;

    /// A store, and the supervisor's end.
    fn store() -> (tempfile::TempDir, UnixDatagram, Store) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(path.as_os_str()).unwrap();
        let store = Store::new(notifier, Ledger::create().unwrap(), Some("/run/x.sock".as_ref()));
        (directory, socket, store)
    }

    fn entry(id: u64) -> Entry {
        Entry { id: ItemId(id), name: "client".into(), kind: Kind::PipeReader, state: vec![] }
    }

    fn next(socket: &UnixDatagram) -> Option<(String, usize)> {
        let mut buffer = [0; 1000];
        let received = receive_with(socket, &mut buffer, Wait::DontWait).ok()?;
        Some((String::from_utf8_lossy(&buffer[..received.bytes]).into_owned(), received.descriptors.len()))
    }

    #[test]
    fn who_ends_waits_for_a_supervisor_that_reads_and_not_for_ever_for_another() {
        let (_directory, socket, mut store) = store();
        let (reader, _writer) = io::pipe().unwrap();
        let mut id = 0;
        while !store.is_waiting() {
            id += 1;
            store.put(entry(id), &reader).unwrap();
        }
        assert!(!store.settle(Duration::from_millis(1)) && store.has_supervisor());
        let (held, waits) = (ItemId(id - 1), ItemId(id));
        assert!(store.holds(held) && !store.holds(waits));
        let reading = std::thread::spawn(move || {
            let mut told = Vec::new();
            while told.last().is_none_or(|last: &String| !last.contains("FDSTOREREMOVE=1\nFDNAME=hl\n")) {
                told.extend(next(&socket).map(|(message, _)| message));
            }
            told
        });
        assert!(store.settle(Duration::from_secs(60)) && store.holds(waits));
        store.abandon(Duration::from_secs(60));
        let told = reading.join().unwrap();
        for id in 1..=id {
            assert!(told.contains(&format!("FDSTOREREMOVE=1\nFDNAME=h{id}\n")), "{id}");
        }
    }

    #[test]
    fn what_the_supervisor_does_not_take_waits_in_order() {
        let (_directory, socket, mut store) = store();
        let (reader, _writer) = io::pipe().unwrap();
        let mut id = 0;
        while !store.is_waiting() {
            id += 1;
            store.put(entry(id), &reader).unwrap();
            assert_eq!(store.holds(ItemId(id)), !store.is_waiting());
        }
        store.remove(ItemId(1)).unwrap();
        assert!(!store.holds(ItemId(1)));
        let mut expected = vec![("X_HEIRLOOM_CONTROL=/run/x.sock\n".to_owned(), 0)];
        expected.extend((1..=id).map(|id| (format!("FDSTORE=1\nFDNAME=h{id}\nFDPOLL=0\n"), 1)));
        expected.push(("FDSTOREREMOVE=1\nFDNAME=h1\n".to_owned(), 0));
        let mut came = Vec::new();
        while came.len() < expected.len() {
            came.extend(next(&socket));
            store.flush();
        }
        assert_eq!(came, expected);
        assert!(!store.is_waiting() && store.holds(ItemId(id)));
    }

    #[test]
    fn without_a_supervisor_the_program_goes_on() {
        let (_directory, socket, mut store) = store();
        let (reader, _writer) = io::pipe().unwrap();
        drop(socket);
        store.put(entry(1), &reader).unwrap();
        assert!(store.holds(ItemId(1)) && !store.is_waiting());
        store.set_item_state(ItemId(1), b"state").unwrap();
        store.remove(ItemId(1)).unwrap();
        assert!(matches!(store.set_item_state(ItemId(1), b""), Err(StoreError::NoSuchId(ItemId(1)))));
    }

    #[test]
    fn names_are_ours_only_if_we_would_write_them_so() {
        assert_eq!(Name::parse("hl"), Some(Name::Ledger));
        assert_eq!(Name::parse("h17"), Some(Name::Item(ItemId(17))));
        for other in ["", "h", "h+1", "h01", "h-1", "listen", "H1", "h1 ", "h99999999999999999999"] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
