//! A page of the vault: a queue of messages with descriptors in flight. See [`super`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use heirloom::channel::{Channel, MAX_DESCRIPTORS, SendError};
use heirloom_sys::{peek_datagram, set_peek_offset};
use rustix::io::Errno;
use rustix::net::{RecvFlags, sockopt};

use super::record::{Lent, RECORD, Record, Role, decode, encode};

/// The number of a pen, which no entry has.
const PEN: u64 = 0;

/// How many entries a page has at most, forgotten ones that are not yet taken out among them. More make for fewer pages, and
/// for more that has to be appended again when something is forgotten.
pub(crate) const CAPACITY: usize = MAX_DESCRIPTORS;

/// The longest message in bytes, and room enough for that.
const LONGEST: usize = 24 * 1024;
const BUFFER: usize = 64 * 1024;

/// The send buffer that is asked for: a message of one entry costs 768 bytes of it.
const SEND_BUFFER: usize = 512 * 1024;

/// A page.
#[derive(Debug)]
pub(crate) struct Page {
    pen: Channel,
    inbox: OwnedFd,
    /// The numbers of the entries in each message of the queue.
    messages: VecDeque<Vec<u64>>,
    /// The first of these messages is the how manieth of all that the page has had.
    first: u64,
    entries: usize,
    /// The kernel takes no more until something is taken out.
    full: bool,
}

/// Why an entry is not in a page.
#[derive(Debug)]
pub(crate) enum Refusal {
    Full,
    /// Too many descriptors are in flight.
    InFlight,
    Other(String),
}

/// Why a page cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    #[error("the limit on open files (`ulimit -n`, LimitNOFILE=) is too low for what is kept")]
    NoRoom,
    #[error("what is kept was written by another version: {0}")]
    Form(String),
    #[error("cannot read what is kept: {0}")]
    Io(#[from] io::Error),
}

impl Page {
    /// An empty page, with its pen in it.
    pub(crate) fn new() -> io::Result<Page> {
        let (pen, inbox) = Channel::pair()?;
        // As far as is allowed (wmem_max).
        let _ = sockopt::set_socket_send_buffer_size(&pen, SEND_BUFFER);
        let mut page = Page { pen, inbox, messages: VecDeque::new(), first: 0, entries: 0, full: false };
        match page.append_pen() {
            Ok(()) => Ok(page),
            Err(_) => Err(Errno::TOOMANYREFS.into()),
        }
    }

