//! The delta: the part of the manifest that is sent at the freeze.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};

use super::{
    Base, Encoded, Listing, ManifestError, Part, Section, Written,
    base::{check_counters, check_critical, check_section_names},
    check_entries, check_order, decode_part, encode_part, list, state_within, within,
};
use crate::{Entry, ItemId, Limits, item::EntryRef};

/// What has changed since the base was written.
///
/// The three lists are in ascending order of their ids; [`encode`](Delta::encode), [`decode`](Delta::decode)
/// and [`Base::apply`] insist on it.
///
/// ```
/// use heirloom::{Limits, manifest::{Base, Delta}};
///
/// let base = Base::default();
/// let crc = base.encode(&Limits::default())?.crc;
/// let now = Base { state: Some(b"later".to_vec()), ..base.clone() };
///
/// let delta = Delta::between(&base, crc, &now)?;
/// assert_eq!(base.apply(delta, crc)?, now);
/// # Ok::<_, heirloom::manifest::ManifestError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map, context_bound = "AsRef<Limits>")]
pub struct Delta {
    /// CRC-32 of the base that this belongs to.
    #[n(0)]
    pub base_crc: u32,
    /// Encoded application state; `None` when it has not changed.
    #[cbor(n(1), with = "minicbor::bytes", default)]
    pub state: Option<Vec<u8>>,
    /// Items whose state has changed.
    #[cbor(n(2), decode_with = "list::decode", default)]
    pub changed: Vec<Change>,
    /// Items that are new.
    #[cbor(n(3), decode_with = "list::decode", default)]
    pub added: Vec<Entry>,
    /// Items that are no more.
    #[cbor(n(4), decode_with = "list::decode", default)]
    pub ended: Vec<ItemId>,
    /// How many items there are in the end, all told (the control listener too, where the base lists it).
    #[n(5)]
    pub count: u64,
    /// When the incumbent froze, in nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
    #[cbor(n(6), default)]
    pub frozen_at_ns: u64,
    /// The service's counters at the freeze: totals, not differences.
    #[cbor(n(7), default)]
    pub counters: BTreeMap<String, u64>,
    /// The id that the next new item gets.
    #[n(8)]
    pub next_id: u64,
    /// Sections that are new or have changed.
    #[cbor(n(9), decode_with = "list::decode", default)]
    pub sections: Vec<Section>,
}

/// The new state of an item that is in the base.
///
/// ```
/// use heirloom::{ItemId, manifest::{Change, Delta}};
///
/// let change = Change { id: ItemId(1), state: b"new".to_vec() };
/// let delta = Delta { changed: vec![change], count: 1, next_id: 2, ..Delta::default() };
/// assert!(delta.state.is_none());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Change {
    /// The item.
    #[n(0)]
    pub id: ItemId,
    /// Its encoded state, whole.
    #[cbor(n(1), with = "minicbor::bytes", default)]
    pub state: Vec<u8>,
}

/// Which items a delta has touched, in ascending order.
///
/// ```
/// use heirloom::{ItemId, manifest::{Change, Changes, Delta}};
///
/// let change = Change { id: ItemId(1), state: b"new".to_vec() };
/// let delta = Delta { changed: vec![change], ended: vec![ItemId(2)], ..Delta::default() };
/// let changes = Changes::of(&delta);
/// assert_eq!((changes.changed, changes.ended), (vec![ItemId(1)], vec![ItemId(2)]));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Items whose state has changed.
    pub changed: Vec<ItemId>,
    /// Items that are new.
    pub added: Vec<ItemId>,
    /// Items that are no more.
    pub ended: Vec<ItemId>,
}

impl Changes {
    /// Those of a delta.
    pub fn of(delta: &Delta) -> Changes {
        Changes {
            changed: delta.changed.iter().map(|change| change.id).collect(),
            added: delta.added.iter().map(|entry| entry.id).collect(),
            ended: delta.ended.clone(),
        }
    }
}

