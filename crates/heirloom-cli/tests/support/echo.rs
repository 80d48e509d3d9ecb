//! Servers that send back what they get, and clients that check each byte of it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::random::Random;
use super::{LONG, wait_for};

/// A server that says its name to whoever comes, and then sends back everything.
pub(crate) struct Echo {
    address: String,
    accepted: Arc<AtomicU64>,
    open: Arc<AtomicU64>,
}

impl Echo {
    pub(crate) fn tcp(name: &'static str) -> Echo {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("bound").to_string();
        Echo::serve(name, address, move || OwnedFd::from(listener.accept().expect("accept").0))
    }

    pub(crate) fn unix(name: &'static str, path: &Path) -> Echo {
        let listener = UnixListener::bind(path).expect("bind");
        let address = format!("unix:{}", path.display());
        Echo::serve(name, address, move || OwnedFd::from(listener.accept().expect("accept").0))
    }

    fn serve(name: &'static str, address: String, accept: impl Fn() -> OwnedFd + Send + 'static) -> Echo {
        let (accepted, open) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let echo = Echo { address, accepted: accepted.clone(), open: open.clone() };
        std::thread::spawn(move || {
            loop {
                let stream = any_stream(accept());
                accepted.fetch_add(1, Ordering::SeqCst);
                open.fetch_add(1, Ordering::SeqCst);
                let open = open.clone();
                std::thread::spawn(move || {
                    send_back(stream, name);
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        echo
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// How many connections it has had.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// How many connections it has.
    pub(crate) fn open(&self) -> u64 {
        self.open.load(Ordering::SeqCst)
    }
}

/// Until the end of the stream, which is sent back, too. A connection that fails is not an end that a client would accept.
fn send_back(mut stream: UnixStream, name: &str) {
    let mut buffer = vec![0; 64 * 1024];
    let mut greeted = writeln!(stream, "{name}").is_ok();
    while greeted && let Ok(count @ 1..) = stream.read(&mut buffer) {
        greeted = stream.write_all(&buffer[..count]).is_ok();
    }
}

/// What there is in the standard library for one kind of stream socket does for all of them.
fn any_stream(socket: impl Into<OwnedFd>) -> UnixStream {
    UnixStream::from(socket.into())
}

/// Bytes that differ at each place: a number of them that is no power of two, over and over.
pub(crate) struct Pattern(Vec<u8>);

impl Pattern {
    pub(crate) fn new(random: &mut Random) -> Arc<Pattern> {
        Arc::new(Pattern((0..1_000_003).map(|_| random.next() as u8).collect()))
    }

    /// So many of the bytes from this position of the stream on, or fewer.
    fn at(&self, position: u64, most: usize) -> &[u8] {
        let rest = &self.0[(position % self.0.len() as u64) as usize..];
        &rest[..rest.len().min(most)]
    }
}

/// A connection to a server that sends everything back.
pub(crate) struct Caller {
    stream: UnixStream,
    /// The server's name.
    pub(crate) server: String,
    /// How many bytes it has sent and got back.
    position: u64,
    pattern: Arc<Pattern>,
}

impl Caller {
    /// Connects to an address or to the path of a UNIX socket, and hears who answers.
    pub(crate) fn connect(address: &str, pattern: &Arc<Pattern>) -> std::io::Result<Caller> {
        let mut stream = match address.strip_prefix("unix:") {
            Some(path) => UnixStream::connect(path)?,
            None => any_stream(TcpStream::connect(address)?),
        };
        // A connection that was forgotten is a failure, and no test that hangs.
        stream.set_read_timeout(Some(LONG))?;
        let mut name = Vec::new();
        let mut byte = [0];
        while name.last() != Some(&b'\n') {
            stream.read_exact(&mut byte)?;
            name.extend(byte);
        }
        let server = String::from_utf8_lossy(&name).trim_end().to_owned();
        Ok(Caller { stream, server, position: 0, pattern: pattern.clone() })
    }

    /// Sends so many bytes, and gets them back.
    pub(crate) fn exchange(&mut self, count: usize) {
        let sent = self.pattern.at(self.position, count);
        self.stream.write_all(sent).expect("it is connected");
        let mut got = vec![0; sent.len()];
        self.stream.read_exact(&mut got).expect("it is connected");
        assert!(got == sent, "other bytes than those from {} on", self.position);
        self.position += sent.len() as u64;
    }

    /// Sends its last bytes and ends its side; everything comes back, and then the end.
    pub(crate) fn hang_up(mut self, count: usize) {
        let sent = self.pattern.at(self.position, count);
        self.stream.write_all(sent).expect("it is connected");
        self.stream.shutdown(Shutdown::Write).expect("it is connected");
        let mut got = Vec::new();
        self.stream.read_to_end(&mut got).expect("a clean end");
        assert!(got == sent, "other bytes than those from {} on", self.position);
    }

    /// Sends as much as the connection takes, on a thread, and checks what comes back, until it is to stop.
    fn stream(&mut self, stop: &AtomicBool, exchanged: &AtomicU64) {
        let (start, pattern) = (self.position, self.pattern.clone());
        let (sent, all_sent) = (Arc::<AtomicU64>::default(), AtomicBool::new(false));
        let mut sending = self.stream.try_clone().expect("dup");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut position = start;
                while !stop.load(Ordering::Relaxed) {
                    let count = sending.write(pattern.at(position, 64 * 1024)).expect("it is connected");
                    position += count as u64;
                    sent.store(position, Ordering::SeqCst);
                }
                all_sent.store(true, Ordering::SeqCst);
                // So that the reader, who waits for bytes, learns of it.
                sending.write_all(&pattern.at(position, 1)[..1]).expect("it is connected");
            });
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let count = self.stream.read(&mut buffer).expect("it is connected");
                assert!(count > 0, "the connection has ended");
                let mut got = &buffer[..count];
                while !got.is_empty() {
                    let expected = self.pattern.at(self.position, got.len());
                    assert!(
                        got[..expected.len()] == *expected,
                        "other bytes than those from {} on",
                        self.position
                    );
                    self.position += expected.len() as u64;
                    got = &got[expected.len()..];
                }
                exchanged.fetch_add(count as u64, Ordering::Relaxed);
                if all_sent.load(Ordering::SeqCst) && self.position == sent.load(Ordering::SeqCst) + 1 {
                    return;
                }
            }
        });
    }
}

/// How a busy caller talks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Manner {
    /// One thing after the other.
    InTurn,
    /// All the time, ahead of what comes back.
    AtOnce,
}

