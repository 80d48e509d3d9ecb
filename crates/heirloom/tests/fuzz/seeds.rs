//! The seeds: valid messages of each kind as this version writes them, and some that are not.
//!
//! They are files (`seeds/TARGET/NAME`), which cargo-fuzz reads as well. What is made here has to be what is in them, so that
//! a change of what is written does not go unnoticed; `HEIRLOOM_WRITE_SEEDS=1` writes them. Other files there are what a
//! fuzzer has found.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use heirloom::control::{
    Failure, FailureCode, Hello, ItemStatus, LastTakeover, ManifestSummary, Reply, Request, Status, Welcome,
};
use heirloom::manifest::{Base, Change, Delta, HEADER_BYTES, Section, ServiceRecord};
use heirloom::protocol::{ToIncumbent, ToSuccessor};
use heirloom::upgrade::{Checked, Upgrade};
use heirloom::{Cbor, Codec, Entry, ItemId, Kind, Limits, NoRequests, VersionRange};

use crate::lines::Mine;
use crate::state::{Phase, Session, Tree};

type Seeds = Vec<(&'static str, Vec<u8>)>;

/// What is in the files of a target.
pub(crate) fn of(target: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(directory(target)).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn the_files_are_what_this_version_writes() {
    let made = [
        ("lines", lines()),
        ("packets", packets()),
        ("incumbent", incumbent()),
        ("successor", successor()),
        ("manifest", manifest()),
        ("state", state()),
    ];
    for (target, seeds) in made {
        for (name, bytes) in seeds {
            let path = directory(target).join(name);
            if std::env::var_os("HEIRLOOM_WRITE_SEEDS").is_some() {
                fs::create_dir_all(directory(target)).unwrap();
                fs::write(&path, &bytes).unwrap();
            }
            let file = fs::read(&path).unwrap_or_default();
            assert!(file == bytes, "{} is not what is written now; is that on purpose?", path.display());
        }
    }
}

fn directory(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(target)
}

// ---- Lines ----

fn lines() -> Seeds {
    let versions = VersionRange::new(1, 1);
    let hello = Hello {
        protocol: versions,
        service: "chat 127.0.0.1:31337".into(),
        program: "heirloom".into(),
        version: "0.1.0".into(),
        pid: 12,
        schema: versions,
        room: 1000,
        generation: Some(3),
        force: true,
    };
    let upgrade = Upgrade {
        program: Some("/usr/bin/heirloom".into()),
        arguments: Some(vec!["chat".into(), "ü\n".into()]),
        in_place: true,
        dry_run: true,
        itself: false,
        generation: Some(u64::MAX),
    };
    let requests = [
        Request::<NoRequests>::Ping,
        Request::Status,
        Request::Quit,
        Request::Inspect,
        Request::Takeover(hello),
        Request::Upgrade(upgrade),
    ];
    let own = [
        Mine::Flush,
        Mine::Rotate { path: "/var/log/chat".into(), keep: Some(7) },
        Mine::Weigh(0.1),
        Mine::Pair(-1, vec!["a".into(), "\u{1f980}".into()]),
    ];
    let status = Status {
        name: "chat".into(),
        pid: 12,
        items: vec![ItemStatus { id: 1, name: "listener".into(), kind: "tcp-listener".into(), put_by: None }],
        counters: BTreeMap::from([("bytes_in".into(), u64::MAX)]),
        last_takeover: Some(LastTakeover { outcome: "taken".into(), ..LastTakeover::default() }),
        ..Status::default()
    };
    let welcome = Welcome {
        protocol: 1,
        generation: 7,
        pid: 12,
        program: "heirloom".into(),
        version: "0.1.0".into(),
        schema: 1,
        items: 3,
        outsider: true,
    };
    let replies = [
        Reply::Pong,
        Reply::Bye,
        Reply::Status(status),
        Reply::Takeover(welcome),
        Reply::Checked(Checked { program: "heirloom".into(), items: 3, ..Checked::default() }),
        Reply::Manifest(ManifestSummary { bytes: 320, items: 3, state_bytes: 7 }),
        Reply::Error(Failure::new(FailureCode::WrongService, "it serves something else")),
        Reply::Application(serde_json::json!({ "lines": [1, 0.5, null, true], "of": "chat" })),
    ];
    let requests: Vec<u8> = requests.iter().flat_map(|request| request.to_line().unwrap()).collect();
    let own: Vec<u8> =
        own.iter().flat_map(|own| Request::Application(own.clone()).to_line().unwrap()).collect();
    let replies: Vec<u8> = replies.iter().flat_map(Reply::to_line).collect();
    vec![
        ("requests", [&[6][..], &requests].concat()),
        ("requests-byte-by-byte", [&[0][..], &requests].concat()),
        ("requests-of-an-application", [&[255][..], &own].concat()),
        ("replies", [&[63][..], &replies].concat()),
        ("ends", b"\x02\"Ping\"\r\n\r\r\n\n\"Ping\"\r".to_vec()),
        ("too-long", [&[9][..], &[b'x'; 101]].concat()),
        ("as-long-as-it-may-be", [&[9][..], &[b'x'; 100], b"\n"].concat()),
        ("nested", [&[255][..], &[b'['; 2000]].concat()),
        (
            "wrong-contents",
            b"\x40{\"Takeover\":{\"pid\":-1}}\n{\"Ping\":1}\n{\"Rotate\":[]}\n{\"a\":1,\"b\":2}\n".to_vec(),
        ),
        ("numbers", b"\x401e999\n-0\n18446744073709551616\n0.30000000000000004\n".to_vec()),
    ]
}

// ---- Packets ----

fn packets() -> Seeds {
    let to_successor =
        |descriptors: u8, message: ToSuccessor| [vec![descriptors], message.to_packet()].concat();
    let to_incumbent = |message: ToIncumbent| [vec![0], message.to_packet()].concat();
    let batch = |ids: u64| ToSuccessor::Batch { ids: (0..ids).map(|id| ItemId(u64::MAX - id)).collect() };
    let abort = to_successor(0, ToSuccessor::abort("the operator says so"));
    let half = abort[..abort.len() / 2].to_vec();
    vec![
        ("offer", to_successor(1, ToSuccessor::Offer)),
        ("offer-without-its-descriptor", to_successor(0, ToSuccessor::Offer)),
        ("batch-empty", to_successor(0, batch(0))),
        ("batch", to_successor(3, batch(3))),
        ("batch-full", to_successor(252, batch(252))),
        ("batch-too-full", to_successor(253, batch(253))),
        ("offered", to_successor(0, ToSuccessor::Offered)),
        ("freeze", to_successor(1, ToSuccessor::Freeze)),
        ("released", to_successor(0, ToSuccessor::Released)),
        ("abort", abort),
        ("abort-cut-off", half),
        ("abort-with-a-long-reason", to_successor(0, ToSuccessor::abort("ü".repeat(2000)))),
        ("credit", to_incumbent(ToIncumbent::Credit)),
        ("ready", to_incumbent(ToIncumbent::Ready)),
        ("accept", to_incumbent(ToIncumbent::Accept)),
        ("taken", to_incumbent(ToIncumbent::Taken)),
        ("withdrawal", to_incumbent(ToIncumbent::abort("no"))),
        ("batch-of-an-unlikely-length", b"\x00\x82\x01\x81\x9b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()),
        ("batch-without-an-end", b"\x02\x9f\x01\x9f\x9f\x01\x02\xff\xff\xff".to_vec()),
    ]
}

// ---- The machines: each byte is what happens next, see there ----

fn incumbent() -> Seeds {
    let start = [3, 1, 5, 0];
    let of = |events: &[u8]| [&start[..], events].concat();
    let credits = [1; 8];
    vec![
        ("taken", of(&[&[14, 1, 1, 14, 2, 14, 1, 1, 14, 3, 14, 4, 14][..]].concat())),
        ("many-batches", [&[0, 200, 60, 0][..], &[14], &credits, &[14], &credits, &[14]].concat()),
        ("credit-for-nothing", of(&[14, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 14])),
        ("taken-at-once", of(&[4, 14])),
        ("taken-before-it-is-released", of(&[14, 1, 1, 14, 2, 14, 1, 1, 14, 4, 14])),
        ("taken-while-draining", of(&[14, 1, 1, 14, 2, 14, 1, 1, 14, 3, 14, 7, 12, 12, 4, 11, 14])),
        ("withdrawn", of(&[14, 5, 14])),
        ("silent", of(&[14, 7, 14])),
        ("closed-after-released", of(&[14, 1, 1, 14, 2, 14, 1, 1, 14, 3, 14, 8, 14])),
        ("dead-after-released", of(&[14, 1, 1, 14, 2, 14, 1, 1, 14, 3, 14, 9, 14])),
        ("rival", [&[3, 1, 5, 1][..], &[14, 1, 1, 14, 2, 14, 1, 1, 14, 3, 14, 7, 14]].concat()),
        ("nonsense", of(&[14, 0, 0, 3, 1, 2, 3, 14])),
        ("packet", of(&[14, 1, 1, 14, 0, 0, 2, 0x82, 1, 0x80, 14])),
    ]
}

fn successor() -> Seeds {
    let of = |events: &[u8]| [&[0][..], events].concat();
    let refused = |events: &[u8]| [&[2][..], events].concat();
    vec![
        ("serves", of(&[1, 2, 2, 3, 15, 2, 4, 15, 5, 15])),
        ("refused-and-withdrawn", refused(&[1, 2, 3, 15, 4, 15, 5, 15, 6, 15])),
        ("refused-and-orphaned", refused(&[1, 2, 3, 15, 4, 15, 5, 15, 9, 10, 15])),
        ("inherits", of(&[1, 3, 15, 4, 15, 10, 15])),
        ("inherits-and-is-withdrawn-from", of(&[1, 3, 15, 4, 15, 10, 14, 12, 6, 15])),
        ("orphaned-then-dead", of(&[1, 3, 15, 4, 15, 9, 10, 15])),
        ("orphaned", of(&[1, 3, 15, 4, 15, 9, 8, 15])),
        ("lock-held", of(&[13, 1, 3, 15, 4, 15, 5, 15, 8, 15, 8, 13, 15])),
        ("withdrawn", of(&[1, 2, 6, 15])),
        ("dead-at-once", of(&[10, 15])),
        ("frozen-at-once", of(&[4, 15])),
        ("dead-while-deciding", of(&[1, 3, 15, 4, 14, 9, 10, 12, 15])),
        ("packet", of(&[1, 0, 2, 5, 0x82, 1, 0x81, 0x82, 1, 2, 3, 15])),
        ("silent", of(&[1, 8, 15])),
    ]
}

// ---- Manifests: bodies, see there ----

fn manifest() -> Seeds {
    let body = |bytes: Vec<u8>| bytes[HEADER_BYTES..].to_vec();
    let base = base();
    let whole = base.encode(&Limits::default()).unwrap();
    let (crc, base_body) = (whole.crc, body(whole.bytes.clone()));
    let delta = delta(crc).encode(&Limits::default()).unwrap().bytes;
    let delta_body = body(delta.clone());
    let both = |delta: &[u8]| {
        let length = u16::try_from(base_body.len()).unwrap().to_le_bytes();
        [&[3][..], &length, &base_body, delta].concat()
    };
    let of = |change: &dyn Fn(&mut Delta)| {
        let mut delta = self::delta(crc);
        change(&mut delta);
        both(&body(delta.encode(&Limits::default()).unwrap().bytes))
    };
    let in_mode = |mode: u8, bytes: &[u8]| [&[mode], bytes].concat();
    let empty = Base::default().encode(&Limits::default()).unwrap().bytes;
    vec![
        ("base", in_mode(0, &whole.bytes)),
        ("base-cut-off", in_mode(0, &whole.bytes[..whole.bytes.len() / 2])),
        ("base-empty", in_mode(0, &empty)),
        ("delta", in_mode(0, &delta)),
        ("header", in_mode(0, &empty[..HEADER_BYTES])),
        ("header-cut-off", in_mode(0, &empty[..HEADER_BYTES - 1])),
        ("base-body", in_mode(1, &base_body)),
        ("base-body-cut-off", in_mode(1, &base_body[..base_body.len() / 2])),
        ("delta-body", in_mode(2, &delta_body)),
        ("delta-body-cut-off", in_mode(2, &delta_body[..delta_body.len() / 2])),
        ("together", both(&delta_body)),
        ("delta-of-another-base", of(&|delta| delta.base_crc ^= 1)),
        ("delta-with-a-wrong-count", of(&|delta| delta.count += 1)),
        ("delta-that-goes-back", of(&|delta| (delta.next_id, delta.added) = (1, Vec::new()))),
        ("delta-of-an-unknown-item", of(&|delta| delta.ended = vec![ItemId(77)])),
        ("delta-of-an-item-that-ends", of(&|delta| delta.changed[0].id = delta.ended[0])),
        ("delta-that-adds-what-is-there", of(&|delta| delta.added[0].id = ItemId(5))),
        // {0: {0: "", 1: 0}, 2: [_ of 2^64-1 items], 3: 1}
        (
            "items-of-an-unlikely-number",
            b"\x01\xa3\x00\xa2\x00\x60\x01\x00\x02\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x03\x01".to_vec(),
        ),
        // {0: …, 1: bytes of which there are too many}
        (
            "state-of-an-unlikely-length",
            b"\x01\xa2\x00\xa2\x00\x60\x01\x00\x01\x5b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        ),
        // {4711: [[[…, an unknown key
        ("unknown-key-deeply-nested", [&b"\x01\xa1\x19\x12\x67"[..], &[0x81; 3000]].concat()),
        (
            "unknown-key-nested-without-end",
            [&b"\x01\xa1\x19\x12\x67"[..], &[0x82, 0x9f].repeat(1500)].concat(),
        ),
    ]
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
            generation: 3,
            started_unix_ms: 1_764_000_000_000,
            counters: BTreeMap::from([("bytes_in".into(), u64::MAX), ("bytes_out".into(), 0)]),
            program: "heirloom".into(),
            version: "0.1.0".into(),
            schema: 1,
        },
        state: Some(b"\x65topic".to_vec()),
        items: vec![
            entry(0, heirloom::CONTROL_NAME, Kind::UnixListener, b""),
            entry(1, "listener", Kind::TcpListener, b""),
            entry(5, "client", Kind::TcpStream, b"\x82\x01\x02"),
            entry(6, "client", Kind::TcpStream, &[0xa5; 200]),
        ],
        next_id: 9,
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
        changed: vec![Change { id: ItemId(5), state: b"\x82\x03\x04".to_vec() }],
        added: vec![Entry { id: ItemId(9), name: "client".into(), kind: Kind::TcpStream, state: Vec::new() }],
        ended: vec![ItemId(6)],
        count: 4,
        frozen_at_ns: 12_345_678_901,
        counters: BTreeMap::from([("bytes_out".into(), 7)]),
        next_id: 10,
        sections: vec![Section { name: "tls".into(), critical: true, bytes: vec![4] }],
    }
}

// ---- State ----

fn state() -> Seeds {
    let session = Session {
        user: "línea".into(),
        id: u64::MAX,
        offset: i64::MIN,
        wide: i128::MIN,
        ratio: f64::NAN,
        letter: 'ß',
        open: true,
        topic: Some(String::new()),
        unsent: (0..=40).collect(),
        pairs: vec![(u32::MAX, -1)],
        by_name: BTreeMap::from([("x".into(), vec![Phase::Idle, Phase::Count(1)])]),
        seen: BTreeSet::from([1, u16::MAX]),
        unit: (),
    };
    let phase = Phase::Named { at: 0.5, then: Some(Box::new(Phase::Pair(-1, "y".into()))) };
    let tree = Tree {
        name: "root".into(),
        children: vec![Tree::default(), Tree { name: "leaf".into(), children: Vec::new() }],
    };
    let session = Cbor::encode(&session).unwrap();
    let half = session[..session.len() / 2].to_vec();
    vec![
        ("session", session),
        ("session-cut-off", half),
        ("phase", Cbor::encode(&phase).unwrap()),
        ("tree", Cbor::encode(&tree).unwrap()),
        ("lists", Cbor::encode(&vec![vec![1_u64, u64::MAX], Vec::new()]).unwrap()),
        ("map", Cbor::encode(&BTreeMap::from([(1_u64, Some("a")), (2, None)])).unwrap()),
        ("list-of-an-unlikely-length", b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff".to_vec()),
        ("map-of-an-unlikely-length", b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()),
        ("lists-without-an-end", b"\x9f\x9f\x01\xff\x80\xff".to_vec()),
        // {"children": [{"children": [… nested without end.
        ("deep-tree", [&b"\xa1\x68children\x81"[..]].concat().repeat(300)),
        // The same, where each list claims to be long.
        (
            "deep-tree-of-unlikely-lengths",
            b"\xa1\x68children\x9b\x00\x00\x00\xff\xff\xff\xff\xff".repeat(100),
        ),
        // {"Named": {"then": {"Named": …
        ("deep-phase", b"\xa1\x65Named\xa1\x64then".repeat(300)),
        ("ignored-and-deep", [0x81; 3000].to_vec()),
    ]
}
