//! The ledger: a [`Journal`] of what a store holds, since a store knows no more of a descriptor than a name.
//!
//! What it promises: each entry and state is in the journal before the call that wrote it returns, and ids that were given
//! out once are known for ever, whether their items have ended or not.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use minicbor::bytes::ByteVec;

use super::journal::{Journal, JournalError};
use crate::item::{Entry, ItemId};
use crate::limits::Limits;

/// What the journal's records say, each an array whose first element is one of these. The numbers are for ever.
const PUT: u8 = 1;
const STATE: u8 = 2;
const REMOVED: u8 = 3;
const APPLICATION: u8 = 4;
const NEXT_ID: u8 = 5;
const SUPERVISOR: u8 = 6;

#[derive(Debug)]
pub(super) struct Ledger {
    journal: Journal,
    entries: BTreeMap<ItemId, Entry>,
    application: Option<Vec<u8>>,
    next_id: u64,
    /// With whom everything is stored, if it says so.
    supervisor: Option<String>,
}

impl Ledger {
    /// A new one.
    pub(super) fn create() -> io::Result<Ledger> {
        let journal = Journal::create("heirloom-ledger")?;
        Ok(Ledger::of(journal))
    }

    /// Goes on with one.
    pub(super) fn open(file: OwnedFd, limits: &Limits) -> Result<Ledger, LedgerError> {
        let (journal, records) = Journal::open(file, limits)?;
        let mut ledger = Ledger::of(journal);
        for record in &records {
            ledger.read(record)?;
        }
        Ok(ledger)
    }

    /// An empty one, in which the ids of this one are known to have been given out.
    pub(super) fn anew(&self) -> io::Result<Ledger> {
        let mut ledger = Ledger::create()?;
        ledger.write(&encoded(NEXT_ID, &self.next_id))?;
        ledger.next_id = self.next_id;
        Ok(ledger)
    }

    fn of(journal: Journal) -> Ledger {
        let (entries, next_id) = (BTreeMap::new(), ItemId::FIRST.0);
        Ledger { journal, entries, application: None, next_id, supervisor: None }
    }

    /// Whether what it lists can be stored with this supervisor. One of an older version does not say with whom it is.
    pub(super) fn may_be_of(&self, supervisor: &str) -> bool {
        self.supervisor.as_deref().is_none_or(|its| its == supervisor)
    }

    pub(super) fn set_supervisor(&mut self, supervisor: &str) -> io::Result<()> {
        if self.supervisor.as_deref() != Some(supervisor) {
            self.write(&encoded(SUPERVISOR, &supervisor))?;
            self.supervisor = Some(supervisor.into());
        }
        Ok(())
    }

    pub(super) fn put(&mut self, entry: Entry) -> io::Result<()> {
        self.write(&encoded(PUT, &entry))?;
        self.insert(entry);
        Ok(())
    }

    /// Whether there is such an item.
    pub(super) fn set_item_state(&mut self, id: ItemId, state: &[u8]) -> io::Result<bool> {
        let Some(entry) = self.entries.get_mut(&id) else { return Ok(false) };
        if entry.state != state {
            let record = encoded(STATE, &(id, ByteVec::from(state.to_vec())));
            self.journal.append(&record)?;
            entry.state = state.into();
            self.tidy();
        }
        Ok(true)
    }

    /// Whether there was such an item.
    pub(super) fn remove(&mut self, id: ItemId) -> io::Result<bool> {
        let known = self.entries.remove(&id).is_some();
        if known {
            self.write(&encoded(REMOVED, &id))?;
        }
        Ok(known)
    }

    pub(super) fn set_application(&mut self, state: &[u8]) -> io::Result<()> {
        if self.application.as_deref() != Some(state) {
            self.write(&encoded(APPLICATION, &ByteVec::from(state.to_vec())))?;
            self.application = Some(state.into());
        }
        Ok(())
    }

    pub(super) fn application(&self) -> Option<&[u8]> {
        self.application.as_deref()
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// One more than the highest id that there ever was.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id
    }

    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        self.journal.append(record)?;
        self.tidy();
        Ok(())
    }

    /// Writes everything anew where that is worth its while. If it fails, everything is still there.
    fn tidy(&mut self) {
        if !self.journal.wants_checkpoint() {
            return;
        }
        let mut records = vec![encoded(NEXT_ID, &self.next_id)];
        if let Some(state) = &self.application {
            records.push(encoded(APPLICATION, &ByteVec::from(state.clone())));
        }
        records.extend(self.supervisor.as_ref().map(|supervisor| encoded(SUPERVISOR, supervisor)));
        records.extend(self.entries.values().map(|entry| encoded(PUT, entry)));
        if let Err(error) = self.journal.checkpoint(records) {
            tracing::warn!(%error, "cannot tidy the ledger of the store; it grows");
        }
    }

    fn insert(&mut self, entry: Entry) {
        self.next_id = self.next_id.max(entry.id.0.saturating_add(1));
        self.entries.insert(entry.id, entry);
    }

    fn read(&mut self, record: &[u8]) -> Result<(), minicbor::decode::Error> {
        let mut decoder = minicbor::Decoder::new(record);
        decoder.array()?;
        match decoder.u8()? {
            PUT => self.insert(decoder.decode()?),
            STATE => {
                let (id, state): (ItemId, ByteVec) = decoder.decode()?;
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.state = state.into();
                }
            }
            REMOVED => drop(self.entries.remove(&decoder.decode()?)),
            APPLICATION => self.application = Some(decoder.decode::<ByteVec>()?.into()),
            SUPERVISOR => self.supervisor = Some(decoder.decode()?),
            NEXT_ID => self.next_id = self.next_id.max(decoder.u64()?),
            // Of a newer version, which has to do without it here.
            _ => {}
        }
        Ok(())
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.journal.as_fd()
    }
}

