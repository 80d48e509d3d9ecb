//! The manifest as a format: what is written comes back, what is damaged is refused, and programs of different
//! versions understand each other.

use std::collections::BTreeMap;

use heirloom::{
    Entry, ItemId, Kind, Limits,
    manifest::{Base, Change, Delta, Encoded, HEADER_BYTES, Header, ManifestError, Section, ServiceRecord},
};
use proptest::{collection, prelude::*};

const KINDS: [Kind; 14] = [
    Kind::Other,
    Kind::TcpListener,
    Kind::TcpStream,
    Kind::UnixListener,
    Kind::UnixStream,
    Kind::UnixSeqpacket,
    Kind::UdpSocket,
    Kind::UnixDatagram,
    Kind::PipeReader,
    Kind::PipeWriter,
    Kind::File,
    Kind::Memfd,
    Kind::Eventfd,
    Kind::Tty,
];

fn limits() -> Limits {
    Limits::default()
}

fn entry(id: u64, name: &str, state: &[u8]) -> Entry {
    Entry { id: ItemId(id), name: name.into(), kind: Kind::TcpStream, state: state.into() }
}

fn base(ids: &[u64]) -> Base {
    Base {
        items: ids.iter().map(|&id| entry(id, "item", &id.to_le_bytes())).collect(),
        next_id: ids.last().map_or(1, |id| id + 1),
        ..Base::default()
    }
}

/// Frames a body that no `Base` or `Delta` of this version would produce.
fn framed(part: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"HEIRLOOM\x01\x00".to_vec();
    bytes.extend(part.to_le_bytes());
    bytes.extend(crc32fast::hash(body).to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes
}

// ---- Arbitrary manifests ----

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    collection::vec(any::<u8>(), 0..200)
}

fn counters() -> impl Strategy<Value = BTreeMap<String, u64>> {
    collection::btree_map("[a-z_]{1,12}", any::<u64>(), 0..5)
}

fn sections() -> impl Strategy<Value = Vec<Section>> {
    let section = (any::<bool>(), bytes()).prop_map(|(critical, bytes)| Section {
        name: String::new(),
        critical,
        bytes,
    });
    collection::vec(section, 0..4).prop_map(|mut sections| {
        for (i, section) in sections.iter_mut().enumerate() {
            section.name = format!("section {i}");
        }
        sections
    })
}

fn service() -> impl Strategy<Value = ServiceRecord> {
    (".{0,40}", any::<u64>(), any::<u64>(), counters(), ".{0,40}", ".{0,40}", any::<u32>()).prop_map(
        |(name, generation, started_unix_ms, counters, program, version, schema)| ServiceRecord {
            name,
            generation,
            started_unix_ms,
            counters,
            program,
            version,
            schema,
        },
    )
}

fn entries(ids: std::ops::Range<u64>) -> impl Strategy<Value = Vec<Entry>> {
    let content = (".{0,40}", proptest::sample::select(&KINDS[..]), bytes());
    collection::btree_map(ids, content, 0..20).prop_map(|items| {
        items
            .into_iter()
            .map(|(id, (name, kind, state))| Entry { id: ItemId(id), name, kind, state })
            .collect()
    })
}

fn any_base() -> impl Strategy<Value = Base> {
    (service(), proptest::option::of(bytes()), entries(0..1000), 1000..u64::MAX - 1000, sections()).prop_map(
        |(service, state, items, next_id, sections)| Base { service, state, items, next_id, sections },
    )
}

/// A base, and what it has become some time later.
fn base_and_now() -> impl Strategy<Value = (Base, Base)> {
    let fate = proptest::option::of(proptest::option::of(bytes()));
    let fates = collection::vec(fate, 20);
    (any_base(), fates, entries(0..1000), proptest::option::of(bytes()), counters()).prop_map(
        |(base, fates, fresh, state, counters)| {
            let mut now = base.clone();
            let mut fates = fates.into_iter();
            now.items.retain_mut(|item| match fates.next().flatten() {
                None => false,
                Some(None) => true,
                Some(Some(state)) => {
                    item.state = state;
                    true
                }
            });
            now.items.extend(fresh.into_iter().map(|e| Entry { id: ItemId(e.id.0 + base.next_id), ..e }));
            now.next_id += 1000;
            now.state = state.or(now.state);
            now.service.counters.extend(counters);
            (base, now)
        },
    )
}

