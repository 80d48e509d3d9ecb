//! Stdin and stdout, read and written piecemeal: no call blocks for long, and no flag of theirs is changed.
//!
//! Their open file descriptions are shared with the shell, and often with each other, so that O_NONBLOCK is not ours to
//! set. What does not block depends on what the descriptor is:
//!
//! | | after POLLIN | after POLLOUT |
//! |---|---|---|
//! | socket | MSG_DONTWAIT | MSG_DONTWAIT |
//! | pipe | RWF_NOWAIT where the kernel has it for pipes | the same; and 4096 bytes fit (PIPE_BUF, pipe(7)) |
//! | terminal | opened anew, with a description of its own that may be O_NONBLOCK | the same |
//! | file, device | never blocks for long | the same |
//!
//! A file is not opened anew, since its offset is shared too, and has to be. Nor is a pipe: one that is opened for
//! reading after its last writer has gone does not report the hang-up.
//!
//! From and to a [`Conduit`] bytes go by splice(2), which the kernel completes even for a process that is killed in it. What
//! cannot be spliced is copied, in an order in which as little as possible is in doubt in between:
//!
//! | | into the conduit | out of the conduit |
//! |---|---|---|
//! | file that is appended to (`>>`), or shared with stderr | by splice | with a [`Note`] |
//! | anything that splice(2) refuses with EINVAL | read, then pushed | copied and written, then discarded |

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, open};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2, read, write};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::termios::isatty;

use super::conduit::Conduit;
use super::note::Note;

/// The most that is copied at once where splice(2) does not work.
const COPIED: usize = 4096;

/// Where the bytes for the server come from.
pub(crate) struct Input {
    fd: OwnedFd,
    kind: Kind,
}

/// Where the bytes of the server go.
pub(crate) struct Output {
    fd: OwnedFd,
    kind: Kind,
    /// What is being written, for a process that finds out after a crash.
    note: Option<Note>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Pipe,
    Socket,
    Terminal,
    Other,
}

/// What came of a read.
#[derive(Debug)]
pub(super) enum Intake {
    Bytes(usize),
    /// Nothing, after all: poll again.
    NotNow,
    /// Nothing will come any more: end-of-file, or this error.
    Ended(Option<io::Error>),
}

/// Why a write failed for good.
#[derive(Debug)]
pub(super) enum WriteError {
    /// Whoever read the other end has gone.
    Closed,
    Failed(io::Error),
}

impl Input {
    /// The process's stdin.
    pub(crate) fn stdin() -> io::Result<Self> {
        Self::new(io::stdin().as_fd().try_clone_to_owned()?)
    }

    /// Reads from `fd`, whatever it is.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = Kind::of(&fd)?;
        let fd = own_description(fd, kind, OFlags::RDONLY);
        Ok(Self { fd, kind })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads once, after a poll for POLLIN has reported `ready`, which is not empty.
    pub(super) fn read(&self, ready: PollFlags, buffer: &mut [u8]) -> Intake {
        let result = match self.kind {
            Kind::Socket => recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT).map(|(_, count)| count),
            Kind::Pipe => read_now(&self.fd, buffer),
            _ => read(&self.fd, &mut *buffer),
        };
        Self::intake(ready, result)
    }

    /// Like [`read`](Input::read), into a conduit that has room.
    pub(super) fn splice(&self, ready: PollFlags, into: &mut Conduit) -> Intake {
        match into.fill(&self.fd) {
            Err(Errno::INVAL) => {
                let mut bytes = [0; COPIED];
                let intake = self.read(ready, &mut bytes);
                if let Intake::Bytes(count) = intake {
                    into.push(&bytes[..count]);
                }
                intake
            }
            Err(Errno::AGAIN) if !into.has_room() => Intake::NotNow,
            result => Self::intake(ready, result),
        }
    }

    fn intake(ready: PollFlags, result: Result<usize, Errno>) -> Intake {
        match result {
            Ok(0) => Intake::Ended(None),
            Ok(count) => Intake::Bytes(count),
            Err(Errno::INTR) => Intake::NotNow,
            // Another reader was faster. (Without POLLIN it was a hang-up or an error, which would be reported for ever.)
            Err(Errno::AGAIN) if ready.contains(PollFlags::IN) => Intake::NotNow,
            Err(error) => Intake::Ended(Some(error.into())),
        }
    }
}

impl Output {
    /// The process's stdout.
    pub(crate) fn stdout() -> io::Result<Self> {
        Self::new(io::stdout().as_fd().try_clone_to_owned()?)
    }

