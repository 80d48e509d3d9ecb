//! How an application's own state is turned into bytes and back.
//!
//! State is read by a program of another version than the one that wrote it, in both directions: an upgrade
//! reads older state, a downgrade newer. A [`Codec`] therefore has to carry field names. [`Cbor`], the
//! default, does.

use std::error::Error;

use minicbor::{Decoder, data::Type};
use serde::{Serialize, de::DeserializeOwned};

/// How deep lists and maps may be nested in what [`Cbor`] encodes and decodes: as deep as serde_json allows.
pub const DEEPEST: usize = 128;

/// A way to encode state that survives a change of the program.
///
/// An implementation promises that decoding ignores fields it does not know, and leaves fields that are absent
/// to serde's defaults. Formats that carry no field names (bincode, postcard) cannot promise it: they read a
/// changed struct silently wrong.
///
/// ```
/// use heirloom::codec::{Codec, Cbor};
///
/// let bytes = Cbor::encode(&("alice", 3)).unwrap();
/// assert_eq!(Cbor::decode::<(String, u32)>(&bytes).unwrap(), ("alice".to_string(), 3));
/// ```
pub trait Codec {
    /// Encodes `value`.
    ///
    /// # Errors
    /// [`CodecError::Encode`] when the type's own `Serialize` fails, or the format cannot express the value;
    /// [`CodecError::TooDeep`] when it could not be decoded again.
    fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError>;

    /// Decodes a value from exactly `bytes`.
    ///
    /// # Errors
    /// [`CodecError::Decode`] when the bytes are not a `T`; [`CodecError::Trailing`] when more follows it;
    /// [`CodecError::TooDeep`].
    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError>;
}

/// CBOR (RFC 8949) with field names: the default [`Codec`].
///
/// What a program may change between versions, so that either reads the other's state:
/// - add a field that has a default (`#[serde(default)]`, or an `Option`);
/// - remove a field that the older program has a default for;
/// - widen an integer or a float (a value that does not fit the narrower type is an error, never cut off).
///
/// A new enum variant is an error for an older program that meets it. `Vec<u8>` becomes an array of numbers,
/// as everywhere in serde; a type that serializes itself with `serialize_bytes` becomes a byte string, which is
/// smaller. As with any format, an `Option<Option<T>>` does not tell `Some(None)` from `None`.
///
/// What is decoded comes from another process: it may be nested [`DEEPEST`] levels deep at most, so that a type which
/// contains itself does not overflow the stack, and a list cannot announce more entries than there are bytes.
///
/// ```
/// use heirloom::codec::{Codec, Cbor};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize)]
/// struct Old { user: String, retired: bool }
///
/// #[derive(Deserialize)]
/// struct New { user: String, #[serde(default)] colour: u32 }
///
/// let bytes = Cbor::encode(&Old { user: "alice".into(), retired: true }).unwrap();
/// let new: New = Cbor::decode(&bytes).unwrap();
/// assert_eq!((new.user.as_str(), new.colour), ("alice", 0));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cbor;

impl Codec for Cbor {
    fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
        let bytes = minicbor_serde::to_vec(value).map_err(|e| CodecError::Encode(Box::new(e)))?;
        // What could not be read again is not written.
        check_nesting(&bytes)?;
        Ok(bytes)
    }

    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
        check_nesting(bytes)?;
        let mut deserializer = minicbor_serde::Deserializer::new(bytes);
        let value = T::deserialize(&mut deserializer).map_err(|e| CodecError::Decode(Box::new(e)))?;
        match bytes.len() - deserializer.decoder().position() {
            0 => Ok(value),
            left => Err(CodecError::Trailing { left }),
        }
    }
}

/// Walks over one value, without recursion, before anything is made of it.
fn check_nesting(bytes: &[u8]) -> Result<(), CodecError> {
    let malformed = |error: minicbor::decode::Error| CodecError::Decode(Box::new(error));
    let mut decoder = Decoder::new(bytes);
    // How many values each open list still has; `None` until its end is met.
    let mut open: Vec<Option<u64>> = Vec::new();
    loop {
        let kind = decoder.datatype().map_err(malformed)?;
        let list = match kind {
            Type::Array | Type::ArrayIndef => Some(decoder.array().map_err(malformed)?),
            Type::Map | Type::MapIndef => {
                Some(decoder.map().map_err(malformed)?.map(|pairs| pairs.saturating_mul(2)))
            }
            Type::Tag => decoder.tag().map(|_| Some(Some(1))).map_err(malformed)?,
            Type::Break if open.last() == Some(&None) => {
                decoder.set_position(decoder.position() + 1);
                open.pop();
                None
            }
            _ => decoder.skip().map(|()| None).map_err(malformed)?,
        };
        if let Some(entries) = list {
            let left = bytes.len() - decoder.position();
            if entries.is_some_and(|entries| entries > left as u64) {
                return Err(malformed(minicbor::decode::Error::message(format!(
                    "a list has more entries than the {left} bytes that follow"
                ))));
            }
            if open.len() == DEEPEST {
                return Err(CodecError::TooDeep);
            }
            open.push(entries);
        }
        // This value was the last of each list that ends here.
        loop {
            match open.last_mut() {
                None => return Ok(()),
                Some(Some(0)) => drop(open.pop()),
                Some(Some(left)) => break *left -= 1,
                Some(None) => break,
            }
        }
    }
}

