//! Clients of all kinds come and go while engines with ever other configurations replace each other, or are to and do not: each
//! client hears exactly what it is to hear, nobody is refused, and nothing is left over.

mod support;

use std::io::{ErrorKind, Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use heirloom_proxy::{Config, Engine};
use rustix::net::sockopt;
use support::random::Random;
use support::*;

/// How often it is handed over, or tried to.
const HANDOVERS: usize = 100;
/// How many clients there are at once. There may be fewer connections than that.
const CLIENTS: u64 = 12;
/// What is said at once is less.
const MUCH: u64 = 1_000_000;

#[test]
fn whatever_clients_do_and_whoever_serves_each_hears_what_it_is_to_hear() {
    heirloom::descriptors::raise_limit().unwrap();
    let mut random = Random::seeded();
    let directory = tempfile::tempdir().unwrap();
    let backends = Backends::start(&directory.path().join("backend"));
    let before = descriptors();
    let engine = fresh(backends.config(&mut random));
    let at = address(&engine);
    let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let engine = thread::scope(|scope| {
        let mut engine = engine;
        for _ in 0..CLIENTS {
            let (over, done) = (&over, &done);
            let mut random = Random::from(random.next());
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    visit(at, &mut random);
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for _ in 0..HANDOVERS {
            let enough = done.load(Ordering::SeqCst) + random.below(2 * CLIENTS) as usize;
            wait_for("clients to be served", || done.load(Ordering::SeqCst) >= enough);
            engine = hand_over_somehow(engine, backends.config(&mut random), &mut random);
        }
        over.store(true, Ordering::SeqCst);
        engine
    });
    wait_until(&engine, "all have ended", |report| report.connections == 0 && report.pipes_in_use == 0);
    assert_eq!(engine.report().listeners[0].refused, 0);
    engine.stop(LONG);
    wait_for("nothing to be left over", || descriptors() <= before);
}

/// Another engine with this configuration takes over, or is to and does not.
fn hand_over_somehow(mut engine: Engine, config: Config, random: &mut Random) -> Engine {
    let yields = |count: u64| (0..count).for_each(|_| thread::yield_now());
    let [meanwhile, in_the_pause, at_last] = [(); 3].map(|()| random.below(200));
    match random.below(8) {
        0 => {
            engine.offer();
            yields(meanwhile);
            engine.reclaim();
            engine
        }
        1 => {
            // There is one that could serve, and does not.
            let (ready, bundle, frozen) = complete(&mut engine, config, || yields(meanwhile));
            yields(in_the_pause);
            drop((ready, bundle));
            frozen.thaw();
            yields(at_last);
            engine.reclaim();
            engine
        }
        _ => hand_over_slowly(
            engine,
            config,
            || yields(meanwhile),
            || yields(in_the_pause),
            || yields(at_last),
        ),
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Two that are reached by TCP, one by a UNIX socket, and one that refuses.
struct Backends {
    good: Vec<String>,
    refuses: SocketAddr,
    _held: TcpStream,
}

impl Backends {
    fn start(path: &std::path::Path) -> Backends {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || serve(Unix(stream)));
            }
        });
        let mut good: Vec<String> =
            (0..2).map(|_| backend(|stream| drop(serve(stream))).to_string()).collect();
        good.push(format!("unix:{}", path.display()));
        let (refuses, _held) = refuses();
        Backends { good, refuses, _held }
    }

    /// Some of them, with limits that are too low at times, and another number of loops.
    fn config(&self, random: &mut Random) -> Config {
        let limit = |random: &mut Random, least: u64| match random.below(2) {
            0 => least + random.below(CLIENTS),
            _ => 100,
        };
        let mut backends: Vec<String> = Vec::new();
        let must = random.below(self.good.len() as u64) as usize;
        for (number, address) in self.good.iter().enumerate() {
            if number == must || random.below(2) == 0 {
                let most = limit(random, 1);
                backends.push(format!("{{ address = \"{address}\", max_connections = {most} }}"));
            }
        }
        if random.below(3) == 0 {
            backends
                .insert(random.below(backends.len() as u64 + 1) as usize, format!("\"{}\"", self.refuses));
        }
        let balance = ["round-robin", "least-connections"][random.below(2) as usize];
        let (threads, most) = (1 + random.below(4), limit(random, 2));
        config(&format!(
            "threads = {threads}
            [[listener]]
            listen = \"127.0.0.1:0\"
            pool = \"p\"
            max_connections = {most}
            [pool.p]
            connect_timeout = \"60s\"
            retries = 9
            balance = \"{balance}\"
            backends = [{}]",
            backends.join(", ")
        ))
    }
}