proptest! {
    #[test]
    fn a_base_comes_back(base in any_base()) {
        let encoded = base.encode(&limits()).unwrap();
        prop_assert_eq!(Header::read(&encoded.bytes).unwrap().crc, encoded.crc);
        prop_assert_eq!(Base::decode(&encoded.bytes, &limits()).unwrap(), base);
    }

    #[test]
    fn a_delta_leads_from_the_base_to_now((base, now) in base_and_now()) {
        let crc = base.encode(&limits()).unwrap().crc;
        let delta = Delta { frozen_at_ns: 5, ..Delta::between(&base, crc, &now).unwrap() };
        let bytes = delta.encode(&limits()).unwrap().bytes;
        let received = Delta::decode(&bytes, &limits()).unwrap();
        prop_assert_eq!(&received, &delta);
        let unchanged = |c: &Change| base.items.iter().any(|e| e.id == c.id && e.state == c.state);
        prop_assert!(!received.changed.iter().any(unchanged));
        prop_assert_eq!(base.apply(received, crc).unwrap(), now);
    }

    #[test]
    fn a_manifest_that_was_cut_off_is_refused(base in any_base(), at in any::<prop::sample::Index>()) {
        let Encoded { bytes, .. } = base.encode(&limits()).unwrap();
        let cut = at.index(bytes.len());
        let error = Base::decode(&bytes[..cut], &limits()).unwrap_err();
        if cut < HEADER_BYTES {
            let cut_is_told = matches!(error, ManifestError::TooShort { found } if found == cut);
            prop_assert!(cut_is_told, "{}", error);
        } else {
            let cut_is_told = matches!(error, ManifestError::Length { .. });
            prop_assert!(cut_is_told, "{}", error);
        }
    }

    #[test]
    fn up_to_three_flipped_bits_are_always_noticed(
        base in any_base(),
        flips in collection::vec(any::<prop::sample::Index>(), 1..=3),
    ) {
        // CRC-32 (IEEE) has a Hamming distance of at least 4 for messages up to 11 kB: see Koopman 2002.
        let good = base.encode(&limits()).unwrap().bytes;
        prop_assume!(good.len() < 11_000);
        let mut bad = good.clone();
        for at in flips {
            let bit = at.index(good.len() * 8);
            bad[bit / 8] ^= 1 << (bit % 8);
        }
        prop_assume!(bad != good);
        prop_assert!(Base::decode(&bad, &limits()).is_err());
        prop_assert!(Delta::decode(&bad, &limits()).is_err());
    }

    #[test]
    fn bytes_with_a_good_checksum_never_panic(body in bytes()) {
        let _ = Base::decode(&framed(1, &body), &limits());
        let _ = Delta::decode(&framed(2, &body), &limits());
    }

    #[test]
    fn a_damaged_body_with_a_good_checksum_is_either_refused_or_well_formed(
        base in any_base(),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let mut body = base.encode(&limits()).unwrap().bytes.split_off(HEADER_BYTES);
        let at = at.index(body.len());
        body[at] = value;
        if let Ok(read) = Base::decode(&framed(1, &body), &limits()) {
            let encoded = read.encode(&limits()).unwrap();
            prop_assert_eq!(Base::decode(&encoded.bytes, &limits()).unwrap(), read);
        }
    }

    #[test]
    fn a_delta_never_panics_on_a_base_it_was_not_made_for((base, now) in base_and_now(), other in any_base()) {
        let delta = Delta::between(&base, 7, &now).unwrap();
        let error = other.clone().apply(delta.clone(), 8).unwrap_err();
        let wrong_base = matches!(error, ManifestError::WrongBase { announced: 7, found: 8 });
        prop_assert!(wrong_base, "{}", error);
        if let Ok(after) = other.apply(delta, 7) {
            prop_assert!(after.encode(&limits()).is_ok());
        }
    }
}

