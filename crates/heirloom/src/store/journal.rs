//! A journal: an append-only log in one memfd, from which the next process reads what the last one had done when it was
//! killed.
//!
//! What it promises: whatever moment the process dies at, [`Journal::open`] gives every record whose
//! [`append`](Journal::append) had returned, in order and nothing else, since the last checkpoint; a checkpoint is there as a
//! whole or not at all. The file offset, which is shared, is neither used nor moved. A journal has one writer at a time.
//!
//! The file: two header slots, each with a number, where the records begin, and a checksum; the valid one with the higher
//! number counts. A record is its length, a checksum over its place, length and contents, and its contents; the first that is
//! not whole ends the log. A checkpoint writes its records on the page behind the end, then the header slot that does not
//! count, and then gives the memory of what was before back. So the file only grows, and the memory does not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstat, ftruncate, memfd_create};
use rustix::io::{Errno, pread, pwrite};

use crate::kind::Kind;
use crate::limits::Limits;

const MAGIC: &[u8; 8] = b"heirlog1";
/// Bytes of a header slot: magic, number, start, checksum; the rest is room.
const SLOT: u64 = 64;
const SLOT_USED: usize = 28;
/// Where records may begin: the slots have the first page for themselves.
const PAGE: u64 = 4096;
/// Length (one more, so that zeros are no record) and checksum before each record.
const PREFIX: usize = 8;
/// So much is written before a checkpoint is worth its while, however small that would be.
const ENOUGH: u64 = 256 * 1024;

/// Why what should be a journal cannot be read.
///
/// ```
/// use heirloom::{Limits, store::{Journal, JournalError}};
///
/// let file = std::fs::File::open("/dev/null")?;
/// let error = Journal::open(file.into(), &Limits::default()).unwrap_err();
/// assert!(matches!(error, JournalError::NotAJournal));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// It is no memfd, or has no valid header.
    #[error("this is no journal of Heirloom")]
    NotAJournal,
    /// It is larger than [`Limits::manifest_bytes`].
    #[error("the journal holds {bytes} bytes, and more than {limit} are not read")]
    TooLarge {
        /// How large it is.
        bytes: u64,
        /// The limit.
        limit: usize,
    },
    /// A system call failed.
    #[error("cannot read the journal: {0}")]
    Io(#[from] io::Error),
}

/// A log in a memfd that outlives its writer wherever somebody else holds a duplicate.
///
/// ```
/// use heirloom::{Limits, store::Journal};
/// use std::os::fd::AsFd;
///
/// let mut journal = Journal::create("events")?;
/// journal.append(b"one")?;
/// journal.append(b"two")?;
/// let kept = journal.as_fd().try_clone_to_owned()?; // by a store
/// drop(journal); // however this process ends
///
/// let (mut journal, records) = Journal::open(kept, &Limits::default())?;
/// assert_eq!(records, [b"one", b"two"]);
/// journal.checkpoint([b"one and two"])?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Journal {
    file: OwnedFd,
    /// The number of the header that counts.
    number: u64,
    /// Where the records begin, where the last checkpoint's end, and where the next one is written.
    start: u64,
    checkpoint_end: u64,
    end: u64,
}

