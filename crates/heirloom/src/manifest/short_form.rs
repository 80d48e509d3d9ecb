//! An entry in the form in which it is written here, written and read without the generality of an encoder and a decoder: a
//! manifest of many connections consists of them, and while it is made and read nobody does anything else.

use minicbor::encode::{Encode, Encoder, Error, Write};

use crate::{Entry, ItemId, Kind, item::EntryRef};

/// The major types of CBOR (RFC 8949, section 3.1) that occur, in the upper three bits of an initial byte.
const UNSIGNED: u8 = 0 << 5;
const BYTES: u8 = 2 << 5;
const TEXT: u8 = 3 << 5;
const MAP: u8 = 5 << 5;

/// The longest head: an initial byte and a number of 64 bits.
const HEAD: usize = 9;

impl<C> Encode<C> for Entry {
    fn encode<W: Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), Error<W::Error>> {
        write(self.into(), e.writer_mut()).map_err(Error::write)
    }
}

fn write<W: Write>(entry: EntryRef<'_>, out: &mut W) -> Result<(), W::Error> {
    let mut heads = Heads::default();
    heads.push(MAP, 4);
    heads.push(UNSIGNED, 0);
    heads.push(UNSIGNED, entry.id.0);
    heads.push(UNSIGNED, 1);
    heads.push(TEXT, entry.name.len() as u64);
    out.write_all(heads.written())?;
    out.write_all(entry.name.as_bytes())?;

    let mut heads = Heads::default();
    heads.push(UNSIGNED, 2);
    heads.push(UNSIGNED, entry.kind as u64);
    heads.push(UNSIGNED, 3);
    heads.push(BYTES, entry.state.len() as u64);
    out.write_all(heads.written())?;
    out.write_all(entry.state)
}

/// Some heads, one after the other: at most three of a byte and two of any length.
#[derive(Default)]
struct Heads {
    bytes: [u8; 3 + 2 * HEAD],
    length: usize,
}

impl Heads {
    /// Adds one, in the shortest form that there is.
    fn push(&mut self, major: u8, argument: u64) {
        match argument {
            0..24 => self.extend([major | argument as u8]),
            24..=0xff => self.extend([major | 24, argument as u8]),
            0x100..=0xffff => self.with(major | 25, (argument as u16).to_be_bytes()),
            0x1_0000..=0xffff_ffff => self.with(major | 26, (argument as u32).to_be_bytes()),
            _ => self.with(major | 27, argument.to_be_bytes()),
        }
    }

    fn with<const N: usize>(&mut self, first: u8, argument: [u8; N]) {
        self.extend([first]);
        self.extend(argument);
    }

    fn extend<const N: usize>(&mut self, bytes: [u8; N]) {
        self.bytes[self.length..][..N].copy_from_slice(&bytes);
        self.length += N;
    }

    fn written(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The entry at the front of `bytes`, and its length; `None` when it is in any other form, or is none at all.
pub(super) fn read(bytes: &[u8]) -> Option<(EntryRef<'_>, usize)> {
    let mut reader = Reader { left: bytes };
    reader.skip([MAP | 4, UNSIGNED])?;
    let id = ItemId(reader.head(UNSIGNED)?);
    reader.skip([UNSIGNED | 1])?;
    let name = reader.string(TEXT)?;
    reader.skip([UNSIGNED | 2])?;
    let kind = Kind::from_code(reader.head(UNSIGNED)?.try_into().ok()?);
    reader.skip([UNSIGNED | 3])?;
    let state = reader.string(BYTES)?;
    let entry = EntryRef { id, name: str::from_utf8(name).ok()?, kind, state };
    Some((entry, bytes.len() - reader.left.len()))
}

struct Reader<'b> {
    left: &'b [u8],
}

impl<'b> Reader<'b> {
    /// Goes past these bytes, which must be there.
    #[inline]
    fn skip<const N: usize>(&mut self, bytes: [u8; N]) -> Option<()> {
        (self.array()? == bytes).then_some(())
    }

    /// The argument of a head of this major type: a number, or a length.
    #[inline]
    fn head(&mut self, major: u8) -> Option<u64> {
        let [first] = self.array()?;
        match first.wrapping_sub(major) {
            small @ 0..24 => Some(u64::from(small)),
            more => self.argument(more),
        }
    }

    fn argument(&mut self, more: u8) -> Option<u64> {
        match more {
            24 => self.array().map(|[byte]| u64::from(byte)),
            25 => self.array().map(|bytes| u64::from(u16::from_be_bytes(bytes))),
            26 => self.array().map(|bytes| u64::from(u32::from_be_bytes(bytes))),
            27 => self.array().map(u64::from_be_bytes),
            _ => None,
        }
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (&array, rest) = self.left.split_first_chunk()?;
        self.left = rest;
        Some(array)
    }

    #[inline]
    fn string(&mut self, major: u8) -> Option<&'b [u8]> {
        let length = self.head(major)?.try_into().ok()?;
        let (string, rest) = self.left.split_at_checked(length)?;
        self.left = rest;
        Some(string)
    }
}

#[cfg(test)]
mod tests {
    use minicbor::Encode;
    use proptest::prelude::*;

    use super::*;

    /// What an entry is by its definition in the manifest.
    #[derive(Encode)]
    #[cbor(map)]
    struct Plain {
        #[n(0)]
        id: ItemId,
        #[n(1)]
        name: String,
        #[n(2)]
        kind: Kind,
        #[cbor(n(3), with = "minicbor::bytes")]
        state: Vec<u8>,
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        let id = prop_oneof![
            0..300_u64,
            0..70_000_u64,
            any::<u32>().prop_map(u64::from),
            any::<u64>(),
            Just(u64::MAX)
        ]
        .prop_map(ItemId);
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
        fn what_is_written_is_what_an_encoder_would_write(entry in any_entry()) {
            let Entry { id, name, kind, state } = entry.clone();
            prop_assert_eq!(minicbor::to_vec(&entry).unwrap(), minicbor::to_vec(Plain { id, name, kind, state }).unwrap());
        }

        #[test]
        fn what_is_written_is_in_this_form(entry in any_entry(), more in prop::collection::vec(any::<u8>(), 0..4)) {
            let mut bytes = minicbor::to_vec(&entry).unwrap();
            let length = bytes.len();
            bytes.extend(more);
            prop_assert_eq!(read(&bytes), Some((EntryRef::from(&entry), length)));
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
