//! An incumbent that misbehaves. It has the chat's connection, and hands over what it has read as not yet written.

use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use heirloom::channel::Channel;
use heirloom::control::path::{bind, prepare_directory};
use heirloom::control::{Failure, FailureCode, LineReader, Reply, Welcome};
use heirloom::descriptors::{Wait, receive_with, send_with};
use heirloom::lock::{LockFile, lock_path};
use heirloom::manifest::{Base, Delta, ServiceRecord, seal};
use heirloom::protocol::{ToIncumbent, ToSuccessor};
use heirloom::{CONTROL_NAME, Cbor, Codec, Entry, ItemId, Kind, Limits};
use serde::{Serialize, Serializer};

use super::{Acts, Rogue, give_up, next_packet, say, send};

/// As much of the chat's state as it needs; the rest has defaults.
#[derive(Serialize)]
struct State {
    #[serde(serialize_with = "bytes")]
    unwritten: Vec<u8>,
    bytes_in: u64,
    connection_id: u64,
}

fn bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// The points, in order.
pub(super) fn run(rogue: &Rogue) {
    prepare_directory(&rogue.control).expect("a directory");
    let file = LockFile::open(lock_path(&rogue.control)).expect("the lock file");
    let Ok(lock) = file.try_lock() else { panic!("somebody serves") };
    let listener = bind(&rogue.control, &lock).expect("bind");
    let mut server = TcpStream::connect(&rogue.server).expect("connect");
    let mut unwritten = vec![0; 1234];
    server.read_exact(&mut unwritten).expect("read");
    let (base, crc, base_memfd) = base(rogue, unwritten.clone());

    listener.set_nonblocking(false).expect("fcntl");
    say("serving");
    let (client, _) = listener.accept().expect("accept");
    hear_hello(&client);
    let say_line = |line: &[u8], with: &[OwnedFd]| {
        let with: Vec<_> = with.iter().map(AsFd::as_fd).collect();
        send_with(&client, line, &with, Wait::Block).expect("send");
    };
    if rogue.point == "hello" {
        let refusal = Failure::new(FailureCode::Busy, "the rogue is busy");
        let pipe = || vec![OwnedFd::from(std::io::pipe().expect("pipe").0)];
        match rogue.act.as_str() {
            "pause" => {}
            "close" => client.shutdown(std::net::Shutdown::Both).expect("shutdown"),
            "garbage" => say_line(b"\"Hi there\"\n", &[]),
            "no JSON" => say_line(b"220 ESMTP\n", &[]),
            "refuse" => say_line(&Reply::Error(refusal).to_line(), &[]),
            "no channel" => say_line(&welcome(), &[]),
            "pipe" => say_line(&welcome(), &pipe()),
            act => panic!("unknown act {act}"),
        }
        rogue.done();
        rogue.pause();
    }

    let (ours, theirs) = Channel::pair().expect("socketpair");
    let mut channel = Some(ours);
    say_line(&welcome(), &[theirs]);
    let acts = || Acts {
        abort: ToSuccessor::abort("the rogue has thought better of it").to_packet(),
        wrong: ToSuccessor::Released.to_packet(),
    };
    let second_freeze = || Acts { wrong: ToSuccessor::Offered.to_packet(), ..acts() };

    rogue.at("welcome", &mut channel, acts());
    send(&channel, &ToSuccessor::Offer.to_packet(), &[base_memfd]);
    rogue.at("offer", &mut channel, acts());
    let ids = vec![ItemId::CONTROL, ItemId(1)];
    let lent = [listener.try_clone().expect("dup").into(), server.try_clone().expect("dup").into()];
    send(&channel, &ToSuccessor::Batch { ids }.to_packet(), &lent);
    rogue.at("batch", &mut channel, acts());
    send(&channel, &ToSuccessor::Offered.to_packet(), &[]);
    rogue.at("offered", &mut channel, acts());
    hear(&channel, &ToIncumbent::Ready);
    rogue.at("ready", &mut channel, acts());

    // The state of the freeze: more was read since the offer.
    let mut more = vec![0; 555];
    server.read_exact(&mut more).expect("read");
    unwritten.extend_from_slice(&more);
    let now = Base { state: Some(state(unwritten)), ..base.clone() };
    let delta =
        Delta::between(&base, crc, &now).expect("a delta").encode(&Limits::default()).expect("encoded");
    let delta = seal("delta", &delta.bytes).expect("memfd");
    send(&channel, &ToSuccessor::Freeze.to_packet(), &[delta]);
    rogue.at("freeze", &mut channel, second_freeze());
    hear(&channel, &ToIncumbent::Accept);
    rogue.at("accept", &mut channel, second_freeze());
    // With the lock still held: what happens when Released came and the lock does not.
    send(&channel, &ToSuccessor::Released.to_packet(), &[]);
    rogue.at("released", &mut channel, second_freeze());
    drop(lock);
    hear(&channel, &ToIncumbent::Taken);
    say("TAKEN");
}

fn base(rogue: &Rogue, unwritten: Vec<u8>) -> (Base, u32, OwnedFd) {
    let entry = |id, name: &str, kind| Entry { id, name: name.into(), kind, state: Vec::new() };
    let base = Base {
        service: ServiceRecord {
            name: format!("chat {}", rogue.server),
            schema: 1,
            ..ServiceRecord::default()
        },
        state: Some(state(unwritten)),
        items: vec![
            entry(ItemId::CONTROL, CONTROL_NAME, Kind::UnixListener),
            entry(ItemId(1), "server", Kind::TcpStream),
        ],
        next_id: 2,
        ..Base::default()
    };
    let encoded = base.encode(&Limits::default()).expect("encoded");
    let memfd = seal("base", &encoded.bytes).expect("memfd");
    (base, encoded.crc, memfd)
}

fn state(unwritten: Vec<u8>) -> Vec<u8> {
    let bytes_in = unwritten.len() as u64;
    Cbor::encode(&State { unwritten, bytes_in, connection_id: 1 }).expect("encoded")
}

fn welcome() -> Vec<u8> {
    Reply::Takeover(Welcome {
        protocol: 1,
        generation: 0,
        pid: std::process::id(),
        program: "rogue".into(),
        version: "6".into(),
        schema: 1,
        items: 2,
        outsider: false,
    })
    .to_line()
}

fn hear_hello(client: &UnixStream) {
    let mut lines = LineReader::new(10_000);
    let mut buffer = [0; 1000];
    loop {
        let received = receive_with(client, &mut buffer, Wait::Block).expect("receive");
        lines.feed(&buffer[..received.bytes]);
        if let Some(line) = lines.next_line().expect("short") {
            assert!(line.starts_with(b"{\"Takeover\":"), "{}", String::from_utf8_lossy(&line));
            return;
        }
    }
}

/// Waits for this message, over credits; gives up when it is an Abort.
fn hear(channel: &Option<Channel>, expected: &ToIncumbent) {
    loop {
        let (packet, descriptors) = next_packet(channel);
        match ToIncumbent::from_packet(&packet, descriptors.len()).expect("a message") {
            ToIncumbent::Credit => {}
            ToIncumbent::Abort { reason } => give_up(&reason),
            message => {
                assert_eq!(&message, expected);
                return;
            }
        }
    }
}