impl Journal {
    /// A new journal without records; `name` is what `/proc` shows.
    ///
    /// # Errors
    ///
    /// What memfd_create(2) or pwrite(2) said: too many open files, no memory, …
    pub fn create(name: &str) -> io::Result<Journal> {
        let flags = MemfdFlags::CLOEXEC;
        let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create(name, flags)?,
            created => created?,
        };
        let mut journal = Journal { file, number: 0, start: PAGE, checkpoint_end: PAGE, end: PAGE };
        journal.publish(PAGE)?;
        Ok(journal)
    }

    /// Goes on with a journal: what was written since the last checkpoint, that of the checkpoint itself first.
    ///
    /// A last record that is not whole is cut off, so that this is for the one who writes from now on.
    ///
    /// # Errors
    ///
    /// See [`JournalError`].
    pub fn open(file: OwnedFd, limits: &Limits) -> Result<(Journal, Vec<Vec<u8>>), JournalError> {
        if Kind::of(&file)? != Kind::Memfd {
            return Err(JournalError::NotAJournal);
        }
        let size = u64::try_from(fstat(&file).map_err(io::Error::from)?.st_size).unwrap_or(0);
        let header = read(&file, 0, size.min(2 * SLOT) as usize)?;
        let slots = header.chunks(SLOT as usize).filter_map(read_slot);
        let Some((number, start)) = slots.max().filter(|&(_, start)| start >= PAGE) else {
            return Err(JournalError::NotAJournal);
        };
        let bytes = size.saturating_sub(start);
        if bytes > limits.manifest_bytes as u64 {
            return Err(JournalError::TooLarge { bytes, limit: limits.manifest_bytes });
        }
        let log = read(&file, start, bytes as usize)?;
        let (mut records, mut at) = (Vec::new(), 0);
        while let Some(record) = read_record(&log[at..], start + at as u64) {
            at += PREFIX + record.len();
            records.push(record.to_vec());
        }
        let end = start + at as u64;
        // What is left of a torn record, or of a checkpoint that was not finished, must never be taken for a record.
        ftruncate(&file, end).map_err(io::Error::from)?;
        // The checkpoint's own end is not known any more; taking all for one is only a little late for the next.
        Ok((Journal { file, number, start, checkpoint_end: end, end }, records))
    }

    /// Writes a record at the end, with one system call. When this has returned it survives this process.
    ///
    /// # Errors
    ///
    /// What pwrite(2) said: memory, or a limit on file sizes. The record is not in the journal then.
    pub fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(PREFIX + record.len());
        push_record(&mut bytes, self.end, record)?;
        self.write_behind(self.end, &bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Puts these records in place of all that are there.
    ///
    /// # Errors
    ///
    /// As [`Journal::append`]. The journal is as it was then.
    pub fn checkpoint(&mut self, records: impl IntoIterator<Item = impl AsRef<[u8]>>) -> io::Result<()> {
        // At least a prefix of zeros stays before it: whoever reads what is there now ends at that.
        let start = (self.end + PREFIX as u64).next_multiple_of(PAGE);
        let mut bytes = Vec::new();
        for record in records {
            let place = start + bytes.len() as u64;
            push_record(&mut bytes, place, record.as_ref())?;
        }
        self.write_behind(start, &bytes)?;
        if let Err(error) = self.publish(start) {
            let _ = ftruncate(&self.file, self.end);
            return Err(error);
        }
        let before = std::mem::replace(&mut self.start, start);
        self.end = start + bytes.len() as u64;
        self.checkpoint_end = self.end;
        // Where that cannot be done, the memory is used until the journal is closed.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = fallocate(&self.file, hole, before, start - before);
        Ok(())
    }

    /// Whether so much was appended since the last checkpoint that another one is worth its while: over time they cost as much
    /// as the appending, at most.
    #[must_use]
    pub fn wants_checkpoint(&self) -> bool {
        self.end - self.checkpoint_end > ENOUGH.max(2 * (self.checkpoint_end - self.start))
    }

    /// How many bytes of records there are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Makes the records that begin there the ones that count.
    fn publish(&mut self, start: u64) -> io::Result<()> {
        let number = self.number + 1;
        let mut slot = [0; SLOT_USED];
        slot[..8].copy_from_slice(MAGIC);
        slot[8..16].copy_from_slice(&number.to_le_bytes());
        slot[16..24].copy_from_slice(&start.to_le_bytes());
        let crc = crc32fast::hash(&slot[..24]);
        slot[24..].copy_from_slice(&crc.to_le_bytes());
        write(&self.file, SLOT * (number % 2), &slot)?;
        self.number = number;
        Ok(())
    }

    /// Writes where nothing is yet, and leaves nothing there if that fails.
    fn write_behind(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        write(&self.file, at, bytes).inspect_err(|_| {
            let _ = ftruncate(&self.file, self.end);
        })
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The number and the start of a valid slot.
fn read_slot(slot: &[u8]) -> Option<(u64, u64)> {
    let slot = slot.get(..SLOT_USED)?;
    let word = |at: usize| Some(u64::from_le_bytes(slot.get(at..at + 8)?.try_into().ok()?));
    let crc = u32::from_le_bytes(slot[24..].try_into().ok()?);
    (&slot[..8] == MAGIC && crc32fast::hash(&slot[..24]) == crc).then_some((word(8)?, word(16)?))
}

/// The record at the beginning of `bytes`, which are at this place in the file, if there is a whole one.
fn read_record(bytes: &[u8], place: u64) -> Option<&[u8]> {
    let (prefix, rest) = bytes.split_at_checked(PREFIX)?;
    let length = u32::from_le_bytes(prefix[..4].try_into().ok()?).checked_sub(1)?;
    let crc = u32::from_le_bytes(prefix[4..].try_into().ok()?);
    let record = rest.get(..length as usize)?;
    (checksum(place, record) == crc).then_some(record)
}

fn push_record(bytes: &mut Vec<u8>, place: u64, record: &[u8]) -> io::Result<()> {
    let length = u32::try_from(record.len() + 1).map_err(|_| io::Error::from(Errno::FBIG))?;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&checksum(place, record).to_le_bytes());
    bytes.extend_from_slice(record);
    Ok(())
}

/// With the place, so that no part of a record's contents can ever pass for one.
fn checksum(place: u64, record: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&place.to_le_bytes());
    crc.update(&(record.len() as u64).to_le_bytes());
    crc.update(record);
    crc.finalize()
}

