//! After a kill: the room and everybody's connection, as they were, from the journal and what the kernel knows.
//!
//! What is found, and what that means:
//!
//! | in the journal | in the store | then |
//! |---|---|---|
//! | joined | held | it goes on: what was written down and not taken from its socket is taken now, and it is sent what was not sent |
//! | joined | not held | its connection ended with the last process: it has left |
//! | not yet joined | held | it joins now |
//! | gone, or cut off | held | its connection is ended, or reset, as that was about to be |
//! | closed | held | the server was being stopped: everybody's connection is ended |
//!
//! Where there is no journal, or it cannot be read, nothing of this can be done: in the first case everybody is reset, in the
//! second everything stays in the store for a program that can read it.
//!
//! Whose counters contradict the journal is reset, and has left: somebody else has read or written there. After a takeover by a program that
//! knows nothing of the journal that is everybody, if it did anything: then all connections end with it, as they would without
//! a store.
//!
//! All of this may be interrupted by a kill too. It changes only sockets, in ways that the kernel's counters tell, until the
//! journal begins anew.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use anyhow::Context;
use heirloom::ItemId;
use heirloom_sys::TcpCounters;
use mio::Registry;
use rustix::io::Errno;

use super::client::{Client, name};
use super::connection::{self, Connection};
use super::event::Counted;
use super::journal::{RoomJournal, replay};
use super::room::{Counters, Room};
use super::switchboard::Switchboard;

/// A client's connection, as it was stored.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) socket: TcpStream,
    /// Where it comes from.
    pub(super) address: String,
}

/// Makes the room again. `next_id` is that of the client that comes next.
pub(super) fn recover(
    mut stored: BTreeMap<ItemId, Stored>,
    journal: Option<OwnedFd>,
    next_id: ItemId,
    registry: Registry,
    backlog: usize,
) -> anyhow::Result<Switchboard> {
    let Some(journal) = journal else {
        if !stored.is_empty() {
            tracing::error!(
                clients = stored.len(),
                "there is no journal, so nobody knows what was said; resetting"
            );
        }
        return begin(stored, Room::new(next_id, Counters::default()), None, registry, backlog);
    };
    let (journal, records) = RoomJournal::open(journal).context("the journal cannot be read")?;
    let count =
        |(&id, stored): (&ItemId, &Stored)| Some((id, heirloom_sys::tcp_counters(&stored.socket).ok()?));
    let counters: BTreeMap<ItemId, TcpCounters> = stored.iter().filter_map(count).collect();
    let replay = replay(&records, |id| counters.get(&id).map(TcpCounters::written))
        .context("the journal cannot be read")?;
    let room = replay.room;
    if let Some(then) = replay.handed_over
        && !counters.iter().all(|(id, now)| then.get(id).is_none_or(|then| is_untouched(*then, now)))
    {
        tracing::error!(
            clients = stored.len(),
            "a program without a store has served since; resetting its clients"
        );
        return begin(stored, Room::new(next_id, room.counters()), Some(journal), registry, backlog);
    }

    let (mut lost, mut connected) = (Vec::new(), Vec::new());
    for client in room.clients() {
        let id = client.id();
        let Some(Stored { socket, .. }) = stored.remove(&id) else {
            lost.push(id);
            continue;
        };
        let connection = Connection::new(socket);
        let last_said = replay.last_said.get(&id).copied().unwrap_or(0);
        // When the server is being stopped, what clients send is not written down.
        let settled = if room.is_closed() { Ok(()) } else { settle(client, &connection, last_said) };
        match settled {
            Ok(()) => connected.push((id, connection)),
            Err(error) => {
                tracing::error!(user = name(id), "resetting it: {error:#}");
                connection.reset(&registry);
                lost.push(id);
            }
        }
    }
    let next = room.next_id();
    let (ended, arrived): (Vec<_>, Vec<_>) = stored.into_iter().partition(|(id, _)| *id < next);

    let mut switchboard = Switchboard::new(registry, backlog, room);
    for (id, connection) in connected {
        connection
            .register(switchboard.registry(), id)
            .with_context(|| format!("cannot wait for {}", name(id)))?;
        switchboard.resume(id, connection);
    }
    for (id, Stored { socket, .. }) in ended {
        // Who went before the last checkpoint has been dealt with.
        match replay.gone.get(&id) {
            Some(false) => connection::reset(&socket),
            _ => connection::end(&socket),
        }
        switchboard.forget(id);
    }
    if switchboard.room().is_closed() {
        switchboard = switchboard.reopen();
    }
    switchboard.write_down(journal)?;
    lost.into_iter().for_each(|id| switchboard.lose(id));
    for (id, Stored { socket, address }) in arrived {
        if let Err(error) = switchboard.join(id, socket, address) {
            tracing::warn!(%error, "cannot let a client in");
            switchboard.forget(id);
        }
    }
    Ok(switchboard)
}

