//! The items of a base while their descriptors arrive: each finds the place of its entry, and is lent at once. That they are
//! what their entries say is checked when all are there, so that nothing but their registration is on their way.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::lent::Lent;
use crate::bundle::{Bundle, BundleError, checked_kind};
use crate::courtesy;
use crate::item::{Entry, EntryRef, Item, ItemId};
use crate::manifest::Listing;

/// How many are checked in a step.
const CHECKED: usize = 64;

#[derive(Debug)]
pub(crate) struct Arriving {
    listing: Listing,
    /// One place for each entry.
    descriptors: Vec<Option<OwnedFd>>,
    /// The place of the next, if they come in the order of the manifest.
    next: usize,
}

impl Arriving {
    pub(crate) fn new(listing: Listing) -> Self {
        let descriptors = (0..listing.len()).map(|_| None).collect();
        Arriving { listing, descriptors, next: 0 }
    }

    /// Lends a descriptor, unless it is the control listener, and keeps it.
    pub(crate) fn take_in(
        &mut self,
        id: ItemId,
        descriptor: OwnedFd,
        each: &mut impl FnMut(Lent<'_>) -> io::Result<()>,
    ) -> Result<(), String> {
        let place = self.place(id).ok_or_else(|| BundleError::NotListed { id }.to_string())?;
        self.next = place + 1;
        if id != ItemId::CONTROL {
            let lent = Lent { id, place, listing: &self.listing, descriptor: descriptor.as_fd() };
            if let Err(error) = each(lent) {
                let entry = self.listing.entry(place).map_err(|error| error.to_string())?;
                // It may not be what it is said to be, which would be the reason.
                checked_kind(entry, &descriptor).map_err(|error| error.to_string())?;
                return Err(format!("cannot prepare for {entry}: {error}"));
            }
        }
        match self.descriptors[place].replace(descriptor) {
            None => Ok(()),
            Some(_) => Err(format!("item {id} was sent twice")),
        }
    }

    fn place(&self, id: ItemId) -> Option<usize> {
        if self.listing.id(self.next) == Some(id) { Some(self.next) } else { self.listing.find(id) }
    }

    /// The bundle of what has come and was checked, and the entries of what has not.
    pub(crate) fn finish(self) -> Result<(Bundle, Vec<Entry>), BundleError> {
        let (mut items, mut missing) = (BTreeMap::new(), Vec::new());
        for (place, descriptor) in self.descriptors.into_iter().enumerate() {
            courtesy::step(place, CHECKED);
            let entry = self.listing.entry(place)?;
            match descriptor {
                Some(descriptor) => {
                    let kind = checked_kind(entry, &descriptor)?;
                    let entry = EntryRef { kind, ..entry }.to_entry();
                    items.insert(entry.id, Item { entry, descriptor });
                }
                None => missing.push(entry.to_entry()),
            }
        }
        Ok((Bundle::of_items(self.listing.into_rest(), items), missing))
    }
}