/// Why a ledger cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum LedgerError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("a record of it is malformed: {0}")]
    Malformed(#[from] minicbor::decode::Error),
}

fn encoded(what: u8, value: &impl minicbor::Encode<()>) -> Vec<u8> {
    let mut record = Vec::new();
    let mut encoder = minicbor::Encoder::new(&mut record);
    // Writing to memory does not fail.
    let _ = encoder.array(2).and_then(|e| e.u8(what)).and_then(|e| e.encode(value));
    record
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kind::Kind;

    fn entry(id: u64, state: &[u8]) -> Entry {
        Entry { id: ItemId(id), name: format!("item {id}"), kind: Kind::TcpStream, state: state.into() }
    }

    fn reopened(ledger: &Ledger) -> Ledger {
        Ledger::open(ledger.as_fd().try_clone_to_owned().unwrap(), &Limits::default()).unwrap()
    }

    #[test]
    fn an_id_is_never_given_out_again() {
        let mut ledger = Ledger::create().unwrap();
        assert_eq!(reopened(&ledger).next_id(), 1);
        ledger.put(entry(7, b"")).unwrap();
        assert!(ledger.remove(ItemId(7)).unwrap() && !ledger.remove(ItemId(7)).unwrap());
        assert_eq!(reopened(&ledger).next_id(), 8);
        // Nor when a checkpoint has forgotten the item.
        for round in 0..20_000_u32 {
            ledger.set_application(&round.to_le_bytes()).unwrap();
            ledger.set_application(&[0; 100]).unwrap();
        }
        assert!(ledger.journal.bytes() < 1_000_000);
        assert_eq!(reopened(&ledger).next_id(), 8);
    }

    #[test]
    fn what_a_newer_version_writes_is_skipped_and_nonsense_is_an_error() {
        let mut ledger = Ledger::create().unwrap();
        ledger.put(entry(1, b"one")).unwrap();
        ledger.journal.append(&encoded(200, &"from the future")).unwrap();
        assert_eq!(reopened(&ledger).entries().collect::<Vec<_>>(), [&entry(1, b"one")]);
        ledger.journal.append(b"\xff").unwrap();
        let file = ledger.as_fd().try_clone_to_owned().unwrap();
        let error = Ledger::open(file, &Limits::default()).unwrap_err();
        assert!(matches!(error, LedgerError::Malformed(_)), "{error}");
    }

    #[test]
    fn it_is_of_one_supervisor_and_none_other() {
        let mut ledger = Ledger::create().unwrap();
        ledger.put(entry(7, b"")).unwrap();
        assert!(ledger.may_be_of("any, as it is of an older version"));
        ledger.set_supervisor("first").unwrap();
        let of_another = reopened(&ledger).anew().unwrap();
        ledger.set_supervisor("second").unwrap();
        // Also when a checkpoint has been written.
        for round in 0..20_000_u32 {
            ledger.set_application(&round.to_le_bytes()).unwrap();
            ledger.set_application(&[0; 100]).unwrap();
        }
        let read = reopened(&ledger);
        assert!(read.may_be_of("second") && !read.may_be_of("first"));
        let read = reopened(&of_another);
        assert_eq!((read.entries().count(), read.next_id()), (0, 8));
        assert!(read.may_be_of("second"));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u64, Vec<u8>),
        State(u64, Vec<u8>),
        Remove(u64),
        Application(Vec<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..20);
        prop_oneof![
            (1..9_u64, bytes()).prop_map(|(id, state)| Step::Put(id, state)),
            (1..9_u64, bytes()).prop_map(|(id, state)| Step::State(id, state)),
            (1..9_u64).prop_map(Step::Remove),
            bytes().prop_map(Step::Application),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_records_are_a_ledger_or_an_error(
            records in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..30),
                    // Of the right form up to some place.
                    (0..7_u8, prop::collection::vec(any::<u8>(), 0..30)).prop_map(|(what, rest)| {
                        [vec![0x82, what], rest].concat()
                    }),
                    (any::<u64>(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(id, at, byte)| {
                        let mut record = encoded(PUT, &entry(id, b"state"));
                        let at = at.index(record.len());
                        record[at] = byte;
                        record
                    }),
                ],
                0..6,
            )
        ) {
            let mut journal = Journal::create("test").unwrap();
            for record in &records {
                journal.append(record).unwrap();
            }
            let file = journal.as_fd().try_clone_to_owned().unwrap();
            if let Ok(mut ledger) = Ledger::open(file, &Limits::default()) {
                prop_assert!(ledger.entries().all(|entry| entry.id.0 < ledger.next_id() || entry.id.0 == u64::MAX));
                ledger.put(entry(3, b"")).unwrap();
                prop_assert!(reopened(&ledger).entries().eq(ledger.entries()));
            }
        }

        #[test]
        fn whoever_opens_it_finds_what_was_written(steps in prop::collection::vec(step(), 0..40)) {
            let mut ledger = Ledger::create().unwrap();
            for step in steps {
                match step {
                    Step::Put(id, state) => ledger.put(entry(id, &state)).unwrap(),
                    Step::State(id, state) => {
                        let known = ledger.entries.contains_key(&ItemId(id));
                        prop_assert_eq!(ledger.set_item_state(ItemId(id), &state).unwrap(), known);
                    }
                    Step::Remove(id) => drop(ledger.remove(ItemId(id)).unwrap()),
                    Step::Application(state) => ledger.set_application(&state).unwrap(),
                }
                let read = reopened(&ledger);
                prop_assert!(read.entries().eq(ledger.entries()));
                prop_assert_eq!(read.application(), ledger.application());
                prop_assert_eq!(read.next_id(), ledger.next_id());
            }
        }
    }
}
