//! Everything is handed over, between two engines of this process.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use heirloom_proxy::address::Address;
use heirloom_proxy::config::{AccessFormat, AccessLog};
use heirloom_proxy::{Engine, Prepared, Report};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, sockopt};
use support::*;

#[test]
fn idle_connections_and_those_that_are_new_changed_or_ended_live_on() {
    let to = backend(echo);
    let mut engine = fresh(simple(&[to], ""));
    let at = address(&engine);
    let mut clients: Vec<TcpStream> = (0..50).map(|_| connect(at)).collect();
    clients.iter_mut().for_each(|client| talk(client, "hello"));
    for generation in 0..5 {
        let mut leaving = clients.split_off(40);
        engine = hand_over(engine, simple(&[to], &format!("backlog = {}", 100 + generation)), || {
            clients[..10].iter_mut().for_each(|client| talk(client, "meanwhile"));
            leaving.drain(..).for_each(|mut client| {
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
            });
            let mut new: Vec<TcpStream> = (0..10).map(|_| connect(at)).collect();
            new.iter_mut().for_each(|client| talk(client, "new"));
            clients.append(&mut new);
        });
        clients.iter_mut().for_each(|client| talk(client, "after"));
        let report = engine.report();
        assert_eq!(report.connections, clients.len());
        assert_eq!(report.listeners[0].total_connections, 50 + 10 * (generation + 1));
        assert_eq!(report.backends[0].connections, clients.len());
    }
    drop(clients);
    wait_until(&engine, "all have ended", |report| report.connections == 0);
}

#[test]
fn what_is_in_a_pipe_travels_and_half_closed_connections_stay_so() {
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |mut stream| {
        let chunk: Vec<u8> = (0..1 << 20).map(|n| (n % 251) as u8).collect();
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        // The client has nothing more to say.
        assert_eq!(stream.read(&mut first).unwrap(), 0);
        for _ in 0..32 {
            stream.write_all(&chunk).unwrap();
        }
        sender.send(()).unwrap();
    });
    let mut engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    client.write_all(b"b").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    let mut buffer = vec![0; 100_000];
    for threads in 1..8 {
        wait_until(&engine, "it is held up", |report| report.pipes_in_use == 1);
        let mut config = simple(&[to], "");
        config.threads = std::num::NonZeroUsize::new(threads);
        engine = hand_over(engine, config, || {});
        for _ in 0..20 {
            let count = client.read(&mut buffer).unwrap();
            heard.extend_from_slice(&buffer[..count]);
        }
    }
    client.read_to_end(&mut heard).unwrap();
    receiver.recv_timeout(LONG).unwrap();
    assert_eq!(heard.len(), 32 << 20);
    assert!(heard.iter().enumerate().all(|(n, byte)| *byte == ((n % (1 << 20)) % 251) as u8));
    wait_until(&engine, "it has ended", |report| report.connections == 0 && report.pipes_in_use == 0);
}

/// Their source says nothing more, and nobody tells that there is room for them.
#[test]
fn the_last_bytes_travel_in_a_pipe_and_are_passed_on() {
    const CHUNK: usize = 16 * 1024;
    let (sender, receiver) = mpsc::channel();
    let to = backend(move |stream| sender.send(stream).unwrap());
    let mut engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    let mut server: TcpStream = receiver.recv_timeout(LONG).unwrap();
    let mut written = 0;
    while engine.report().pipes_in_use == 0 {
        server.write_all(&[7; CHUNK]).unwrap();
        written += CHUNK;
        let is_passed_on = |report: &Report| report.backends[0].down_bytes == written as u64;
        wait_until(&engine, "it is passed on or held up", |report| {
            is_passed_on(report) || report.pipes_in_use == 1
        });
    }
    for threads in [3, 1] {
        let mut config = simple(&[to], "");
        config.threads = std::num::NonZeroUsize::new(threads);
        engine = hand_over(engine, config, || {});
    }
    let mut heard = vec![0; written];
    client.read_exact(&mut heard).unwrap();
    assert!(heard.iter().all(|&byte| byte == 7));
}

