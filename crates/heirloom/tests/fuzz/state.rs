//! State, decoded as types of every shape: each byte string is one value of an application.

use std::collections::{BTreeMap, BTreeSet};

use heirloom::{Cbor, Codec};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

/// A struct as an application has it.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Session {
    pub(crate) user: String,
    pub(crate) id: u64,
    pub(crate) offset: i64,
    pub(crate) wide: i128,
    pub(crate) ratio: f64,
    pub(crate) letter: char,
    pub(crate) open: bool,
    pub(crate) topic: Option<String>,
    pub(crate) unsent: Vec<u8>,
    pub(crate) pairs: Vec<(u32, i8)>,
    pub(crate) by_name: BTreeMap<String, Vec<Phase>>,
    pub(crate) seen: BTreeSet<u16>,
    pub(crate) unit: (),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Phase {
    Idle,
    Count(u64),
    Pair(i8, String),
    Named { at: f32, then: Option<Box<Phase>> },
}

/// A type that can be nested without end.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Tree {
    pub(crate) name: String,
    pub(crate) children: Vec<Tree>,
}

pub(crate) fn run(input: &[u8]) {
    as_type::<Session>(input);
    as_type::<Phase>(input);
    as_type::<Tree>(input);
    as_type::<Vec<Vec<u64>>>(input);
    as_type::<BTreeMap<u64, Option<String>>>(input);
    let _ = Cbor::decode::<IgnoredAny>(input);
}

/// What can be read is the same when it was written again. The bytes are compared, since a NaN differs from itself.
fn as_type<T: Serialize + DeserializeOwned>(input: &[u8]) {
    let Ok(value) = Cbor::decode::<T>(input) else { return };
    let written = Cbor::encode(&value).expect("what was read can be written");
    let again: T = Cbor::decode(&written).expect("what was written can be read");
    assert_eq!(Cbor::encode(&again).expect("the same value"), written);
}
