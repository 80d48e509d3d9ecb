//! Appending to a file (`>>`) what is in a pipe, so that a crash neither loses nor repeats a byte.
//!
//! splice(2) refuses files that are open for appending. So bytes are copied out of the pipe, appended, and only then
//! dropped from the pipe; a note says beforehand what is appended where. A process that finds a note of a killed one
//! looks whether the file has the bytes, and drops them from the pipe if so.
//!
//! The note is a memfd that a store holds as well. What is appended at once never crosses a page of the file: so it is
//! there or not there, and never there in part. Others may append to the same file (a log of several programs): the bytes
//! are searched for in what has come since, in one piece, as the kernel keeps appends of a local file together.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, fstat, ftruncate, memfd_create, open};
use rustix::io::{Errno, pread, pwrite, retry_on_intr, write};

use super::conduit::Conduit;

/// The most that is appended at once, and what its end is aligned to. A file's pages may be larger, never smaller.
const PAGE: u64 = 4096;

/// Fewer bytes than these can be in what others have appended by accident: then only the place where they were to be
/// counts.
const UNMISTAKABLE: usize = 16;

/// How far behind the place where they were to be bytes are searched for.
const SEARCHED: u64 = 16 * 1024 * 1024;

/// Where the note is kept.
pub(crate) struct Note {
    memfd: OwnedFd,
}

/// What is being appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Append {
    /// The size of the file before.
    at: u64,
    /// How many bytes.
    count: u64,
    /// How many bytes were in the pipe before, these included.
    in_pipe: u64,
}

impl Note {
    /// One that says nothing yet.
    pub(crate) fn new() -> io::Result<Self> {
        let memfd = memfd_create("heirloom-append", MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, Append::BYTES as u64)?;
        Ok(Self { memfd })
    }

    /// That of another process.
    pub(crate) fn adopt(memfd: OwnedFd) -> Self {
        Self { memfd }
    }

    /// Appends the first bytes of the pipe, at most a page of them. Returns how many.
    pub(super) fn append(&self, file: BorrowedFd<'_>, from: &mut Conduit) -> io::Result<usize> {
        let at = fstat(file)?.st_size as u64;
        let mut bytes = [0; PAGE as usize];
        let count = from.peek(&mut bytes[..(PAGE - at % PAGE) as usize])?;
        if count == 0 {
            return Ok(0);
        }
        self.write(Append { at, count: count as u64, in_pipe: from.len() as u64 })?;
        let written = write(file, &bytes[..count]);
        if let Ok(written) = written {
            from.discard(written)?;
        }
        self.write(Append::NONE)?;
        Ok(written?)
    }

    /// Drops from the pipe what a killed process has appended and could not drop any more.
    pub(super) fn settle(&self, file: BorrowedFd<'_>, from: &mut Conduit) -> io::Result<()> {
        let Some(append) = self.read()? else { return Ok(()) };
        // All that was appended was dropped at once, so that less in the pipe means that it was.
        if append.in_pipe == from.len() as u64 {
            let mut bytes = [0; PAGE as usize];
            let count = from.peek(&mut bytes[..append.count.min(PAGE) as usize])?;
            if has_been_appended(file, append.at, &bytes[..count])? {
                from.discard(count)?;
            }
        }
        self.write(Append::NONE)
    }

    fn write(&self, append: Append) -> io::Result<()> {
        let bytes = append.to_bytes();
        match retry_on_intr(|| pwrite(&self.memfd, &bytes, 0))? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn read(&self) -> io::Result<Option<Append>> {
        let mut bytes = [0; Append::BYTES];
        let count = retry_on_intr(|| pread(&self.memfd, &mut bytes, 0))?;
        let append = Append::from_bytes(bytes);
        Ok((count == bytes.len() && append != Append::NONE).then_some(append))
    }
}

impl AsFd for Note {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

impl Append {
    const BYTES: usize = 24;
    const NONE: Append = Append { at: 0, count: 0, in_pipe: 0 };

    fn to_bytes(self) -> [u8; Append::BYTES] {
        let mut bytes = [0; Append::BYTES];
        for (place, number) in bytes.chunks_exact_mut(8).zip([self.at, self.count, self.in_pipe]) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; Append::BYTES]) -> Append {
        let number = |index: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[8 * index..][..8]);
            u64::from_ne_bytes(number)
        };
        Append { at: number(0), count: number(1), in_pipe: number(2) }
    }
}

/// Whether the file, which was `at` bytes long before, has got these bytes since.
fn has_been_appended(file: BorrowedFd<'_>, at: u64, bytes: &[u8]) -> io::Result<bool> {
    let size = fstat(file)?.st_size as u64;
    if bytes.is_empty() || size < at + bytes.len() as u64 {
        return Ok(false);
    }
    // It is open for writing alone.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(file) = open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty()) else {
        // Nobody else is known to append.
        return Ok(true);
    };
    let mut since = vec![0; bytes.len()];
    read_at(&file, &mut since, at)?;
    if since == bytes {
        return Ok(true);
    }
    if bytes.len() < UNMISTAKABLE {
        return Ok(false);
    }
    // Somebody else's came between.
    since = vec![0; (size - at).min(SEARCHED) as usize];
    let count = read_at(&file, &mut since, at)?;
    Ok(since[..count].windows(bytes.len()).any(|part| part == bytes))
}

