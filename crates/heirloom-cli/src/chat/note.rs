//! Writing to a file what is in a pipe where splice(2) will not do, so that a crash neither loses nor repeats a byte.
//!
//! splice(2) refuses files that are open for appending (`>>`), and does not guard the place at which it writes against others
//! who write through the same description (`>log 2>&1`). So bytes are copied out of the pipe, written, and only then dropped
//! from the pipe; a note says beforehand what is written where. A process that finds a note of a killed one looks whether the
//! file has the bytes, and drops them from the pipe if so.
//!
//! The note is a memfd that a store holds as well. What is written at once never crosses a page of the file: so it is there or
//! not there, and never there in part. Others may write to the same file (a log of several programs): the bytes are searched
//! for in what has come since, in one piece, as the kernel keeps what is written at once to a local file together.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, fcntl_getfl, fstat, ftruncate, memfd_create, open, tell};
use rustix::io::{Errno, pread, pwrite, retry_on_intr, write};

use super::conduit::Conduit;

/// The most that is written at once, and what its end is aligned to. A file's pages may be larger, never smaller.
const PAGE: u64 = 4096;

/// Fewer bytes than these can be in what others have written by accident: then only the place where they were to be
/// counts.
const UNMISTAKABLE: usize = 16;

/// How far behind the place where they were to be bytes are searched for.
const SEARCHED: u64 = 16 * 1024 * 1024;

/// Where the note is kept.
pub(crate) struct Note {
    memfd: OwnedFd,
}

/// What is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    /// Where the file's [`end`] was before.
    at: u64,
    /// How many bytes.
    count: u64,
    /// How many bytes were in the pipe before, these included.
    in_pipe: u64,
}

impl Note {
    /// One that says nothing yet.
    pub(crate) fn new() -> io::Result<Self> {
        let memfd = memfd_create("heirloom-note", MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, Piece::BYTES as u64)?;
        Ok(Self { memfd })
    }

    /// That of another process.
    pub(crate) fn adopt(memfd: OwnedFd) -> Self {
        Self { memfd }
    }

    /// Writes the first bytes of the pipe, at most a page of them. Returns how many.
    pub(super) fn write_from(&self, file: BorrowedFd<'_>, from: &mut Conduit) -> io::Result<usize> {
        let at = end(file)?;
        let mut bytes = [0; PAGE as usize];
        let count = from.peek(&mut bytes[..(PAGE - at % PAGE) as usize])?;
        if count == 0 {
            return Ok(0);
        }
        self.write(Piece { at, count: count as u64, in_pipe: from.len() as u64 })?;
        let written = write(file, &bytes[..count]);
        if let Ok(written) = written {
            from.discard(written)?;
        }
        self.write(Piece::NONE)?;
        Ok(written?)
    }

    /// Drops from the pipe what a killed process has written and could not drop any more.
    pub(super) fn settle(&self, file: BorrowedFd<'_>, from: &mut Conduit) -> io::Result<()> {
        let Some(piece) = self.read()? else { return Ok(()) };
        // All that was written was dropped at once, so that less in the pipe means that it was.
        if piece.in_pipe == from.len() as u64 {
            let mut bytes = [0; PAGE as usize];
            let count = from.peek(&mut bytes[..piece.count.min(PAGE) as usize])?;
            if has_been_written(file, piece.at, &bytes[..count])? {
                from.discard(count)?;
            }
        }
        self.write(Piece::NONE)
    }

    fn write(&self, piece: Piece) -> io::Result<()> {
        let bytes = piece.to_bytes();
        match retry_on_intr(|| pwrite(&self.memfd, &bytes, 0))? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn read(&self) -> io::Result<Option<Piece>> {
        let mut bytes = [0; Piece::BYTES];
        let count = retry_on_intr(|| pread(&self.memfd, &mut bytes, 0))?;
        let piece = Piece::from_bytes(bytes);
        Ok((count == bytes.len() && piece != Piece::NONE).then_some(piece))
    }
}

impl AsFd for Note {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

impl Piece {
    const BYTES: usize = 24;
    const NONE: Piece = Piece { at: 0, count: 0, in_pipe: 0 };

    fn to_bytes(self) -> [u8; Piece::BYTES] {
        let mut bytes = [0; Piece::BYTES];
        for (place, number) in bytes.chunks_exact_mut(8).zip([self.at, self.count, self.in_pipe]) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; Piece::BYTES]) -> Piece {
        let number = |index: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[8 * index..][..8]);
            u64::from_ne_bytes(number)
        };
        Piece { at: number(0), count: number(1), in_pipe: number(2) }
    }
}