// ---- Other versions of the program ----

#[test]
fn a_newer_program_s_manifest_is_read_and_what_is_new_is_skipped() {
    let mut body = Vec::new();
    let mut e = minicbor::Encoder::new(&mut body);
    e.map(7).unwrap();
    // A key before all that are known, with something nested in it.
    e.i8(-1).unwrap().array(2).unwrap().begin_map().unwrap().u8(1).unwrap().null().unwrap().end().unwrap();
    e.str("x").unwrap();
    e.u8(0).unwrap().map(3).unwrap();
    e.u8(0).unwrap().str("chat").unwrap().u8(1).unwrap().u64(41).unwrap();
    e.u8(99).unwrap().f64(1.5).unwrap();
    e.u8(1).unwrap().bytes(b"state").unwrap();
    e.u8(2).unwrap().array(1).unwrap().map(5).unwrap();
    e.u8(0).unwrap().u8(3).unwrap().u8(1).unwrap().str("conn").unwrap();
    // A kind that only the newer program knows.
    e.u8(2).unwrap().u16(1000).unwrap().u8(3).unwrap().bytes(b"").unwrap();
    e.u8(17).unwrap().begin_array().unwrap().bool(true).unwrap().end().unwrap();
    e.u8(3).unwrap().u8(4).unwrap();
    e.u8(4).unwrap().array(1).unwrap().map(2).unwrap();
    e.u8(0).unwrap().str("later").unwrap().u8(9).unwrap().bytes(b"?").unwrap();
    e.u32(70_000).unwrap().tag(minicbor::data::Tag::new(1)).unwrap().u8(0).unwrap();

    let read = Base::decode(&framed(1, &body), &limits()).unwrap();
    let expected = Base {
        service: ServiceRecord { name: "chat".into(), generation: 41, ..ServiceRecord::default() },
        state: Some(b"state".to_vec()),
        items: vec![Entry { id: ItemId(3), name: "conn".into(), kind: Kind::Other, state: vec![] }],
        next_id: 4,
        sections: vec![Section { name: "later".into(), critical: false, bytes: vec![] }],
    };
    assert_eq!(read, expected);
    assert!(read.check_sections(&[]).is_ok());
}

#[test]
fn the_least_that_a_delta_needs() {
    // {0: 7, 5: 0, 8: 1}
    let delta = Delta::decode(&framed(2, &[0xa3, 0, 7, 5, 0, 8, 1]), &limits()).unwrap();
    assert_eq!(delta, Delta { base_crc: 7, next_id: 1, ..Delta::default() });
    // Without the count it is malformed.
    let error = Delta::decode(&framed(2, &[0xa2, 0, 7, 8, 1]), &limits()).unwrap_err();
    assert!(matches!(error, ManifestError::Malformed(_)), "{error}");
}

#[test]
fn a_critical_section_that_is_not_understood_is_refused_by_name() {
    let section = |name: &str, critical| Section { name: name.into(), critical, bytes: b"payload".to_vec() };
    let sections = vec![section("hints", false), section("tls-keys", true), section("quic", true)];
    let base = Base { sections: sections.clone(), ..Base::default() };
    let base = Base::decode(&base.encode(&limits()).unwrap().bytes, &limits()).unwrap();
    let delta = Delta { sections, next_id: 1, ..Delta::default() };

    assert!(base.check_sections(&["quic", "tls-keys"]).is_ok());
    for error in [base.check_sections(&["quic"]).unwrap_err(), delta.check_sections(&["quic"]).unwrap_err()] {
        assert!(matches!(&error, ManifestError::Critical { name } if name == "tls-keys"), "{error}");
    }
}

