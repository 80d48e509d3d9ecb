//! How a client comes to its pump: afresh, with what a killed process has left, or with what an incumbent hands over.
//!
//! Where there is a store, bytes go through pipes from then on, and what was in memory goes into them first. Where there is
//! none, what was in pipes goes into memory.

use std::io::{self, PipeReader, PipeWriter};
use std::mem;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Context;
use heirloom::store::{Activated, LEDGER_NAME, Restored, Store, activated, restore};
use heirloom::{Bundle, ItemId, Limits, TakenItem, Typed};

use super::items::{End, Items, Part};
use super::kept::{Kept, Saved};
use super::note::Note;
use super::pump::{self, Pipes, Pump, PumpState};
use super::stdio::{Input, Output};
use crate::failure::Failure;

/// What there is before the first turn.
pub(super) struct Beginning {
    state: PumpState,
    left: Left,
    store: Option<Store>,
}

/// The descriptors that there are already.
struct Left {
    ids: Vec<(Part, ItemId)>,
    next_id: ItemId,
    socket: Option<TcpStream>,
    from_server: Option<(OwnedFd, OwnedFd)>,
    from_stdin: Option<(OwnedFd, OwnedFd)>,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    note: Option<OwnedFd>,
    ledger: Option<OwnedFd>,
    ledger_id: Option<ItemId>,
    /// What a store may hold, and nobody needs.
    stale: Vec<ItemId>,
}

impl Beginning {
    /// Nobody serves, so that it is begun with what a killed process has left in a store, if there is one.
    pub(super) fn fresh(control: &Path, service: &str) -> Result<Self, Failure> {
        let Restored { bundle, activated, store } = restore(Some(control), &Limits::default())
            .context("cannot go on with what is in the store; it is still there")?;
        close(activated);
        let mut saved =
            Saved::read(&bundle).context("cannot read the state in the store; it is still there")?;
        let mut left = Left::take(bundle, saved.connection_id());
        if saved.is_of_another(service) {
            tracing::warn!("what is in the store is of another service: it is closed");
            (left, saved) = (left.discarded(), Saved::default());
        }
        let mut state = saved.until_now(left.socket.as_ref());
        if left.stdin.is_none() && left.stdout.is_none() {
            // The one before has ended in order: these streams are others.
            state.stdin_open = true;
        }
        if !left.ids.is_empty() {
            tracing::info!(
                connected = left.socket.is_some(),
                "goes on where a process was that has left everything in the store"
            );
        }
        Ok(Beginning { state, left, store })
    }

    /// With what an incumbent has handed over. `in_place` says that stdin and stdout are the same as before.
    pub(super) fn taken(bundle: Bundle, in_place: bool, control: &Path) -> Self {
        let mut state: PumpState = match bundle.state() {
            Ok(state) => state.unwrap_or_default(),
            // It could be decoded a moment ago, or in the preflight.
            Err(error) => {
                tracing::error!(%error, "what was read and not yet passed on is lost");
                PumpState::default()
            }
        };
        // A stdin of its own: what the incumbent's had to say of its end does not matter then.
        state.stdin_open |= !in_place;
        let mut left = Left::take(bundle, state.connection_id);
        left.stale.append(&mut state.streams);
        Self::handed_over(state, left, control)
    }

    /// With the connection of an incumbent of protocol 0.
    pub(super) fn older(socket: Option<TcpStream>, control: &Path) -> Self {
        let state = PumpState { connection_id: u64::from(socket.is_some()), ..PumpState::default() };
        let mut left = Left::take(Bundle::new(), state.connection_id);
        left.socket = socket;
        Self::handed_over(state, left, control)
    }

    fn handed_over(state: PumpState, mut left: Left, control: &Path) -> Self {
        // A supervisor that has started this process beside one that serves gives it what is stored: it comes from that one.
        close(activated().unwrap_or_default());
        let ledger = left.ledger.take();
        let store = Store::resume(ledger, Some(control), &Limits::default()).unwrap_or_else(|error| {
            tracing::error!(%error, "serving without a store: a kill would end the connection");
            None
        });
        Beginning { state, left, store }
    }

    /// The pump, its items, and what keeps them.
    pub(super) fn pump(
        self,
        addresses: Vec<SocketAddr>,
        service: &str,
    ) -> Result<(Pump, Items, Option<Kept>), Failure> {
        let Beginning { mut state, mut left, store } = self;
        let input = match left.stdin.take() {
            Some(stdin) => Input::new(stdin),
            None => Input::stdin(),
        };
        let output = match left.stdout.take() {
            Some(stdout) => Output::new(stdout),
            None => Output::stdout(),
        };
        let input = input.context("cannot use stdin")?;
        let mut output = output.context("cannot use stdout")?;
        let mut pipes = match &store {
            Some(_) => Some(left.pipes().context("cannot make a pipe")?),
            None => {
                left.drain_pipes(&mut state).context("cannot empty the incumbent's pipes")?;
                None
            }
        };
        if let Some(pipes) = &mut pipes
            && (left.note.is_some() || output.wants_note())
        {
            let note = left.note.take().map_or_else(Note::new, |note| Ok(Note::adopt(note)));
            output.keep_note(note.context("cannot make a memfd")?);
            output.settle(&mut pipes.from_server).context("cannot find out what was written to stdout")?;
        }
        let socket = left.socket.take();
        let stale = mem::take(&mut left.stale);
        let mut items = Items::new(left.ids.clone(), left.next_id);
        let kept = store.map(|store| {
            let ledger = left.ledger_id.unwrap_or_else(|| items.give_out());
            let mut kept = Kept::new(store, ledger, service.to_owned(), left.ids);
            kept.remove(stale);
            kept
        });
        let config = pump::Config { addresses, input, output, pipes };
        Ok((Pump::resume(config, state, socket), items, kept))
    }
}

