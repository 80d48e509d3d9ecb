//! The manifest: a bundle written down.
//!
//! A manifest is written in two sealed memfds. The [`Base`] is sent ahead, while the incumbent still serves;
//! the [`Delta`] at the freeze says what has changed since, so that the freeze costs nothing for an item that
//! has not changed. Each is a fixed [`Header`] of 24 bytes and a body: a CBOR map with integer keys.
//!
//! What it promises across versions: keys that are not known are skipped, keys that are absent have a default
//! wherever an older program could not have written them, and a [`Section`] that must not be skipped is refused
//! by name. The format version in the header changes only when that is not enough.
//!
//! What it promises about bad input: every error is a [`ManifestError`] that says what was wrong; decoding
//! takes time linear in the input and memory in proportion to the bytes that are really there, whatever the
//! lengths inside say.

mod base;
mod delta;
mod header;
mod listing;
mod sealed;
mod short_form;

use std::{borrow::Borrow, convert::Infallible, io};

use minicbor::{Decode, Decoder, Encode};

pub(crate) use self::{base::Written, listing::Listing};
pub use self::{
    base::{Base, Section, ServiceRecord},
    delta::{Change, Changes, Delta},
    header::{Encoded, FORMAT_VERSION, HEADER_BYTES, Header, OLDEST_FORMAT_VERSION, Part},
    sealed::{read_sealed, seal},
};
use crate::{Entry, ItemId, Limits, item::EntryRef};

/// Why a manifest could not be written, read or applied.
///
/// ```
/// use heirloom::{Limits, manifest::{Base, ManifestError}};
///
/// let error = Base::decode(b"HTTP/1.1 200 OK\r\n\r\n......", &Limits::default()).unwrap_err();
/// assert!(matches!(error, ManifestError::NotAManifest));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Fewer bytes than a header.
    #[error("too short for a manifest: {found} bytes, and the header alone has {HEADER_BYTES}")]
    TooShort {
        /// Bytes that were there.
        found: usize,
    },
    /// The magic bytes are missing.
    #[error("not a manifest: it does not begin with \"HEIRLOOM\"")]
    NotAManifest,
    /// Written in a format that this program cannot read.
    #[error(
        "the manifest has format version {found}, and this program reads {oldest} to {newest}: \
         hand over by way of a version that reads both, or restart"
    )]
    Version {
        /// The version in the header.
        found: u16,
        /// The oldest version this program reads.
        oldest: u16,
        /// The newest version this program reads.
        newest: u16,
    },
    /// A base where a delta was expected, or the other way round, or neither.
    #[error("expected a {expected} and found part number {found}")]
    WrongPart {
        /// What was asked for.
        expected: Part,
        /// The number in the header.
        found: u16,
    },
    /// The body is not as long as the header says.
    #[error(
        "the manifest was cut off or added to: its header announces {announced} bytes, and {found} follow"
    )]
    Length {
        /// Length in the header.
        announced: u64,
        /// Bytes after the header.
        found: u64,
    },
    /// The body is not what was written.
    #[error("the manifest is damaged: its CRC-32 is {found:08x}, and the header says {announced:08x}")]
    Checksum {
        /// CRC-32 in the header.
        announced: u32,
        /// CRC-32 of the body.
        found: u32,
    },
    /// The body is not the CBOR map that it should be.
    #[error("the manifest is malformed: {0}")]
    Malformed(#[source] minicbor::decode::Error),
    /// Bytes follow the CBOR map.
    #[error("the manifest is malformed: {left} bytes follow its end")]
    Trailing {
        /// How many.
        left: usize,
    },
    /// The manifest could not be written as CBOR.
    #[error("the manifest could not be encoded: {0}")]
    Encode(#[source] minicbor::encode::Error<Infallible>),
    /// Something is larger than a limit allows.
    #[error(
        "{of} exceeds a limit: {found}, where Limits::{limit_name} allows {limit} (raise it on both sides)"
    )]
    Limit {
        /// What is too large; an item with its name.
        of: String,
        /// The field of [`Limits`].
        limit_name: &'static str,
        /// Its size or number (where counting stopped).
        found: usize,
        /// The bound.
        limit: usize,
    },
    /// A section is marked critical and this program does not know it.
    #[error(
        "the other program says that section {name:?} must be understood, and this program does not know it: \
         use a version that does"
    )]
    Critical {
        /// The section's name.
        name: String,
    },
    /// Ids in a list do not ascend: out of order, or one occurs twice.
    #[error("the ids in the list of {list} do not ascend at {id}: it is out of order or occurs twice")]
    Order {
        /// Which list.
        list: &'static str,
        /// The first id that is not greater than the one before it.
        id: ItemId,
    },
    /// An item has an id that the counter has not given out.
    #[error("item {id} has an id that was never given out: the next one is {next_id}")]
    NotGivenOut {
        /// The item.
        id: ItemId,
        /// The manifest's `next_id`.
        next_id: u64,
    },
    /// A delta belongs to another base.
    #[error("the delta belongs to a base with CRC-32 {announced:08x}, and this base has {found:08x}")]
    WrongBase {
        /// What the delta says.
        announced: u32,
        /// What the base has.
        found: u32,
    },
    /// A delta changes or ends an item that is not in the base (or changes one that it ends).
    #[error("the delta speaks of item {id}, which the base does not hold (or which ends)")]
    UnknownItem {
        /// The item.
        id: ItemId,
    },
    /// A delta adds an item under an id that is in use.
    #[error("the delta adds item {id}, and the base has an item of that id")]
    DuplicateItem {
        /// The item.
        id: ItemId,
    },
    /// After the delta the number of items is not what it should be.
    #[error("the delta announces {announced} items in all, and {found} are there")]
    Count {
        /// What the delta says.
        announced: u64,
        /// What came out.
        found: u64,
    },
    /// The id counter went backwards.
    #[error("the delta takes the id counter back from {base} to {delta}")]
    CounterBack {
        /// In the base.
        base: u64,
        /// In the delta.
        delta: u64,
    },
    /// An item's name or kind differs under one id; an id means one descriptor for ever.
    #[error("item {was} became {now}: a changed descriptor needs a new id")]
    ItemChanged {
        /// The item in the base.
        was: String,
        /// The item now.
        now: String,
    },
    /// The base has application state and there is none now, which a delta cannot say.
    #[error("the application state was taken away after the base was written, and a delta cannot say so")]
    StateRemoved,
    /// The descriptor is not a memfd whose contents can no longer change.
    #[error("the manifest's descriptor is not a sealed memfd (missing: {missing})")]
    NotSealed {
        /// Which seals are missing, or all of them.
        missing: String,
    },
    /// The memfd could not be read.
    #[error("could not read the manifest's memfd: {0}")]
    Io(#[from] io::Error),
}

