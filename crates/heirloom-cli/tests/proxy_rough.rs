//! The proxy in rough weather: descriptors that are used up, floods, backends that are gone, and nothing to do.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use support::echo::Echo;
use support::proc::{processors, time_running};
use support::proxy::{Handover, Proxy, THREADS};
use support::*;

/// How long is looked whether somebody does nothing.
const LOOK: Duration = Duration::from_millis(500);
/// How much of it may be spent all the same: a sample for the rates is taken, and this process asks for the status.
const IDLE: f64 = 0.05;

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket");
    stream.set_write_timeout(Some(LONG)).expect("a socket");
    stream
}

/// The echo's greeting, and what is said.
fn talk(stream: &mut TcpStream, text: &str) -> std::io::Result<()> {
    let mut heard = vec![0; text.len()];
    stream.write_all(text.as_bytes())?;
    stream.read_exact(&mut heard)?;
    assert_eq!(heard, text.as_bytes());
    Ok(())
}

/// Who answers.
fn greeting(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut heard = [0; NAME.len() + 1];
    stream.read_exact(&mut heard)?;
    Ok(String::from_utf8_lossy(&heard).trim_end().to_owned())
}

fn is_greeted(stream: &mut TcpStream) -> std::io::Result<()> {
    assert_eq!(greeting(stream)?, NAME);
    Ok(())
}

const NAME: &str = "echo";

/// The share of a processor that the proxy uses when nothing is asked of it. What was still to do may be done first.
#[track_caller]
fn assert_idle(proxy: &Proxy, while_what: &str) {
    assert_process_idle(proxy.status().pid, while_what);
}

#[track_caller]
fn assert_process_idle(pid: u32, while_what: &str) {
    let give_up = Instant::now() + LONG;
    loop {
        let (before, at) = (time_running(pid), Instant::now());
        std::thread::sleep(LOOK);
        let share = (time_running(pid) - before) as f64 / at.elapsed().as_nanos() as f64;
        if share < IDLE {
            return;
        }
        assert!(Instant::now() < give_up, "uses {share:.3} of a processor while {while_what}");
    }
}

fn open(proxy: &Proxy) -> u64 {
    proxy.status().application.expect("a proxy's")["connections"].as_u64().expect("a number")
}

/// Waits until no connection is left, and no descriptor that was not there before but for the pipes that are kept.
#[track_caller]
fn wait_for_calm(proxy: &Proxy, before: usize) {
    wait_for("no connection", || open(proxy) == 0);
    wait_for("no descriptor is left over", || proxy.descriptors() <= before);
}

#[test]
fn it_does_nothing_when_there_is_nothing_to_do() {
    let echo = Echo::tcp(NAME);
    let proxy = Proxy::to(echo.address());
    assert_idle(&proxy, "nobody is there");
    let mut clients: Vec<TcpStream> = (0..100).map(|_| connect(&proxy.address())).collect();
    for client in &mut clients {
        is_greeted(client).expect("it lives");
        talk(client, "hello").expect("it lives");
    }
    assert_idle(&proxy, "all are silent");
    // Those who have nothing more to say, and those who do not read while much is sent.
    for client in &mut clients[..10] {
        client.set_nonblocking(true).expect("a socket");
        let chunk = vec![b'x'; 1 << 20];
        let mut silence = Instant::now();
        while silence.elapsed() < Duration::from_millis(100) {
            match client.write(&chunk) {
                Ok(count) if count > 0 => silence = Instant::now(),
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    }
    assert_idle(&proxy, "some do not read");
    clients.clear();
    wait_for("no connection", || open(&proxy) == 0);
    assert_idle(&proxy, "all have gone");
    proxy.finish();
}

#[test]
fn clients_wait_while_there_are_no_descriptors() {
    if !have("prlimit") {
        return skip("there is no prlimit");
    }
    let echo = Echo::tcp(NAME);
    let mut proxy = Proxy::to(echo.address());
    let before = proxy.descriptors();
    let pid = proxy.status().pid;
    let limit = |pid: u32, most: usize| {
        let status = Command::new("prlimit")
            .args(["--pid", &pid.to_string(), &format!("--nofile={most}:20000")])
            .status();
        assert!(status.expect("prlimit").success());
    };
    // Room for a few connections, and then for half of one, or for no pipe.
    for room in [20, 21, 22, 23] {
        limit(pid, before + room);
        let mut clients: Vec<TcpStream> = (0..40).map(|_| connect(&proxy.address())).collect();
        for client in &mut clients {
            client.write_all(b"hello").expect("the kernel takes it");
        }
        // It cannot be asked: there is no descriptor for that, either.
        assert_process_idle(pid, "there are no descriptors");
        let is_served = |client: &&TcpStream| {
            client.set_nonblocking(true).expect("a socket");
            let served = matches!(client.peek(&mut [0]), Ok(1));
            client.set_nonblocking(false).expect("a socket");
            served
        };
        let served = clients.iter().filter(is_served).count();
        assert!((1..40).contains(&served), "{served} are served");
        // Whoever is served makes room for the next.
        for (number, mut client) in clients.into_iter().enumerate() {
            if number == 20 {
                limit(pid, 20_000);
            }
            is_greeted(&mut client).expect("it is served in the end");
            let mut heard = [0; 5];
            client.read_exact(&mut heard).expect("it is served in the end");
            assert_eq!(&heard, b"hello");
        }
        wait_for_calm(&proxy, before);
    }
    proxy.hand_over(Handover::Reload);
    is_greeted(&mut connect(&proxy.address())).expect("it serves");
    proxy.finish();
}

#[test]
fn a_flood_of_connections_is_served_and_leaves_nothing_behind() {
    const EACH: usize = 250;
    let echo = Echo::tcp(NAME);
    let mut proxy = Proxy::start(&format!(
        "max_connections = 20\n[[listener]]\nname = \"main\"\nlisten = \"127.0.0.1:0\"\nto = [\"{}\"]\n",
        echo.address()
    ));
    let (before, address) = (proxy.descriptors(), proxy.address());
    let (served, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let flood: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    for number in 0..EACH {
                        let mut stream = connect(&address);
                        is_greeted(&mut stream).expect("it is served");
                        talk(&mut stream, "once").expect("it is served");
                        if number % 3 == 0 {
                            // Leaves nothing that waits, and ends it hard.
                            sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("a socket");
                        }
                        served.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        // Others come and go without a word.
        let (over, address) = (&over, &address);
        let silent = scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                drop(connect(address));
            }
        });
        for how in [Handover::Reload, Handover::InPlace, Handover::Upgrade] {
            proxy.hand_over(how);
        }
        flood.into_iter().for_each(|thread| thread.join().expect("all are served"));
        over.store(true, Ordering::SeqCst);
        silent.join().expect("all are accepted");
    });
    assert_eq!(served.into_inner(), 8 * EACH);
    wait_for_calm(&proxy, before);
    assert_idle(&proxy, "the flood is over");
    proxy.finish();
}

