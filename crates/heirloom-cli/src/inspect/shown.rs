//! State for people: whatever CBOR there is as JSON, with long bytes and texts cut short.

use std::fmt;

use heirloom::{Cbor, Codec};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

/// How much of a text or of bytes is shown.
const SHOWN: usize = 64;

/// State as JSON; state that is no CBOR, from a codec of the application's own, by its length alone.
pub(super) fn state(bytes: &[u8]) -> Value {
    if bytes.is_empty() {
        return Value::Null;
    }
    match Cbor::decode::<Shown>(bytes) {
        Ok(Shown(value)) => value,
        Err(_) => json!({ "bytes": bytes.len() }),
    }
}

struct Shown(Value);

impl<'de> Deserialize<'de> for Shown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Anything).map(Shown)
    }
}

struct Anything;

impl<'de> Visitor<'de> for Anything {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("anything")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(match value.char_indices().nth(SHOWN) {
            Some((end, _)) => json!({ "bytes": value.len(), "begins": &value[..end] }),
            None => value.into(),
        })
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        let begins = String::from_utf8_lossy(&value[..value.len().min(SHOWN)]);
        Ok(json!({ "bytes": value.len(), "begins": begins }))
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Shown(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some((Shown(name), Shown(value))) = map.next_entry()? {
            let name = name.as_str().map_or_else(|| name.to_string(), str::to_owned);
            fields.insert(name, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;

    #[derive(Serialize)]
    struct State<'a> {
        topic: &'a str,
        members: Vec<(u64, Option<i8>)>,
        ratio: f64,
        quiet: bool,
    }

    #[test]
    fn any_state_can_be_shown() {
        let long = "ä".repeat(100);
        let encoded = Cbor::encode(&State {
            topic: &long,
            members: vec![(1, None), (2, Some(-3))],
            ratio: 0.5,
            quiet: true,
        })
        .unwrap();
        let expected = json!({
            "topic": { "bytes": 200, "begins": "ä".repeat(64) },
            "members": [[1, null], [2, -3]],
            "ratio": 0.5,
            "quiet": true,
        });
        assert_eq!(state(&encoded), expected);
        assert_eq!(state(b""), Value::Null);
        assert_eq!(state(b"\xff\x00\x01"), json!({ "bytes": 3 }));
    }

    #[test]
    fn what_is_nested_without_end_is_not_shown() {
        assert_eq!(state(&[0x81; 1_000_000]), json!({ "bytes": 1_000_000 }));
    }
}
