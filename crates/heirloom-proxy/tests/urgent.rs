//! TCP's urgent byte comes through in its place, as an urgent one, and nothing waits behind it.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use heirloom_proxy::Engine;
use heirloom_sys::is_at_mark;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};
use support::*;

fn say_urgently(stream: &TcpStream, byte: u8) {
    assert_eq!(send(stream, &[byte], SendFlags::OOB).unwrap(), 1);
}

/// Reads so many bytes, or to the end, and says behind how many bytes those were that came urgently.
fn hear_marks(stream: &mut TcpStream, most: usize) -> (Vec<u8>, Vec<usize>) {
    sockopt::set_socket_oobinline(&*stream, true).unwrap();
    let (mut heard, mut marks) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 65_536];
    while heard.len() < most {
        poll(&mut [PollFd::new(&*stream, PollFlags::IN)], None).unwrap();
        if is_at_mark(&*stream).unwrap() && marks.last() != Some(&heard.len()) {
            marks.push(heard.len());
        }
        let room = buffer.len().min(most - heard.len());
        // It stops at the mark.
        match stream.read(&mut buffer[..room]).unwrap() {
            0 => break,
            count => heard.extend_from_slice(&buffer[..count]),
        }
    }
    (heard, marks)
}

/// Both ends of a relayed connection.
fn relayed() -> (Engine, TcpStream, TcpStream) {
    let (sender, receiver) = mpsc::channel();
    let engine = fresh(simple(&[backend(move |stream| sender.send(stream).unwrap())], ""));
    let client = connect(address(&engine));
    let server = receiver.recv_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    (engine, client, server)
}

/// Whatever of it comes together, and whichever way.
#[test]
fn it_comes_in_its_place_and_as_an_urgent_one() {
    for (before, after, ends) in [
        (0, 0, false),
        (5, 0, false),
        (0, 5, true),
        (5, 5, false),
        (0, 0, true),
        (700, 300_000, true),
        (300_000, 0, true),
    ] {
        for up in [true, false] {
            let (_engine, client, server) = relayed();
            let (mut from, mut to) = if up { (client, server) } else { (server, client) };
            let what = format!("{before}, {after}, {ends}, {up}");
            let hearing = std::thread::spawn(move || {
                let most = if ends { usize::MAX } else { before + 1 + after };
                hear_marks(&mut to, most)
            });
            from.write_all(&vec![b'b'; before]).unwrap();
            say_urgently(&from, b'!');
            from.write_all(&vec![b'a'; after]).unwrap();
            if ends {
                from.shutdown(Shutdown::Write).unwrap();
            }
            let (heard, marks) = hearing.join().unwrap();
            let all = [vec![b'b'; before], vec![b'!'], vec![b'a'; after]].concat();
            assert!(heard == all, "{what}: {} of {} bytes", heard.len(), all.len());
            assert_eq!(marks, [before], "{what}");
        }
    }
}

/// Only the last one is urgent then; the others are in line.
#[test]
fn none_is_lost_if_there_are_many_and_all_are_counted() {
    let (engine, client, mut server) = relayed();
    let all: Vec<u8> = (0..10_000).map(|n| (n % 251) as u8).collect();
    let said = all.clone();
    let saying = std::thread::spawn(move || {
        said.iter().for_each(|&byte| say_urgently(&client, byte));
        client
    });
    let (heard, marks) = hear_marks(&mut server, all.len());
    assert!(heard == all);
    assert!(!marks.is_empty());
    wait_until(&engine, "all are counted", |report| report.listeners[0].up_bytes == 10_000);
    drop(saying.join().unwrap());
}

#[test]
fn it_comes_through_a_handover() {
    let (mut engine, client, mut server) = relayed();
    let config = |threads| {
        let mut config = simple(&["127.0.0.1:9".parse().unwrap()], "");
        config.threads = std::num::NonZeroUsize::new(threads);
        config
    };
    for threads in [1, 3, 2] {
        engine = hand_over(engine, config(threads), || say_urgently(&client, b'1'));
        assert_eq!(hear_marks(&mut server, 1), (b"1".to_vec(), vec![0]));
        engine = hand_over_slowly(engine, config(threads), || {}, || say_urgently(&client, b'2'), || {});
        assert_eq!(hear_marks(&mut server, 1), (b"2".to_vec(), vec![0]));
    }
    drop(engine);
}

/// It is in line there, where the kernel knows such a byte.
#[test]
fn of_a_unix_socket_it_is_a_byte_as_any_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("door");
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |stream| sender.send(stream).unwrap());
    let listen = format!("listen = \"unix:{}\"", path.display());
    let _engine = fresh(config(&format!("[[listener]]\n{listen}\nto = [\"{to}\"]\n")));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"before").unwrap();
    match send(&client, b"!", SendFlags::OOB) {
        Err(Errno::OPNOTSUPP) => client.write_all(b"!").unwrap(),
        sent => assert_eq!(sent, Ok(1)),
    }
    client.write_all(b"after").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = String::new();
    receiver.recv_timeout(LONG).unwrap().read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "before!after");
}