#[test]
fn a_format_version_out_of_range_is_told_with_the_range() {
    let mut bytes = Base::default().encode(&limits()).unwrap().bytes;
    bytes[8] = 2;
    let error = Base::decode(&bytes, &limits()).unwrap_err();
    assert!(matches!(error, ManifestError::Version { found: 2, oldest: 1, newest: 1 }));
    assert!(error.to_string().contains("format version 2, and this program reads 1 to 1"), "{error}");
}

// ---- Limits ----

fn limited(error: &ManifestError, name: &str, text: &str) {
    assert!(matches!(error, ManifestError::Limit { limit_name, .. } if *limit_name == name), "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

/// Both the writer and the reader refuse it, each in the same words.
fn base_limited(base: &Base, limits: &Limits, name: &str, text: &str) {
    limited(&base.encode(limits).unwrap_err(), name, text);
    let bytes = base.encode(&Limits::default()).unwrap().bytes;
    limited(&Base::decode(&bytes, limits).unwrap_err(), name, text);
}

fn delta_limited(delta: &Delta, limits: &Limits, name: &str, text: &str) {
    limited(&delta.encode(limits).unwrap_err(), name, text);
    let bytes = delta.encode(&Limits::default()).unwrap().bytes;
    limited(&Delta::decode(&bytes, limits).unwrap_err(), name, text);
}

#[test]
fn every_limit_is_enforced_on_both_sides() {
    let tight = Limits {
        items: 2,
        name_bytes: 8,
        item_state_bytes: 4,
        state_bytes: 5,
        manifest_bytes: 200,
        ..Limits::default()
    };
    let fits = Base {
        state: Some(vec![0; 5]),
        items: vec![entry(1, "12345678", &[0; 4]), entry(2, "", b"")],
        next_id: 3,
        ..Base::default()
    };
    let bytes = fits.encode(&tight).unwrap().bytes;
    assert_eq!(Base::decode(&bytes, &tight).unwrap(), fits);

    let with = |change: fn(&mut Base)| {
        let mut base = fits.clone();
        change(&mut base);
        base
    };
    let long = || "123456789".to_owned();
    let check = |change, name, text| base_limited(&with(change), &tight, name, text);
    check(|b| b.state = Some(vec![0; 6]), "state_bytes", "the application state");
    check(|b| b.items[1].state = vec![0; 5], "item_state_bytes", "the state of item \"\" (id 2, tcp-stream)");
    check(|b| b.items[0].name = "123456789".into(), "name_bytes", "\"123456789\"");
    check(|b| b.service.name = "123456789".into(), "name_bytes", "service name");
    check(|b| b.service.program = "123456789".into(), "name_bytes", "program name");
    check(|b| b.service.version = "123456789".into(), "name_bytes", "program version");
    check(|b| b.service.counters.extend([("123456789".to_owned(), 1)]), "name_bytes", "counter name");
    let section = Section { name: long(), critical: false, bytes: vec![] };
    base_limited(&Base { sections: vec![section], ..fits.clone() }, &tight, "name_bytes", "section name");
    let section = Section { name: "s".into(), critical: false, bytes: vec![0; 200] };
    base_limited(&Base { sections: vec![section], ..fits.clone() }, &tight, "manifest_bytes", "manifest");
    let many =
        Base { next_id: 4, items: vec![entry(1, "", b""), entry(2, "", b""), entry(3, "", b"")], ..fits };
    limited(&many.encode(&tight).unwrap_err(), "items", "3");
    let bytes = many.encode(&limits()).unwrap().bytes;
    limited(&Base::decode(&bytes, &tight).unwrap_err(), "items", "list");

    let delta = Delta { next_id: 10, ..Delta::default() };
    let change = Change { id: ItemId(7), state: vec![0; 5] };
    let check = |delta, name, text| delta_limited(&delta, &tight, name, text);
    check(Delta { changed: vec![change], ..delta.clone() }, "item_state_bytes", "item 7");
    check(Delta { added: vec![entry(7, "new", &[0; 5])], ..delta.clone() }, "item_state_bytes", "\"new\"");
    check(Delta { state: Some(vec![0; 6]), ..delta }, "state_bytes", "application state");
}

#[test]
fn lengths_inside_are_not_believed() {
    // Lists of 2^62 elements and byte strings of 2^62 bytes, in a few bytes of input.
    let huge = [0x40, 0, 0, 0, 0, 0, 0, 0];
    for (key, major) in [(2, 0x9b), (4, 0x9b), (1, 0x5b), (0, 0xbb)] {
        let body: Vec<u8> = [0xa1, key, major].into_iter().chain(huge).collect();
        let error = Base::decode(&framed(1, &body), &limits()).unwrap_err();
        assert!(matches!(error, ManifestError::Malformed(_)), "{error}");
    }
}

// ---- What must not be written or applied ----

#[test]
fn ids_must_ascend_and_be_given_out() {
    let twice = Base { items: vec![entry(1, "a", b""), entry(1, "b", b"")], next_id: 5, ..Base::default() };
    assert!(matches!(twice.encode(&limits()), Err(ManifestError::Order { list: "items", id: ItemId(1) })));
    let future = Base { next_id: 2, ..base(&[1, 2]) };
    assert!(matches!(
        future.encode(&limits()),
        Err(ManifestError::NotGivenOut { id: ItemId(2), next_id: 2 })
    ));

    // A reader does not rely on the writer: {0: {0: "", 1: 0}, 2: [{1, "", 0} twice], 3: 9}
    let item = [0xa3, 0, 1, 1, 0x60, 2, 0];
    let body = [&[0xa3, 0, 0xa2, 0, 0x60, 1, 0, 2, 0x82][..], &item, &item, &[3, 9]].concat();
    let error = Base::decode(&framed(1, &body), &limits()).unwrap_err();
    assert!(matches!(error, ManifestError::Order { id: ItemId(1), .. }), "{error}");
}

#[test]
fn bytes_after_the_map_are_refused() {
    let body = [&[0xa3, 0, 0xa2, 0, 0x60, 1, 0, 2, 0x80, 3, 1][..], &[0, 0]].concat();
    assert!(Base::decode(&framed(1, &body[..body.len() - 2]), &limits()).is_ok());
    let error = Base::decode(&framed(1, &body), &limits()).unwrap_err();
    assert!(matches!(error, ManifestError::Trailing { left: 2 }), "{error}");
}

#[test]
fn a_delta_that_does_not_fit_is_refused() {
    let apply = |change: fn(&mut Delta)| {
        let mut delta = Delta { base_crc: 9, count: 3, next_id: 20, ..Delta::default() };
        change(&mut delta);
        base(&[0, 3, 5]).apply(delta, 9)
    };

    assert_eq!(apply(|_| ()).unwrap().items, base(&[0, 3, 5]).items);
    assert!(matches!(apply(|d| d.base_crc = 8), Err(ManifestError::WrongBase { announced: 8, found: 9 })));
    assert!(matches!(apply(|d| d.count = 4), Err(ManifestError::Count { announced: 4, found: 3 })));
    assert!(matches!(apply(|d| d.next_id = 5), Err(ManifestError::CounterBack { base: 6, delta: 5 })));
    assert!(matches!(
        apply(|d| d.changed = vec![Change { id: ItemId(4), state: vec![] }]),
        Err(ManifestError::UnknownItem { id: ItemId(4) })
    ));
    assert!(matches!(
        apply(|d| d.ended = vec![ItemId(4)]),
        Err(ManifestError::UnknownItem { id: ItemId(4) })
    ));
    assert!(matches!(
        apply(|d| {
            d.changed = vec![Change { id: ItemId(3), state: vec![] }];
            d.ended = vec![ItemId(3)];
        }),
        Err(ManifestError::UnknownItem { id: ItemId(3) })
    ));
    assert!(matches!(
        apply(|d| d.added = vec![entry(3, "again", b"")]),
        Err(ManifestError::DuplicateItem { id: ItemId(3) })
    ));
    // Not even when the item of that id ends: an id is used once.
    assert!(matches!(
        apply(|d| {
            d.added = vec![entry(3, "again", b"")];
            d.ended = vec![ItemId(3)];
        }),
        Err(ManifestError::DuplicateItem { id: ItemId(3) })
    ));
    assert!(matches!(
        apply(|d| {
            d.added = vec![entry(20, "too new", b"")];
            d.count = 4;
        }),
        Err(ManifestError::NotGivenOut { id: ItemId(20), next_id: 20 })
    ));
    for twice in [
        apply(|d| d.ended = vec![ItemId(3), ItemId(3)]),
        apply(|d| d.added = vec![entry(8, "", b""), entry(7, "", b"")]),
        apply(|d| d.changed = vec![Change { id: ItemId(3), state: vec![] }; 2]),
    ] {
        assert!(matches!(twice, Err(ManifestError::Order { .. })), "{twice:?}");
    }
}

#[test]
fn the_control_listener_can_join_late() {
    let delta = Delta {
        base_crc: 1,
        added: vec![entry(0, "heirloom.control", b"")],
        count: 3,
        next_id: 6,
        ..Delta::default()
    };
    let ids: Vec<u64> = base(&[3, 5]).apply(delta, 1).unwrap().items.iter().map(|e| e.id.0).collect();
    assert_eq!(ids, [0, 3, 5]);
}

#[test]
fn a_delta_cannot_rename_an_item_or_take_the_state_away() {
    let was = base(&[1, 2]);
    let mut now = was.clone();
    now.items[1].name = "other".into();
    let error = Delta::between(&was, 0, &now).unwrap_err();
    assert!(matches!(error, ManifestError::ItemChanged { .. }));
    assert!(error.to_string().contains("\"item\" (id 2, tcp-stream) became \"other\""), "{error}");

    let mut now = was.clone();
    now.items[0].kind = Kind::File;
    assert!(matches!(Delta::between(&was, 0, &now), Err(ManifestError::ItemChanged { .. })));

    let stateful = Base { state: Some(vec![1]), ..was.clone() };
    assert!(matches!(Delta::between(&stateful, 0, &was), Err(ManifestError::StateRemoved)));
}

#[test]
fn a_section_in_the_delta_takes_the_place_of_its_namesake() {
    let section =
        |name: &str, bytes: &[u8]| Section { name: name.into(), critical: false, bytes: bytes.into() };
    let was = Base { sections: vec![section("a", b"1"), section("b", b"1")], ..Base::default() };
    let now =
        Base { sections: vec![section("b", b"1"), section("a", b"2"), section("c", b"1")], ..was.clone() };
    let delta = Delta::between(&was, 0, &now).unwrap();
    assert_eq!(delta.sections, [section("a", b"2"), section("c", b"1")]);
    assert_eq!(was.apply(delta, 0).unwrap().sections, now.sections);
}

#[test]
fn a_hundred_thousand_items_are_no_trouble() {
    // Were anything quadratic, this would take minutes.
    let was = base(&(1..=100_000).collect::<Vec<_>>());
    let crc = was.encode(&limits()).unwrap().crc;
    let mut now = base(&(50_001..=150_000).collect::<Vec<_>>());
    for item in &mut now.items {
        item.state.push(1);
    }
    let delta = Delta::between(&was, crc, &now).unwrap();
    let delta = Delta::decode(&delta.encode(&limits()).unwrap().bytes, &limits()).unwrap();
    assert_eq!((delta.ended.len(), delta.changed.len(), delta.added.len()), (50_000, 50_000, 50_000));
    assert_eq!(was.apply(delta, crc).unwrap(), now);
}
