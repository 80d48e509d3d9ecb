//! The relay as its clients and backends see it.

mod support;

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
use support::*;

#[test]
fn what_is_said_is_passed_on_both_ways_and_counted() {
    let engine = fresh(simple(&[backend(echo)], ""));
    let mut client = connect(address(&engine));
    for n in 0..100 {
        talk(&mut client, &format!("line {n}\n"));
    }
    wait_until(&engine, "everything is counted", |report| {
        let listener = &report.listeners[0];
        (listener.up_bytes, listener.down_bytes) == (790, 790) && listener.total_connections == 1
    });
    assert_eq!((engine.report().connections, engine.report().pipes_in_use), (1, 0));
    drop(client);
    wait_until(&engine, "it has ended", |report| report.connections == 0);
    assert_eq!(engine.report().backends[0].connections, 0);
}

#[test]
fn an_end_of_one_direction_leaves_the_other() {
    // Answers only when it has heard everything.
    let to = backend(|mut stream| {
        let mut heard = String::new();
        stream.read_to_string(&mut heard).unwrap();
        stream.write_all(heard.to_uppercase().as_bytes()).unwrap();
    });
    let engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "QUESTION");

    // And the other way round.
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |mut stream| {
        stream.write_all(b"greeting").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).unwrap();
        sender.send(heard).unwrap();
    });
    let engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    let mut greeting = String::new();
    client.read_to_string(&mut greeting).unwrap();
    assert_eq!(greeting, "greeting");
    client.write_all(b"thanks").unwrap();
    drop(client);
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), "thanks");
    wait_until(&engine, "it has ended", |report| report.connections == 0);
}

fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
}

#[test]
fn a_reset_is_passed_on_as_a_reset() {
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |mut stream| {
        let mut buffer = [0; 100];
        let heard = stream.read(&mut buffer).unwrap();
        sender.send((heard, stream.read(&mut buffer).map_err(|error| error.kind()))).unwrap();
    });
    let engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    client.write_all(b"hello").unwrap();
    wait_until(&engine, "it is passed on", |report| report.backends[0].up_bytes == 5);
    reset(client);
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), (5, Err(ErrorKind::ConnectionReset)));
    wait_until(&engine, "it has ended", |report| report.connections == 0);

    let to = backend(|mut stream| {
        stream.write_all(b"last words").unwrap();
        let mut buffer = [0; 100];
        assert_eq!(stream.read(&mut buffer).unwrap(), 1);
        reset(stream);
    });
    let engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    hear(&mut client, "last words");
    client.write_all(b"!").unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    wait_until(&engine, "it has ended", |report| report.connections == 0);
}

#[test]
fn who_does_not_read_holds_up_who_sends_and_nobody_else() {
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |mut stream| {
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        if first == *b"e" {
            return echo(stream);
        }
        // As much as is taken: far more than any buffer.
        let chunk = vec![b'x'; 1 << 20];
        let sent: usize = (0..64).map(|_| stream.write(&chunk).unwrap()).sum();
        sender.send(sent).unwrap();
    });
    let engine = fresh(simple(&[to], ""));
    let mut slow = connect(address(&engine));
    slow.write_all(b"b").unwrap();
    wait_until(&engine, "it is held up", |report| report.pipes_in_use == 1);
    let mut other = connect(address(&engine));
    other.write_all(b"e").unwrap();
    for n in 0..100 {
        talk(&mut other, &format!("line {n}\n"));
    }
    assert!(receiver.try_recv().is_err(), "the sender is held up");
    let mut heard = Vec::new();
    slow.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), receiver.recv_timeout(LONG).unwrap());
    assert!(heard.iter().all(|byte| *byte == b'x'));
}

