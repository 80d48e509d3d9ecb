//! Items: what a bundle is made of.
//!
//! An item is one descriptor with an id, a name, a kind and its own state. Its id is its identity: it is given
//! out once, travels with the item through every generation, and is never used again. Names are the
//! application's, and need not be unique.

use std::{
    fmt, fs, io,
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
};

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::kind::Kind;

/// The identity of an item, unique within a service for as long as the service lives.
///
/// ```
/// use heirloom::ItemId;
///
/// assert_eq!(ItemId(7).to_string(), "7");
/// assert!(ItemId::CONTROL < ItemId::FIRST);
/// ```
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode,
)]
#[serde(transparent)]
#[cbor(transparent)]
pub struct ItemId(#[n(0)] pub u64);

impl ItemId {
    /// The control listener, which is handed over like an item and belongs to Heirloom.
    pub const CONTROL: ItemId = ItemId(0);
    /// The first id that an application's item can have.
    pub const FIRST: ItemId = ItemId(1);
}

impl fmt::Display for ItemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names that start with this are Heirloom's own.
pub const RESERVED_PREFIX: &str = "heirloom.";

/// The name of the control listener, whose id is [`ItemId::CONTROL`].
pub const CONTROL_NAME: &str = "heirloom.control";

/// An item as it is written in a manifest: everything but the descriptor.
///
/// ```
/// use heirloom::{Entry, ItemId, Kind};
///
/// let entry = Entry { id: ItemId(1), name: "client".into(), kind: Kind::TcpStream, state: vec![] };
/// assert_eq!(entry.to_string(), "\"client\" (id 1, tcp-stream)");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Decode)]
#[cbor(map)]
pub struct Entry {
    /// The item's identity.
    #[n(0)]
    pub id: ItemId,
    /// What the application calls it.
    #[n(1)]
    pub name: String,
    /// What its descriptor is.
    #[n(2)]
    pub kind: Kind,
    /// Its encoded state; empty when it has none.
    #[cbor(n(3), with = "minicbor::bytes", default)]
    pub state: Vec<u8>,
}

/// An entry whose name and state lie elsewhere, in a manifest or in an [`Entry`].
///
/// ```
/// use heirloom::{Entry, EntryRef, ItemId, Kind};
///
/// let entry = Entry { id: ItemId(1), name: "client".into(), kind: Kind::TcpStream, state: vec![] };
/// let borrowed = EntryRef::from(&entry);
/// assert_eq!(borrowed.name, "client");
/// assert_eq!(borrowed.to_entry(), entry);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Decode)]
#[cbor(map)]
pub struct EntryRef<'e> {
    /// The item's identity.
    #[n(0)]
    pub id: ItemId,
    /// What the application calls it.
    #[b(1)]
    pub name: &'e str,
    /// What its descriptor is.
    #[n(2)]
    pub kind: Kind,
    /// Its encoded state; empty when it has none.
    #[cbor(b(3), with = "minicbor::bytes", default)]
    pub state: &'e [u8],
}

impl<'e> From<&'e Entry> for EntryRef<'e> {
    fn from(entry: &'e Entry) -> Self {
        EntryRef { id: entry.id, name: &entry.name, kind: entry.kind, state: &entry.state }
    }
}

impl EntryRef<'_> {
    /// A copy with a name and a state of its own.
    #[must_use]
    pub fn to_entry(self) -> Entry {
        Entry { id: self.id, name: self.name.to_owned(), kind: self.kind, state: self.state.to_owned() }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        EntryRef::from(self).fmt(f)
    }
}

impl fmt::Display for EntryRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (id {}, {})", self.name, self.id, self.kind)
    }
}

/// An item with its descriptor.
///
/// ```
/// use heirloom::{Entry, Item, ItemId, Kind};
/// use std::net::UdpSocket;
///
/// let socket = UdpSocket::bind("127.0.0.1:0")?;
/// let entry = Entry { id: ItemId(1), name: "dns".into(), kind: Kind::of(&socket)?, state: vec![] };
/// let item = Item { entry, descriptor: socket.into() };
/// assert_eq!(item.entry.kind, Kind::UdpSocket);
/// # Ok::<_, std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Item {
    /// What the manifest says about it.
    pub entry: Entry,
    /// The descriptor. Dropping it is a plain close: it neither shuts a connection down nor changes anything
    /// that another process's duplicate would notice.
    pub descriptor: OwnedFd,
}

/// A type of the standard library that can be made from a descriptor of certain kinds.
///
/// ```
/// use heirloom::{Kind, Typed};
/// use std::{fs::File, net::TcpStream};
///
/// assert!(TcpStream::accepts(Kind::TcpStream));
/// assert!(!TcpStream::accepts(Kind::TcpListener));
/// assert!(File::accepts(Kind::Tty));
/// ```
pub trait Typed: From<OwnedFd> {
    /// Whether a descriptor of this kind makes sense as a `Self`.
    fn accepts(kind: Kind) -> bool;
}

macro_rules! typed {
    ($($type:ty: $($kind:ident)|+;)+) => {$(
        impl Typed for $type {
            fn accepts(kind: Kind) -> bool {
                matches!(kind, $(Kind::$kind)|+)
            }
        }
    )+};
}

typed! {
    TcpListener: TcpListener;
    TcpStream: TcpStream;
    UdpSocket: UdpSocket;
    UnixListener: UnixListener;
    UnixStream: UnixStream;
    UnixDatagram: UnixDatagram;
    io::PipeReader: PipeReader;
    io::PipeWriter: PipeWriter;
    fs::File: File | Memfd | Tty | PipeReader | PipeWriter;
}

/// Anything is a descriptor: the way to take a kind for which there is no type of its own.
impl Typed for OwnedFd {
    fn accepts(_: Kind) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_bare_number_on_every_wire() {
        assert_eq!(minicbor::to_vec(ItemId(5)).unwrap(), [5]);
        assert_eq!(serde_json::to_string(&ItemId(u64::MAX)).unwrap(), u64::MAX.to_string());
    }

    #[test]
    fn an_entry_needs_id_name_and_kind_but_no_state() {
        // {0: 9, 1: "x", 2: 2}
        let entry: Entry = minicbor::decode(&[0xa3, 0, 9, 1, 0x61, b'x', 2, 2]).unwrap();
        assert_eq!(entry, Entry { id: ItemId(9), name: "x".into(), kind: Kind::TcpStream, state: vec![] });
        assert!(minicbor::decode::<Entry>(&[0xa2, 0, 9, 1, 0x61, b'x']).is_err());
        assert!(minicbor::decode::<EntryRef<'_>>(&[0xa2, 0, 9, 1, 0x61, b'x']).is_err());
    }

    #[test]
    fn an_entry_is_read_alike_in_place() {
        let entry = Entry { id: ItemId(9), name: "x".into(), kind: Kind::TcpStream, state: vec![1, 2] };
        let bytes = minicbor::to_vec(&entry).unwrap();
        let read: EntryRef<'_> = minicbor::decode(&bytes).unwrap();
        assert_eq!((read, read.to_entry()), (EntryRef::from(&entry), entry.clone()));
    }
}
