//! The load of the steady state: streams, short connections, small messages and idle connections, in a process of its own.
//!
//! It never waits for a proxy while another of its connections could go on, discards what streams bring without copying it
//! (`MSG_TRUNC`), and warms up before it counts.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde::{Deserialize, Serialize};

use crate::process::{now, say, told};
use crate::proxy::backend::{ANSWER, ECHO, FLOW, REQUEST, send_some};
use crate::proxy::herd::stay_on;

/// The length of a small message.
const MESSAGE: usize = 64;
/// How much a stream's bytes are discarded at once, at most.
const DISCARD: usize = 4 * 1024 * 1024;
/// No connection and no answer takes longer, unless it never comes.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the load is to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) kind: Kind,
    /// The proxy, or the server itself.
    pub(crate) to: SocketAddr,
    /// So many connections at a time.
    pub(crate) connections: usize,
    pub(crate) warm_up: Duration,
    pub(crate) lasting: Duration,
}

/// What is done with the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Receive a stream on each.
    Streams,
    /// Connect, ask, receive the answer until it ends, close, and again.
    Requests,
    /// Send a small message on each, receive it back, and again.
    Messages,
    /// Send one small message on each, receive it back, and hold them until told to go on. Nothing is measured.
    Hold,
}

/// What came of it. It is said after `"begun"`, which is said when the measured time begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Bytes, requests or messages.
    pub(crate) amount: u64,
    pub(crate) nanoseconds: u64,
    /// Of messages: the times from sending to the answer, in nanoseconds: half are shorter than the first, 99 % than the
    /// second, 99.9 % than the third.
    pub(crate) latencies: [u64; 3],
}

/// Does what it is told until there is nobody any more.
pub(crate) fn run(cpu: Option<usize>) -> anyhow::Result<()> {
    stay_on(cpu)?;
    while let Some(task) = told::<Task>()? {
        let mut load = Load::begin(&task)?;
        let done = match task.kind {
            Kind::Streams => load.streams()?,
            Kind::Requests => load.requests()?,
            Kind::Messages => load.messages()?,
            Kind::Hold => {
                load.hold()?;
                continue;
            }
        };
        say(&done)?;
    }
    Ok(())
}

struct Load {
    to: SocketAddr,
    connections: Vec<TcpStream>,
    poller: OwnedFd,
    events: Vec<Event>,
    window: Window,
}

/// The time that is measured.
struct Window {
    begins: u64,
    lasting: u64,
    /// When it began indeed, once it has.
    began: Option<u64>,
}

impl Window {
    /// Looks at the time: whether it is over, and after how long.
    fn over(&mut self) -> anyhow::Result<Option<u64>> {
        let elapsed = now().saturating_sub(self.began.unwrap_or(self.begins));
        if self.began.is_some() {
            return Ok((elapsed >= self.lasting).then_some(elapsed));
        }
        if elapsed > 0 {
            say(&"begun")?;
            self.began = Some(now());
        }
        Ok(None)
    }
}

