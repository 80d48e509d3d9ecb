//! The pipes through which bytes are moved, and how many a loop may have.
//!
//! A pipe is with a connection only while it holds bytes; when it is empty, it is given back. When none is to be had, a
//! direction waits, and its bytes with it in the kernel: back-pressure, not an error.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};

/// How many empty pipes a loop keeps at most.
const KEPT: usize = 64;
/// How many there are at least, so that something moves even when all other descriptors are used up by sockets.
const RESERVE: usize = 2;
/// How much a wide pipe takes. What is filled at once is acknowledged at once, and acknowledging is much of what a stream
/// costs: four times what a pipe usually takes makes it a third to a half cheaper. Twice that has 128 slots, so that it is known of
/// small messages that there is [no more](Pipe::has_room_beside).
const WIDE: usize = 512 * 1024;
/// How many wide pipes all loops may have together: half of what the pipes of a user without privileges may take, beyond which
/// each new one is tiny.
const WIDE_PIPES: usize = 32 * 1024 * 1024 / WIDE;

/// A pipe, shared with whoever lends its ends to a successor.
#[derive(Clone, Debug)]
pub(crate) struct Pipe(Arc<Ends>);

#[derive(Debug)]
struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
    /// How many pieces it takes, of whatever size, once that was asked.
    slots: OnceLock<usize>,
}

impl Pipe {
    pub(crate) fn adopt(reader: OwnedFd, writer: OwnedFd) -> Pipe {
        Pipe(Arc::new(Ends { reader, writer, slots: OnceLock::new() }))
    }

    fn new(wide: bool) -> io::Result<Pipe> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if wide {
            // Where that is more than the user may have, it stays as it is.
            let _ = fcntl_setpipe_size(&writer, WIDE);
        }
        Ok(Pipe::adopt(reader, writer))
    }

    pub(crate) fn reader(&self) -> &OwnedFd {
        &self.0.reader
    }

    pub(crate) fn writer(&self) -> &OwnedFd {
        &self.0.writer
    }

    /// Whether so many bytes, put into it in one go while it was empty, leave room for one more: each slot that is used has at
    /// least one.
    pub(crate) fn has_room_beside(&self, count: usize) -> bool {
        count < *self.0.slots.get_or_init(|| slots(self.reader()))
    }
}

/// A slot is a page of what a pipe is said to take (`F_GETPIPE_SZ`, `fcntl(2)`).
fn slots(pipe: impl AsFd) -> usize {
    fcntl_getpipe_size(pipe).unwrap_or(0) / rustix::param::page_size()
}

/// The pipes of a loop.
#[derive(Debug)]
pub(crate) struct Pipes {
    empty: Vec<Pipe>,
    /// How many are with connections.
    lent: usize,
    limit: usize,
    /// How many of them are wide. They are made first, and the one given back last is used next: what is used most is wide.
    wide: usize,
}

impl Pipes {
    /// Those of one of so many loops.
    pub(crate) fn new(limit: usize, loops: usize) -> Pipes {
        let wide = WIDE_PIPES / loops.max(1);
        let mut pipes = Pipes { empty: Vec::new(), lent: 0, limit: limit.max(RESERVE), wide };
        pipes.fill_reserve();
        pipes
    }

    /// An empty one, if there may be one more.
    pub(crate) fn take(&mut self) -> Option<Pipe> {
        let pipe = match self.empty.pop() {
            Some(pipe) => pipe,
            None if self.lent < self.limit => Pipe::new(self.count() < self.wide).ok()?,
            None => return None,
        };
        self.lent += 1;
        Some(pipe)
    }

    /// Takes back an empty one.
    pub(crate) fn give(&mut self, pipe: Pipe) {
        self.lent -= 1;
        if self.empty.len() < KEPT {
            self.empty.push(pipe);
        }
    }

    /// One that is not empty is closed, with what is in it.
    pub(crate) fn discard(&mut self, pipe: Pipe) {
        self.lent -= 1;
        drop(pipe);
        self.fill_reserve();
    }

    fn fill_reserve(&mut self) {
        while self.count() < RESERVE
            && let Ok(pipe) = Pipe::new(self.count() < self.wide)
        {
            self.empty.push(pipe);
        }
    }

    /// One has come with a connection.
    pub(crate) fn arrived(&mut self) {
        self.lent += 1;
    }

    /// One has gone with a connection.
    pub(crate) fn left(&mut self) {
        self.lent -= 1;
    }

    /// How many are with connections.
    pub(crate) fn lent(&self) -> usize {
        self.lent
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lent + self.empty.len()
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_and_those_given_back_are_used_again() {
        let mut pipes = Pipes::new(2, 1);
        let (one, other) = (pipes.take().unwrap(), pipes.take().unwrap());
        assert!(pipes.take().is_none());
        pipes.give(one);
        let again = pipes.take().unwrap();
        assert!(pipes.take().is_none());
        pipes.discard(other);
        // In place of the one that is gone there is another.
        assert_eq!((pipes.lent(), pipes.count()), (1, 2));
        pipes.give(again);
        assert_eq!((pipes.lent(), pipes.count()), (0, 2));
    }

    #[test]
    fn not_too_many_are_kept() {
        let mut pipes = Pipes::new(2 * KEPT, 1);
        let all: Vec<Pipe> = (0..2 * KEPT).map(|_| pipes.take().unwrap()).collect();
        all.into_iter().for_each(|pipe| pipes.give(pipe));
        assert_eq!(pipes.count(), KEPT);
    }

    #[test]
    fn the_first_ones_are_wide() {
        let mut pipes = Pipes::new(1000, WIDE_PIPES / 2);
        let sizes = [(); 3].map(|()| fcntl_getpipe_size(pipes.take().unwrap().reader()).unwrap());
        assert_eq!(sizes[..2], [WIDE, WIDE]);
        assert!(sizes[2] < WIDE, "{sizes:?}");
    }
}
