//! An entry in the form in which it is written here, read without the generality of a decoder: a manifest of many
//! connections consists of them.

use crate::{ItemId, Kind, item::EntryRef};

/// The major types of CBOR (RFC 8949, section 3.1) that occur, in the upper three bits of an initial byte.
const UNSIGNED: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const MAP: u8 = 5;

/// The entry at the front of `bytes`, and its length; `None` when it is in any other form, or is none at all.
pub(super) fn read(bytes: &[u8]) -> Option<(EntryRef<'_>, usize)> {
    let mut reader = Reader { left: bytes };
    reader.exactly(MAP, 4)?;
    reader.exactly(UNSIGNED, 0)?;
    let id = ItemId(reader.head(UNSIGNED)?);
    reader.exactly(UNSIGNED, 1)?;
    let name = reader.string(TEXT)?;
    reader.exactly(UNSIGNED, 2)?;
    let kind = Kind::from_code(reader.head(UNSIGNED)?.try_into().ok()?);
    reader.exactly(UNSIGNED, 3)?;
    let state = reader.string(BYTES)?;
    let entry = EntryRef { id, name: str::from_utf8(name).ok()?, kind, state };
    Some((entry, bytes.len() - reader.left.len()))
}

struct Reader<'b> {
    left: &'b [u8],
}

impl<'b> Reader<'b> {
    fn exactly(&mut self, major: u8, argument: u64) -> Option<()> {
        (self.head(major)? == argument).then_some(())
    }

    /// The argument of a head of this major type: a number, or a length.
    fn head(&mut self, major: u8) -> Option<u64> {
        let (&first, rest) = self.left.split_first()?;
        self.left = rest;
        if first >> 5 != major {
            return None;
        }
        match first & 0x1f {
            small @ 0..24 => Some(u64::from(small)),
            24 => self.array().map(|[byte]| u64::from(byte)),
            25 => self.array().map(|bytes| u64::from(u16::from_be_bytes(bytes))),
            26 => self.array().map(|bytes| u64::from(u32::from_be_bytes(bytes))),
            27 => self.array().map(u64::from_be_bytes),
            _ => None,
        }
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (&array, rest) = self.left.split_first_chunk()?;
        self.left = rest;
        Some(array)
    }

    fn string(&mut self, major: u8) -> Option<&'b [u8]> {
        let length = self.head(major)?.try_into().ok()?;
        let (string, rest) = self.left.split_at_checked(length)?;
        self.left = rest;
        Some(string)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Entry;

    fn any_entry() -> impl Strategy<Value = Entry> {
        let id = prop_oneof![0..30_u64, any::<u64>(), Just(u64::MAX)].prop_map(ItemId);
        let name = prop_oneof![".{0,8}", "[a-z]{20,300}"];
        let state = prop::collection::vec(any::<u8>(), 0..300);
        (id, name, 0..20_u32, state).prop_map(|(id, name, kind, state)| Entry {
            id,
            name,
            kind: Kind::from_code(kind),
            state,
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_in_this_form(entry in any_entry(), more in prop::collection::vec(any::<u8>(), 0..4)) {
            let mut bytes = minicbor::to_vec(&entry).unwrap();
            let length = bytes.len();
            bytes.extend(more);
            prop_assert_eq!(read(&bytes), Some((entry.as_ref(), length)));
        }

        #[test]
        fn what_is_in_this_form_means_the_same_to_a_decoder(
            entry in any_entry(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            length in any::<prop::sample::Index>(),
        ) {
            let mut bytes = minicbor::to_vec(&entry).unwrap();
            for (at, byte) in damage {
                *at.get_mut(&mut bytes) = byte;
            }
            bytes.truncate(length.index(bytes.len() + 1));
            if let Some((entry, length)) = read(&bytes) {
                let mut decoder = minicbor::Decoder::new(&bytes);
                prop_assert_eq!(decoder.decode::<EntryRef<'_>>().unwrap(), entry);
                prop_assert_eq!(decoder.position(), length);
            }
        }
    }
}