impl Load {
    fn begin(task: &Task) -> anyhow::Result<Load> {
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut connections = Vec::with_capacity(task.connections);
        for token in 0..task.connections as u64 {
            let connection = connect(task.to)?;
            epoll::add(&poller, &connection, EventData::new_u64(token), EventFlags::IN)?;
            connections.push(connection);
        }
        let begins = now() + task.warm_up.as_nanos() as u64;
        let window = Window { begins, lasting: task.lasting.as_nanos() as u64, began: None };
        Ok(Load { to: task.to, connections, poller, events: Vec::with_capacity(256), window })
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        self.events.clear();
        let timeout = rustix::event::Timespec::try_from(PATIENCE)?;
        if epoll::wait(&self.poller, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout))? == 0 {
            bail!("nothing has arrived for {PATIENCE:?}");
        }
        Ok(())
    }

    fn streams(&mut self) -> anyhow::Result<Done> {
        for connection in &self.connections {
            send_some(connection, &[FLOW])?;
        }
        let mut buffer = vec![0; DISCARD];
        let mut amount = 0;
        loop {
            self.wait()?;
            for event in &self.events {
                let connection = &self.connections[event.data.u64() as usize];
                match recv(connection, &mut *buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                    Ok((_, 0)) => bail!("a stream has ended"),
                    Ok((_, read)) => amount += read as u64,
                    Err(Errno::AGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let begun = self.window.began.is_some();
            if let Some(nanoseconds) = self.window.over()? {
                return Ok(Done { amount, nanoseconds, latencies: [0; 3] });
            }
            if !begun && self.window.began.is_some() {
                amount = 0;
            }
        }
    }

    fn requests(&mut self) -> anyhow::Result<Done> {
        let request = [ANSWER; REQUEST];
        let mut received = vec![0; self.connections.len()];
        for connection in &self.connections {
            send_some(connection, &request)?;
        }
        let mut buffer = [0; 2 * REQUEST];
        let mut amount = 0;
        loop {
            self.wait()?;
            for event in &self.events {
                let token = event.data.u64() as usize;
                let connection = &mut self.connections[token];
                match recv(&*connection, &mut buffer, RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => {
                        if received[token] != REQUEST {
                            bail!("{} bytes came for an answer", received[token]);
                        }
                        received[token] = 0;
                        amount += u64::from(self.window.began.is_some());
                        *connection = connect(self.to)?;
                        send_some(connection, &request)?;
                        epoll::add(&self.poller, &*connection, event.data, EventFlags::IN)?;
                    }
                    Ok((_, read)) => received[token] += read,
                    Err(Errno::AGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if let Some(nanoseconds) = self.window.over()? {
                return Ok(Done { amount, nanoseconds, latencies: [0; 3] });
            }
        }
    }

    fn messages(&mut self) -> anyhow::Result<Done> {
        let message = [b'm'; MESSAGE];
        let mut sent = vec![0; self.connections.len()];
        let mut received = vec![0; self.connections.len()];
        let mut latencies: Vec<u32> = Vec::with_capacity(1 << 20);
        for (connection, sent) in self.connections.iter().zip(&mut sent) {
            connection.set_nodelay(true)?;
            send_some(connection, &[ECHO])?;
            *sent = now();
            send_some(connection, &message)?;
        }
        let mut buffer = [0; 2 * MESSAGE];
        loop {
            self.wait()?;
            for event in &self.events {
                let token = event.data.u64() as usize;
                let connection = &self.connections[token];
                match recv(connection, &mut buffer, RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => bail!("a connection has ended"),
                    Ok((_, read)) => received[token] += read,
                    Err(Errno::AGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
                if received[token] == MESSAGE {
                    let now = now();
                    if self.window.began.is_some() {
                        latencies.push(u32::try_from(now - sent[token]).unwrap_or(u32::MAX));
                    }
                    received[token] = 0;
                    sent[token] = now;
                    send_some(connection, &message)?;
                }
            }
            if let Some(nanoseconds) = self.window.over()? {
                latencies.sort_unstable();
                let amount = latencies.len() as u64;
                let below = |per_mille: usize| {
                    latencies.get(latencies.len() * per_mille / 1000).copied().unwrap_or(0).into()
                };
                return Ok(Done { amount, nanoseconds, latencies: [below(500), below(990), below(999)] });
            }
        }
    }

    fn hold(&self) -> anyhow::Result<()> {
        for connection in &self.connections {
            exchange(connection)?;
        }
        say(&"held")?;
        let _: Option<String> = told()?;
        Ok(())
    }
}

/// A connection, which must come about at once.
pub(crate) fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))
}

/// Makes an echoing connection of it, and sees one message come back.
pub(crate) fn exchange(mut connection: &TcpStream) -> anyhow::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.write_all(&[ECHO])?;
    see_echo(connection)
}

/// Sees a message come back on an echoing connection.
pub(crate) fn see_echo(mut connection: &TcpStream) -> anyhow::Result<()> {
    let mut message = [b'm'; MESSAGE];
    connection.write_all(&message)?;
    message.fill(0);
    connection.read_exact(&mut message).context("a message does not come back")?;
    if message != [b'm'; MESSAGE] {
        bail!("a message has come back changed");
    }
    Ok(())
}