/// A room without anybody, after all connections were reset.
fn begin(
    stored: BTreeMap<ItemId, Stored>,
    room: Room,
    journal: Option<RoomJournal>,
    registry: Registry,
    backlog: usize,
) -> anyhow::Result<Switchboard> {
    let mut switchboard = Switchboard::new(registry, backlog, room);
    for (id, Stored { socket, .. }) in stored {
        connection::reset(&socket);
        switchboard.forget(id);
    }
    if let Some(journal) = journal {
        switchboard.write_down(journal)?;
    }
    Ok(switchboard)
}

/// Whether nobody has read or written since.
fn is_untouched(then: Counted, now: &TcpCounters) -> bool {
    // The end that may be counted of a connection that is over.
    let end = u64::from(now.is_over());
    now.written() == then.written && (then.consumed..=then.consumed + end).contains(&now.consumed())
}

/// Takes from a client's socket what was written down and not taken, and checks that what was sent is part of what it was to
/// hear.
fn settle(client: &Client, connection: &Connection, last_said: u64) -> anyhow::Result<()> {
    let counters = heirloom_sys::tcp_counters(connection.descriptor())
        .context("its socket does not tell how far it was")?;
    let Counted { consumed, written } = client.counted();
    anyhow::ensure!(
        counters.written() == written,
        "{} bytes were sent to it, {written} of what it was to hear",
        counters.written()
    );
    let error = counters.is_over().then(|| connection.take_error()).flatten();
    let owed = owed(consumed, last_said, &Taken::from(counters, error));
    anyhow::ensure!(
        (0..=last_said.into()).contains(&owed) && owed <= counters.unread.into(),
        "{} bytes were read from it, and {consumed} written down",
        counters.consumed()
    );
    connection.discard(&mut vec![0; usize::try_from(owed)?]).context("what was written down is not there")
}

/// What the kernel says was taken from a socket.
struct Taken {
    consumed: u64,
    unread: u64,
    /// Whether the peer's end is counted too; `None`: nobody knows.
    with_end: Option<bool>,
}

impl Taken {
    /// The error is one that a connection has which is over, if nobody has heard of it yet.
    fn from(counters: TcpCounters, error: Option<Errno>) -> Taken {
        let with_end = match error {
            // As it is known while the connection is not over.
            _ if !counters.is_over() => Some(false),
            // Reset after its end, or before.
            Some(Errno::PIPE) => Some(true),
            Some(Errno::CONNRESET) => Some(false),
            _ => None,
        };
        Taken { consumed: counters.consumed(), unread: counters.unread, with_end }
    }
}

/// How much is to be taken from a socket so that it is what was written down. Negative: too much was taken.
///
/// Of a connection that is over it may not be known whether its end is counted. The last that was written down is taken as a
/// whole or not at all, which decides it. Where that was a single byte, it was all that there was to read: the error has been
/// heard of before, by who was about to read for the last time.
fn owed(written_down: u64, last_said: u64, taken: &Taken) -> i128 {
    let (last, difference) = (i128::from(last_said), i128::from(written_down) - i128::from(taken.consumed));
    let with_end = taken.with_end.unwrap_or(difference < 0 || (difference + 1 == last && taken.unread > 0));
    difference + i128::from(with_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_connection_that_is_over_is_told_from_a_byte() {
        // So much was written down, and the last of it is so long. With or without an end that was counted, all of it was
        // taken, or all but the last.
        for last in [1, 2, 3, 64 * 1024] {
            for (end, known) in [(0, false), (1, false), (0, true), (1, true)] {
                let with_end = known.then_some(end == 1);
                let taken = |consumed, unread| Taken { consumed: consumed + end, unread, with_end };
                assert_eq!(owed(100_000, last, &taken(100_000, 0)), 0);
                let not_taken = taken(100_000 - last, last);
                let owed = owed(100_000, last, &not_taken);
                assert_eq!(owed, last.into(), "{last} {end} {known}");
            }
        }
    }
}
