//! The ids of items, which are the numbers of users too: none is given out twice, in no generation.

use std::io;

use heirloom::ItemId;

/// The counter.
#[derive(Debug)]
pub(super) struct Ids(ItemId);

impl Ids {
    /// Begins with this one. Where the counting began is what another process said.
    pub(super) fn from(next: ItemId) -> Ids {
        Ids(next)
    }

    /// The next one that is given out.
    pub(super) fn next(&self) -> ItemId {
        self.0
    }

    /// Gives one out.
    pub(super) fn take(&mut self) -> io::Result<ItemId> {
        let id = self.0;
        self.0 = ItemId(id.0.checked_add(1).ok_or_else(|| io::Error::other("no user number is left"))?);
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counting_ends() {
        let mut ids = Ids::from(ItemId(u64::MAX - 1));
        assert_eq!(ids.take().unwrap(), ItemId(u64::MAX - 1));
        let error = ids.take().unwrap_err();
        assert!(error.to_string().contains("no user number is left"), "{error}");
        assert_eq!(ids.next(), ItemId(u64::MAX));
    }
}