impl Delta {
    /// What leads from `base`, whose checksum is `base_crc`, to `now`.
    ///
    /// `frozen_at_ns` is left at 0, for the caller to set. Of the service record only the counters can change.
    ///
    /// # Errors
    /// [`ManifestError::ItemChanged`] when a name or kind differs under one id, [`ManifestError::StateRemoved`],
    /// and [`ManifestError::Order`] when one of the two is out of order.
    pub fn between(base: &Base, base_crc: u32, now: &Base) -> Result<Delta, ManifestError> {
        check_order("items", base.items.iter().map(|e| e.id))?;
        let state = base.state.as_deref();
        let items = base.items.iter().map(|entry| Ok(entry.into()));
        Delta::from_lists(state, &base.sections, items, base_crc, &now.written())
    }

    /// What leads from what was listed to `now`; otherwise as [`Delta::between`].
    pub(crate) fn since(base: &Listing, now: &Written<'_>) -> Result<Delta, ManifestError> {
        let rest = base.rest();
        Delta::from_lists(rest.state.as_deref(), &rest.sections, base.entries(), base.crc(), now)
    }

    fn from_lists<'b>(
        state: Option<&[u8]>,
        sections: &[Section],
        before: impl Iterator<Item = Result<EntryRef<'b>, ManifestError>>,
        base_crc: u32,
        now: &Written<'_>,
    ) -> Result<Delta, ManifestError> {
        check_order("items", now.items.iter().map(|e| e.id))?;
        if state.is_some() && now.state.is_none() {
            return Err(ManifestError::StateRemoved);
        }

        let mut delta = Delta {
            base_crc,
            state: now.state.filter(|_| now.state != state).map(<[u8]>::to_vec),
            count: now.items.len() as u64,
            counters: now.service.counters.clone(),
            next_id: now.next_id,
            sections: now.sections.iter().filter(|s| !sections.contains(s)).cloned().collect(),
            ..Delta::default()
        };
        let mut after = now.items.iter().peekable();
        for was in before {
            let was = was?;
            while let Some(new) = after.next_if(|entry| entry.id < was.id) {
                delta.added.push((*new).clone());
            }
            match after.next_if(|entry| entry.id == was.id) {
                None => delta.ended.push(was.id),
                Some(is) if (was.name, was.kind) != (&is.name, is.kind) => {
                    return Err(ManifestError::ItemChanged { was: was.to_string(), now: is.to_string() });
                }
                Some(is) if was.state != is.state => {
                    delta.changed.push(Change { id: is.id, state: is.state.clone() });
                }
                Some(_) => {}
            }
        }
        delta.added.extend(after.map(|entry| (*entry).clone()));
        Ok(delta)
    }

    /// Writes the delta down.
    ///
    /// # Errors
    /// As [`Base::encode`].
    pub fn encode(&self, limits: &Limits) -> Result<Encoded, ManifestError> {
        self.check(limits)?;
        encode_part(Part::Delta, self, 0, limits)
    }

    /// Reads a delta.
    ///
    /// # Errors
    /// As [`Base::decode`].
    pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Delta, ManifestError> {
        let delta: Delta = decode_part(Part::Delta, bytes, limits)?;
        delta.check(limits)?;
        Ok(delta)
    }

    /// Checks that every critical section is among those `understood`.
    ///
    /// # Errors
    /// [`ManifestError::Critical`] names the first that is not.
    pub fn check_sections(&self, understood: &[&str]) -> Result<(), ManifestError> {
        check_critical(&self.sections, understood)
    }

    /// Checks that this belongs to the base with this checksum.
    ///
    /// # Errors
    /// [`ManifestError::WrongBase`].
    pub fn check_base(&self, base_crc: u32) -> Result<(), ManifestError> {
        if self.base_crc == base_crc {
            Ok(())
        } else {
            Err(ManifestError::WrongBase { announced: self.base_crc, found: base_crc })
        }
    }

    pub(crate) fn check_order(&self) -> Result<(), ManifestError> {
        check_order("changed items", self.changed.iter().map(|c| c.id))?;
        check_order("new items", self.added.iter().map(|e| e.id))?;
        check_order("ended items", self.ended.iter().copied())
    }

    fn check(&self, limits: &Limits) -> Result<(), ManifestError> {
        state_within(self.state.as_deref(), limits)?;
        check_counters(&self.counters, limits)?;
        check_section_names(&self.sections, limits)?;
        self.check_order()?;
        for change in &self.changed {
            within(
                || format!("the state of item {}", change.id),
                "item_state_bytes",
                change.state.len(),
                limits.item_state_bytes,
            )?;
        }
        check_entries("new items", &self.added, self.next_id, limits)
    }
}
