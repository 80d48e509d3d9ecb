//! A queue of bytes in the kernel: a pipe that splice(2) fills from one descriptor and drains into another.
//!
//! No byte in it is ever in this process's memory alone: what a call moves is at its source before the call, and in the
//! pipe after it, also when the process is killed in it. So whoever holds a duplicate of the two ends has every byte.
//!
//! What does not come by splice (state that another process has handed over, a source that cannot be spliced) is
//! [pushed](Conduit::push). What of it finds no room waits in memory behind the pipe, and nothing is let in before it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice, tee};

/// The most bytes that one call moves.
const STEP: usize = 64 * 1024;

/// A bounded queue of bytes in a pipe.
pub(crate) struct Conduit {
    reader: OwnedFd,
    writer: OwnedFd,
    /// How many bytes are in the pipe. Nobody else reads or writes there, so that they can be counted here.
    in_pipe: usize,
    limit: usize,
    /// Nothing went in last time. A pipe holds a number of pieces, not of bytes: it can be full of small ones.
    full: bool,
    /// Bytes that come after those in the pipe.
    behind: Vec<u8>,
}

impl Conduit {
    /// An empty one, for about `limit` bytes.
    pub(crate) fn new(limit: usize) -> io::Result<Self> {
        let (reader, writer) = make_pipe(limit)?;
        Ok(Self { reader, writer, in_pipe: 0, limit, full: false, behind: Vec::new() })
    }

    /// One that another process has left behind, with what is in it.
    pub(crate) fn adopt(reader: OwnedFd, writer: OwnedFd, limit: usize) -> io::Result<Self> {
        let in_pipe = ioctl_fionread(&reader)? as usize;
        Ok(Self { reader, writer, in_pipe, limit, full: false, behind: Vec::new() })
    }