#[test]
fn a_backend_that_refuses_is_passed_over_and_if_all_do_the_client_is_reset() {
    let (nobody, _held) = refuses();
    let engine = fresh(simple(&[nobody, backend(echo)], ""));
    for _ in 0..10 {
        talk(&mut connect(address(&engine)), "hello");
    }
    let report = engine.report();
    assert!(report.backends[0].failed >= 5 && report.backends[1].total_connections == 10, "{report:?}");

    let engine = fresh(simple(&[nobody], ""));
    for _ in 0..100 {
        let mut client = connect(address(&engine));
        assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    wait_until(&engine, "all have ended", |report| report.connections == 0);
    let report = engine.report();
    assert_eq!((report.listeners[0].refused, report.pipes_in_use), (100, 0));
}

#[test]
fn who_is_refused_waits_for_a_backend_that_is_full() {
    let (nobody, _held) = refuses();
    let to = backend(echo);
    let engine = fresh(config(&format!(
        "threads = 2\n[[listener]]\nlisten = \"127.0.0.1:0\"\npool = \"p\"\n[pool.p]\n\
         backends = [\"{nobody}\", {{ address = \"{to}\", max_connections = 1 }}]"
    )));
    let mut first = connect(address(&engine));
    talk(&mut first, "first");
    let mut rest: Vec<_> = (0..6).map(|_| connect(address(&engine))).collect();
    rest.iter_mut().for_each(|client| client.write_all(b"rest").unwrap());
    wait_until(&engine, "one waits", |report| report.connections > 1 && report.backends[0].failed > 0);
    talk(&mut first, "still");
    drop(first);
    rest.iter().for_each(|client| client.set_nonblocking(true).unwrap());
    wait_for("all to be served", || {
        rest.retain_mut(|client| match client.read(&mut [0; 4]) {
            Ok(count) => count == 0,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                true
            }
        });
        rest.is_empty()
    });
    let report = engine.report();
    assert_eq!((report.listeners[0].refused, report.backends[1].total_connections), (0, 7));
}

#[test]
fn at_a_limit_clients_wait_until_somebody_has_gone() {
    for limit in ["max_connections = 2", "to_limit"] {
        let to = backend(echo);
        let config = if limit == "to_limit" {
            config(&format!(
                "[[listener]]\nlisten = \"127.0.0.1:0\"\npool = \"p\"\n[pool.p]\nbackends = [{{ address = \"{to}\", max_connections = 2 }}]"
            ))
        } else {
            simple(&[to], limit)
        };
        let engine = fresh(config);
        let mut clients: Vec<_> = (0..20).map(|_| connect(address(&engine))).collect();
        clients.iter_mut().for_each(|client| client.write_all(b"me").unwrap());
        wait_until(&engine, "two are served", |report| report.listeners[0].down_bytes == 4);
        assert_eq!(engine.report().backends[0].connections, 2);
        // Whoever is served goes, and makes room for the next, in the order in which they came.
        for mut client in clients {
            hear(&mut client, "me");
        }
        wait_until(&engine, "all have ended", |report| report.connections == 0);
        assert_eq!(engine.report().listeners[0].down_bytes, 40);
    }
}

#[test]
fn what_is_silent_for_too_long_ends() {
    let engine = fresh(simple(&[backend(echo)], "idle_timeout = \"2s\""));
    let mut silent = connect(address(&engine));
    talk(&mut silent, "hello");
    let mut talks = connect(address(&engine));
    let (done, over) = mpsc::channel::<()>();
    let talking = thread::spawn(move || {
        while over.try_recv() == Err(mpsc::TryRecvError::Empty) {
            talk(&mut talks, "still here");
            thread::sleep(std::time::Duration::from_millis(5));
        }
        talks
    });
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    drop(done);
    let mut talks = talking.join().unwrap();
    assert_eq!(talks.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn unix_sockets_on_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    let (outside, inside) = (directory.path().join("outside"), directory.path().join("inside"));
    let listener = UnixListener::bind(&inside).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut buffer = [0; 100];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                stream.write_all(&buffer[..count]).unwrap();
            }
        }
    });
    let engine = fresh(config(&format!(
        "[[listener]]\nlisten = \"unix:{}\"\nto = [\"unix:{}\"]\nmode = \"0600\"",
        outside.display(),
        inside.display()
    )));
    let mut client = UnixStream::connect(&outside).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    let mut heard = [0; 5];
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut heard).unwrap(), 0);
    engine.stop(LONG);
    assert!(!outside.exists());
}