/// A caller that talks all the time.
pub(crate) struct Busy {
    stop: Arc<AtomicBool>,
    exchanged: Arc<AtomicU64>,
    thread: JoinHandle<Caller>,
}

impl Busy {
    pub(crate) fn start(mut caller: Caller, manner: Manner, mut random: Random) -> Busy {
        let (stop, exchanged) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, counted) = (stop.clone(), exchanged.clone());
        let thread = std::thread::spawn(move || {
            match manner {
                Manner::AtOnce => caller.stream(&stopped, &counted),
                Manner::InTurn => {
                    while !stopped.load(Ordering::Relaxed) {
                        let before = caller.position;
                        caller.exchange(1 + random.below(16 * 1024) as usize);
                        counted.fetch_add(caller.position - before, Ordering::Relaxed);
                    }
                }
            }
            caller
        });
        Busy { stop, exchanged, thread }
    }

    /// How many bytes have come back.
    pub(crate) fn exchanged(&self) -> u64 {
        assert!(!self.thread.is_finished(), "it has stopped talking");
        self.exchanged.load(Ordering::Relaxed)
    }

    /// Lets it come to an end.
    pub(crate) fn stop(self) -> Caller {
        self.stop.store(true, Ordering::Relaxed);
        wait_for("a caller that stops", || self.thread.is_finished());
        self.thread.join().expect("all bytes were right")
    }
}

/// Waits until each of them has heard something more.
pub(crate) fn wait_for_each(busy: &[Busy]) {
    let before: Vec<u64> = busy.iter().map(Busy::exchanged).collect();
    wait_for("all callers to go on", || {
        busy.iter().zip(&before).all(|(busy, before)| busy.exchanged() > *before)
    });
}

/// Somebody who calls, exchanges a few bytes and hangs up, over and over: everybody who comes is let in.
pub(crate) struct Visitors {
    stop: Arc<AtomicBool>,
    came: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Visitors {
    pub(crate) fn start(address: String, pattern: Arc<Pattern>) -> Visitors {
        let (stop, came) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, counted) = (stop.clone(), came.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let mut caller = Caller::connect(&address, &pattern).expect("everybody is let in");
                caller.exchange(100);
                caller.hang_up(100);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Visitors { stop, came, thread }
    }

    /// Lets nobody come any more; how many there were.
    pub(crate) fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        wait_for("the last visitor to leave", || self.thread.is_finished());
        self.thread.join().expect("all were let in");
        self.came.load(Ordering::Relaxed)
    }
}
