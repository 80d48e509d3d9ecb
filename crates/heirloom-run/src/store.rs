//! The store: duplicates of descriptors under names, kept while no process of the program runs.
//!
//! To put and to remove costs the same whatever is held, but for a logarithm. What is one open file description already
//! held is not held twice, as in systemd: duplicates are found by device and inode, and among those by kcmp(2).

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::fstat;

/// The longest name in bytes (`sd_notify(3)`).
const LONGEST_NAME: usize = 255;

/// Why a name cannot be one in `LISTEN_FDNAMES`, where it stands between colons.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    match name {
        "" => Err("is empty"),
        name if name.len() > LONGEST_NAME => Err("is longer than 255 characters"),
        name if !name.is_ascii() => Err("is not ASCII"),
        name if name.contains(':') => Err("has a colon in it"),
        name if name.bytes().any(|byte| byte.is_ascii_control()) => Err("has a control character in it"),
        _ => Ok(()),
    }
}

/// A descriptor that is held.
#[derive(Debug)]
pub(crate) struct Held {
    /// Its name.
    pub(crate) name: Rc<str>,
    /// Itself.
    pub(crate) descriptor: OwnedFd,
    /// Who put it.
    pub(crate) put_by: u32,
    /// Whether it goes when its other end hangs up.
    pub(crate) polled: bool,
    file: (u64, u64),
}

/// The descriptors, in the order in which they were put.
#[derive(Debug, Default)]
pub(crate) struct Store {
    entries: BTreeMap<u64, Rc<Held>>,
    names: HashMap<Rc<str>, BTreeSet<u64>>,
    /// By device and inode; each list is in the order of kcmp(2), where there is one.
    files: HashMap<(u64, u64), Vec<u64>>,
    name_bytes: usize,
}

impl Store {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The length of all names, each with a separator.
    pub(crate) fn name_bytes(&self) -> usize {
        self.name_bytes
    }

    /// What is held, by number, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Rc<Held>)> {
        self.entries.iter().map(|(&number, held)| (number, held))
    }

    pub(crate) fn get(&self, number: u64) -> Option<&Rc<Held>> {
        self.entries.get(&number)
    }

    /// The numbers of what is held under a name.
    pub(crate) fn named(&self, name: &str) -> Vec<u64> {
        self.names.get(name).map(|numbers| numbers.iter().copied().collect()).unwrap_or_default()
    }

    /// Holds a descriptor under a number that is higher than any before. False: it is held already, and is closed.
    pub(crate) fn put(
        &mut self,
        number: u64,
        name: &str,
        descriptor: OwnedFd,
        put_by: u32,
        polled: bool,
    ) -> bool {
        let file = identity(&descriptor);
        let same = self.files.entry(file).or_default();
        let place = same.binary_search_by(|other| match self.entries.get(other) {
            // Without kcmp everything counts as different, and a duplicate is held: that does no harm.
            Some(held) => {
                heirloom_sys::compare_files(&held.descriptor, &descriptor).unwrap_or(Ordering::Less)
            }
            None => Ordering::Less,
        });
        let Err(place) = place else { return false };
        same.insert(place, number);
        let name: Rc<str> = match self.names.get_key_value(name) {
            Some((name, _)) => name.clone(),
            None => name.into(),
        };
        self.names.entry(name.clone()).or_default().insert(number);
        self.name_bytes += name.len() + 1;
        self.entries.insert(number, Rc::new(Held { name, descriptor, put_by, polled, file }));
        true
    }

    /// Holds it no longer.
    pub(crate) fn remove(&mut self, number: u64) -> Option<Rc<Held>> {
        let held = self.entries.remove(&number)?;
        self.name_bytes -= held.name.len() + 1;
        if let Some(numbers) = self.names.get_mut(&held.name) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.names.remove(&held.name);
            }
        }
        if let Some(same) = self.files.get_mut(&held.file) {
            same.retain(|&other| other != number);
            if same.is_empty() {
                self.files.remove(&held.file);
            }
        }
        Some(held)
    }
}

/// Device and inode; the same for all where it cannot be told.
fn identity(descriptor: impl AsFd) -> (u64, u64) {
    fstat(descriptor).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::pipe;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn names_are_those_of_sd_notify() {
        assert!(
            check_name("a").is_ok() && check_name(&"a".repeat(255)).is_ok() && check_name("a b/c=d").is_ok()
        );
        for wrong in ["", "a:b", "ä", "a\nb", "a\u{7f}", &"a".repeat(256)] {
            assert!(check_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_put_is_held_in_order_and_removed_by_name() {
        let mut store = Store::default();
        for (number, name) in [(1, "a"), (2, "b"), (3, "a")] {
            assert!(store.put(number, name, null(), 7, true));
        }
        assert_eq!((store.len(), store.name_bytes()), (3, 6));
        assert_eq!(store.iter().map(|(_, held)| &*held.name).collect::<Vec<_>>(), ["a", "b", "a"]);
        assert_eq!(store.named("a"), [1, 3]);
        for number in store.named("a") {
            store.remove(number).unwrap();
        }
        assert_eq!((store.len(), store.name_bytes(), store.named("a")), (1, 2, vec![]));
        assert!(store.remove(1).is_none());
        store.remove(2).unwrap();
        assert!(store.names.is_empty() && store.files.is_empty() && store.name_bytes == 0);
    }

    #[test]
    fn the_same_file_description_is_held_once_and_the_same_file_opened_twice_is_not_that() {
        let mut store = Store::default();
        // Eventfds all have one inode: they are told apart by kcmp alone.
        let events: Vec<OwnedFd> = (0..200).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
        for (number, event) in (0..).zip(&events) {
            assert!(store.put(number, "e", event.try_clone().unwrap(), 7, true));
        }
        for (number, event) in (1000..).zip(&events) {
            assert!(!store.put(number, "other", event.try_clone().unwrap(), 7, true));
        }
        assert_eq!(store.len(), 200);
        let (reader, writer) = pipe().unwrap();
        assert!(store.put(2000, "r", reader.into(), 7, true) && store.put(2001, "w", writer.into(), 7, true));
        for number in 0..200 {
            store.remove(number).unwrap();
        }
        assert!(store.put(3000, "e", events[0].try_clone().unwrap(), 7, true));
    }
}
