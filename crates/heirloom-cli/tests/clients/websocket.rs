//! Two ends of a WebSocket (tungstenite) that both talk all the time.

use std::collections::VecDeque;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error, Message, WebSocket};

use crate::support::random::Random;

/// How many bytes of messages may be on their way from one end.
const AHEAD: u64 = 8 << 20;
/// One message in so many is long, and one is a ping.
const LONG_ONES: u64 = 20;
const PINGS: u64 = 10;

/// How far a conversation has come.
#[derive(Default)]
pub(crate) struct Progress {
    /// Messages that both have heard.
    heard: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    pub(crate) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// Lets the client bring the conversation to an end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What one end has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Talked {
    pub(crate) messages_said: u64,
    pub(crate) messages_heard: u64,
    pub(crate) bytes_heard: u64,
    pub(crate) pongs: u64,
}

/// A server that talks with the first client that comes.
pub(crate) fn serve(seed: u64, progress: &Arc<Progress>) -> (String, JoinHandle<Talked>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let progress = progress.clone();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        let socket = tungstenite::accept(stream).expect("a handshake");
        End::new(socket, (seed + 1, seed), None).talk(&progress)
    });
    (address, thread)
}

/// A client that connects to an address, and talks with the server until it is to stop.
pub(crate) fn connect(address: &str, seed: u64, progress: &Arc<Progress>) -> JoinHandle<Talked> {
    let stream = TcpStream::connect(address).expect("connect");
    let progress = progress.clone();
    let url = format!("ws://{address}/");
    std::thread::spawn(move || {
        let (socket, _) = tungstenite::client(url, stream).expect("a handshake");
        let stop = progress.clone();
        End::new(socket, (seed, seed + 1), Some(stop)).talk(&progress)
    })
}

/// One end. What it says follows from a seed that the other one knows.
struct End {
    socket: WebSocket<TcpStream>,
    mine: Random,
    others: Random,
    /// The pings that have not been answered yet.
    pings: VecDeque<Vec<u8>>,
    said_bytes: u64,
    talked: Talked,
    /// Who decides when it is over.
    ends: Option<Arc<Progress>>,
}

impl End {
    fn new(socket: WebSocket<TcpStream>, (mine, others): (u64, u64), ends: Option<Arc<Progress>>) -> End {
        socket.get_ref().set_nonblocking(true).expect("fcntl");
        let (mine, others) = (Random::from(mine), Random::from(others));
        End { socket, mine, others, pings: VecDeque::new(), said_bytes: 0, talked: Talked::default(), ends }
    }

    /// Says and hears messages until the client closes, with the number of those that it has said.
    fn talk(mut self, progress: &Progress) -> Talked {
        let mut closing = false;
        loop {
            if !closing && self.ends.as_ref().is_some_and(|ends| ends.stop.load(Ordering::Relaxed)) {
                closing = true;
                self.close();
            }
            let waits_to_be_sent = match self.socket.flush() {
                Ok(()) => {
                    if !closing && self.said_bytes < self.talked.bytes_heard + AHEAD {
                        self.say();
                    }
                    false
                }
                Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => true,
                Err(Error::ConnectionClosed | Error::AlreadyClosed) => return self.end(),
                Err(error) => panic!("it cannot send: {error}"),
            };
            match self.socket.read() {
                Ok(message) => {
                    if let Message::Close(frame) = message {
                        if self.ends.is_none() {
                            let said = frame.expect("it says how much it has said").reason.to_string();
                            assert_eq!(
                                self.talked.messages_heard.to_string(),
                                said,
                                "messages until the end"
                            );
                        }
                        closing = true;
                    } else {
                        self.hear(message);
                        progress.heard.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.wait(waits_to_be_sent);
                }
                Err(Error::ConnectionClosed) => return self.end(),
                Err(error) => panic!("it cannot read: {error}"),
            }
        }
    }

    fn say(&mut self) {
        let message = next(&mut self.mine);
        self.said_bytes += message.len() as u64;
        if let Message::Ping(payload) = &message {
            self.pings.push_back(payload.to_vec());
        } else {
            self.talked.messages_said += 1;
        }
        // What does not go out at once goes out at the next flush.
        self.queued(|socket| socket.send(message));
    }

    fn close(&mut self) {
        let reason = self.talked.messages_said.to_string().into();
        self.queued(|socket| socket.close(Some(CloseFrame { code: CloseCode::Normal, reason })));
    }

    fn queued(&mut self, act: impl FnOnce(&mut WebSocket<TcpStream>) -> tungstenite::Result<()>) {
        match act(&mut self.socket) {
            Ok(()) => {}
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("it cannot send: {error}"),
        }
    }

    fn hear(&mut self, message: Message) {
        if let Message::Pong(payload) = &message {
            // RFC 6455, 5.5.3: of several pings only the last one need be answered.
            let answered = self.pings.iter().position(|ping| ping == payload).expect("a pong to no ping");
            self.pings.drain(..=answered);
            self.talked.pongs += 1;
            return;
        }
        self.talked.bytes_heard += message.len() as u64;
        self.talked.messages_heard += u64::from(!message.is_ping());
        let expected = next(&mut self.others);
        assert!(message == expected, "message {} is another one", self.talked.messages_heard);
    }

    /// Waits for something to do: not for long, since it may be told to stop.
    fn wait(&self, to_be_sent: bool) {
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, to_be_sent);
        let timeout = Timespec::try_from(Duration::from_millis(10)).expect("short");
        match poll(&mut [PollFd::new(self.socket.get_ref(), events)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }

    fn end(self) -> Talked {
        self.talked
    }
}

/// The next thing that somebody says.
fn next(random: &mut Random) -> Message {
    let kind = random.below(PINGS * LONG_ONES);
    let length = if kind % LONG_ONES == 1 { random.below(1 << 20) } else { random.below(2000) };
    let fill = |random: &mut Random, length: u64| -> Vec<u8> {
        let start = random.next();
        // Cheap, and different at each place of each message.
        (0..length)
            .map(|at| (start.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 24) as u8)
            .collect()
    };
    if kind.is_multiple_of(PINGS) {
        return Message::Ping(fill(random, length % 126).into());
    }
    if random.one_in(2) {
        return Message::Binary(fill(random, length).into());
    }
    let text: String = fill(random, length).iter().map(|byte| char::from(b' ' + byte % 95)).collect();
    Message::Text(text.into())
}
