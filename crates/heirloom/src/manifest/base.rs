//! The base: the part of the manifest that is sent ahead.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::{
    Delta, Encoded, Listing, ManifestError, Part, check_entries, check_order, encode_part, list, name_within,
    shortened, state_within, within,
};
use crate::{Entry, ItemId, Limits};

/// Bytes in an entry beside its name and its state, mostly.
const ITEM_BYTES: usize = 16;

/// Everything about a service that is handed over, but the descriptors.
///
/// Items are in ascending order of their ids; both [`encode`](Base::encode) and [`decode`](Base::decode)
/// insist on it, so a manifest with an id twice cannot exist.
///
/// ```
/// use heirloom::{Limits, manifest::Base};
///
/// let base = Base { state: Some(b"hello".to_vec()), ..Base::default() };
/// let encoded = base.encode(&Limits::default())?;
/// assert_eq!(Base::decode(&encoded.bytes, &Limits::default())?, base);
/// # Ok::<_, heirloom::manifest::ManifestError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Who hands over.
    pub service: ServiceRecord,
    /// Encoded application state, `None` when the application has none.
    pub state: Option<Vec<u8>>,
    /// The items, in ascending order of their ids.
    pub items: Vec<Entry>,
    /// The id that the next new item gets; it travels, so that no id is ever used twice.
    pub next_id: u64,
    /// What other parts of the program add.
    pub sections: Vec<Section>,
}

/// A base as it is written down, of parts that lie elsewhere. A [`Listing`] is how it is read.
#[derive(Debug, Encode)]
#[cbor(map)]
pub(crate) struct Written<'a> {
    #[n(0)]
    pub(crate) service: &'a ServiceRecord,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub(crate) state: Option<&'a [u8]>,
    #[cbor(n(2), encode_with = "list::encode")]
    pub(crate) items: Vec<&'a Entry>,
    #[n(3)]
    pub(crate) next_id: u64,
    #[n(4)]
    pub(crate) sections: &'a [Section],
}

/// Who hands over: what is known about the service itself and outlives each of its processes.
///
/// ```
/// use heirloom::manifest::ServiceRecord;
///
/// let record = ServiceRecord { name: "chat".into(), generation: 3, ..ServiceRecord::default() };
/// assert_eq!(record.counters.get("bytes_in"), None);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
#[serde(default)]
pub struct ServiceRecord {
    /// The service's name.
    #[n(0)]
    pub name: String,
    /// The incumbent's generation: how many times the service had been handed over when it began to serve.
    #[n(1)]
    pub generation: u64,
    /// When the service first started, in milliseconds since the UNIX epoch.
    #[cbor(n(2), default)]
    pub started_unix_ms: u64,
    /// Counters that go on over a handover (`bytes_in`, `bytes_out`, …), so that metrics stay monotonic.
    #[cbor(n(3), default)]
    pub counters: BTreeMap<String, u64>,
    /// The program that wrote this.
    #[cbor(n(4), default)]
    pub program: String,
    /// Its version.
    #[cbor(n(5), default)]
    pub version: String,
    /// The schema version of the application state.
    #[cbor(n(6), default)]
    pub schema: u32,
}

/// A named piece of a manifest for some other part of the program.
///
/// A reader skips a section that it does not know, unless the section is critical: then it must refuse.
///
/// ```
/// use heirloom::manifest::{Base, Section};
///
/// let section = Section { name: "tls".into(), critical: true, bytes: vec![] };
/// let base = Base { sections: vec![section], ..Base::default() };
/// assert!(base.check_sections(&["tls"]).is_ok());
/// assert!(base.check_sections(&[]).unwrap_err().to_string().contains("\"tls\""));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Section {
    /// What it is called.
    #[n(0)]
    pub name: String,
    /// Whether a reader that does not know it must refuse the manifest. A flag that is absent is false.
    #[cbor(n(1), default)]
    pub critical: bool,
    /// What is in it.
    #[cbor(n(2), with = "minicbor::bytes", default)]
    pub bytes: Vec<u8>,
}

impl Default for Base {
    /// The base of a service that has nothing yet.
    fn default() -> Self {
        Base {
            service: ServiceRecord::default(),
            state: None,
            items: Vec::new(),
            next_id: ItemId::FIRST.0,
            sections: Vec::new(),
        }
    }
}

impl ServiceRecord {
    /// What the process that takes over writes: the same, one generation later.
    pub(crate) fn succeeded(&self) -> ServiceRecord {
        // Another process chose the number.
        ServiceRecord { generation: self.generation.saturating_add(1), ..self.clone() }
    }
}

impl Base {
    /// Writes the base down.
    ///
    /// # Errors
    /// [`ManifestError::Limit`], [`ManifestError::Order`] or [`ManifestError::NotGivenOut`]: what a reader would
    /// refuse is not written.
    pub fn encode(&self, limits: &Limits) -> Result<Encoded, ManifestError> {
        self.written().encode(limits)
    }

    /// Reads a base.
    ///
    /// # Errors
    /// Any [`ManifestError`] about form. Sections are not looked at: see [`check_sections`](Base::check_sections).
    pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Base, ManifestError> {
        Listing::read(bytes, limits)?.into_base()
    }