/// A stream that a backend has of a client.
trait Stream: Read + Write {
    /// Has the client hear a reset; where there is none, an end.
    fn reset(self);
}

impl Stream for TcpStream {
    fn reset(self) {
        sockopt::set_socket_linger(&self, Some(std::time::Duration::ZERO)).unwrap();
    }
}

struct Unix(UnixStream);

impl Read for Unix {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Unix {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Stream for Unix {
    fn reset(self) {}
}

/// Does what the client asks for: says it all again until its end (`e`), says so much (`d`), or that and then resets (`r`).
fn serve(mut stream: impl Stream) -> Result<()> {
    let mut command = [0; 1];
    stream.read_exact(&mut command)?;
    if command == *b"e" {
        let mut buffer = vec![0; 65_536];
        while let count @ 1.. = stream.read(&mut buffer)? {
            stream.write_all(&buffer[..count])?;
        }
        return Ok(());
    }
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    stream.write_all(said(u32::from_be_bytes(length) as usize))?;
    if command == *b"r" {
        stream.read_exact(&mut [0])?;
        stream.reset();
    }
    Ok(())
}

/// The first so many bytes of what anybody says.
fn said(count: usize) -> &'static [u8] {
    static SAID: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..MUCH).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect());
    &SAID[..count]
}

/// A client comes, does something, and goes.
fn visit(at: SocketAddr, random: &mut Random) {
    let mut stream = connect(at);
    let little = said(random.below(5000) as usize);
    let much = said(random.below(MUCH) as usize);
    let length = (much.len() as u32).to_be_bytes();
    match random.below(8) {
        // Without a word.
        0 => {}
        1 => {
            let _ = stream.write_all(&[b"e", little].concat());
            sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
        }
        2 => {
            stream.write_all(b"e").unwrap();
            let often = [10, 100][random.below(2) as usize];
            for _ in 0..random.below(often) {
                stream.write_all(little).unwrap();
                hears(&mut stream, little);
            }
        }
        3 => {
            stream.write_all(&[b"e", little].concat()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            hears_all(&mut stream, little);
        }
        4 | 5 => {
            let mut mouth = stream.try_clone().unwrap();
            thread::scope(|scope| {
                scope.spawn(|| {
                    mouth.write_all(b"e").unwrap();
                    mouth.write_all(much).unwrap();
                    mouth.shutdown(Shutdown::Write).unwrap();
                });
                hears_all(&mut stream, much);
            });
        }
        6 => {
            stream.write_all(&[b"d", &length[..]].concat()).unwrap();
            let mut heard = 0;
            // Slowly, at times.
            while heard < much.len() {
                let portion = (1 + random.below(300_000) as usize).min(much.len() - heard);
                hears(&mut stream, &much[heard..heard + portion]);
                heard += portion;
                (0..random.below(100)).for_each(|_| thread::yield_now());
            }
            hears_all(&mut stream, &[]);
        }
        _ => {
            stream.write_all(&[b"r", &length[..]].concat()).unwrap();
            hears(&mut stream, much);
            stream.write_all(b"!").unwrap();
            match stream.read(&mut [0]) {
                // Of a UNIX socket.
                Ok(0) => {}
                Ok(_) => panic!("too much"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
        }
    }
}

#[track_caller]
fn hears(stream: &mut TcpStream, expected: &[u8]) {
    let mut heard = vec![0; expected.len()];
    stream.read_exact(&mut heard).unwrap();
    assert!(heard == expected, "something else");
}

/// And then its end.
#[track_caller]
fn hears_all(stream: &mut TcpStream, expected: &[u8]) {
    let mut heard = Vec::with_capacity(expected.len());
    stream.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), expected.len());
    assert!(heard == expected, "something else");
}