#[test]
fn backends_that_vanish_take_only_their_own_connections_with_them() {
    let stays = Echo::tcp(NAME);
    let goes = TcpListener::bind("127.0.0.1:0").expect("bind");
    let goes_at = goes.local_addr().expect("bound");
    let proxy = Proxy::start(&format!(
        "[[listener]]\nname = \"main\"\nlisten = \"127.0.0.1:0\"\nto = [\"{}\", \"{goes_at}\"]\n",
        stays.address()
    ));
    let before = proxy.descriptors();
    let clients: Vec<TcpStream> = (0..10).map(|_| connect(&proxy.address())).collect();
    let mut held: Vec<TcpStream> = (0..5).map(|_| goes.accept().expect("every other one").0).collect();
    held.iter_mut().for_each(|stream| stream.write_all(b"gone\n").expect("it lives"));
    let stays = |client: &mut TcpStream| greeting(client).expect("it is served") == NAME;
    let (mut alive, mut doomed): (Vec<_>, Vec<_>) = clients
        .into_iter()
        .map(|mut client| {
            let stays = stays(&mut client);
            (stays, client)
        })
        .partition(|(stays, _)| *stays);
    // As when it is killed with something unread.
    for (_, client) in &mut doomed {
        client.write_all(b"unread").expect("it lives");
    }
    wait_for("it is all there", || held.iter().all(|stream| matches!(stream.peek(&mut [0; 10]), Ok(6))));
    drop((held, goes));
    for (_, client) in &mut doomed {
        assert_eq!(client.read(&mut [0; 1]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    }
    for (_, client) in &mut alive {
        talk(client, "still here").expect("it lives");
    }
    // Who comes now is passed on to the other one, every time.
    for _ in 0..20 {
        is_greeted(&mut connect(&proxy.address())).expect("it is served");
    }
    drop((alive, doomed));
    wait_for_calm(&proxy, before);
    assert_idle(&proxy, "a backend is gone");
    proxy.finish();
}

#[test]
fn when_every_backend_refuses_each_client_is_told_at_once() {
    // A port that is taken, and at which nobody listens.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound");
    let _taken = (TcpStream::connect(address).expect("it listens"), listener.accept().expect("it came"));
    drop(listener);
    let proxy = Proxy::to(&address.to_string());
    let before = proxy.descriptors();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..250 {
                    let error = connect(&proxy.address()).read(&mut [0; 1]).expect_err("a reset");
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                }
            });
        }
    });
    wait_for_calm(&proxy, before);
    assert_idle(&proxy, "every backend refuses");
    let report = proxy.status().application.expect("a proxy's");
    assert_eq!(report["listeners"][0]["refused"], 1000);
    proxy.finish();
}

#[test]
fn loops_stay_on_a_processor_each_if_that_is_wanted_and_nothing_else_does() {
    let echo = Echo::tcp(NAME);
    let listener =
        format!("[[listener]]\nname = 'main'\nlisten = '127.0.0.1:0'\nto = ['{}']\n", echo.address());
    let mut proxy = Proxy::start(&listener);
    let all = processors(std::process::id(), "").pop().expect("this thread");
    assert!(processors(proxy.status().pid, "").iter().all(|of_thread| *of_thread == all));

    let room = std::thread::available_parallelism().expect("a number").get();
    proxy.configure(&format!("pin_threads = true\n{listener}"));
    for _ in 0..2 {
        // The second one is started by one whose loops are pinned.
        proxy.hand_over(Handover::Reload);
        let pid = proxy.status().pid;
        // A thread does so itself, when it comes to it.
        wait_for("each loop to be on a processor of its own", || {
            let mut of_loops = processors(pid, "loop ");
            let are_pinned = of_loops.iter().all(|one| one.parse::<usize>().is_ok());
            of_loops.sort();
            of_loops.dedup();
            are_pinned && of_loops.len() == THREADS.min(room)
        });
        assert_eq!(processors(pid, "heirloom"), [all.as_str()], "the thread that starts others");
    }
    let mut client = connect(&proxy.address());
    is_greeted(&mut client).expect("it relays");
    proxy.configure(&listener);
    proxy.hand_over(Handover::Reload);
    assert!(processors(proxy.status().pid, "").iter().all(|of_thread| *of_thread == all));
    talk(&mut client, "still there").expect("it relays");
}