    /// Checks that every critical section is among those `understood`.
    ///
    /// # Errors
    /// [`ManifestError::Critical`] names the first that is not.
    pub fn check_sections(&self, understood: &[&str]) -> Result<(), ManifestError> {
        check_critical(&self.sections, understood)
    }

    /// What a base would say had it been written at the moment of the delta.
    ///
    /// `base_crc` is this base's checksum: [`Encoded::crc`], or [`Header::crc`](super::Header::crc) on the side
    /// that received it. The work is proportional to what the delta holds, apart from one pass over the ids. A
    /// section in the delta takes the place of one with the same name.
    ///
    /// # Errors
    /// [`ManifestError::WrongBase`], [`ManifestError::UnknownItem`], [`ManifestError::DuplicateItem`],
    /// [`ManifestError::Order`], [`ManifestError::NotGivenOut`], [`ManifestError::CounterBack`] or
    /// [`ManifestError::Count`]. Nothing is left of the base then: a delta that does not fit ends the takeover.
    pub fn apply(mut self, delta: Delta, base_crc: u32) -> Result<Base, ManifestError> {
        delta.check_base(base_crc)?;
        delta.check_order()?;
        check_order("items", self.items.iter().map(|e| e.id))?;
        if delta.next_id < self.next_id {
            return Err(ManifestError::CounterBack { base: self.next_id, delta: delta.next_id });
        }

        if let Some(entry) = delta.added.iter().find(|e| find(&self.items, e.id).is_some()) {
            return Err(ManifestError::DuplicateItem { id: entry.id });
        }
        if let Some(&id) = delta.ended.iter().find(|id| find(&self.items, **id).is_none()) {
            return Err(ManifestError::UnknownItem { id });
        }
        if !delta.ended.is_empty() {
            self.items.retain(|e| delta.ended.binary_search(&e.id).is_err());
        }
        for change in delta.changed {
            let at = find(&self.items, change.id).ok_or(ManifestError::UnknownItem { id: change.id })?;
            self.items[at].state = change.state;
        }
        self.items.extend(delta.added);
        // Two ascending runs, which this merges in linear time.
        self.items.sort_by_key(|e| e.id);

        let found = self.items.len() as u64;
        if found != delta.count {
            return Err(ManifestError::Count { announced: delta.count, found });
        }
        if let Some(last) = self.items.last().filter(|e| e.id.0 >= delta.next_id) {
            return Err(ManifestError::NotGivenOut { id: last.id, next_id: delta.next_id });
        }

        self.next_id = delta.next_id;
        self.state = delta.state.or(self.state);
        self.service.counters.extend(delta.counters);
        self.sections.retain(|old| delta.sections.iter().all(|new| new.name != old.name));
        self.sections.extend(delta.sections);
        Ok(self)
    }

    pub(super) fn check(&self, limits: &Limits) -> Result<(), ManifestError> {
        self.written().check(limits)
    }

    pub(crate) fn written(&self) -> Written<'_> {
        Written {
            service: &self.service,
            state: self.state.as_deref(),
            items: self.items.iter().collect(),
            next_id: self.next_id,
            sections: &self.sections,
        }
    }
}

impl Written<'_> {
    /// As [`Base::encode`].
    pub(crate) fn encode(&self, limits: &Limits) -> Result<Encoded, ManifestError> {
        self.check(limits)?;
        let items: usize = self.items.iter().map(|e| ITEM_BYTES + e.name.len() + e.state.len()).sum();
        encode_part(Part::Base, self, items + self.state.map_or(0, <[u8]>::len), limits)
    }

    fn check(&self, limits: &Limits) -> Result<(), ManifestError> {
        let ServiceRecord { name, program, version, counters, .. } = self.service;
        name_within("service name", name, limits)?;
        name_within("program name", program, limits)?;
        name_within("program version", version, limits)?;
        check_counters(counters, limits)?;
        state_within(self.state, limits)?;
        check_section_names(self.sections, limits)?;
        check_entries("items", &self.items, self.next_id, limits)
    }
}

fn find(items: &[Entry], id: ItemId) -> Option<usize> {
    items.binary_search_by_key(&id, |e| e.id).ok()
}

pub(super) fn check_counters(counters: &BTreeMap<String, u64>, limits: &Limits) -> Result<(), ManifestError> {
    within(|| "the number of counters".into(), "items", counters.len(), limits.items)?;
    counters.keys().try_for_each(|name| name_within("counter name", name, limits))
}

pub(super) fn check_section_names(sections: &[Section], limits: &Limits) -> Result<(), ManifestError> {
    within(|| "the number of sections".into(), "items", sections.len(), limits.items)?;
    sections.iter().try_for_each(|s| name_within("section name", &s.name, limits))
}

pub(super) fn check_critical(sections: &[Section], understood: &[&str]) -> Result<(), ManifestError> {
    match sections.iter().find(|s| s.critical && !understood.contains(&s.name.as_str())) {
        Some(section) => Err(ManifestError::Critical { name: shortened(&section.name) }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_generation_has_itself_for_a_successor() {
        let record =
            |generation| ServiceRecord { name: "chat".into(), generation, ..ServiceRecord::default() };
        assert_eq!(record(3).succeeded(), record(4));
        assert_eq!(record(u64::MAX).succeeded(), record(u64::MAX));
    }
}
