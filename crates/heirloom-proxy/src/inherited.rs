//! Which listeners of an incumbent go on as which of ours, and which of ours are to be bound.
//!
//! One whose address is written as that of one of ours is that one, or else one that means the same place. One at a single address goes
//! on beside one of ours that is to be at all addresses, at the same port: nobody who waits in its queue is lost. All others end, when ours
//! listen.

use std::collections::{BTreeMap, BTreeSet};

use heirloom::ItemId;

use crate::address::{Address, Place};
use crate::config::Listener;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Inherited {
    /// The incumbent's listeners, and which of ours they go on as.
    pub(crate) doors: BTreeMap<ItemId, Option<usize>>,
    /// Those of ours that are to be bound.
    pub(crate) free: BTreeSet<usize>,
    /// The incumbent's listeners that are at none of our addresses.
    elsewhere: Vec<(ItemId, Place)>,
}

impl Inherited {
    /// Finds out what becomes of these, each with its address as it was written.
    pub(crate) fn find<'a>(
        ours: &[Listener],
        theirs: impl IntoIterator<Item = (ItemId, Option<&'a str>)>,
    ) -> Inherited {
        let mut found =
            Inherited { doors: BTreeMap::new(), free: (0..ours.len()).collect(), elsewhere: Vec::new() };
        let mut otherwise_written = Vec::new();
        for (id, address) in theirs {
            let alike = ours.iter().position(|one| Some(one.address.text()) == address);
            found.goes_on_as(id, alike);
            let address = address.filter(|_| alike.is_none()).map(Address::to_listen);
            otherwise_written.extend(address.and_then(Result::ok).map(|address| (id, address)));
        }
        for (id, address) in otherwise_written {
            // `localhost:80` is where `127.0.0.1:80` was: it could not be bound.
            let same = |at: &usize| ours[*at].address.place() == address.place();
            match found.free.iter().copied().find(same) {
                Some(at) => found.goes_on_as(id, Some(at)),
                None => found.elsewhere.push((id, address.place().clone())),
            }
        }
        for (id, place) in &found.elsewhere {
            let takes_in = |at: &usize| ours[*at].address.place().takes_in(place);
            found.doors.insert(*id, found.free.iter().copied().find(takes_in));
        }
        found
    }

    fn goes_on_as(&mut self, id: ItemId, ours: Option<usize>) {
        self.doors.insert(id, ours);
        if let Some(at) = ours {
            self.free.remove(&at);
        }
    }

    /// The incumbent's listeners beside which nobody else can be bound here.
    pub(crate) fn in_the_way_of(&self, place: &Place) -> Vec<ItemId> {
        let overlaps = |other: &Place| place.takes_in(other) || other.takes_in(place);
        self.elsewhere.iter().filter(|(_, other)| overlaps(other)).map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn ours(addresses: &[&str]) -> Vec<Listener> {
        let one = |address: &&str| format!("[[listener]]\nlisten = \"{address}\"\nto = [\"127.0.0.1:7\"]\n");
        let text: String = addresses.iter().map(one).collect();
        Config::parse(&text, "test.toml").unwrap().listeners
    }

    fn find(now: &[&str], before: &[&str]) -> (Vec<Option<usize>>, Vec<usize>, Vec<usize>) {
        let ours = ours(now);
        let theirs = before.iter().enumerate().map(|(id, address)| (ItemId(id as u64), Some(*address)));
        let found = Inherited::find(&ours, theirs);
        let in_the_way =
            found.free.iter().map(|at| found.in_the_way_of(ours[*at].address.place()).len()).collect();
        (found.doors.values().copied().collect(), found.free.iter().copied().collect(), in_the_way)
    }

    #[test]
    fn who_is_written_alike_or_means_the_same_goes_on() {
        let now = ["127.0.0.1:81", "127.0.0.1:80", "127.0.0.1:82"];
        let before = ["127.0.0.1:080", "127.0.0.1:83", "127.0.0.1:82"];
        assert_eq!(find(&now, &before), (vec![Some(1), None, Some(2)], vec![0], vec![0]));
        assert_eq!(find(&["unix:/a"], &["unix:/b", "unix:/a"]), (vec![None, Some(0)], vec![], vec![]));
        // As it is after a change to all addresses.
        assert_eq!(find(&[":80"], &[":80", ":80"]), (vec![Some(0), Some(0)], vec![], vec![]));
    }

    #[test]
    fn a_single_address_goes_on_beside_all_addresses_but_not_the_other_way_round() {
        let singles = ["127.0.0.1:80", "[::1]:80", "127.0.0.1:81"];
        assert_eq!(find(&[":80"], &singles), (vec![Some(0), Some(0), None], vec![0], vec![2]));
        assert_eq!(find(&["0.0.0.0:80"], &singles), (vec![Some(0), None, None], vec![0], vec![1]));
        assert_eq!(find(&["127.0.0.1:80", "127.0.0.1:9"], &[":80"]), (vec![None], vec![0, 1], vec![1, 0]));
        assert_eq!(find(&["0.0.0.0:80"], &[":80"]), (vec![None], vec![0], vec![1]));
    }
}