    /// Writes to `fd`, whatever it is.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = Kind::of(&fd)?;
        let fd = own_description(fd, kind, OFlags::WRONLY);
        Ok(Self { fd, kind, note: None })
    }

    /// Whether a [`splice`](Output::splice) is exact only with a note: into a file that is appended to, or that stderr goes to as
    /// well. The place at which splice(2) writes is not guarded against who writes at the same time.
    pub(crate) fn wants_note(&self) -> bool {
        let appends = || fcntl_getfl(&self.fd).is_ok_and(|flags| flags.contains(OFlags::APPEND));
        self.kind == Kind::File && (appends() || is_same_file(&self.fd, io::stderr()))
    }

    /// From now on notes down what is written.
    pub(crate) fn keep_note(&mut self, note: Note) {
        self.note = Some(note);
    }

    pub(crate) fn note(&self) -> Option<&Note> {
        self.note.as_ref()
    }

    /// Settles what a killed process has left in doubt: drops from the conduit what was written already.
    pub(super) fn settle(&self, from: &mut Conduit) -> io::Result<()> {
        match &self.note {
            Some(note) => note.settle(self.fd.as_fd(), from),
            None => Ok(()),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether a poll, even one for nothing, has reported that nobody will read what is written.
    pub(super) fn is_closed(ready: PollFlags) -> bool {
        ready.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
    }

    /// Writes once, after POLLOUT. Returns how many bytes were written: 0 means not now, after all.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<usize, WriteError> {
        let chunk = &bytes[..bytes.len().min(self.kind.chunk())];
        let result = match self.kind {
            Kind::Socket => send(&self.fd, chunk, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Pipe => write_now(&self.fd, chunk),
            _ => write(&self.fd, chunk),
        };
        self.written(result)
    }

    /// Like [`write`](Output::write), what is in a conduit.
    pub(super) fn splice(&self, from: &mut Conduit) -> Result<usize, WriteError> {
        let result = match &self.note {
            Some(note) => note
                .write_from(self.fd.as_fd(), from)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            None => from.drain(&self.fd, self.kind.step()),
        };
        match result {
            Err(Errno::INVAL) => self.copy(from),
            result => self.written(result),
        }
    }

    fn copy(&self, from: &mut Conduit) -> Result<usize, WriteError> {
        let mut bytes = [0; COPIED];
        let count = from.peek(&mut bytes[..self.kind.chunk().min(COPIED)]).map_err(WriteError::Failed)?;
        let written = self.write(&bytes[..count])?;
        from.discard(written).map_err(WriteError::Failed)?;
        Ok(written)
    }

    fn written(&self, result: Result<usize, Errno>) -> Result<usize, WriteError> {
        match result {
            Ok(count) => Ok(count),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(WriteError::Closed),
            // A terminal that has hung up.
            Err(Errno::IO) if self.kind == Kind::Terminal => Err(WriteError::Closed),
            Err(error) => Err(WriteError::Failed(error.into())),
        }
    }
}

impl Kind {
    fn of(fd: &OwnedFd) -> io::Result<Self> {
        Ok(match FileType::from_raw_mode(fstat(fd)?.st_mode) {
            FileType::RegularFile => Self::File,
            FileType::Fifo => Self::Pipe,
            FileType::Socket => Self::Socket,
            FileType::CharacterDevice if isatty(fd) => Self::Terminal,
            _ => Self::Other,
        })
    }

    /// The most that is written at once.
    fn chunk(self) -> usize {
        match self {
            Self::File | Self::Socket => 64 * 1024,
            Self::Pipe | Self::Other => 4096,
            Self::Terminal => 256,
        }
    }

    /// The most that is spliced at once. Into a pipe that never blocks; into a socket it does, if more is sent than has room.
    fn step(self) -> usize {
        match self {
            Self::File | Self::Pipe => 64 * 1024,
            Self::Socket | Self::Other => 4096,
            Self::Terminal => 256,
        }
    }
}

fn is_same_file(a: impl AsFd, b: impl AsFd) -> bool {
    let identity = |fd: BorrowedFd<'_>| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    identity(a.as_fd()).is_some_and(|a| identity(b.as_fd()) == Some(a))
}

/// A terminal with a non-blocking open file description of our own where we may open it, else `fd` as it is.
fn own_description(fd: OwnedFd, kind: Kind, access: OFlags) -> OwnedFd {
    if kind != Kind::Terminal {
        return fd;
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).unwrap_or(fd)
}

/// The offset that means "where the file is" to preadv2(2) and pwritev2(2): -1.
const CURRENT: u64 = u64::MAX;

/// Reads without blocking, or after POLLIN as good as that where the kernel lacks RWF_NOWAIT for it (before Linux 6.4,
/// and for named pipes).
fn read_now(fd: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    match preadv2(fd, &mut [IoSliceMut::new(buffer)], CURRENT, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => read(fd, buffer),
        result => result,
    }
}

/// Writes without blocking, or after POLLOUT as good as that, as in [`read_now`].
fn write_now(fd: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    match pwritev2(fd, &[IoSlice::new(bytes)], CURRENT, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => write(fd, bytes),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use rustix::event::{PollFd, Timespec, poll};
    use rustix::fs::{CWD, fcntl_getfl, mknodat};

    use super::*;

    fn ready(fd: BorrowedFd<'_>, events: PollFlags) -> PollFlags {
        let mut fds = [PollFd::from_borrowed_fd(fd, events)];
        poll(&mut fds, Some(&Timespec::default())).unwrap();
        fds[0].revents()
    }

    /// Reads until nothing more comes: the bytes, and whether the input has ended.
    fn read_all(input: &Input) -> (Vec<u8>, bool) {
        let (mut all, mut buffer) = (Vec::new(), [0; 1000]);
        loop {
            let ready = ready(input.fd(), PollFlags::IN);
            if ready.is_empty() {
                return (all, false);
            }
            match input.read(ready, &mut buffer) {
                Intake::Bytes(count) => all.extend(&buffer[..count]),
                Intake::NotNow => return (all, false),
                Intake::Ended(None) => return (all, true),
                Intake::Ended(Some(error)) => panic!("{error}"),
            }
        }
    }

    /// Writes until it would block: how much fitted.
    fn fill(output: &Output) -> usize {
        let mut total = 0;
        while ready(output.fd(), PollFlags::OUT).contains(PollFlags::OUT) {
            match output.write(&[b'x'; 100_000]).unwrap() {
                0 => break,
                count => total += count,
            }
        }
        total
    }

    #[test]
    fn a_pipe_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        let input = Input::new(reader.into()).unwrap();
        assert_eq!(read_all(&input), (vec![], false));
        writer.write_all(b"hello").unwrap();
        assert_eq!(read_all(&input), (b"hello".to_vec(), false));
        writer.write_all(b"bye").unwrap();
        drop(writer);
        assert_eq!(read_all(&input), (b"bye".to_vec(), true));
    }

    #[test]
    fn a_reader_or_a_writer_that_was_late_does_not_block() {
        let (reader, writer) = io::pipe().unwrap();
        let input = Input::new(reader.into()).unwrap();
        // As if another reader of the same pipe had been faster than us after the poll.
        let mut buffer = [0; 10];
        assert!(matches!(input.read(PollFlags::IN, &mut buffer), Intake::NotNow));
        let output = Output::new(writer.into()).unwrap();
        assert_eq!(fill(&output), 65536);
        assert_eq!(output.write(b"x").unwrap(), 0);
    }

    #[test]
    fn a_named_pipe_works_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let pipe = File::options().read(true).write(true).open(path).unwrap();
        let input = Input::new(pipe.try_clone().unwrap().into()).unwrap();
        let output = Output::new(pipe.into()).unwrap();
        assert_eq!(fill(&output), 65536);
        assert_eq!(read_all(&input).0.len(), 65536);
    }

    #[test]
    fn a_socket_does_not_block_and_stays_blocking() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let input = Input::new(ours.try_clone().unwrap().into()).unwrap();
        let output = Output::new(ours.into()).unwrap();
        assert!(fill(&output) > 4096);
        // A socket that polls full still takes a little.
        while output.write(&[b'x'; 4096]).unwrap() > 0 {}
        theirs.write_all(b"hello").unwrap();
        assert_eq!(read_all(&input), (b"hello".to_vec(), false));
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_all(&input), (vec![], true));
        assert!(!fcntl_getfl(output.fd()).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn a_file_is_read_and_written_at_the_offset_that_others_share() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abcdef").unwrap();
        file.seek(io::SeekFrom::Start(2)).unwrap();
        let input = Input::new(file.try_clone().unwrap().into()).unwrap();
        assert_eq!(read_all(&input), (b"cdef".to_vec(), true));
        let output = Output::new(file.try_clone().unwrap().into()).unwrap();
        assert_eq!(output.write(b"ghi").unwrap(), 3);
        file.write_all(b"jkl").unwrap();
        file.rewind().unwrap();
        let mut whole = String::new();
        file.read_to_string(&mut whole).unwrap();
        assert_eq!(whole, "abcdefghijkl");
    }

    #[test]
    fn devices_work_and_a_full_one_is_an_error() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let input = Input::new(null.try_clone().unwrap().into()).unwrap();
        assert_eq!(read_all(&input), (vec![], true));
        assert_eq!(Output::new(null.into()).unwrap().write(b"x").unwrap(), 1);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = Output::new(full.into()).unwrap().write(b"x").unwrap_err();
        assert!(matches!(error, WriteError::Failed(_)), "{error:?}");
    }

    #[test]
    fn what_cannot_be_read_has_ended() {
        let directory = File::open("/").unwrap();
        let input = Input::new(directory.into()).unwrap();
        let mut buffer = [0; 10];
        assert!(matches!(input.read(PollFlags::IN, &mut buffer), Intake::Ended(Some(_))));
    }

    #[test]
    fn a_reader_that_has_gone_is_noticed_with_and_without_a_write() {
        let (reader, writer) = io::pipe().unwrap();
        let output = Output::new(writer.into()).unwrap();
        assert!(!Output::is_closed(ready(output.fd(), PollFlags::empty())));
        drop(reader);
        assert!(Output::is_closed(ready(output.fd(), PollFlags::empty())));
        assert!(matches!(output.write(b"x"), Err(WriteError::Closed)));

        let (ours, theirs) = UnixStream::pair().unwrap();
        let output = Output::new(ours.into()).unwrap();
        drop(theirs);
        assert!(Output::is_closed(ready(output.fd(), PollFlags::empty())));
        assert!(matches!(output.write(b"x"), Err(WriteError::Closed)));
    }
}