fn read_at(file: &OwnedFd, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match pread(file, &mut buffer[count..], at + count as u64) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    struct Rig {
        directory: tempfile::TempDir,
        file: File,
        conduit: Conduit,
        note: Note,
    }

    impl Rig {
        /// A file with so many bytes in it, and these in the pipe.
        fn new(size: usize, bytes: &[u8]) -> Rig {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("log");
            std::fs::write(&path, vec![b'.'; size]).unwrap();
            let file = File::options().append(true).open(path).unwrap();
            let mut conduit = Conduit::new(64 * 1024).unwrap();
            conduit.push(bytes);
            Rig { directory, file, conduit, note: Note::new().unwrap() }
        }

        fn written(&self) -> Vec<u8> {
            std::fs::read(self.directory.path().join("log")).unwrap()
        }

        /// As if the process had been killed when it had noted what it was about to append.
        fn note_down(&self, count: usize) {
            let at = self.written().len() as u64;
            self.note.write(Append { at, count: count as u64, in_pipe: self.conduit.len() as u64 }).unwrap();
        }

        fn settle_and_finish(&mut self) -> Vec<u8> {
            self.note.settle(self.file.as_fd(), &mut self.conduit).unwrap();
            while self.conduit.len() > 0 {
                self.note.append(self.file.as_fd(), &mut self.conduit).unwrap();
            }
            assert_eq!(self.note.read().unwrap(), None);
            self.written()
        }
    }

    #[test]
    fn what_is_appended_at_once_does_not_cross_a_page() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|n| (n / 3) as u8).collect();
        let mut rig = Rig::new(4000, &bytes);
        assert_eq!(rig.note.append(rig.file.as_fd(), &mut rig.conduit).unwrap(), 96);
        assert_eq!(rig.note.append(rig.file.as_fd(), &mut rig.conduit).unwrap(), 4096);
        assert!(rig.settle_and_finish()[4000..] == bytes);
    }

    #[test]
    fn killed_before_the_write() {
        let mut rig = Rig::new(10, b"hello");
        rig.note_down(5);
        assert_eq!(rig.settle_and_finish(), b"..........hello");
    }

    #[test]
    fn killed_between_the_write_and_the_drop() {
        let mut rig = Rig::new(10, b"hello, world");
        rig.note_down(5);
        rig.file.write_all(b"hello").unwrap();
        assert_eq!(rig.settle_and_finish(), b"..........hello, world");
    }

    #[test]
    fn killed_after_the_drop() {
        let mut rig = Rig::new(10, b"hello");
        rig.note_down(5);
        rig.file.write_all(b"hello").unwrap();
        rig.conduit.discard(5).unwrap();
        assert_eq!(rig.settle_and_finish(), b"..........hello");
        // What the same bytes look like the next time is no matter.
        rig.conduit.push(b"hello");
        assert_eq!(rig.settle_and_finish(), b"..........hellohello");
    }

    /// Such as the supervisor, which logs to the same file that the process was killed.
    #[test]
    fn others_append_to_the_same_file() {
        const LINE: &[u8] = b"a line of a chat\n";
        let before = |rig: &Rig| rig.note_down(LINE.len());
        let log = |rig: &mut Rig| rig.file.write_all(b"killed by signal 9; starting again\n").unwrap();
        let append = |rig: &mut Rig| rig.file.write_all(LINE).unwrap();
        let finish = |mut rig: Rig| {
            let written = rig.settle_and_finish();
            written.windows(LINE.len()).filter(|part| *part == LINE).count()
        };

        let mut rig = Rig::new(10, LINE);
        before(&rig);
        log(&mut rig);
        assert_eq!(finish(rig), 1, "not appended");

        let mut rig = Rig::new(10, LINE);
        before(&rig);
        append(&mut rig);
        log(&mut rig);
        assert_eq!(finish(rig), 1, "appended, and others after it");

        let mut rig = Rig::new(10, LINE);
        before(&rig);
        log(&mut rig);
        append(&mut rig);
        assert_eq!(finish(rig), 1, "appended after others");
    }

    #[test]
    fn a_full_disk_leaves_the_bytes_and_no_note() {
        let mut rig = Rig::new(0, b"hello");
        let full = File::options().append(true).open("/dev/full").unwrap();
        let error = rig.note.append(full.as_fd(), &mut rig.conduit).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        assert_eq!((rig.conduit.len(), rig.note.read().unwrap()), (5, None));
    }
}
