//! Clients of all kinds come and go while engines with ever other configurations replace each other, or are to and do not: each
//! client hears exactly what it is to hear, nobody is refused, and nothing is left over.

mod support;

use std::io::{ErrorKind, Read, Result, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use heirloom_proxy::{Config, Engine};
use rustix::net::{SendFlags, send, sockopt};
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
    let door = &directory.path().join("door");
    let backends = Backends::start(door, &directory.path().join("backend"));
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
                    match random.below(3) {
                        0 => visit(connect_to_path(door), &mut random),
                        _ => visit(connect(at), &mut random),
                    }
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
    assert!(engine.report().listeners.iter().all(|listener| listener.refused == 0));
    engine.stop(LONG);
    wait_for("nothing to be left over", || descriptors() <= before);
}

fn connect_to_path(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
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
    door: PathBuf,
}

impl Backends {
    fn start(door: &Path, path: &Path) -> Backends {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || serve(stream));
            }
        });
        let mut good: Vec<String> =
            (0..2).map(|_| backend(|stream| drop(serve_in_line(stream))).to_string()).collect();
        good.push(format!("unix:{}", path.display()));
        let (refuses, _held) = refuses();
        Backends { good, refuses, _held, door: door.into() }
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
            [[listener]]
            listen = \"unix:{}\"
            pool = \"p\"
            max_connections = {most}
            [pool.p]
            connect_timeout = \"60s\"
            retries = 9
            balance = \"{balance}\"
            backends = [{}]",
            self.door.display(),
            backends.join(", ")
        ))
    }
}

/// A stream that a client has, or a backend.
trait Stream: Read + Write + Send {
    fn twin(&self) -> Self;
    /// Says nothing more.
    fn end(&self);
    /// Has the other one hear a reset; where there is none, an end.
    fn reset(self);
    /// Says this at once, where that can be.
    fn urge(&mut self, byte: u8);
}

impl Stream for TcpStream {
    fn twin(&self) -> TcpStream {
        self.try_clone().unwrap()
    }

    fn end(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }

    fn reset(self) {
        sockopt::set_socket_linger(&self, Some(Duration::ZERO)).unwrap();
    }

    fn urge(&mut self, byte: u8) {
        assert_eq!(send(self, &[byte], SendFlags::OOB).unwrap(), 1);
    }
}

impl Stream for UnixStream {
    fn twin(&self) -> UnixStream {
        self.try_clone().unwrap()
    }

    fn end(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }

    fn reset(self) {}

    fn urge(&mut self, byte: u8) {
        self.write_all(&[byte]).unwrap();
    }
}

/// What is urgent is heard in its place.
fn serve_in_line(stream: TcpStream) -> Result<()> {
    sockopt::set_socket_oobinline(&stream, true).unwrap();
    serve(stream)
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

/// A client does something, and goes.
fn visit(mut stream: impl Stream, random: &mut Random) {
    let little = said(random.below(5000) as usize);
    let much = said(random.below(MUCH) as usize);
    let length = (much.len() as u32).to_be_bytes();
    match random.below(8) {
        // Without a word.
        0 => {}
        1 => {
            let _ = stream.write_all(&[b"e", little].concat());
            stream.reset();
        }
        2 => {
            stream.write_all(b"e").unwrap();
            let often = [10, 100][random.below(2) as usize];
            for _ in 0..random.below(often) {
                stream.write_all(little).unwrap();
                let is_urgent = random.below(4) == 0;
                if is_urgent {
                    stream.urge(b'!');
                }
                hears(&mut stream, little);
                hears(&mut stream, if is_urgent { b"!" } else { b"" });
            }
        }
        3 => {
            stream.write_all(&[b"e", little].concat()).unwrap();
            stream.end();
            hears_all(&mut stream, little);
        }
        4 | 5 => {
            let mut mouth = stream.twin();
            thread::scope(|scope| {
                scope.spawn(move || {
                    mouth.write_all(b"e").unwrap();
                    mouth.write_all(much).unwrap();
                    mouth.end();
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
                // Of a UNIX socket, or through one.
                Ok(0) => {}
                Ok(_) => panic!("too much"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
        }
    }
}

#[track_caller]
fn hears(stream: &mut impl Stream, expected: &[u8]) {
    let mut heard = vec![0; expected.len()];
    stream.read_exact(&mut heard).unwrap();
    assert!(heard == expected, "something else");
}

/// And then its end.
#[track_caller]
fn hears_all(stream: &mut impl Stream, expected: &[u8]) {
    let mut heard = Vec::with_capacity(expected.len());
    stream.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), expected.len());
    assert!(heard == expected, "something else");
}
