//! Manifests: base and delta as they come, and what becomes of one with the other.
//!
//! The first byte says what the rest is: a whole part; a body, which is framed as it should be, so that a wrong checksum
//! does not hide what is behind it; or a base's body, of a length in the next two bytes, and a delta's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;

use heirloom::manifest::{Base, Delta, HEADER_BYTES, Header, Section};
use heirloom::{Bundle, Entry, ItemId, Kind, Limits};

use crate::input::Input;

/// So few descriptors are opened for what can be put together.
const MOST_ITEMS: usize = 32;

pub(crate) fn run(input: &[u8]) {
    let mut input = Input(input);
    match input.number() % 4 {
        0 => {
            let _ = base(input.0);
            let _ = delta(input.0);
        }
        1 => drop(base(&framed(1, input.0))),
        2 => drop(delta(&framed(2, input.0))),
        _ => {
            let length = input.number() | input.number() << 8;
            let base = base(&framed(1, input.bytes(length)));
            let delta = delta(&framed(2, input.0));
            if let (Some((base, crc)), Some(mut delta)) = (base, delta) {
                let fits = delta.base_crc == crc;
                assert_eq!(base.clone().apply(delta.clone(), crc).is_ok(), fits && applies(&base, &delta));
                delta.base_crc = crc;
                together(base, delta, crc);
            }
        }
    }
}

/// Puts a header in front of a body.
pub(crate) fn framed(part: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"HEIRLOOM\x01\x00".to_vec();
    bytes.extend(part.to_le_bytes());
    bytes.extend(crc32fast::hash(body).to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// Low enough for an input to exceed them.
fn limits() -> Limits {
    Limits {
        items: 100,
        name_bytes: 32,
        item_state_bytes: 256,
        state_bytes: 512,
        manifest_bytes: 4096,
        ..Limits::default()
    }
}

fn base(bytes: &[u8]) -> Option<(Base, u32)> {
    let base = Base::decode(bytes, &limits()).ok()?;
    let header = Header::read(bytes).expect("it was read");
    assert_eq!(header.length as usize + HEADER_BYTES, bytes.len());
    within(&base.items, base.state.as_ref(), base.next_id);
    let again = encoded(base.encode(&limits()));
    assert_eq!(Base::decode(&again, &Limits::default()).expect("it was written"), base);
    critical(&base.sections, |known| base.check_sections(known).is_ok());
    Some((base, header.crc))
}

fn delta(bytes: &[u8]) -> Option<Delta> {
    let delta = Delta::decode(bytes, &limits()).ok()?;
    within(&delta.added, delta.state.as_ref(), delta.next_id);
    assert!(delta.changed.windows(2).all(|pair| pair[0].id < pair[1].id));
    assert!(delta.ended.windows(2).all(|pair| pair[0] < pair[1]));
    let again = encoded(delta.encode(&limits()));
    assert_eq!(Delta::decode(&again, &Limits::default()).expect("it was written"), delta);
    critical(&delta.sections, |known| delta.check_sections(known).is_ok());
    Some(delta)
}

fn encoded(written: Result<heirloom::manifest::Encoded, heirloom::manifest::ManifestError>) -> Vec<u8> {
    let encoded = written.expect("what was read within limits can be written within them");
    assert_eq!(Header::read(&encoded.bytes).expect("it was written").crc, encoded.crc);
    encoded.bytes
}

fn within(items: &[Entry], state: Option<&Vec<u8>>, next_id: u64) {
    let limits = limits();
    assert!(items.len() <= limits.items && state.is_none_or(|state| state.len() <= limits.state_bytes));
    assert!(items.windows(2).all(|pair| pair[0].id < pair[1].id));
    for item in items {
        assert!(item.id.0 < next_id && item.name.len() <= limits.name_bytes);
        assert!(item.state.len() <= limits.item_state_bytes);
    }
}

/// A critical section is understood or refused.
fn critical(sections: &[Section], passes: impl Fn(&[&str]) -> bool) {
    let names: Vec<&str> = sections.iter().map(|section| section.name.as_str()).collect();
    assert!(passes(&names));
    assert_eq!(passes(&[]), sections.iter().all(|section| !section.critical));
}

/// Whether a delta that belongs to a base fits it, said in another way than the library does.
fn applies(base: &Base, delta: &Delta) -> bool {
    let held: BTreeSet<ItemId> = base.items.iter().map(|item| item.id).collect();
    let ended: BTreeSet<ItemId> = delta.ended.iter().copied().collect();
    let added: BTreeSet<ItemId> = delta.added.iter().map(|item| item.id).collect();
    delta.next_id >= base.next_id
        && ended.is_subset(&held)
        && added.is_disjoint(&held)
        && delta.changed.iter().all(|change| held.contains(&change.id) && !ended.contains(&change.id))
        && (held.len() - ended.len() + added.len()) as u64 == delta.count
}

/// The two ways to bring a base up to date agree, and the difference can be told again.
fn together(mut base: Base, mut delta: Delta, crc: u32) {
    let fits = applies(&base, &delta);
    let applied = base.clone().apply(delta.clone(), crc);
    assert_eq!(applied.is_ok(), fits, "{:?}", applied.err());
    if let Ok(now) = applied {
        now.encode(&Limits::default()).expect("what came of it is a manifest");
        if unique(&base.sections) && unique(&now.sections) {
            let told = Delta::between(&base, crc, &now).expect("nothing changed that must not");
            let mut again = base.clone().apply(told, crc).expect("it belongs to it");
            again.sections.sort_by(|a, b| a.name.cmp(&b.name));
            let mut now = now;
            now.sections.sort_by(|a, b| a.name.cmp(&b.name));
            assert_eq!(again, now);
        }
    }

    if base.items.len() + delta.added.len() > MOST_ITEMS {
        return;
    }
    // A bundle looks at the descriptors, which are none of what is tried here.
    for item in base.items.iter_mut().chain(&mut delta.added) {
        item.kind = Kind::Other;
    }
    let mut bundle = Bundle::from_parts(base.clone(), descriptors(&base.items)).expect("each has its own");
    let before = bundle.base(bundle.service().clone());
    let descriptors = descriptors(&delta.added);
    let result = bundle.apply(delta.clone(), crc, descriptors);
    assert_eq!(result.is_ok(), fits, "{:?}", result.err());
    let after = bundle.base(bundle.service().clone());
    if fits {
        let mut expected = base.apply(delta, crc).expect("it has before");
        expected.items.retain(|item| item.id != ItemId::CONTROL);
        expected.sections.clear();
        assert_eq!(after, expected);
    } else {
        assert_eq!(after, before, "a delta that does not fit changes nothing");
    }
    let _ = bundle.close_rest();
}

fn unique(sections: &[Section]) -> bool {
    let names: BTreeSet<&str> = sections.iter().map(|section| section.name.as_str()).collect();
    names.len() == sections.len()
}

fn descriptors(items: &[Entry]) -> BTreeMap<ItemId, OwnedFd> {
    let null = || File::open("/dev/null").expect("it is everywhere").into();
    items.iter().map(|item| (item.id, null())).collect()
}