    /// A page that another process has left: calls `see` for each entry. None if it is an empty one.
    pub(crate) fn restore(
        inbox: OwnedFd,
        mut see: impl FnMut(Record<'static>, OwnedFd),
    ) -> Result<Option<Page>, PageError> {
        let mut pen = None;
        let mut messages = VecDeque::new();
        look(&inbox, |socket, buffer| {
            let datagram = peek_datagram(socket, buffer)?;
            let bytes = &buffer[..datagram.bytes];
            if bytes.is_empty() {
                return Ok(false);
            }
            let records = records(bytes)?;
            if datagram.descriptors_truncated {
                return Err(PageError::NoRoom);
            }
            if datagram.truncated || records.len() != datagram.descriptors.len() {
                return Err(PageError::Form("descriptors and names do not match".into()));
            }
            messages.push_back(records.iter().map(|record| record.number).collect());
            for (record, descriptor) in records.into_iter().zip(datagram.descriptors) {
                match record.role {
                    Role::Pen => pen = Some(descriptor),
                    _ => see(record, descriptor),
                }
            }
            Ok(true)
        })?;
        match pen {
            Some(pen) => Page::of(pen, inbox, messages).map(Some),
            None if messages.is_empty() => Ok(None),
            None => Err(PageError::Form("a page has no sending end".into())),
        }
    }

    /// A page whose both ends were carried over an upgrade in place, of which only the numbers are read.
    pub(crate) fn adopt(pen: OwnedFd, inbox: OwnedFd) -> Result<Page, PageError> {
        let mut messages = VecDeque::new();
        look(&inbox, |socket, buffer| {
            // Without a control buffer no duplicate is made.
            let (bytes, _) = rustix::net::recv(socket, &mut *buffer, RecvFlags::DONTWAIT | RecvFlags::PEEK)
                .map_err(io::Error::from)?;
            let bytes = &buffer[..bytes];
            if bytes.is_empty() {
                return Ok(false);
            }
            messages.push_back(records(bytes)?.iter().map(|record| record.number).collect());
            Ok(true)
        })?;
        Page::of(pen, inbox, messages)
    }

    fn of(pen: OwnedFd, inbox: OwnedFd, messages: VecDeque<Vec<u64>>) -> Result<Page, PageError> {
        let pen = Channel::adopt(pen).map_err(|error| PageError::Form(error.to_string()))?;
        let entries = messages.iter().map(Vec::len).sum();
        Ok(Page { pen, inbox, messages, first: 0, entries, full: false })
    }

    /// Appends one message with as many of these as fit in it; gives how many, and which message it is.
    pub(crate) fn append(&mut self, lent: &[Lent<'_>]) -> Result<(usize, u64), Refusal> {
        self.append_up_to(lent, self.room())
    }

    /// The same with what is in this page already, and is to be taken out where it was: there may be more than fits for so long.
    pub(crate) fn append_again(&mut self, lent: &[Lent<'_>]) -> Result<(usize, u64), Refusal> {
        self.append_up_to(lent, MAX_DESCRIPTORS)
    }

    fn append_up_to(&mut self, lent: &[Lent<'_>], room: usize) -> Result<(usize, u64), Refusal> {
        let mut bytes = 0;
        let room = room.min(MAX_DESCRIPTORS);
        let fitting = lent.iter().take(room).take_while(|lent| {
            bytes += lent.record.name.len() + RECORD;
            bytes <= LONGEST
        });
        let count = fitting.count();
        if count == 0 {
            return Err(Refusal::Full);
        }
        self.send(&lent[..count]).map(|message| (count, message))
    }

    /// Appends the pen, so that what is in the queue before can be taken out.
    pub(crate) fn append_pen(&mut self) -> Result<(), Refusal> {
        let pen = self.pen.as_fd().try_clone_to_owned().map_err(|error| Refusal::Other(error.to_string()))?;
        let record = Record::new(PEN, Role::Pen, "");
        self.send(&[Lent { record, descriptor: pen.as_fd() }]).map(drop)
    }

    fn send(&mut self, lent: &[Lent<'_>]) -> Result<u64, Refusal> {
        let descriptors: Vec<BorrowedFd<'_>> = lent.iter().map(|lent| lent.descriptor).collect();
        let bytes = encode(lent.iter().map(|lent| &lent.record));
        match self.pen.send(&bytes, &descriptors) {
            Ok(()) => {
                self.messages.push_back(lent.iter().map(|lent| lent.record.number).collect());
                self.entries += lent.len();
                Ok(self.last())
            }
            Err(SendError::Full) => {
                self.full = true;
                Err(Refusal::Full)
            }
            Err(SendError::InFlight { .. }) => Err(Refusal::InFlight),
            Err(error) => Err(Refusal::Other(error.to_string())),
        }
    }

    /// The last message.
    pub(crate) fn last(&self) -> u64 {
        (self.first + self.messages.len() as u64).saturating_sub(1)
    }

    /// The entries of all messages up to this one, each with its message.
    pub(crate) fn through(&self, message: u64) -> impl Iterator<Item = (u64, u64)> {
        let messages = (self.first..=message).zip(&self.messages);
        let all =
            messages.flat_map(|(message, numbers)| numbers.iter().map(move |&number| (number, message)));
        all.filter(|&(number, _)| number != PEN)
    }

    /// Whether the pen is appended once more behind this message.
    pub(crate) fn has_pen_behind(&self, message: u64) -> bool {
        let behind = (message + 1).saturating_sub(self.first) as usize;
        self.messages.iter().skip(behind).any(|numbers| numbers.contains(&PEN))
    }

    /// Takes out all messages up to this one; the kernel lets go of what is in them.
    pub(crate) fn take_out(&mut self, message: u64) {
        while self.first <= message
            && let Some(numbers) = self.messages.pop_front()
        {
            self.first += 1;
            self.entries -= numbers.len();
            if let Err(error) = rustix::net::recv(&self.inbox, &mut [0; 1][..], RecvFlags::DONTWAIT) {
                tracing::error!(%error, "cannot take out of a page");
            }
        }
        self.full = false;
    }

    /// It is not written to before something is taken out.
    pub(crate) fn close(&mut self) {
        self.full = true;
    }

    /// How many entries it has room for.
    pub(crate) fn room(&self) -> usize {
        // Its own pen counts as one of them.
        if self.full { 0 } else { (CAPACITY + 1).saturating_sub(self.entries) }
    }

    /// Whether nothing is in it but its pen.
    pub(crate) fn is_empty(&self) -> bool {
        self.messages.iter().flatten().all(|&number| number == PEN)
    }

    pub(crate) fn inbox(&self) -> BorrowedFd<'_> {
        self.inbox.as_fd()
    }

    pub(crate) fn pen(&self) -> BorrowedFd<'_> {
        self.pen.as_fd()
    }
}

fn records(bytes: &[u8]) -> Result<Vec<Record<'static>>, PageError> {
    decode(bytes).map_err(|why| PageError::Form(why.into()))
}

/// Looks at all messages, from the first on, until `one` says that there are no more.
fn look(
    inbox: &OwnedFd,
    mut one: impl FnMut(&OwnedFd, &mut [u8]) -> Result<bool, PageError>,
) -> Result<(), PageError> {
    set_peek_offset(inbox, Some(0))?;
    let mut buffer = vec![0; BUFFER];
    let looked = loop {
        match one(inbox, &mut buffer) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(PageError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    set_peek_offset(inbox, None)?;
    looked
}