#[test]
fn descriptors_are_let_go_of_and_the_bytes_that_they_come_with_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let door = directory.path().join("door");
    let engine = fresh(config(&format!(
        "[[listener]]\nlisten = \"unix:{}\"\nto = [\"{}\"]",
        door.display(),
        backend(echo)
    )));
    let mut client = UnixStream::connect(&door).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    for text in ["one", "two"] {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let descriptors = [writer.as_fd()];
        assert!(with.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = [IoSlice::new(text.as_bytes())];
        assert_eq!(sendmsg(&client, &bytes, &mut with, SendFlags::empty()).unwrap(), 3);
    }
    client.write_all(b"three").unwrap();
    let mut heard = [0; 11];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"onetwothree");
    drop(writer);
    rustix::io::ioctl_fionbio(&reader, true).unwrap();
    wait_for("nobody to have the other end", || matches!((&reader).read(&mut [0]), Ok(0)));
    wait_until(&engine, "all are counted", |report| report.listeners[0].down_bytes == 11);
}

#[test]
fn a_backend_that_does_not_accept_in_time_is_passed_over() {
    let (stuck, _socket, _in_queue) = stuck();
    let engine = fresh(simple(&[stuck, backend(echo)], "connect_timeout = \"100ms\""));
    for _ in 0..4 {
        talk(&mut connect(address(&engine)), "hello");
    }
    let report = engine.report();
    assert!(report.backends[0].failed >= 1 && report.backends[1].total_connections == 4, "{report:?}");
}

#[test]
fn without_a_pipe_one_waits_and_goes_on_when_there_is_one() {
    let to = backend(|mut stream| {
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        if first == *b"e" {
            return echo(stream);
        }
        // Who goes without reading ends it.
        let chunk = vec![b'x'; 1 << 20];
        while stream.write_all(&chunk).is_ok() {}
    });
    heirloom::descriptors::raise_limit().unwrap();
    // As many connections as leave hardly a pipe.
    let limit = heirloom::descriptors::limit() as usize;
    let mut config = simple(&[to], "");
    config.threads = std::num::NonZeroUsize::new(1);
    config.max_connections = Some((limit - 68 - 2 * 64) / 2);
    let engine = fresh(config);
    let pipes = engine.report().max_pipes;
    assert!((64..80).contains(&pipes), "{pipes}");
    let mut slow: Vec<TcpStream> = (0..pipes).map(|_| connect(address(&engine))).collect();
    slow.iter_mut().for_each(|client| client.write_all(b"b").unwrap());
    wait_until(&engine, "all pipes are in use", |report| report.pipes_in_use == pipes);
    let mut other = connect(address(&engine));
    other.write_all(b"e").unwrap();
    wait_until(&engine, "it is connected", |report| report.connections == pipes + 1);
    other.set_nonblocking(true).unwrap();
    assert_eq!(other.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
    other.set_nonblocking(false).unwrap();
    other.write_all(b"cho").unwrap();
    slow.pop();
    hear(&mut other, "cho");
    drop(slow);
    wait_until(&engine, "the others have ended", |report| report.connections == 1);
}

#[test]
fn ipv6_and_all_addresses_of_a_host() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        eprintln!("SKIPPED: there is no IPv6");
        assert!(std::env::var_os("HEIRLOOM_REQUIRE_ALL").is_none());
        return;
    };
    let to = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || echo(stream));
        }
    });
    let engine = fresh(config(&format!("[[listener]]\nlisten = \":0\"\nto = [\"{to}\"]")));
    let port = address(&engine).port();
    talk(&mut connect(SocketAddr::from(([127, 0, 0, 1], port))), "over IPv4");
    talk(&mut connect(SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port))), "over IPv6");
}

