//! The client's descriptors as items: what each is called, and which id it has.
//!
//! Ids are given out by one counter that travels with the service, and each once. The items are not told what happens; they
//! are [compared](Items::update) with what the pump has.

use std::os::fd::{AsFd, BorrowedFd};

use heirloom::{Entry, Incumbent, ItemId, Kind};

use super::pump::Pump;

/// One of the client's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The connection to the server, and its number.
    Server(u64),
    /// An end of the pipe from the server to stdout.
    FromServer(End),
    /// An end of the pipe from stdin to the server.
    FromStdin(End),
    Stdin,
    Stdout,
    /// The note of what is being written to stdout.
    Note,
}

/// Which end of a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Reader,
    Writer,
}

/// Who gets an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Travels {
    /// A successor, as soon as it asks.
    Early,
    /// A successor in the freeze: the incumbent goes on using it until then, and could not shut it down if a successor that
    /// has failed keeps it.
    Late,
    /// Nobody but the store: each process has its own.
    Never,
}

impl Part {
    pub(super) fn name(self) -> &'static str {
        match self {
            Part::Server(_) => "server",
            Part::FromServer(_) => "from-server",
            Part::FromStdin(_) => "from-stdin",
            Part::Stdin => "stdin",
            Part::Stdout => "stdout",
            Part::Note => "note",
        }
    }

    pub(super) fn travels(self) -> Travels {
        match self {
            Part::Server(_) => Travels::Early,
            Part::FromServer(_) | Part::FromStdin(_) => Travels::Late,
            Part::Stdin | Part::Stdout | Part::Note => Travels::Never,
        }
    }

    /// What its descriptor is; of a standard stream that is for the kernel to say.
    fn kind(self) -> Kind {
        match self {
            Part::Server(_) => Kind::TcpStream,
            Part::FromServer(End::Reader) | Part::FromStdin(End::Reader) => Kind::PipeReader,
            Part::FromServer(End::Writer) | Part::FromStdin(End::Writer) => Kind::PipeWriter,
            Part::Stdin | Part::Stdout => Kind::Other,
            Part::Note => Kind::Memfd,
        }
    }

    pub(super) fn entry(self, id: ItemId) -> Entry {
        Entry { id, name: self.name().into(), kind: self.kind(), state: Vec::new() }
    }

    /// Everything that the pump has. Standard streams and pipes are items only where they are kept: where bytes go through
    /// the kernel.
    fn all(pump: &Pump) -> Vec<(Part, BorrowedFd<'_>)> {
        let mut all = Vec::new();
        all.extend(pump.socket().map(|socket| (Part::Server(pump.connection_id()), socket)));
        if let Some((from_server, from_stdin)) = pump.conduits() {
            let (reader, writer) = from_server.ends();
            all.extend([(Part::FromServer(End::Reader), reader), (Part::FromServer(End::Writer), writer)]);
            let (reader, writer) = from_stdin.ends();
            all.extend([(Part::FromStdin(End::Reader), reader), (Part::FromStdin(End::Writer), writer)]);
            all.extend(pump.reads_on().then(|| (Part::Stdin, pump.input().fd())));
            all.push((Part::Stdout, pump.output().fd()));
            all.extend(pump.output().note().map(|note| (Part::Note, note.as_fd())));
        }
        all
    }
}

/// Which descriptor has which id.
#[derive(Debug)]
pub(super) struct Items {
    ids: Vec<(Part, ItemId)>,
    next_id: u64,
}

impl Items {
    /// Those that another process has left, and where the counter stands.
    pub(super) fn new(ids: Vec<(Part, ItemId)>, next_id: ItemId) -> Self {
        Items { ids, next_id: next_id.0 }
    }

    pub(super) fn next_id(&self) -> u64 {
        self.next_id
    }

    /// An id that nothing has had before.
    pub(super) fn give_out(&mut self) -> ItemId {
        let id = ItemId(self.next_id);
        // At its end it stays there, as counters that another process has sent do.
        self.next_id = self.next_id.saturating_add(1);
        id
    }