/// Closes descriptors that came from a supervisor and are not the client's: a duplicate would hide the end of a connection.
fn close(activated: Vec<Activated>) {
    for Activated { name, .. } in activated {
        tracing::warn!(name, "closed a descriptor that this process has no use for");
    }
}

impl Left {
    /// Takes out of a bundle what is the client's. `connection` is the number of the connection in it.
    fn take(mut bundle: Bundle, connection: u64) -> Self {
        let mut left = Left::nothing(bundle.next_id());
        left.socket = left.part(&mut bundle, Part::Server(connection));
        left.from_server = left.pipe(&mut bundle, Part::FromServer);
        left.from_stdin = left.pipe(&mut bundle, Part::FromStdin);
        left.stdin = left.part(&mut bundle, Part::Stdin);
        left.stdout = left.part(&mut bundle, Part::Stdout);
        left.note = left.part(&mut bundle, Part::Note);
        if left.stdout.is_none() {
            // It is about another stdout.
            left.forget(Part::Note);
            left.note = None;
        }
        if let Some(ledger) = bundle.take_all::<OwnedFd>(LEDGER_NAME).pop() {
            (left.ledger, left.ledger_id) = (Some(ledger.descriptor), Some(ledger.id));
        }
        for entry in bundle.close_rest() {
            tracing::warn!(item = %entry, "closed an item that this version does not know");
            left.stale.push(entry.id);
        }
        left
    }

    fn nothing(next_id: ItemId) -> Self {
        Left {
            ids: Vec::new(),
            next_id,
            socket: None,
            from_server: None,
            from_stdin: None,
            stdin: None,
            stdout: None,
            note: None,
            ledger: None,
            ledger_id: None,
            stale: Vec::new(),
        }
    }

    fn forget(&mut self, part: Part) {
        self.stale.extend(self.ids.extract_if(.., |(known, _)| *known == part).map(|(_, id)| id));
    }

    /// Nothing, and everything that there was is stale.
    fn discarded(self) -> Self {
        let mut nothing = Left::nothing(self.next_id);
        nothing.stale = self.stale;
        nothing.stale.extend(self.ids.into_iter().map(|(_, id)| id));
        nothing
    }

    fn part<T: Typed>(&mut self, bundle: &mut Bundle, part: Part) -> Option<T> {
        let taken = self.last(bundle, part.name())?;
        self.ids.push((part, taken.id));
        Some(taken.descriptor)
    }

    /// Both ends of a pipe. One alone is of no use: nothing flows before both are kept.
    fn pipe(&mut self, bundle: &mut Bundle, part: fn(End) -> Part) -> Option<(OwnedFd, OwnedFd)> {
        let name = part(End::Reader).name();
        let reader = self.last::<PipeReader>(bundle, name);
        let writer = self.last::<PipeWriter>(bundle, name);
        match (reader, writer) {
            (Some(reader), Some(writer)) => {
                self.ids.extend([(part(End::Reader), reader.id), (part(End::Writer), writer.id)]);
                Some((reader.descriptor.into(), writer.descriptor.into()))
            }
            (reader, writer) => {
                self.stale.extend(reader.map(|reader| reader.id));
                self.stale.extend(writer.map(|writer| writer.id));
                None
            }
        }
    }

    /// The item of this name, of which there is one; if there are more, that which was added last.
    fn last<T: Typed>(&mut self, bundle: &mut Bundle, name: &str) -> Option<TakenItem<T>> {
        let mut all = bundle.take_all::<T>(name);
        let last = all.pop();
        self.stale.extend(all.into_iter().map(|other| other.id));
        last
    }

    /// The pipes with what is in them; new ones where there are none.
    fn pipes(&mut self) -> io::Result<Pipes> {
        Pipes::new(self.from_server.take(), self.from_stdin.take())
    }

    /// Takes what is in the pipes into the state, before what is there: it came earlier.
    fn drain_pipes(&mut self, state: &mut PumpState) -> io::Result<()> {
        if self.from_server.is_none() && self.from_stdin.is_none() {
            return Ok(());
        }
        let Pipes { from_server, from_stdin } = self.pipes()?;
        state.unwritten.splice(..0, from_server.into_bytes()?);
        state.unsent.splice(..0, from_stdin.into_bytes()?);
        Ok(())
    }
}
