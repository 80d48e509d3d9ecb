//! Random puts, removals, restarts and upgrades in place against what should come of them.

use std::collections::BTreeMap;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::{PoisonError, RwLockReadGuard};

use heirloom::descriptors::{Wait, receive_with};
use heirloom::notify::Notifier;
use proptest::prelude::*;

use super::super::record::Role;
use super::*;

/// A supervisor with a store, which reads when it is told to.
struct Supervisor {
    directory: tempfile::TempDir,
    socket: UnixDatagram,
    limit: usize,
    stored: Vec<(String, OwnedFd)>,
}

impl Supervisor {
    fn new(limit: usize) -> Supervisor {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        Supervisor { directory, socket, limit, stored: Vec::new() }
    }

    fn voice(&self) -> Voice {
        Voice::new(Notifier::to(self.directory.path().join("notify").as_os_str()).unwrap())
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(received) = receive_with(&self.socket, &mut buffer, Wait::DontWait) {
            let text = std::str::from_utf8(&buffer[..received.bytes]).unwrap();
            let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
            if text.starts_with("FDSTORE=1") {
                for descriptor in received.descriptors {
                    if self.stored.len() < self.limit {
                        self.stored.push((value("FDNAME=").unwrap(), descriptor));
                    }
                }
            } else if text.starts_with("FDSTOREREMOVE=1") {
                let name = value("FDNAME=").unwrap();
                self.stored.retain(|(stored, _)| *stored != name);
            } else {
                assert!(text.starts_with("BARRIER=1"), "{text}");
            }
        }
    }

    /// What the next process is given: duplicates.
    fn pages(&self) -> Vec<StoredPage> {
        let page = |(name, descriptor): &(String, OwnedFd)| {
            let id = name.strip_prefix(PAGE)?.parse().ok()?;
            Some(StoredPage { id, inbox: descriptor.try_clone().unwrap() })
        };
        self.stored.iter().filter_map(page).collect()
    }
}

/// The entries, each the writing end of a pipe: the other end tells when it is nowhere any more.
#[derive(Default)]
struct Entries {
    held: BTreeMap<u64, PipeWriter>,
    others: BTreeMap<u64, PipeReader>,
}

impl Entries {
    fn add(&mut self, number: u64) {
        let (reader, writer) = pipe().unwrap();
        self.held.insert(number, writer);
        self.others.insert(number, reader);
    }
}

impl Holder for Entries {
    fn lend(&self, number: u64) -> Option<Lent<'_>> {
        let writer = self.held.get(&number)?;
        let name = ["short", "a rather long name, as long as they may be, or nearly so: ................"]
            [number as usize % 2];
        Some(Lent { record: Record::new(number, Role::Stored, name), descriptor: writer.as_fd() })
    }
}

#[derive(Clone, Debug)]
enum Op {
    Put(u8),
    RemoveOldest(u8),
    RemoveAny(u16),
    Settle,
    SupervisorReads,
    Limit(u16),
    Killed,
    Upgraded,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0_u8..160).prop_map(Op::Put),
        2 => (0_u8..).prop_map(Op::RemoveOldest),
        6 => any::<u16>().prop_map(Op::RemoveAny),
        4 => Just(Op::Settle),
        4 => Just(Op::SupervisorReads),
        1 => (0_u16..1000).prop_map(Op::Limit),
        1 => Just(Op::Killed),
        1 => Just(Op::Upgraded),
    ]
}

struct World {
    /// Nobody has a descriptor of ours by accident.
    _no_forks: RwLockReadGuard<'static, ()>,
    supervisor: Supervisor,
    voice: Voice,
    vault: Vault,
    entries: Entries,
    next: u64,
    /// Forgotten, and not yet settled.
    leaving: Vec<u64>,
}

impl World {
    fn new(limit: usize) -> World {
        let supervisor = Supervisor::new(limit);
        let voice = supervisor.voice();
        World {
            _no_forks: crate::FORKS.read().unwrap_or_else(PoisonError::into_inner),
            supervisor,
            voice,
            vault: Vault::default(),
            entries: Entries::default(),
            next: 1,
            leaving: Vec::new(),
        }
    }

    fn put(&mut self) {
        let number = self.next;
        self.next += 1;
        self.entries.add(number);
        self.vault.keep(&self.entries.lend(number).unwrap(), &mut self.voice);
    }

    fn remove(&mut self, number: u64) {
        self.vault.forget(number);
        self.entries.held.remove(&number);
        self.leaving.push(number);
    }

    fn settle(&mut self) {
        self.vault.settle(&self.entries, &mut self.voice);
        for number in self.leaving.drain(..) {
            let reader = self.entries.others.remove(&number).unwrap();
            assert!(has_hung_up(&reader), "{number} lingers");
        }
        assert_eq!(self.vault.kept() + self.vault.missing.len(), self.entries.held.len());
        let pages = self.vault.pages.len();
        assert!(pages <= 2 + 2 * self.next as usize / CAPACITY, "{pages} pages");
    }

    fn supervisor_reads(&mut self) {
        self.supervisor.read();
        self.voice.flush();
        self.vault.look_at_trials(&mut self.voice);
    }

