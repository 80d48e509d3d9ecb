//! All that a server serves: the door, everybody in the room, and what is kept of both in a store.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, anyhow};
use heirloom::manifest::Base;
use heirloom::store::{Activated, LEDGER_NAME, Restored, Store, restore};
use heirloom::{Bundle, Cbor, Codec, CodecError, Incumbent, ItemId, Kind, TakenBy};
use mio::{Poll, Registry, Token};
use serde::{Deserialize, Serialize};

use super::connection::{reset, token};
use super::door::Door;
use super::handover::{self, Ahead, JOURNAL_NAME, LISTENER_NAME};
use super::ids::Ids;
use super::journal::RoomJournal;
use super::keeper::Keeper;
use super::recovery::recover;
use super::switchboard::Switchboard;

/// What it means when nothing is in a store.
const UNKEPT: &str = "a kill of this process ends all connections";

/// See the [module](self).
pub(super) struct House {
    pub(super) listener: ItemId,
    pub(super) door: Door,
    pub(super) switchboard: Switchboard,
    ids: Ids,
    /// Where there is a supervisor.
    keeper: Option<Keeper>,
}

/// How one comes to it.
impl House {
    /// With what a store has kept of the last process; where there is nothing, without clients, at the first of these addresses
    /// that is free.
    pub(super) fn restored(
        control: &Path,
        service: &str,
        addresses: &[SocketAddr],
        backlog: usize,
    ) -> anyhow::Result<(Poll, House)> {
        let Restored { mut bundle, activated, mut store } = restore(Some(control), &handover::limits())
            .context("cannot go on with what is in the store; it is still there")?;
        let mut ids = Ids::from(bundle.next_id());
        if Owner::of(&bundle).is_another_than(service) {
            tracing::warn!("what is in the store is of another service: its connections are reset");
            handover::take_stored(&mut bundle)?.values().for_each(|stored| reset(&stored.socket));
            close_rest(std::mem::take(&mut bundle), store.as_mut());
        }
        let kept = bundle.take_all::<TcpListener>(LISTENER_NAME).pop();
        let activated = activation(activated);
        // The supervisor's own need not be kept.
        let keeps_listener = activated.is_none();
        let (listener, socket) = match (activated, kept) {
            (Some(activated), kept) => {
                if let (Some(item), Some(store)) = (kept, &mut store) {
                    store.remove(item.id)?;
                }
                (ids.take()?, activated)
            }
            (None, Some(item)) => (item.id, item.descriptor),
            (None, None) => (ids.take()?, bind(addresses)?),
        };
        socket.set_nonblocking(true)?;
        let poll = Poll::new()?;
        let door = Door::new(socket);
        door.register(poll.registry(), token(listener))?;

        let (journal, file) =
            bundle.take_all::<OwnedFd>(JOURNAL_NAME).pop().map(|item| (item.id, item.descriptor)).unzip();
        let stored = handover::take_stored(&mut bundle)?;
        close_rest(bundle, store.as_mut());
        let switchboard = recover(stored, file, ids.next(), poll.registry().try_clone()?, backlog)?;
        let mut house = House { listener, door, switchboard, ids, keeper: None };
        if journal.is_some() {
            tracing::info!(clients = house.clients(), "going on where the last process ended");
        }
        if let Some(store) = store {
            house.keep(store, service, journal, keeps_listener);
        }
        Ok((poll, house))
    }

