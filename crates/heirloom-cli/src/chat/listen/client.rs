//! One client: what it has begun to say, and what it is still to hear.

use std::net::TcpStream;
use std::sync::Arc;

use heirloom::ItemId;

use super::escape::escape;
use super::event::Counted;
use super::lines::Lines;
use super::outbox::Outbox;

/// Who is connected. Its [connection](super::connection::Connection) is elsewhere.
#[derive(Debug)]
pub(super) struct Client {
    id: ItemId,
    /// Where it comes from, as the others are told.
    address: String,
    lines: Lines,
    outbox: Outbox,
    /// It has nothing more to say and hears nothing new.
    leaving: bool,
    /// Nothing can be sent to it any more. What it has sent can still be read.
    deaf: bool,
    counted: Counted,
}

impl Client {
    /// A client that has said and heard nothing yet.
    pub(super) fn new(id: ItemId, address: String, counted: Counted) -> Client {
        Client::resume(id, address, Vec::new(), Outbox::default(), false, counted)
    }

    /// A client that has begun a line, and is still to hear something.
    pub(super) fn resume(
        id: ItemId,
        address: String,
        half_line: Vec<u8>,
        outbox: Outbox,
        leaving: bool,
        counted: Counted,
    ) -> Client {
        Client { id, address, lines: Lines::resume(half_line), outbox, leaving, deaf: false, counted }
    }

    pub(super) fn id(&self) -> ItemId {
        self.id
    }

    /// What it is called, by the others and among the items.
    pub(super) fn name(&self) -> String {
        name(self.id)
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// What it has said of a line that has not ended.
    pub(super) fn half_line(&self) -> &[u8] {
        self.lines.half()
    }

    /// What it is still to hear.
    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// What was read from it and sent to it, as the kernel counts.
    pub(super) fn counted(&self) -> Counted {
        self.counted
    }

    /// Takes in what it has sent. How many lines came to their end with that, and what the others get of them.
    pub(super) fn said(&mut self, bytes: &[u8]) -> (u64, Vec<u8>) {
        self.counted.consumed = self.counted.consumed.wrapping_add(bytes.len() as u64);
        let (mut text, mut count) = (Vec::with_capacity(bytes.len() + 64), 0);
        self.lines.push(bytes, |line| {
            count += 1;
            spoken(self.id, line, &mut text);
        });
        (count, text)
    }

    /// It says nothing more: what the others get of a line that has not ended. Nothing if there is none.
    pub(super) fn leave(&mut self) -> Vec<u8> {
        self.leaving = true;
        let mut text = Vec::new();
        self.lines.finish(|line| spoken(self.id, line, &mut text));
        text
    }

    /// Queues a text.
    pub(super) fn offer(&mut self, text: &Arc<[u8]>) {
        if !self.deaf {
            self.outbox.push(text);
        }
    }

    /// So many bytes of the outbox were sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.outbox.consume(count);
        self.counted.written = self.counted.written.wrapping_add(count as u64);
    }

    /// Nothing can be sent any more.
    pub(super) fn deafen(&mut self) {
        self.deaf = true;
        self.outbox = Outbox::default();
    }
}

/// The name of the client with this id.
pub(super) fn name(id: ItemId) -> String {
    format!("user{id}")
}

/// What the kernel has counted of a connection until now.
pub(super) fn counted(connection: &TcpStream) -> std::io::Result<Counted> {
    let counters = heirloom_sys::tcp_counters(connection)?;
    Ok(Counted { consumed: counters.consumed(), written: counters.written() })
}

/// Appends a line as the others get it.
fn spoken(id: ItemId, line: &[u8], text: &mut Vec<u8>) {
    text.extend_from_slice(format!("<user{id}> ").as_bytes());
    escape(line, text);
    text.push(b'\n');
}