#[test]
fn a_busy_stream_is_exact_over_many_handovers() {
    let to = backend(echo);
    let mut engine = fresh(simple(&[to], ""));
    let mut writer = connect(address(&engine));
    let mut reader = writer.try_clone().unwrap();
    const LINES: u64 = 300_000;
    let reading = thread::spawn(move || {
        let mut heard = Vec::new();
        reader.read_to_end(&mut heard).unwrap();
        heard
    });
    let writing = thread::spawn(move || {
        for n in 0..LINES / 100 {
            let lines: String = (0..100).map(|m| format!("{:012}\n", n * 100 + m)).collect();
            writer.write_all(lines.as_bytes()).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut handovers = 0;
    while !writing.is_finished() || handovers < 20 {
        engine = hand_over(engine, simple(&[to], ""), || {});
        handovers += 1;
    }
    writing.join().unwrap();
    let heard = reading.join().unwrap();
    let expected: String = (0..LINES).map(|n| format!("{n:012}\n")).collect();
    assert!(heard == expected.as_bytes(), "{} bytes of {}", heard.len(), expected.len());
    wait_until(&engine, "it has ended", |report| report.connections == 0);
}

#[test]
fn a_backend_that_leaves_the_configuration_keeps_its_connections_for_the_time_to_drain() {
    let (old, new) = (backend(echo), backend(echo));
    let engine = fresh(simple(&[old], ""));
    let at = address(&engine);
    let mut client = connect(at);
    talk(&mut client, "hello");
    let engine = hand_over(engine, simple(&[new], ""), || {});
    talk(&mut client, "still");
    talk(&mut connect(at), "new");
    let report = engine.report();
    let of = |address: &std::net::SocketAddr| {
        report.backends.iter().find(|backend| backend.address == address.to_string()).unwrap()
    };
    assert!(!of(&old).configured && of(&old).connections == 1);
    assert!(of(&new).configured && of(&new).total_connections == 1);

    let mut config = simple(&[new], "");
    config.drain = Some(std::time::Duration::from_millis(50));
    let engine = hand_over(engine, config, || {});
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    wait_until(&engine, "it has ended", |report| report.connections == 0);
    assert_eq!(engine.report().backends.len(), 1);
}

#[test]
fn who_has_no_backend_any_more_gets_another_and_nobody_new_overtakes() {
    let to = backend(echo);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("full");
    let full = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&full, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let _in_queue = UnixStream::connect(&path).unwrap();
    let config = |pool: &str, more: &str| {
        config(&format!(
            "threads = 2
            [[listener]]
            name = \"moves\"
            listen = \"127.0.0.1:0\"
            pool = \"{pool}\"
            [[listener]]
            name = \"stays\"
            listen = \"127.0.0.2:0\"
            pool = \"one\"
            [pool.one]
            backends = [{{ address = \"{to}\", max_connections = 1 }}]
            {more}"
        ))
    };
    let other = format!("[pool.full]\nbackends = [\"unix:{}\"]\nconnect_timeout = \"1h\"", path.display());
    let engine = fresh(config("full", &other));
    let [moves, stays] = [0, 1].map(|at| engine.report().listeners[at].address.parse().unwrap());
    let mut first = connect(stays);
    talk(&mut first, "first");
    let mut second = connect(moves);
    second.write_all(b"second").unwrap();
    wait_until(&engine, "it has no backend yet", |report| report.listeners[0].connections == 1);
    let engine = hand_over(engine, config("one", ""), || {});
    let mut rest: Vec<_> = (0..6).map(|n| connect(if n % 2 == 0 { moves } else { stays })).collect();
    rest.iter_mut().for_each(|client| client.write_all(b"rest").unwrap());
    talk(&mut first, "still");
    wait_until(&engine, "one is served, and one waits", |report| report.connections == 2);
    drop(first);
    hear(&mut second, "second");
    assert_eq!(engine.report().backends[0].total_connections, 2);
    drop(second);
    // These wait at two listeners: whichever is served goes, and makes room for the next.
    rest.iter().for_each(|client| client.set_nonblocking(true).unwrap());
    wait_for("all to be served", || {
        rest.retain_mut(|client| client.read(&mut [0; 4]).is_err());
        rest.is_empty()
    });
    wait_until(&engine, "all have ended", |report| report.connections == 0);
}

#[test]
fn a_backend_that_has_left_and_refuses_then_is_none_of_the_tries() {
    let (leaves, socket, in_queue) = stuck();
    let engine = fresh(simple(&[leaves], "connect_timeout = \"60s\""));
    let mut client = connect(address(&engine));
    client.write_all(b"hello").unwrap();
    wait_until(&engine, "it is being connected", |report| report.backends[0].connections == 1);
    let engine = hand_over(engine, simple(&[backend(echo)], ""), || {});
    assert!(engine.report().backends.iter().any(|backend| !backend.configured && backend.connections == 1));
    // The kernel asks again after a second.
    drop((socket, in_queue));
    hear(&mut client, "hello");
    assert_eq!(engine.report().listeners[0].refused, 0);
}

/// What somebody does at one moment of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Nothing,
    Talk,
    Write,
    End,
}

const ACTS: [Act; 4] = [Act::Nothing, Act::Talk, Act::Write, Act::End];

/// Nobody tells the successor of it but the poller in which it was registered before.
#[test]
fn whatever_comes_before_the_freeze_or_in_the_pause_is_passed_on() {
    let to = backend(echo);
    let mut engine = fresh(simple(&[to], ""));
    for threads in [1, 2, 3] {
        let at = address(&engine);
        // Of each kind, one that is there before the offer and one that comes after it.
        let mut clients = Vec::new();
        for (before, then) in ACTS.into_iter().flat_map(|before| ACTS.map(|then| (before, then))) {
            let is_over = before == Act::End && then != Act::Nothing;
            if !is_over && then != Act::Talk {
                clients.push((before, then, connect(at), None));
            }
        }
        clients.iter_mut().for_each(|(_, _, client, _)| talk(client, "hello"));
        let clients = std::cell::RefCell::new(clients);
        let act = |what: Act, client: &mut TcpStream| match what {
            Act::Nothing => {}
            Act::Talk => talk(client, "talk"),
            Act::Write => client.write_all(b"write").unwrap(),
            Act::End => client.shutdown(Shutdown::Write).unwrap(),
        };
        let mut config = simple(&[to], "");
        config.threads = std::num::NonZeroUsize::new(threads);
        engine = hand_over_slowly(
            engine,
            config,
            || {
                for (before, _, client, late) in clients.borrow_mut().iter_mut() {
                    act(*before, client);
                    let mut new = connect(at);
                    talk(&mut new, "new");
                    *late = Some(new);
                }
            },
            || {
                for (_, then, client, late) in clients.borrow_mut().iter_mut() {
                    act(*then, client);
                    act(*then, late.as_mut().unwrap());
                }
            },
            || {},
        );
        for (before, then, mut client, late) in clients.into_inner() {
            let expected =
                |acts: &[Act]| "write".repeat(acts.iter().filter(|&&act| act == Act::Write).count());
            for (client, acts) in [(&mut client, &[before, then][..]), (&mut late.unwrap(), &[then])] {
                hear(client, &expected(acts));
                if acts.contains(&Act::End) {
                    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "{before:?}, {then:?}");
                } else {
                    talk(client, "after");
                }
            }
        }
    }
}

/// Bound anew, it would be in the way of itself.
/// The loops of the one before wait for clients still: none of these is theirs.
#[test]
fn whoever_comes_when_the_next_one_serves_is_served_at_once() {
    let to = backend(echo);
    let mut engine = fresh(simple(&[to], ""));
    let at = address(&engine);
    for threads in [3, 1, 4, 2] {
        let mut config = simple(&[to], "");
        config.threads = std::num::NonZeroUsize::new(threads);
        let come = || {
            for _ in 0..20 {
                talk(&mut connect(at), "hello");
            }
        };
        come();
        let meanwhile = || {
            come();
            // Whether the loops wait again by then decides how much this shows, and not what is right.
            thread::sleep(std::time::Duration::from_millis(20));
        };
        engine = hand_over_slowly(engine, config, meanwhile, || {}, come);
    }
}

#[test]
fn a_listener_whose_address_is_written_otherwise_is_the_same_one() {
    let to = backend(echo);
    let engine = fresh(simple(&[to], ""));
    let at = address(&engine);
    let mut config = simple(&[to], "");
    config.listeners[0].address = Address::to_listen("127.0.0.1:00").unwrap();
    let engine = hand_over(engine, config, || {});
    assert_eq!(address(&engine), at);
    talk(&mut connect(at), "new");
}

#[test]
fn a_listener_is_extended_to_all_addresses_and_limited_to_one_again() {
    let to = backend(echo);
    // A port that was free everywhere.
    let everywhere = TcpListener::bind("[::]:0").unwrap();
    let port = everywhere.local_addr().unwrap().port();
    let config_at = |listen: SocketAddr| {
        let mut config = simple(&[to], "");
        config.listeners[0].address = Address::from(listen);
        config
    };
    let (here, there) = (SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from(([127, 0, 0, 2], port)));
    drop(everywhere);
    let mut engine = fresh(config_at(here));
    let mut old = connect(here);
    talk(&mut old, "old");
    for all in [SocketAddr::from(([0; 4], port)), SocketAddr::from(([0; 16], port))] {
        Prepared::new(config_at(all)).unwrap().check(&engine.offer()).unwrap();
        // It could be had, and nothing comes of it.
        let (ready, bundle, frozen) = complete(&mut engine, config_at(all), || ());
        drop((ready, bundle));
        frozen.thaw();
        engine.reclaim();
        assert!(!is_shared(&mut engine));
        for _ in 0..2 {
            let mut waiting = None;
            engine = hand_over_slowly(
                engine,
                config_at(all),
                || talk(&mut connect(here), "meanwhile"),
                || waiting = Some(connect(here)),
                || {
                    talk(&mut connect(here), "here");
                    talk(&mut connect(there), "there");
                },
            );
            talk(&mut waiting.unwrap(), "waiting");
            assert_eq!(address(&engine), all);
            assert!(!is_shared(&mut engine));
        }
        for _ in 0..2 {
            engine = hand_over_slowly(
                engine,
                config_at(here),
                || talk(&mut connect(here), "meanwhile"),
                || (),
                || {
                    talk(&mut connect(here), "here");
                    assert_eq!(TcpStream::connect(there).unwrap_err().kind(), ErrorKind::ConnectionRefused);
                },
            );
        }
        talk(&mut old, "old");
    }
    let report = engine.report();
    assert_eq!((report.listeners.len(), report.listeners[0].refused), (1, 0));

    // And to two of them, which are in the way of none but all.
    engine = hand_over(engine, config_at(SocketAddr::from(([0; 4], port))), || ());
    let mut both = config_at(here);
    let mut other = both.listeners[0].clone();
    (other.name, other.address) = ("other".into(), Address::from(there));
    both.listeners.push(other);
    engine = hand_over(engine, both, || talk(&mut connect(there), "meanwhile"));
    talk(&mut connect(here), "here");
    talk(&mut connect(there), "there");
    assert!(!is_shared(&mut engine));
}

/// Whether a listener of the engine lets others be bound beside it.
fn is_shared(engine: &mut Engine) -> bool {
    let listener = engine.offer().items.into_iter().find(|item| item.name == "listener").unwrap();
    let shared = sockopt::socket_reuseport(engine.descriptor(listener.id).unwrap()).unwrap();
    engine.reclaim();
    shared
}

#[test]
fn what_was_passed_on_at_any_time_is_counted_once() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let to = backend(echo);
    let config = |threads| {
        let mut config = simple(&[to], "");
        config.threads = std::num::NonZeroUsize::new(threads);
        config.access_log = Some(AccessLog { path: Some(log.clone()), format: AccessFormat::Json });
        config
    };
    let mut engine = fresh(config(1));
    let mut client = connect(address(&engine));
    for threads in [2, 1, 3] {
        talk(&mut client, "before");
        engine = hand_over(engine, config(threads), || talk(&mut client, "offered"));
    }
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    let bytes = 3 * ("before".len() + "offered".len()) as u64;
    wait_for("its end is in the log", || std::fs::read_to_string(&log).unwrap().ends_with('\n'));
    let line: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&log).unwrap()).unwrap();
    assert_eq!((&line["from_client"], &line["from_backend"]), (&bytes.into(), &bytes.into()), "{line}");
    let report = engine.report();
    assert_eq!((report.listeners[0].up_bytes, report.backends[0].down_bytes), (bytes, bytes));
}

#[test]
fn an_offer_of_which_nothing_comes_changes_nothing() {
    let to = backend(echo);
    let mut engine = fresh(simple(&[to], ""));
    let mut client = connect(address(&engine));
    talk(&mut client, "hello");
    for _ in 0..3 {
        let base = engine.offer();
        talk(&mut client, "offered");
        let mut frozen = engine.freeze();
        let delta = frozen.delta();
        // How much it has moved is in the state of the whole.
        assert_eq!((delta.changed.len(), delta.added.len(), delta.ended.len()), (0, 0, 0));
        assert_ne!(delta.state, base.state);
        client.write_all(b"frozen").unwrap();
        frozen.thaw();
        hear(&mut client, "frozen");
        engine.reclaim();
        talk(&mut client, "reclaimed");
        talk(&mut connect(address(&engine)), "new");
        wait_until(&engine, "that one has ended", |report| report.connections == 1);
    }
}