    /// With what was taken over, whatever of it was registered ahead. Without its store, if that fails: everything is this
    /// process's own by now.
    pub(super) fn resume<A>(
        mut bundle: Bundle,
        service: &str,
        incumbent: &Incumbent<A>,
        ahead: Ahead,
        backlog: usize,
    ) -> anyhow::Result<(Poll, House)> {
        let ids = Ids::from(bundle.next_id());
        let ledger = bundle.take_all::<OwnedFd>(LEDGER_NAME).pop().map(|item| item.descriptor);
        let had_store = ledger.is_some();
        let journal = bundle.take_all::<OwnedFd>(JOURNAL_NAME).pop();
        let store =
            Store::resume(ledger, Some(incumbent.path()), &handover::limits()).unwrap_or_else(|error| {
                tracing::error!(%error, "cannot go on with the store");
                None
            });
        if had_store && store.is_none() {
            tracing::warn!("the incumbent had a store, and there is none here: {UNKEPT}");
        }
        let (poll, listener, door, switchboard) =
            handover::resume(&mut bundle, incumbent, ahead, backlog, store.is_some())?;
        close_rest(bundle, None);
        let mut house = House { listener, door, switchboard, ids, keeper: None };
        if let Some(mut store) = store {
            let journal = journal.and_then(|item| match house.go_on_in(item.descriptor) {
                Ok(()) => Some(item.id),
                Err(error) => {
                    tracing::error!("cannot go on with the journal, and begins another: {error:#}");
                    let _ = store.remove(item.id);
                    None
                }
            });
            house.keep(store, service, journal, true);
        }
        Ok((poll, house))
    }

    /// Goes on in a journal, the records of which are the incumbent's.
    fn go_on_in(&mut self, journal: OwnedFd) -> anyhow::Result<()> {
        let (journal, _) = RoomJournal::open(journal)?;
        Ok(self.switchboard.write_down(journal)?)
    }

    /// Begins to keep everything in a store that is not in it yet, with a new journal if there is none.
    fn keep(&mut self, mut store: Store, service: &str, journal: Option<ItemId>, with_listener: bool) {
        let owner = Owner { service: service.into() };
        if let Err(error) = owner.write(&mut store) {
            tracing::error!("cannot say in the store whose it is: {error:#}");
        }
        let begun = match self.switchboard.journal() {
            Some(_) => Ok(()),
            None => RoomJournal::create().and_then(|journal| self.switchboard.write_down(journal)),
        };
        let listener = with_listener.then(|| (self.listener, self.door.descriptor()));
        let kept =
            begun.and_then(|()| Keeper::new(store, &mut self.ids, journal, listener, &self.switchboard));
        match kept {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(error) => tracing::error!(%error, "cannot keep a journal: {UNKEPT}"),
        }
    }
}

/// How it is served.
impl House {
    /// Lets in who waits, hears who has something to say, and sends.
    pub(super) fn work(&mut self, now: Instant, is_open: bool) {
        let House { door, switchboard, ids, keeper, .. } = self;
        if is_open {
            door.accept(now, |socket, address| {
                let entered = ids.take().and_then(|id| match keeper {
                    Some(keeper) => {
                        keeper.receive(id, socket, address);
                        Ok(())
                    }
                    None => switchboard.join(id, socket, address),
                });
                if let Err(error) = entered {
                    tracing::warn!(%error, "cannot let a client in");
                }
            });
        }
        if let Some(keeper) = keeper {
            keeper.admit(switchboard);
        }
        switchboard.turn(now);
        if let Some(keeper) = keeper {
            keeper.turn(now, switchboard);
        }
    }

    /// Whether there is something to do at once.
    pub(super) fn has_more(&self) -> bool {
        self.switchboard.has_more() || self.door.is_ready()
    }