/// Why state could not be encoded or decoded.
///
/// ```
/// use heirloom::codec::{Codec, CodecError, Cbor};
///
/// assert!(matches!(Cbor::decode::<u8>(&[1, 2]), Err(CodecError::Trailing { left: 1 })));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The value could not be written.
    #[error("the state could not be encoded: {0}")]
    Encode(#[source] Box<dyn Error + Send + Sync>),
    /// The bytes are not a value of the type that was asked for.
    #[error(
        "the state could not be decoded as the type asked for (was it written by an incompatible version?): {0}"
    )]
    Decode(#[source] Box<dyn Error + Send + Sync>),
    /// A whole value was read and bytes were left over.
    #[error("{left} bytes follow the state that was decoded: it is not what the other program wrote")]
    Trailing {
        /// How many bytes were left.
        left: usize,
    },
    /// Lists and maps are in each other too often.
    #[error("the state is nested more than {DEEPEST} levels deep, which no program would read")]
    TooDeep,
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    enum Phase {
        Idle,
        Count(u64),
        Pair(i8, String),
        Named { at: f64, inner: Option<Box<Phase>> },
    }

    /// Serializes itself as a byte string, as `serde_bytes` does.
    #[derive(Debug, Clone, PartialEq)]
    struct Blob(Vec<u8>);

    impl Serialize for Blob {
        fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            s.serialize_bytes(&self.0)
        }
    }

    impl<'de> Deserialize<'de> for Blob {
        fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            struct Bytes;
            impl serde::de::Visitor<'_> for Bytes {
                type Value = Blob;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("bytes")
                }
                fn visit_bytes<E>(self, v: &[u8]) -> Result<Blob, E> {
                    Ok(Blob(v.to_vec()))
                }
            }
            d.deserialize_byte_buf(Bytes)
        }
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Everything {
        max: u64,
        min: i64,
        wide: u128,
        ratio: f32,
        letter: char,
        text: String,
        numbers: Vec<u8>,
        blob: Blob,
        some: Option<Vec<String>>,
        none: Option<u8>,
        unit: (),
        phases: Vec<Phase>,
        by_name: HashMap<String, Phase>,
        by_number: BTreeMap<u32, (bool, u16)>,
        #[serde(skip_serializing_if = "Vec::is_empty", default)]
        empty: Vec<u8>,
    }

    fn everything() -> Everything {
        Everything {
            max: u64::MAX,
            min: i64::MIN,
            wide: u128::MAX,
            ratio: 0.1,
            letter: 'ß',
            text: "línea\n\0".into(),
            numbers: (0..=255).collect(),
            blob: Blob((0..=255).collect()),
            some: Some(vec!["a".into(), String::new()]),
            none: None,
            unit: (),
            phases: vec![
                Phase::Idle,
                Phase::Count(7),
                Phase::Pair(-1, "x".into()),
                Phase::Named { at: f64::MIN_POSITIVE, inner: Some(Box::new(Phase::Idle)) },
            ],
            by_name: HashMap::from([("k".into(), Phase::Idle)]),
            by_number: BTreeMap::from([(1, (true, 2)), (u32::MAX, (false, 0))]),
            empty: vec![],
        }
    }

    #[test]
    fn every_shape_comes_back() {
        let bytes = Cbor::encode(&everything()).unwrap();
        assert_eq!(Cbor::decode::<Everything>(&bytes).unwrap(), everything());
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V1 {
        user: String,
        count: u32,
        nested: NestedV1,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct NestedV1 {
        a: u8,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V2 {
        user: String,
        count: u64,
        nested: NestedV2,
        #[serde(default)]
        history: Vec<Phase>,
        topic: Option<String>,
        #[serde(default = "seven")]
        seven: u8,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct NestedV2 {
        #[serde(default)]
        deep: BTreeMap<String, Vec<Option<Phase>>>,
        a: u8,
    }

    fn seven() -> u8 {
        7
    }

    #[test]
    fn a_newer_program_reads_older_state() {
        let old = V1 { user: "alice".into(), count: 3, nested: NestedV1 { a: 1 } };
        let new: V2 = Cbor::decode(&Cbor::encode(&old).unwrap()).unwrap();
        assert_eq!(
            new,
            V2 {
                user: "alice".into(),
                count: 3,
                nested: NestedV2 { deep: BTreeMap::new(), a: 1 },
                history: vec![],
                topic: None,
                seven: 7,
            }
        );
    }

    #[test]
    fn an_older_program_reads_newer_state() {
        let new = V2 {
            user: "bob".into(),
            count: 4,
            nested: NestedV2 {
                deep: BTreeMap::from([("x".into(), vec![None, Some(Phase::Pair(1, "y".into()))])]),
                a: 9,
            },
            history: vec![Phase::Named { at: 1.5, inner: None }],
            topic: Some("t".into()),
            seven: 8,
        };
        let old: V1 = Cbor::decode(&Cbor::encode(&new).unwrap()).unwrap();
        assert_eq!(old, V1 { user: "bob".into(), count: 4, nested: NestedV1 { a: 9 } });
    }

    #[test]
    fn a_number_too_large_for_the_older_type_is_an_error() {
        #[derive(Serialize)]
        struct Wide {
            user: &'static str,
            count: u64,
            nested: NestedV1,
        }
        let wide = Wide { user: "eve", count: 1 << 40, nested: NestedV1 { a: 1 } };
        let error = Cbor::decode::<V1>(&Cbor::encode(&wide).unwrap()).unwrap_err();
        assert!(matches!(error, CodecError::Decode(_)), "{error}");
    }

    #[test]
    fn a_missing_field_without_a_default_is_named() {
        let bytes = Cbor::encode(&BTreeMap::from([("user", "alice")])).unwrap();
        let error = Cbor::decode::<V1>(&bytes).unwrap_err();
        assert!(error.to_string().contains("count"), "{error}");
    }

    #[test]
    fn trailing_bytes_and_truncation_are_errors() {
        let mut bytes = Cbor::encode(&everything()).unwrap();
        for cut in 0..bytes.len() {
            assert!(Cbor::decode::<Everything>(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        bytes.extend([0, 0]);
        assert!(matches!(Cbor::decode::<Everything>(&bytes), Err(CodecError::Trailing { left: 2 })));
    }

    #[test]
    fn a_length_that_the_input_does_not_have_allocates_nothing() {
        // An array that claims 2^62 elements, in 9 bytes.
        let bytes = [0x9b, 0x40, 0, 0, 0, 0, 0, 0, 0];
        assert!(matches!(Cbor::decode::<Vec<u64>>(&bytes), Err(CodecError::Decode(_))));
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Chain {
        #[serde(default)]
        next: Option<Box<Chain>>,
    }

    fn chain(length: usize) -> Chain {
        (1..length).fold(Chain { next: None }, |next, _| Chain { next: Some(next.into()) })
    }

    #[test]
    fn a_type_that_contains_itself_is_read_to_a_depth() {
        let deepest = chain(DEEPEST);
        assert_eq!(Cbor::decode::<Chain>(&Cbor::encode(&deepest).unwrap()).unwrap(), deepest);
        assert!(matches!(Cbor::encode(&chain(DEEPEST + 1)), Err(CodecError::TooDeep)));
        // Written by a program that has no such bound.
        let deeper = b"\xa1\x64next".repeat(1_000_000);
        assert!(matches!(Cbor::decode::<Chain>(&deeper), Err(CodecError::TooDeep)));
        assert!(matches!(Cbor::decode::<Chain>(&[0xc1; 1_000_000]), Err(CodecError::TooDeep)));
    }

    #[test]
    fn depth_is_counted_over_lists_that_have_ended() {
        // Lists of known and of unknown length, empty ones too, side by side.
        let list: Vec<(Vec<Vec<u8>>, Option<u8>)> = vec![(vec![vec![], vec![1, 2]], None); 1000];
        let bytes = Cbor::encode(&list).unwrap();
        assert_eq!(Cbor::decode::<Vec<(Vec<Vec<u8>>, Option<u8>)>>(&bytes).unwrap(), list);
        let bytes = [&[0x9f][..], &[0x9f, 0x80, 0x81, 1, 0xff].repeat(1000), &[0xff]].concat();
        assert_eq!(Cbor::decode::<Vec<Vec<Vec<u8>>>>(&bytes).unwrap(), vec![vec![vec![], vec![1]]; 1000]);
    }
}
