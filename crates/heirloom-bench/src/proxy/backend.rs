//! The server behind the proxies. The first byte of a connection says what it is for, so that one server and one proxy do for all
//! that is measured.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::process::{say, told};
use crate::proxy::herd::stay_on;

/// Send without end.
pub(crate) const FLOW: u8 = b'f';
/// Send back what comes after this byte.
pub(crate) const ECHO: u8 = b'e';
/// Send as many bytes as the request has, then close.
pub(crate) const ANSWER: u8 = b'a';
/// The length of a request, with its first byte, and of the answer to it.
pub(crate) const REQUEST: usize = 100;

/// How much is sent at once, at most.
const CHUNK: usize = 256 * 1024;
/// The tokens of what is no connection.
const LISTENER: u64 = u64::MAX - 1;
const STDIN: u64 = u64::MAX;

/// Serves until nobody asks any more; to whoever asks, it says how many connections it has.
pub(crate) fn run(cpu: Option<usize>) -> anyhow::Result<()> {
    stay_on(cpu)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    rustix::net::listen(&listener, 4096)?;
    say(&listener.local_addr()?)?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poller, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    epoll::add(&poller, std::io::stdin(), EventData::new_u64(STDIN), EventFlags::IN)?;
    let mut server = Server { poller, connections: Vec::new(), free: Vec::new(), buffer: vec![0; CHUNK] };
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        epoll::wait(&server.poller, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            match event.data.u64() {
                LISTENER => server.accept(&listener)?,
                STDIN => match told::<String>()? {
                    Some(_) => say(&(server.connections.len() - server.free.len()))?,
                    None => return Ok(()),
                },
                token => server.serve(token as usize)?,
            }
        }
    }
}

struct Server {
    poller: OwnedFd,
    connections: Vec<Option<Connection>>,
    /// Which of the connections are none.
    free: Vec<usize>,
    buffer: Vec<u8>,
}

struct Connection {
    stream: TcpStream,
    purpose: Purpose,
}

enum Purpose {
    Unknown,
    Flow,
    /// These bytes are still to be sent.
    Echo(Vec<u8>),
    /// So many bytes of the request have come.
    Answer(usize),
}

/// What becomes of a connection.
enum Fate {
    Goes(EventFlags),
    Ends,
}

impl Server {
    fn accept(&mut self, listener: &TcpListener) -> anyhow::Result<()> {
        while let Ok((stream, _)) = listener.accept() {
            let token = self.free.pop().unwrap_or(self.connections.len());
            epoll::add(&self.poller, &stream, EventData::new_u64(token as u64), EventFlags::IN)?;
            let connection = Some(Connection { stream, purpose: Purpose::Unknown });
            match self.connections.get_mut(token) {
                Some(free) => *free = connection,
                None => self.connections.push(connection),
            }
        }
        Ok(())
    }

    fn serve(&mut self, token: usize) -> anyhow::Result<()> {
        let Some(connection) = &mut self.connections[token] else { return Ok(()) };
        let before = connection.interest();
        match connection.turn(&mut self.buffer) {
            Ok(Fate::Goes(interest)) => {
                if interest != before {
                    let data = EventData::new_u64(token as u64);
                    epoll::modify(&self.poller, &connection.stream, data, interest)?;
                }
            }
            // What the proxies do to a connection is seen at its other end.
            Ok(Fate::Ends) | Err(_) => {
                self.connections[token] = None;
                self.free.push(token);
            }
        }
        Ok(())
    }
}

impl Connection {
    fn interest(&self) -> EventFlags {
        match &self.purpose {
            Purpose::Flow => EventFlags::OUT,
            Purpose::Echo(left) if !left.is_empty() => EventFlags::OUT,
            _ => EventFlags::IN,
        }
    }

    fn turn(&mut self, buffer: &mut [u8]) -> Result<Fate, Errno> {
        if self.interest() == EventFlags::OUT {
            match &mut self.purpose {
                Purpose::Echo(left) => {
                    let sent = send_some(&self.stream, left)?;
                    left.drain(..sent);
                }
                _ => drop(send_some(&self.stream, buffer)?),
            }
            return Ok(Fate::Goes(self.interest()));
        }
        let read = match recv(&self.stream, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(Fate::Ends),
            Ok((_, read)) => read,
            Err(Errno::AGAIN) => return Ok(Fate::Goes(self.interest())),
            Err(error) => return Err(error),
        };
        let mut arrived = &buffer[..read];
        if let Purpose::Unknown = self.purpose {
            self.purpose = match arrived[0] {
                FLOW => Purpose::Flow,
                ECHO => Purpose::Echo(Vec::new()),
                _ => Purpose::Answer(0),
            };
            if arrived[0] == ECHO {
                let _ = self.stream.set_nodelay(true);
                arrived = &arrived[1..];
            }
        }
        match &mut self.purpose {
            Purpose::Echo(left) if !arrived.is_empty() => {
                let sent = send_some(&self.stream, arrived)?;
                left.extend(&arrived[sent..]);
            }
            Purpose::Answer(come) => {
                *come += arrived.len();
                if *come >= REQUEST {
                    send_some(&self.stream, &buffer[..REQUEST])?;
                    return Ok(Fate::Ends);
                }
            }
            _ => {}
        }
        Ok(Fate::Goes(self.interest()))
    }
}

/// Sends as much as there is room for.
pub(crate) fn send_some(stream: &TcpStream, bytes: &[u8]) -> Result<usize, Errno> {
    match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Err(Errno::AGAIN) => Ok(0),
        sent => sent,
    }
}