#[test]
fn a_backend_that_reads_no_more_is_heard_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("backend");
    let listener = UnixListener::bind(&path).unwrap();
    let (reads_no_more, told) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.shutdown(Shutdown::Read).unwrap();
        reads_no_more.send(()).unwrap();
        for n in 0..1000 {
            stream.write_all(format!("{n:09}\n").repeat(1000).as_bytes()).unwrap();
        }
    });
    let engine =
        fresh(config(&format!("[[listener]]\nlisten = \"127.0.0.1:0\"\nto = [\"unix:{}\"]", path.display())));
    let mut client = connect(address(&engine));
    // What comes before that lies unread when the backend ends, which resets the connection.
    told.recv().unwrap();
    client.write_all(b"nobody reads this").unwrap();
    wait_until(&engine, "it is held up", |report| report.pipes_in_use == 1);
    let (mut heard, mut buffer) = (Vec::new(), vec![0; 1 << 20]);
    let ended = loop {
        match client.read(&mut buffer) {
            Ok(0) => panic!("bytes were lost, and nobody says so"),
            Ok(count) => heard.extend_from_slice(&buffer[..count]),
            Err(error) => break error,
        }
    };
    assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
    let expected: String = (0..1000).map(|n| format!("{n:09}\n").repeat(1000)).collect();
    // The reset comes behind what the kernel has sent, and overtakes what it has not.
    assert!(expected.as_bytes().starts_with(&heard));
    wait_until(&engine, "it has ended", |report| report.connections == 0);
    assert_eq!(engine.report().listeners[0].down_bytes, expected.len() as u64);
}

/// They begin with the loop that has accepted them.
#[test]
fn a_stream_that_another_loop_goes_on_with_is_exact() {
    const CLIENTS: usize = 12;
    const CHUNK: usize = 100_000;
    let mut config = simple(&[backend(echo)], "");
    config.threads = std::num::NonZeroUsize::new(3);
    let engine = fresh(config);
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let streaming: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (mut client, over) = (connect(address(&engine)), std::sync::Arc::clone(&over));
            thread::spawn(move || {
                let mut reader = client.try_clone().unwrap();
                let byte = move |place: usize| (place * 7 + number) as u8;
                let reading = thread::spawn(move || {
                    let mut heard = 0;
                    let mut buffer = vec![0; CHUNK];
                    loop {
                        let count = reader.read(&mut buffer).unwrap();
                        if count == 0 {
                            return heard;
                        }
                        let right = |(at, &is): (usize, &u8)| is == byte(heard + at);
                        assert!(buffer[..count].iter().enumerate().all(right), "behind {heard}");
                        heard += count;
                    }
                });
                let mut said = 0;
                while !over.load(std::sync::atomic::Ordering::SeqCst) {
                    let chunk: Vec<u8> = (said..said + CHUNK).map(byte).collect();
                    client.write_all(&chunk).unwrap();
                    said += CHUNK;
                }
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(reading.join().unwrap(), said);
            })
        })
        .collect();
    wait_until(&engine, "each loop has as many", |report| {
        report.connections_of_loops.iter().all(|&of| of == CLIENTS / 3)
    });
    over.store(true, std::sync::atomic::Ordering::SeqCst);
    streaming.into_iter().for_each(|one| one.join().unwrap());
    wait_until(&engine, "all have ended", |report| report.connections == 0 && report.pipes_in_use == 0);
}

#[test]
fn loops_have_as_many_connections_each() {
    let mut config = simple(&[backend(echo)], "");
    config.threads = std::num::NonZeroUsize::new(3);
    let engine = fresh(config);
    let mut clients: Vec<TcpStream> = (0..90).map(|_| connect(address(&engine))).collect();
    clients.iter_mut().for_each(|client| talk(client, "hello"));
    let balanced = |count: usize| {
        move |report: &heirloom_proxy::Report| {
            let of_loops = &report.connections_of_loops;
            of_loops.iter().sum::<usize>() == count && of_loops.iter().all(|of| of.abs_diff(count / 3) <= 2)
        }
    };
    wait_until(&engine, "each has 30", balanced(90));
    let engine = hand_over(engine, simple(&[backend(echo)], ""), || {});
    assert_eq!(engine.report().connections_of_loops, [45, 45]);
    clients.iter_mut().for_each(|client| talk(client, "hello"));
}
