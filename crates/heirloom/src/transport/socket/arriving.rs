//! The items of a base while their descriptors arrive: each finds the place of its entry, and is lent at once. That they are
//! what their entries say is checked when all are there, so that nothing but their registration is on their way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::bundle::{Bundle, BundleError, checked_kind};
use crate::item::{Entry, Item, ItemId};
use crate::manifest::Base;

#[derive(Debug)]
pub(crate) struct Arriving {
    base: Base,
    /// One place for each entry.
    descriptors: Vec<Option<OwnedFd>>,
    /// The place of the next, if they come in the order of the manifest.
    next: usize,
}

impl Arriving {
    pub(crate) fn new(base: Base) -> Self {
        let descriptors = base.items.iter().map(|_| None).collect();
        Arriving { base, descriptors, next: 0 }
    }

    /// Lends a descriptor, unless it is the control listener, and keeps it.
    pub(crate) fn take_in(
        &mut self,
        id: ItemId,
        descriptor: OwnedFd,
        each: &mut dyn FnMut(&Entry, BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<(), String> {
        let place = self.place(id).ok_or_else(|| BundleError::NotListed { id }.to_string())?;
        self.next = place + 1;
        let entry = &self.base.items[place];
        if id != ItemId::CONTROL
            && let Err(error) = each(entry, descriptor.as_fd())
        {
            // It may not be what it is said to be, which would be the reason.
            checked_kind(entry, &descriptor).map_err(|error| error.to_string())?;
            return Err(format!("cannot prepare for {entry}: {error}"));
        }
        match self.descriptors[place].replace(descriptor) {
            None => Ok(()),
            Some(_) => Err(format!("item {id} was sent twice")),
        }
    }

    fn place(&self, id: ItemId) -> Option<usize> {
        match self.base.items.get(self.next) {
            Some(entry) if entry.id == id => Some(self.next),
            _ => self.base.items.binary_search_by_key(&id, |entry| entry.id).ok(),
        }
    }

    /// The bundle of what has come and was checked, and the entries of what has not.
    pub(crate) fn finish(mut self) -> Result<(Bundle, Vec<Entry>), BundleError> {
        let entries = std::mem::take(&mut self.base.items);
        let (mut items, mut missing) = (Vec::with_capacity(entries.len()), Vec::new());
        for (mut entry, descriptor) in entries.into_iter().zip(self.descriptors) {
            match descriptor {
                Some(descriptor) => {
                    entry.kind = checked_kind(&entry, &descriptor)?;
                    items.push((entry.id, Item { entry, descriptor }));
                }
                None => missing.push(entry),
            }
        }
        Ok((Bundle::of_items(self.base, items.into_iter().collect()), missing))
    }
}