    /// The process is killed, whatever it was about to do; the supervisor reads what was sent.
    fn kill(&mut self) {
        let kept: Vec<u64> =
            self.entries.held.keys().copied().filter(|&number| self.vault.keeps(number)).collect();
        self.vault = Vault::default();
        self.entries.held.clear();
        self.voice = self.supervisor.voice();
        self.supervisor.read();
        for (probe, _) in self.supervisor.stored.iter().filter(|(name, _)| name.starts_with(PROBE)) {
            self.voice.say(&Message::new().remove(probe), &[]);
        }
        let found = self.vault.restore(self.supervisor.pages()).unwrap();
        for (record, descriptor) in found {
            let is_leaving = self.leaving.contains(&record.number);
            assert!(is_leaving || kept.contains(&record.number), "{} has come back", record.number);
            let mut writer = PipeWriter::from(descriptor);
            writer.write_all(&[record.number as u8]).unwrap();
            let mut byte = [0];
            self.entries.others.get_mut(&record.number).unwrap().read_exact(&mut byte).unwrap();
            assert_eq!(byte, [record.number as u8]);
            self.entries.held.insert(record.number, writer);
        }
        for number in kept {
            assert!(self.entries.held.contains_key(&number), "{number} is lost");
        }
        self.leaving.clear();
        let numbers: Vec<u64> = self.entries.held.keys().copied().collect();
        self.vault.reconcile(&numbers);
        assert!(self.vault.missing.is_empty());
    }

    fn upgrade(&mut self) {
        self.vault.end_trials(&mut self.voice);
        if self.vault.is_behind() {
            return;
        }
        let pages = self.vault.pages().map(|(id, inbox, pen)| CarriedPage {
            id,
            inbox: inbox.try_clone_to_owned().unwrap(),
            pen: pen.try_clone_to_owned().unwrap(),
        });
        let pages = pages.collect();
        let kept = self.vault.kept();
        self.vault = Vault::default();
        self.vault.adopt(pages).unwrap();
        assert!(self.vault.kept() >= kept);
        let numbers: Vec<u64> = self.entries.held.keys().copied().collect();
        self.vault.reconcile(&numbers);
    }

    fn play(&mut self, op: &Op) {
        match *op {
            Op::Put(count) => (0..count).for_each(|_| self.put()),
            Op::RemoveOldest(count) => {
                for number in self.entries.held.keys().copied().take(count.into()).collect::<Vec<_>>() {
                    self.remove(number);
                }
            }
            Op::RemoveAny(which) => {
                let count = self.entries.held.len();
                if let Some(&number) = self.entries.held.keys().nth(usize::from(which) % count.max(1)) {
                    self.remove(number);
                }
            }
            Op::Settle => self.settle(),
            Op::SupervisorReads => self.supervisor_reads(),
            Op::Limit(most) => self.vault.limit(most.into()),
            Op::Killed => self.kill(),
            Op::Upgraded => self.upgrade(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn what_is_kept_comes_back_and_what_is_forgotten_does_not(ops in prop::collection::vec(op(), 1..80)) {
        let mut world = World::new(usize::MAX);
        for op in &ops {
            world.play(op);
        }
        world.vault.limit(usize::MAX);
        for _ in 0..20 {
            world.supervisor_reads();
            world.settle();
        }
        prop_assert!(world.vault.missing.is_empty() && !world.vault.is_behind() && world.vault.trials.is_empty());
        world.kill();
        world.settle();
        world.vault.empty(&mut world.voice);
        world.supervisor_reads();
        world.supervisor_reads();
        prop_assert!(world.supervisor.stored.is_empty());
    }

    #[test]
    fn where_there_is_little_room_above_nothing_lingers_and_what_is_missing_is_known(
        limit in 0_usize..4,
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let mut world = World::new(limit);
        for op in ops.iter().filter(|op| !matches!(op, Op::Killed | Op::Upgraded)) {
            world.play(op);
            // So that the vault knows what was refused.
            for _ in 0..4 {
                world.supervisor_reads();
                world.settle();
            }
        }
        world.kill();
        for number in world.entries.held.keys().copied().collect::<Vec<_>>() {
            world.remove(number);
        }
        world.settle();
        prop_assert_eq!(world.vault.kept(), 0);
    }
}

#[test]
fn a_supervisor_without_a_store_is_no_vault() {
    let mut world = World::new(0);
    world.put();
    assert!(!world.vault.is_refused());
    world.supervisor_reads();
    world.settle();
    assert!(world.vault.is_refused() && world.vault.pages.is_empty());
    assert_eq!(world.vault.kept(), 0);
}

#[test]
fn a_supervisor_that_is_gone_is_no_vault() {
    let mut world = World::new(1);
    std::fs::remove_file(world.supervisor.directory.path().join("notify")).unwrap();
    world.supervisor.socket = UnixDatagram::unbound().unwrap();
    world.put();
    world.settle();
    assert!(world.vault.is_refused() && !world.vault.is_behind());
}

#[test]
fn a_page_that_is_written_to_by_one_and_the_same_entry_over_and_over_does_not_fill_up() {
    let mut world = World::new(100);
    world.put();
    for _ in 0..5 * CAPACITY {
        world.put();
        let last = world.next - 1;
        world.remove(last);
        world.settle();
        world.supervisor_reads();
    }
    assert_eq!(world.vault.pages.len(), 1);
    world.kill();
    assert_eq!(world.entries.held.len(), 1);
}