    /// When there is something to do though nothing has happened.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let keeper = self.keeper.as_ref().and_then(|keeper| keeper.deadline(self.clients()));
        [self.door.deadline(), self.switchboard.deadline(), keeper].into_iter().flatten().min()
    }

    /// Has the poller tell when the store takes more, if it does not take everything now.
    pub(super) fn wait_for_store(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        self.keeper.as_mut().map_or(Ok(()), |keeper| keeper.wait(registry, token))
    }

    /// Whether the store has not taken everything. A successor would not know of what waits.
    pub(super) fn waits_for_store(&self) -> bool {
        self.keeper.as_ref().is_some_and(Keeper::is_waiting)
    }

    /// This process serves.
    pub(super) fn ready(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.ready();
        }
    }

    /// Another process serves.
    pub(super) fn replaced(&mut self, by: &TakenBy) {
        if let Some(keeper) = self.keeper.take() {
            keeper.replaced(by);
        }
    }

    /// Nobody is let in or heard any more.
    pub(super) fn close(&mut self, registry: &Registry) {
        self.door.close(registry);
        self.switchboard.close();
        if let Some(keeper) = &mut self.keeper {
            keeper.close();
        }
    }

    /// Whether a store has everything, so that the next process can go on with it.
    pub(super) fn is_kept(&self) -> bool {
        self.switchboard.journal().is_some() && self.keeper.as_ref().is_some_and(Keeper::is_left)
    }

    /// Leaves everything to the next process, as a kill would: no connection is ended.
    pub(super) fn leave(&mut self) {
        let (clients, unsent) = (self.clients(), self.switchboard.unsent());
        tracing::info!(clients, unsent, "stopping; everything is left in the store");
        if let Some(keeper) = &mut self.keeper {
            keeper.leave();
        }
    }

    /// Tells the supervisor of takeovers what is to be told.
    pub(super) fn tell<A>(&mut self, incumbent: &Incumbent<A>) {
        let clients = self.clients();
        if let Some(keeper) = &mut self.keeper {
            keeper.tell(incumbent, clients);
        }
    }

    /// Ends every connection, for good.
    pub(super) fn end(&mut self) {
        self.switchboard.end();
        if let Some(keeper) = &mut self.keeper {
            keeper.clear(self.listener, &mut self.switchboard);
        }
    }
}

/// What there is to be shown and handed over.
impl House {
    /// How many clients hear what is said.
    pub(super) fn clients(&self) -> usize {
        self.switchboard.room().listeners().count()
    }

    /// All items.
    pub(super) fn items(&self) -> impl Iterator<Item = (ItemId, String, Kind)> {
        let kept = self.keeper.iter().flat_map(Keeper::entries);
        handover::items(self.listener, self.switchboard.room(), kept)
    }

    /// Everything as it is now.
    pub(super) fn manifest(&self) -> Result<Base, CodecError> {
        let kept = self.keeper.iter().flat_map(Keeper::entries);
        handover::manifest(self.listener, self.switchboard.room(), kept, self.ids.next())
    }

    pub(super) fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        if id == self.listener {
            return Some(self.door.descriptor());
        }
        let kept = || self.keeper.as_ref().and_then(|keeper| keeper.descriptor(id, &self.switchboard));
        self.switchboard.descriptor(id).or_else(kept)
    }
}

/// What the store's ledger says of the application: whose store it is. The command that a supervisor runs may be another today.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Owner {
    service: String,
}

impl Owner {
    fn of(bundle: &Bundle) -> Owner {
        bundle.state().ok().flatten().unwrap_or_default()
    }

    fn is_another_than(&self, service: &str) -> bool {
        !self.service.is_empty() && self.service != service
    }

    fn write(&self, store: &mut Store) -> anyhow::Result<()> {
        Ok(store.set_state(&Cbor::encode(self)?)?)
    }
}

/// Closes what nobody has taken, and takes it out of the store.
fn close_rest(bundle: Bundle, mut store: Option<&mut Store>) {
    for entry in bundle.close_rest() {
        tracing::warn!(item = %entry, "closed an item that this version does not know");
        if let Some(store) = &mut store {
            let _ = store.remove(entry.id);
        }
    }
}

/// The socket at which the supervisor wants this server to listen, if it says so.
fn activation(activated: Vec<Activated>) -> Option<TcpListener> {
    let mut first = None;
    for Activated { name, descriptor } in activated {
        if first.is_none() && Kind::of(&descriptor).is_ok_and(|kind| kind == Kind::TcpListener) {
            first = Some(TcpListener::from(descriptor));
        } else {
            tracing::warn!(name, "closed a descriptor of the supervisor's for which there is no use");
        }
    }
    first
}

/// Listens at the first of these addresses that is free.
fn bind(addresses: &[SocketAddr]) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addresses).map_err(|error| {
        let places: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        let places = places.join(" or ");
        anyhow!("cannot listen at {places}: {error:#}; give an address of this machine whose port is free")
    })
}