    /// Gives what the pump has got since the last time its ids, and takes them from what it has no longer: those that are
    /// new, and those that have ended.
    pub(super) fn update(&mut self, pump: &Pump) -> (Vec<(Part, ItemId)>, Vec<ItemId>) {
        let all = Part::all(pump);
        let mut ended = Vec::new();
        self.ids.retain(|(part, id)| {
            let is_there = all.iter().any(|(there, _)| there == part);
            if !is_there {
                ended.push(*id);
            }
            is_there
        });
        let mut new = Vec::new();
        for (part, _) in all {
            if self.id(part).is_none() {
                let id = self.give_out();
                self.ids.push((part, id));
                new.push((part, id));
            }
        }
        (new, ended)
    }

    pub(super) fn id(&self, part: Part) -> Option<ItemId> {
        self.ids.iter().find(|(known, _)| *known == part).map(|(_, id)| *id)
    }

    /// The ids of those that travel so.
    pub(super) fn that_travel(&self, travels: Travels) -> impl Iterator<Item = ItemId> {
        self.ids.iter().filter(move |(part, _)| part.travels() == travels).map(|(_, id)| *id)
    }

    pub(super) fn descriptor<'p>(&self, pump: &'p Pump, id: ItemId) -> Option<BorrowedFd<'p>> {
        let (part, _) = self.ids.iter().find(|(_, known)| *known == id)?;
        Part::all(pump).into_iter().find(|(there, _)| there == part).map(|(_, fd)| fd)
    }

    /// What a successor gets: all that travels early, and in the freeze what travels late.
    pub(super) fn entries(&self, frozen: bool) -> Vec<Entry> {
        let last = if frozen { Travels::Late } else { Travels::Early };
        let mut entries: Vec<Entry> = self
            .ids
            .iter()
            .filter(|(part, _)| part.travels() <= last)
            .map(|&(part, id)| part.entry(id))
            .collect();
        entries.sort_by_key(|entry| entry.id);
        entries
    }

    /// Tells status what a successor would get.
    pub(super) fn show<A>(&self, incumbent: &mut Incumbent<A>) {
        let entries = self.entries(true).into_iter();
        incumbent.set_items(entries.map(|entry| (entry.id, entry.name, entry.kind)));
    }
}

#[cfg(test)]
mod tests {
    use std::io::pipe;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::chat::pump::{Config, Pipes, PumpState};
    use crate::chat::stdio::{Input, Output};

    /// A pump between pipes, with this connection; `kept`: through pipes.
    fn pump(connection_id: u64, socket: Option<TcpStream>, kept: bool) -> Pump {
        let config = Config {
            addresses: Vec::new(),
            input: Input::new(pipe().unwrap().0.into()).unwrap(),
            output: Output::new(pipe().unwrap().1.into()).unwrap(),
            pipes: kept.then(|| Pipes::new(None, None).unwrap()),
        };
        Pump::resume(config, PumpState { connection_id, ..PumpState::default() }, socket)
    }

    fn connection() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap()
    }

    #[test]
    fn ids_are_given_out_once_and_a_new_connection_is_another_item() {
        let mut items = Items::new(Vec::new(), ItemId(5));
        let first = pump(1, Some(connection()), true);
        let (new, ended) = items.update(&first);
        let ids: Vec<u64> = new.iter().map(|(_, id)| id.0).collect();
        assert_eq!((ids, ended), ((5..=11).collect(), vec![]));
        assert_eq!(items.update(&first), (vec![], vec![]));

        let (new, ended) = items.update(&pump(2, Some(connection()), true));
        assert_eq!((new, ended), (vec![(Part::Server(2), ItemId(12))], vec![ItemId(5)]));
        let (new, ended) = items.update(&pump(2, None, false));
        assert_eq!((new, ended.len(), items.next_id()), (vec![], 7, 13));
    }

    #[test]
    fn pipes_travel_in_the_freeze_alone_and_standard_streams_never() {
        let mut items = Items::new(Vec::new(), ItemId::FIRST);
        let pump = pump(1, Some(connection()), true);
        items.update(&pump);
        let names = |frozen| items.entries(frozen).into_iter().map(|entry| entry.name).collect::<Vec<_>>();
        assert_eq!(names(false), ["server"]);
        assert_eq!(names(true), ["server", "from-server", "from-server", "from-stdin", "from-stdin"]);
        for entry in items.entries(true) {
            let descriptor = items.descriptor(&pump, entry.id).unwrap();
            assert_eq!(Kind::of(descriptor).unwrap(), entry.kind, "{entry}");
        }
        assert!(items.descriptor(&pump, ItemId(99)).is_none());
    }
}
