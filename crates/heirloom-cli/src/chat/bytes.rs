//! Serializes a `Vec<u8>` as one byte string instead of a list of numbers: for `#[serde(with = "bytes")]`.
//!
//! Reading accepts a list too, since that is what formats without byte strings (JSON) write.

use std::fmt;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::ser::Serializer;

/// A list announces its length before it has any elements: no more than this is reserved on its word.
const TRUSTED_LENGTH: usize = 64 * 1024;

pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>, B: From<Vec<u8>>>(
    deserializer: D,
) -> Result<B, D::Error> {
    deserializer.deserialize_byte_buf(Bytes).map(B::from)
}

struct Bytes;

impl<'de> Visitor<'de> for Bytes {
    type Value = Vec<u8>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("bytes")
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }

    fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u8>, A::Error> {
        let mut bytes = Vec::with_capacity(list.size_hint().unwrap_or(0).min(TRUSTED_LENGTH));
        while let Some(byte) = list.next_element()? {
            bytes.push(byte);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Message {
        #[serde(with = "super")]
        body: Vec<u8>,
    }

    #[test]
    fn a_format_without_byte_strings_gets_a_list() {
        let body: Vec<u8> = (0..=255).collect();
        let json = serde_json::to_string(&Message { body: body.clone() }).unwrap();
        assert!(json.starts_with(r#"{"body":[0,1,2,"#), "{json}");
        assert_eq!(serde_json::from_str::<Message>(&json).unwrap().body, body);
    }

    #[test]
    fn what_is_no_byte_is_refused() {
        assert!(serde_json::from_str::<Message>(r#"{"body":[256]}"#).is_err());
        assert!(serde_json::from_str::<Message>(r#"{"body":7}"#).is_err());
    }
}