    /// Where it is drained and where it is filled.
    pub(crate) fn ends(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.reader.as_fd(), self.writer.as_fd())
    }

    /// How many bytes are queued.
    pub(super) fn len(&self) -> usize {
        self.in_pipe + self.behind.len()
    }

    /// Whether it is worth the try to [`fill`](Conduit::fill) it.
    pub(super) fn has_room(&self) -> bool {
        !self.full && self.behind.is_empty() && self.in_pipe < self.limit
    }

    /// The bytes that are not in the pipe, but behind it.
    pub(super) fn behind(&self) -> &[u8] {
        &self.behind
    }

    /// Moves bytes in, as many as there are and find room: 0 means end-of-file. Does not block if `from` polled readable.
    pub(super) fn fill(&mut self, from: impl AsFd) -> Result<usize, Errno> {
        let room = self.limit.saturating_sub(self.in_pipe).min(STEP);
        let filled = splice(from, None, &self.writer, None, room, SpliceFlags::NONBLOCK);
        match filled {
            Ok(count) => self.in_pipe += count,
            // The source was empty, or the pipe full; an empty pipe never is.
            Err(Errno::AGAIN) => self.full = self.in_pipe > 0,
            Err(_) => {}
        }
        filled
    }

    /// Moves bytes out, `at_most` of them; some, if there are any.
    pub(super) fn drain(&mut self, into: impl AsFd, at_most: usize) -> Result<usize, Errno> {
        let count = self.in_pipe.min(at_most);
        let drained = splice(&self.reader, None, into, None, count, SpliceFlags::NONBLOCK)?;
        self.have_left(drained);
        Ok(drained)
    }

    /// Appends bytes from memory.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.behind.extend_from_slice(bytes);
        self.pour();
    }

    /// A copy of the first bytes, as many as `buffer` has room for, or fewer.
    pub(super) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.in_pipe.min(buffer.len());
        if count == 0 {
            return Ok(0);
        }
        let (copy, writer) = make_pipe(count)?;
        let count = tee(&self.reader, writer, count, SpliceFlags::NONBLOCK)?;
        let mut copied = 0;
        while copied < count {
            match read(&copy, &mut buffer[copied..count]) {
                Ok(0) => break,
                Ok(more) => copied += more,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(copied)
    }

    /// Drops the first bytes, `count` of them, which have left otherwise.
    pub(super) fn discard(&mut self, count: usize) -> io::Result<()> {
        let mut left = count.min(self.in_pipe);
        let mut dropped = vec![0; left];
        while left > 0 {
            match read(&self.reader, &mut dropped[..left]) {
                Ok(0) => break,
                Ok(read) => {
                    left -= read;
                    self.have_left(read);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Everything that is in it, for a queue in memory.
    pub(crate) fn into_bytes(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.in_pipe];
        let mut taken = 0;
        while taken < bytes.len() {
            match read(&self.reader, &mut bytes[taken..]) {
                Ok(0) => break,
                Ok(count) => taken += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(taken);
        bytes.append(&mut self.behind);
        Ok(bytes)
    }

    fn have_left(&mut self, count: usize) {
        self.in_pipe = self.in_pipe.saturating_sub(count);
        self.full &= count == 0;
        self.pour();
    }

    /// Lets into the pipe what waits behind it.
    fn pour(&mut self) {
        while !self.behind.is_empty() {
            match write(&self.writer, &self.behind) {
                Ok(count) => {
                    self.behind.drain(..count);
                    self.in_pipe += count;
                }
                Err(Errno::INTR) => {}
                // Full: again when something has left. Nothing else can happen to a pipe whose ends are both here.
                Err(_) => break,
            }
        }
        if self.behind.is_empty() {
            self.behind = Vec::new();
        }
    }
}

/// A pipe for about so many bytes; fewer where the system grants no more.
fn make_pipe(size: usize) -> io::Result<(OwnedFd, OwnedFd)> {
    const USUAL: usize = 64 * 1024;
    // Both ends are this service's own, so that the flag disturbs nobody.
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    if size > USUAL
        && let Err(error) = fcntl_setpipe_size(&writer, size)
    {
        tracing::debug!(%error, size, "a pipe stays as small as it is");
    }
    Ok((reader, writer))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn contents(conduit: &Conduit) -> Vec<u8> {
        let mut bytes = vec![0; conduit.len()];
        let count = conduit.peek(&mut bytes).unwrap();
        bytes.truncate(count);
        bytes
    }

    #[test]
    fn bytes_go_from_a_socket_through_it_into_a_file() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let mut conduit = Conduit::new(64 * 1024).unwrap();
        theirs.write_all(b"one two").unwrap();
        assert_eq!(conduit.fill(&ours), Ok(7));
        assert_eq!(contents(&conduit), b"one two");
        assert_eq!(conduit.drain(&file, 3), Ok(3));
        assert_eq!((conduit.len(), contents(&conduit)), (4, b" two".to_vec()));
        assert_eq!(conduit.drain(&file, 100), Ok(4));
        drop(theirs);
        assert_eq!(conduit.fill(&ours), Ok(0));
        let mut written = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut written).unwrap();
        assert_eq!(written, b"one two");
    }

    #[test]
    fn another_process_finds_what_is_in_it() {
        let mut conduit = Conduit::new(64 * 1024).unwrap();
        conduit.push(b"left behind");
        let (reader, writer) = conduit.ends();
        let (reader, writer) = (reader.try_clone_to_owned().unwrap(), writer.try_clone_to_owned().unwrap());
        drop(conduit);
        let mut conduit = Conduit::adopt(reader, writer, 64 * 1024).unwrap();
        assert_eq!((conduit.len(), contents(&conduit)), (11, b"left behind".to_vec()));
        conduit.discard(5).unwrap();
        assert_eq!(conduit.into_bytes().unwrap(), b"behind");
    }

    /// A pipe takes so many pieces, whatever their size.
    #[test]
    fn full_of_small_pieces_it_has_no_room_until_one_has_left() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut conduit = Conduit::new(64 * 1024).unwrap();
        let mut pieces = 0;
        while conduit.has_room() {
            theirs.write_all(b"x").unwrap();
            match conduit.fill(&ours) {
                Ok(count) => pieces += count,
                Err(error) => assert_eq!(error, Errno::AGAIN),
            }
            assert!(pieces < 1000, "it never fills");
        }
        assert_eq!(conduit.len(), pieces);
        let (reader, writer) = io::pipe().unwrap();
        assert_eq!(conduit.drain(&writer, 1), Ok(1));
        assert!(conduit.has_room());
        assert_eq!(conduit.fill(&ours), Ok(1));
        drop(reader);
        assert_eq!(conduit.drain(&writer, 1), Err(Errno::PIPE));
        assert_eq!(conduit.len(), pieces);
    }

    #[test]
    fn an_empty_source_does_not_make_it_full() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut conduit = Conduit::new(64 * 1024).unwrap();
        assert_eq!(conduit.fill(&ours), Err(Errno::AGAIN));
        assert!(conduit.has_room());
    }

    #[test]
    fn what_does_not_fit_waits_behind_and_nothing_overtakes_it() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|n| (n / 7) as u8).collect();
        let mut conduit = Conduit::new(64 * 1024).unwrap();
        conduit.push(&bytes);
        assert_eq!(conduit.len(), bytes.len());
        assert!(!conduit.has_room() && !conduit.behind().is_empty());
        let mut file = tempfile::tempfile().unwrap();
        while conduit.len() > 0 {
            conduit.drain(&file, 10_000).unwrap();
        }
        assert!(conduit.has_room());
        let mut written = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut written).unwrap();
        assert!(written == bytes);
    }
}