/// Where the next bytes go: the end of a file that is appended to, else where its description is.
fn end(file: BorrowedFd<'_>) -> io::Result<u64> {
    if fcntl_getfl(file)?.contains(OFlags::APPEND) {
        return Ok(fstat(file)?.st_size as u64);
    }
    match tell(file) {
        Ok(place) => Ok(place),
        // A device has no such place.
        Err(Errno::SPIPE) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Whether the file, whose [`end`] was `at` before, has got these bytes since.
fn has_been_written(file: BorrowedFd<'_>, at: u64, bytes: &[u8]) -> io::Result<bool> {
    let end = end(file)?;
    if bytes.is_empty() || end < at + bytes.len() as u64 {
        return Ok(false);
    }
    // It is open for writing alone.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(file) = open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty()) else {
        // Nobody else is known to write.
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
    since = vec![0; (end - at).min(SEARCHED) as usize];
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
    use std::fs::{File, OpenOptions};
    use std::io::{Seek, Write};

    use super::*;

    struct Rig {
        directory: tempfile::TempDir,
        file: File,
        conduit: Conduit,
        note: Note,
    }

    impl Rig {
        /// A file that is appended to, with so many bytes in it, and these in the pipe.
        fn new(size: usize, bytes: &[u8]) -> Rig {
            Rig::with(File::options().append(true), size, bytes)
        }

        fn with(options: &OpenOptions, size: usize, bytes: &[u8]) -> Rig {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("log");
            std::fs::write(&path, vec![b'.'; size]).unwrap();
            let mut file = options.open(path).unwrap();
            file.seek(io::SeekFrom::End(0)).unwrap();
            let mut conduit = Conduit::new(64 * 1024).unwrap();
            conduit.push(bytes);
            Rig { directory, file, conduit, note: Note::new().unwrap() }
        }

        fn written(&self) -> Vec<u8> {
            std::fs::read(self.directory.path().join("log")).unwrap()
        }

        /// As if the process had been killed when it had noted what it was about to write.
        fn note_down(&self, count: usize) {
            let at = end(self.file.as_fd()).unwrap();
            self.note.write(Piece { at, count: count as u64, in_pipe: self.conduit.len() as u64 }).unwrap();
        }

        fn settle_and_finish(&mut self) -> Vec<u8> {
            self.note.settle(self.file.as_fd(), &mut self.conduit).unwrap();
            while self.conduit.len() > 0 {
                self.note.write_from(self.file.as_fd(), &mut self.conduit).unwrap();
            }
            assert_eq!(self.note.read().unwrap(), None);
            self.written()
        }
    }

    #[test]
    fn what_is_appended_at_once_does_not_cross_a_page() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|n| (n / 3) as u8).collect();
        let mut rig = Rig::new(4000, &bytes);
        assert_eq!(rig.note.write_from(rig.file.as_fd(), &mut rig.conduit).unwrap(), 96);
        assert_eq!(rig.note.write_from(rig.file.as_fd(), &mut rig.conduit).unwrap(), 4096);
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
    fn others_write_to_the_same_file() {
        const LINE: &[u8] = b"a line of a chat\n";
        const LOG: &[u8] = b"killed by signal 9; starting again\n";
        for options in [File::options().append(true), File::options().write(true)] {
            let settled = |come_since: &[&[u8]]| {
                let mut rig = Rig::with(options, 10, LINE);
                rig.note_down(LINE.len());
                come_since.iter().for_each(|bytes| rig.file.write_all(bytes).unwrap());
                let written = rig.settle_and_finish();
                written.windows(LINE.len()).filter(|part| *part == LINE).count()
            };
            assert_eq!(settled(&[]), 1, "not written");
            assert_eq!(settled(&[LOG]), 1, "not written, but others have");
            assert_eq!(settled(&[LINE]), 1, "written");
            assert_eq!(settled(&[LINE, LOG]), 1, "written, and others after it");
            assert_eq!(settled(&[LOG, LINE]), 1, "written after others");
        }
    }

    /// What is overwritten may happen to be the same: what counts is how far the file has come.
    #[test]
    fn the_same_bytes_from_before() {
        let mut rig = Rig::with(File::options().write(true), 10, b".....");
        rig.file.seek(io::SeekFrom::Start(2)).unwrap();
        rig.note_down(5);
        rig.settle_and_finish();
        assert_eq!(rig.file.stream_position().unwrap(), 7);
    }

    #[test]
    fn a_full_disk_leaves_the_bytes_and_no_note() {
        let mut rig = Rig::new(0, b"hello");
        let full = File::options().append(true).open("/dev/full").unwrap();
        let error = rig.note.write_from(full.as_fd(), &mut rig.conduit).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        assert_eq!((rig.conduit.len(), rig.note.read().unwrap()), (5, None));
    }
}
