//! The pipes through which bytes are moved, and how many a loop may have.
//!
//! A pipe is with a connection only while it holds bytes; when it is empty, it is given back. When none is to be had, a
//! direction waits, and its bytes with it in the kernel: back-pressure, not an error.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::pipe::{PipeFlags, pipe_with};

/// How many empty pipes a loop keeps at most.
const KEPT: usize = 64;

/// A pipe, shared with whoever lends its ends to a successor.
#[derive(Clone, Debug)]
pub(crate) struct Pipe(Arc<Ends>);

#[derive(Debug)]
struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    pub(crate) fn adopt(reader: OwnedFd, writer: OwnedFd) -> Pipe {
        Pipe(Arc::new(Ends { reader, writer }))
    }

    fn new() -> io::Result<Pipe> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Pipe::adopt(reader, writer))
    }

    pub(crate) fn reader(&self) -> &OwnedFd {
        &self.0.reader
    }

    pub(crate) fn writer(&self) -> &OwnedFd {
        &self.0.writer
    }
}

/// The pipes of a loop.
#[derive(Debug)]
pub(crate) struct Pipes {
    empty: Vec<Pipe>,
    /// How many are with connections.
    lent: usize,
    limit: usize,
}

impl Pipes {
    pub(crate) fn new(limit: usize) -> Pipes {
        Pipes { empty: Vec::new(), lent: 0, limit: limit.max(1) }
    }

    /// An empty one, if there may be one more.
    pub(crate) fn take(&mut self) -> Option<Pipe> {
        let pipe = match self.empty.pop() {
            Some(pipe) => pipe,
            None if self.lent < self.limit => Pipe::new().ok()?,
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
    }

    /// One has come with a connection.
    pub(crate) fn arrived(&mut self) {
        self.lent += 1;
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
        let mut pipes = Pipes::new(2);
        let (one, other) = (pipes.take().unwrap(), pipes.take().unwrap());
        assert!(pipes.take().is_none());
        pipes.give(one);
        let again = pipes.take().unwrap();
        assert!(pipes.take().is_none());
        pipes.discard(other);
        assert_eq!((pipes.lent(), pipes.count()), (1, 1));
        pipes.give(again);
        assert_eq!((pipes.lent(), pipes.count()), (0, 1));
    }

    #[test]
    fn not_too_many_are_kept() {
        let mut pipes = Pipes::new(2 * KEPT);
        let all: Vec<Pipe> = (0..2 * KEPT).map(|_| pipes.take().unwrap()).collect();
        all.into_iter().for_each(|pipe| pipes.give(pipe));
        assert_eq!(pipes.count(), KEPT);
    }
}