fn read(file: &OwnedFd, at: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let place = at + bytes.len() as u64;
        match pread(file, spare_capacity(&mut bytes), place) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

fn write(file: &OwnedFd, at: u64, bytes: &[u8]) -> io::Result<()> {
    let mut written = 0;
    while written < bytes.len() {
        match pwrite(file, &bytes[written..], at + written as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// The records that another process would find now.
    fn records(journal: &Journal) -> Vec<Vec<u8>> {
        Journal::open(copy(journal, u64::MAX), &Limits::default()).unwrap().1
    }

    /// A copy of the file as it is, up to this length.
    fn copy(journal: &Journal, length: u64) -> OwnedFd {
        let size = fstat(journal).unwrap().st_size as u64;
        let bytes = read(&journal.file, 0, size.min(length) as usize).unwrap();
        let copy = memfd_create("copy", MemfdFlags::CLOEXEC).unwrap();
        write(&copy, 0, &bytes).unwrap();
        copy
    }

    #[test]
    fn memory_is_given_back_at_a_checkpoint() {
        let mut journal = Journal::create("test").unwrap();
        let mut checkpoints = 0;
        for round in 0..20_000_u32 {
            journal.append(&[round as u8; 200]).unwrap();
            if journal.wants_checkpoint() {
                checkpoints += 1;
                journal.checkpoint([round.to_le_bytes()]).unwrap();
            }
        }
        // st_blocks counts 512 bytes each.
        let used = fstat(&journal).unwrap().st_blocks as u64 * 512;
        assert!(checkpoints > 5 && used < 2 * ENOUGH, "{checkpoints} checkpoints, {used} bytes");
        assert_eq!(records(&journal).len() as u64, 1 + (journal.end - journal.checkpoint_end) / 208);
    }

    #[test]
    fn a_write_that_fails_leaves_the_journal_as_it_was() {
        let mut journal = Journal::create("test").unwrap();
        journal.append(b"one").unwrap();
        let read_only = rustix::fs::open(
            format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&journal.file)),
            rustix::fs::OFlags::RDONLY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let writable = std::mem::replace(&mut journal.file, read_only);
        assert!(journal.append(b"two").is_err());
        assert!(journal.checkpoint([b"three"]).is_err());
        journal.file = writable;
        assert_eq!(records(&journal), [b"one"]);
        journal.append(b"four").unwrap();
        assert_eq!(records(&journal), [&b"one"[..], b"four"]);
    }

    #[test]
    fn what_is_no_journal_is_refused() {
        let memfd = || memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let empty = memfd();
        let zeros = memfd();
        write(&zeros, 0, &[0; 9000]).unwrap();
        let file = tempfile::tempfile().unwrap();
        for file in [empty, zeros, file.into()] {
            let error = Journal::open(file, &Limits::default()).unwrap_err();
            assert!(matches!(error, JournalError::NotAJournal), "{error}");
        }
        let mut journal = Journal::create("test").unwrap();
        journal.append(&[0; 1000]).unwrap();
        let limits = Limits { manifest_bytes: 1007, ..Limits::default() };
        let error = Journal::open(copy(&journal, u64::MAX), &limits).unwrap_err();
        assert!(matches!(error, JournalError::TooLarge { bytes: 1008, .. }), "{error}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Append(Vec<u8>),
        Checkpoint(Vec<Vec<u8>>),
        Reopen,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let record = || prop_oneof![4 => prop::collection::vec(any::<u8>(), 0..40), 1 => Just(vec![0; 5000])];
        prop::collection::vec(
            prop_oneof![
                6 => record().prop_map(Step::Append),
                1 => prop::collection::vec(record(), 0..4).prop_map(Step::Checkpoint),
                1 => Just(Step::Reopen),
            ],
            0..30,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_is_a_list_of_records(steps in steps()) {
            let mut journal = Journal::create("test").unwrap();
            let mut expected: Vec<Vec<u8>> = Vec::new();
            for step in steps {
                match step {
                    Step::Append(record) => {
                        journal.append(&record).unwrap();
                        expected.push(record);
                    }
                    Step::Checkpoint(records) => {
                        journal.checkpoint(&records).unwrap();
                        expected = records;
                    }
                    Step::Reopen => {
                        let kept = journal.as_fd().try_clone_to_owned().unwrap();
                        let read;
                        (journal, read) = Journal::open(kept, &Limits::default()).unwrap();
                        prop_assert_eq!(&read, &expected);
                    }
                }
                prop_assert_eq!(records(&journal), expected.clone());
            }
        }

        /// A kill in the middle of a write: some of its bytes are there, the header or the rest is not.
        #[test]
        fn a_torn_write_is_no_record(first in prop::collection::vec(any::<u8>(), 0..40), cut: Index, whole: bool) {
            let mut journal = Journal::create("test").unwrap();
            journal.append(&first).unwrap();
            let before = journal.end;
            if whole {
                // A checkpoint of which all is there but the header.
                let mut bytes = Vec::new();
                let start = (journal.end + PREFIX as u64).next_multiple_of(PAGE);
                push_record(&mut bytes, start, b"not yet").unwrap();
                write(&journal.file, start, &bytes).unwrap();
                prop_assert_eq!(records(&journal), [first]);
            } else {
                // What is torn contains what would be a record, if it were one.
                let mut inner = Vec::new();
                push_record(&mut inner, before + PREFIX as u64, b"a record in a record").unwrap();
                journal.append(&inner).unwrap();
                let length = before + cut.index((journal.end - before) as usize) as u64;
                let (mut torn, read) = Journal::open(copy(&journal, length), &Limits::default()).unwrap();
                prop_assert_eq!(read, [first.clone()]);
                torn.append(b"").unwrap();
                prop_assert_eq!(records(&torn), [first, vec![]]);
            }
        }

        #[test]
        fn any_bytes_are_a_journal_or_an_error(change in prop::collection::vec((any::<Index>(), any::<u8>()), 0..8)) {
            let mut journal = Journal::create("test").unwrap();
            journal.append(b"one").unwrap();
            journal.checkpoint([b"two", b"and"]).unwrap();
            journal.append(b"three").unwrap();
            let copy = copy(&journal, u64::MAX);
            for (at, byte) in change {
                let place = at.index(2 * PAGE as usize + 64);
                write(&copy, place as u64, &[byte]).unwrap();
            }
            let _ = Journal::open(copy, &Limits::default());
        }
    }
}