/// Decodes a list, and gives up as soon as it is longer than the limit: an entry is larger in memory than its
/// shortest form on the wire.
mod list {
    use minicbor::encode::{self, Write};
    use minicbor::{Decode, Decoder, Encode, Encoder, decode::Error};

    use super::within;
    use crate::{Limits, courtesy};

    /// Bytes in the shortest map that is an element. A list of bare ids may have more elements, and grows.
    const SHORTEST: usize = 3;
    /// How many elements are encoded or decoded in a step.
    const AT_ONCE: usize = 256;

    pub(super) fn encode<C, T: Encode<C>, W: Write>(
        list: &[T],
        e: &mut Encoder<W>,
        ctx: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        e.array(list.len() as u64)?;
        for (done, element) in list.iter().enumerate() {
            element.encode(e, ctx)?;
            courtesy::step(done + 1, AT_ONCE);
        }
        Ok(())
    }

    pub(super) fn decode<'b, C, T>(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Vec<T>, Error>
    where
        C: AsRef<Limits>,
        T: Decode<'b, C>,
    {
        let limit = ctx.as_ref().items;
        let left = d.input().len() - d.position();
        let elements = d.array_iter_with(ctx)?;
        // No more room than the bytes that are there can fill, whatever the list announces.
        let mut list = Vec::with_capacity(elements.size_hint().0.min(limit).min(left / SHORTEST));
        for element in elements {
            let of = || "the length of a list in the manifest".into();
            within(of, "items", list.len().saturating_add(1), limit).map_err(Error::custom)?;
            list.push(element?);
            courtesy::step(list.len(), AT_ONCE);
        }
        Ok(list)
    }
}

/// Encodes and frames one part, of about so many bytes; the caller has checked what is in it.
fn encode_part<T>(part: Part, value: &T, about: usize, limits: &Limits) -> Result<Encoded, ManifestError>
where
    T: for<'l> Encode<&'l Limits>,
{
    let mut context = limits;
    let encoded = header::frame(part, about, |out| minicbor::encode_with(value, out, &mut context))
        .map_err(ManifestError::Encode)?;
    within(|| format!("the {part}"), "manifest_bytes", encoded.bytes.len(), limits.manifest_bytes)?;
    Ok(encoded)
}

