//! Who is held up, since the other side does not read, wakes nobody by sending more, and is heard again when it does.
//!
//! In a program of its own: its threads are counted.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::Duration;

use heirloom_proxy::Engine;
use rustix::net::sockopt;
use support::*;

/// How much is sent at once until the other side takes no more.
const CHUNK: usize = 65_536;
/// How often somebody sends something then: more than has room where it waits. And how often the loop may be woken all the same:
/// to know of it, to hear that the source could be written to, by acknowledgements that come late.
const PIECES: usize = 50;
const WAKES: u64 = 6;

/// The thread of the only loop: whether it waits, and how often it did so by now.
fn event_loop() -> (bool, u64) {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    let is_loop = |path: &std::path::PathBuf| {
        fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "loop 0\n")
    };
    let thread = threads.map(|thread| thread.path()).find(is_loop).expect("there is one");
    let status = fs::read_to_string(thread.join("status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
    (field("State:").starts_with('S'), field("voluntary_ctxt_switches:").parse().unwrap())
}

/// Sends until nothing is moved any more, since nobody reads, and then something more in pieces. What was sent.
fn hold_up(engine: &Engine, source: &mut TcpStream, moved: impl Fn() -> u64) -> Vec<u8> {
    let before = moved();
    let chunk: Vec<u8> = (0..CHUNK).map(|place| (place / 256) as u8).collect();
    let mut sent = Vec::new();
    let mut send = |sent: &mut Vec<u8>, bytes: &[u8]| {
        source.write_all(bytes).unwrap();
        sent.extend_from_slice(bytes);
    };
    let woken = loop {
        send(&mut sent, &chunk);
        let mut held_at = None;
        wait_for("all has moved, or is held up", || {
            let now = moved();
            let is_held = engine.report().pipes_in_use == 1 && event_loop().0;
            held_at = Some(now).filter(|_| is_held);
            is_held || now == before + sent.len() as u64
        });
        if held_at.is_none() {
            continue;
        }
        let (_, before) = event_loop();
        for piece in 0..PIECES {
            send(&mut sent, &[piece as u8; 100]);
            wait_for("the loop waits", || event_loop().0);
        }
        let (_, now) = event_loop();
        // The sink may have taken some more, since it was acknowledged late.
        if held_at == Some(moved()) {
            break now - before;
        }
    };
    assert!(woken <= WAKES, "woken {woken} times by {PIECES} pieces of which nobody takes any");
    sent
}

/// All that was sent is heard now.
fn hear_all(engine: &Engine, sink: &mut TcpStream, sent: &[u8]) {
    let mut heard = vec![0; sent.len()];
    sink.read_exact(&mut heard).unwrap();
    assert!(heard == sent, "something else was heard than sent");
    wait_for("the pipe is given back", || engine.report().pipes_in_use == 0);
}

#[test]
fn who_is_held_up_wakes_nobody_is_heard_again_and_may_reset() {
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |stream| sender.send(stream).unwrap());
    let config = || {
        config(&format!("threads = 1\n[[listener]]\nname = \"l\"\nlisten = \"127.0.0.1:0\"\nto = [\"{to}\"]"))
    };
    let mut engine = fresh(config());
    let mut client = connect(address(&engine));
    let mut server = receiver.recv_timeout(LONG).unwrap();
    // Each piece is a packet.
    [&client, &server].iter().for_each(|stream| stream.set_nodelay(true).unwrap());
    let up = |engine: &Engine| engine.report().listeners[0].up_bytes;
    let down = |engine: &Engine| engine.report().listeners[0].down_bytes;
    for _ in 0..2 {
        for _ in 0..2 {
            let sent = hold_up(&engine, &mut client, || up(&engine));
            hear_all(&engine, &mut server, &sent);
            let sent = hold_up(&engine, &mut server, || down(&engine));
            hear_all(&engine, &mut client, &sent);
        }
        // The next one has registered them ahead.
        engine = hand_over(engine, config(), || ());
    }
    hold_up(&engine, &mut server, || down(&engine));
    sockopt::set_socket_linger(&server, Some(Duration::ZERO)).unwrap();
    drop(server);
    wait_until(&engine, "the reset is passed on", |report| report.connections == 0);
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap_err().kind(), ErrorKind::ConnectionReset);
}
