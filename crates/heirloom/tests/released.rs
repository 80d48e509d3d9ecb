//! What released versions have written can be read for ever, with everything in it: `tests/fixtures/manifest-v1`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use heirloom::manifest::{Base, Change, Delta, Header, Section, ServiceRecord};
use heirloom::{CONTROL_NAME, Entry, ItemId, Kind, Limits};

#[test]
fn the_base_of_0_1() {
    let bytes = fixture("base.bin", || base().encode(&Limits::default()).unwrap().bytes);
    assert_eq!(Base::decode(&bytes, &Limits::default()).unwrap(), base());
    assert_eq!(Header::read(&bytes).unwrap().version, 1);
}

#[test]
fn the_delta_of_0_1_and_what_becomes_of_the_base() {
    let base_bytes = fixture("base.bin", || base().encode(&Limits::default()).unwrap().bytes);
    let crc = Header::read(&base_bytes).unwrap().crc;
    let bytes = fixture("delta.bin", || delta(crc).encode(&Limits::default()).unwrap().bytes);
    let read = Delta::decode(&bytes, &Limits::default()).unwrap();
    assert_eq!(read, delta(crc));

    let now = Base::decode(&base_bytes, &Limits::default()).unwrap().apply(read, crc).unwrap();
    let ids: Vec<u64> = now.items.iter().map(|item| item.id.0).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 42]);
    assert_eq!((now.items[2].state.as_slice(), now.next_id), (&b"\x82\x03\x04"[..], 43));
    assert_eq!(now.state.as_deref(), Some(&b"\x65later"[..]));
    let counters =
        BTreeMap::from([("bytes_in".into(), u64::MAX), ("bytes_out".into(), 7), ("new".into(), 1)]);
    assert_eq!(now.service, ServiceRecord { counters, ..base().service });
    assert_eq!(now.sections, [base().sections[1].clone(), delta(crc).sections[0].clone()]);
}

#[test]
fn the_empty_base_of_0_1() {
    let bytes = fixture("empty.bin", || Base::default().encode(&Limits::default()).unwrap().bytes);
    assert_eq!(Base::decode(&bytes, &Limits::default()).unwrap(), Base::default());
}

/// This version still writes what 0.1 wrote. When that is no longer so, on purpose, this test goes, and fixtures of what is
/// written then come.
#[test]
fn the_newest_fixtures_are_what_this_version_writes() {
    let limits = Limits::default();
    let base = base().encode(&limits).unwrap();
    assert_eq!(fixture("base.bin", Vec::new), base.bytes);
    assert_eq!(fixture("delta.bin", Vec::new), delta(base.crc).encode(&limits).unwrap().bytes);
    assert_eq!(fixture("empty.bin", Vec::new), Base::default().encode(&limits).unwrap().bytes);
}

/// A file of 0.1. When asked to, one that is not there is written.
fn fixture(name: &str, written: impl Fn() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/manifest-v1").join(name);
    if std::env::var_os("HEIRLOOM_WRITE_FIXTURES").is_some() && !path.exists() {
        fs::write(&path, written()).unwrap();
    }
    fs::read(&path).unwrap()
}

fn base() -> Base {
    let entry = |id, name: &str, kind, state: &[u8]| Entry {
        id: ItemId(id),
        name: name.into(),
        kind,
        state: state.into(),
    };
    Base {
        service: ServiceRecord {
            name: "chat 127.0.0.1:31337".into(),
            generation: 7,
            started_unix_ms: 1_764_000_000_000,
            counters: BTreeMap::from([("bytes_in".into(), u64::MAX), ("bytes_out".into(), 0)]),
            program: "heirloom".into(),
            version: "0.1.0".into(),
            schema: 3,
        },
        state: Some(b"\x65topic".to_vec()),
        items: vec![
            entry(0, CONTROL_NAME, Kind::UnixListener, b""),
            entry(1, "listener", Kind::TcpListener, b""),
            entry(2, "client", Kind::TcpStream, b"\x82\x01\x02"),
            entry(3, "client", Kind::UnixStream, b"\x67l\xc3\xadnea"),
            entry(4, "channel", Kind::UnixSeqpacket, b""),
            entry(5, "dns", Kind::UdpSocket, b""),
            entry(6, "log", Kind::UnixDatagram, b""),
            entry(7, "in", Kind::PipeReader, b""),
            entry(8, "out", Kind::PipeWriter, b""),
            entry(9, "journal", Kind::File, &[0xa5; 300]),
            entry(10, "table", Kind::Memfd, b""),
            entry(11, "wake", Kind::Eventfd, b""),
            entry(12, "terminal", Kind::Tty, b""),
            entry(40, "", Kind::Other, b""),
        ],
        next_id: 41,
        sections: vec![
            Section { name: "tls".into(), critical: true, bytes: vec![1, 2, 3] },
            Section { name: "notes".into(), critical: false, bytes: Vec::new() },
        ],
    }
}

fn delta(base_crc: u32) -> Delta {
    Delta {
        base_crc,
        state: Some(b"\x65later".to_vec()),
        changed: vec![Change { id: ItemId(2), state: b"\x82\x03\x04".to_vec() }],
        added: vec![Entry {
            id: ItemId(42),
            name: "client".into(),
            kind: Kind::TcpStream,
            state: b"\x00".to_vec(),
        }],
        ended: vec![ItemId(40)],
        count: 14,
        frozen_at_ns: 12_345_678_901,
        counters: BTreeMap::from([("bytes_out".into(), 7), ("new".into(), 1)]),
        next_id: 43,
        sections: vec![Section { name: "tls".into(), critical: true, bytes: vec![4] }],
    }
}