/// Checks the frame and decodes the body; the caller checks what is in it.
fn decode_part<'b, T>(part: Part, bytes: &'b [u8], limits: &Limits) -> Result<T, ManifestError>
where
    T: for<'l> Decode<'b, &'l Limits>,
{
    within(|| format!("the {part}"), "manifest_bytes", bytes.len(), limits.manifest_bytes)?;
    let body = header::unframe(part, bytes)?;
    let mut decoder = Decoder::new(body);
    let mut context = limits;
    let value = decoder.decode_with(&mut context).map_err(malformed)?;
    match body.len() - decoder.position() {
        0 => Ok(value),
        left => Err(ManifestError::Trailing { left }),
    }
}

/// What a decoder's error is: a limit, if it was one that ended it.
fn malformed(error: minicbor::decode::Error) -> ManifestError {
    let source = std::error::Error::source(&error);
    match source.and_then(|s| s.downcast_ref::<ManifestError>()) {
        Some(&ManifestError::Limit { ref of, limit_name, found, limit }) => {
            ManifestError::Limit { of: of.clone(), limit_name, found, limit }
        }
        _ => ManifestError::Malformed(error),
    }
}

/// Holds one size against one limit; `of` is asked only when it is exceeded.
fn within(
    of: impl FnOnce() -> String,
    limit_name: &'static str,
    found: usize,
    limit: usize,
) -> Result<(), ManifestError> {
    if found <= limit { Ok(()) } else { Err(ManifestError::Limit { of: of(), limit_name, found, limit }) }
}

fn name_within(of: &str, name: &str, limits: &Limits) -> Result<(), ManifestError> {
    within(|| format!("the {of} {:?}", shortened(name)), "name_bytes", name.len(), limits.name_bytes)
}

fn state_within(state: Option<&[u8]>, limits: &Limits) -> Result<(), ManifestError> {
    let bytes = state.map_or(0, <[u8]>::len);
    within(|| "the application state".into(), "state_bytes", bytes, limits.state_bytes)
}

/// Checks a list of entries: limits, order (and so duplicates), and that the counter is past every id.
fn check_entries(
    list: &'static str,
    entries: &[impl Borrow<Entry>],
    next_id: u64,
    limits: &Limits,
) -> Result<(), ManifestError> {
    within(|| format!("the number of {list}"), "items", entries.len(), limits.items)?;
    let entries = entries.iter().map(Borrow::borrow);
    check_ids(list, entries.clone().map(|e| e.id), next_id)?;
    entries.clone().try_for_each(|e| check_entry(e.into(), limits))
}

/// Checks an entry by itself.
fn check_entry(entry: EntryRef<'_>, limits: &Limits) -> Result<(), ManifestError> {
    name_within("item name", entry.name, limits)?;
    let of = || format!("the state of item {entry}");
    within(of, "item_state_bytes", entry.state.len(), limits.item_state_bytes)
}

/// Checks that ids ascend, and that the counter is past them.
fn check_ids(
    list: &'static str,
    ids: impl DoubleEndedIterator<Item = ItemId> + Clone,
    next_id: u64,
) -> Result<(), ManifestError> {
    check_order(list, ids.clone())?;
    match ids.last() {
        Some(id) if id.0 >= next_id => Err(ManifestError::NotGivenOut { id, next_id }),
        _ => Ok(()),
    }
}

fn check_order(list: &'static str, ids: impl Iterator<Item = ItemId>) -> Result<(), ManifestError> {
    let mut previous = None;
    for id in ids {
        if previous >= Some(id) {
            return Err(ManifestError::Order { list, id });
        }
        previous = Some(id);
    }
    Ok(())
}

/// A name for a message: what another process sent may be as long as it liked.
fn shortened(name: &str) -> String {
    const SHOWN: usize = 64;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_strict() {
        let ids = |ids: &[u64]| check_order("items", ids.iter().map(|&id| ItemId(id)));
        assert!(ids(&[]).is_ok());
        assert!(ids(&[0, 1, 9]).is_ok());
        assert!(matches!(ids(&[1, 1]), Err(ManifestError::Order { id: ItemId(1), .. })));
        assert!(matches!(ids(&[2, 3, 1]), Err(ManifestError::Order { id: ItemId(1), .. })));
    }

    #[test]
    fn long_names_are_shortened_between_characters() {
        assert_eq!(shortened("ä"), "ä");
        assert_eq!(shortened(&"ä".repeat(65)), format!("{}…", "ä".repeat(64)));
    }
}
