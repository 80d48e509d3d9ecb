//! What a successor may see of an item before anything is its own. An entry is read when somebody asks for it: whatever is done
//! for each of many descriptors delays the next one, and for most an id is enough.

use std::os::fd::BorrowedFd;
use std::{fmt, io};

use crate::item::{EntryRef, ItemId};
use crate::manifest::Listing;

/// An item whose descriptor has just come, lent to [`Successor::receive_each`](super::Successor::receive_each).
///
/// The descriptor may be registered with a poller, and nothing else: its file description is the incumbent's, which reads and
/// writes it.
///
/// ```
/// use heirloom::Lent;
/// use mio::{Interest, Registry, Token};
///
/// fn register(registry: &Registry, item: Lent<'_>) -> std::io::Result<()> {
///     if item.entry()?.name != "connection" {
///         return Ok(());
///     }
///     let token = Token(item.id().0 as usize);
///     heirloom::runtime::mio::register(registry, item.descriptor(), token, Interest::READABLE)
/// }
/// ```
#[derive(Clone, Copy)]
pub struct Lent<'l> {
    pub(super) id: ItemId,
    pub(super) descriptor: BorrowedFd<'l>,
    pub(super) listing: &'l Listing,
    /// Of its entry in the list.
    pub(super) place: usize,
}

impl<'l> Lent<'l> {
    /// The item's identity.
    #[must_use]
    pub fn id(&self) -> ItemId {
        self.id
    }

    /// The descriptor that has come. That it is of the kind that the entry says is not checked yet.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'l> {
        self.descriptor
    }

    /// What the manifest says of it, read anew each time.
    ///
    /// # Errors
    ///
    /// It cannot be read, which was checked when the manifest came.
    pub fn entry(&self) -> io::Result<EntryRef<'l>> {
        self.listing.entry(self.place).map_err(io::Error::other)
    }
}

impl fmt::Debug for Lent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the list, which has the entries of all the others.
        let Lent { id, descriptor, .. } = self;
        f.debug_struct("Lent").field("id", id).field("descriptor", descriptor).finish_non_exhaustive()
    }
}
