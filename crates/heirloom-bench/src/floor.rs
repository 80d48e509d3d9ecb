//! The floor of a takeover: the system calls that it cannot do without, in the same order, and nothing else. No checks, no
//! time limits, nobody watched, blocking calls.
//!
//! Ahead of the freeze: a connect to a path; a request, and as its answer one end of a SEQPACKET pair; a memfd of as many
//! bytes as the library's manifest has, written, sealed, passed and read; the listener and the connections passed, 252 a
//! packet, the connections served between two packets; each connection registered with an epoll as it arrives. In the freeze: a
//! second memfd, an answer, the lock released, a packet, the lock taken, a packet. One packet for each that the library
//! sends, but no credit: a full queue makes the sender wait.
//!
//! The other ways differ in how the descriptors are passed, and in nothing else.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use heirloom::descriptors::{Received, Wait, receive_with, send_with};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{FlockOperation, MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::Timespec;

use crate::echo::echo;
use crate::member::{Came, connections, leave};
use crate::process::{now, say};
use crate::way::Way;

/// Bytes of a manifest without items, and for each item beside its state: about what the library's have.
const MANIFEST: usize = 200;
const ITEM: usize = 20;
/// Descriptors a packet, as many as the library sends.
const BATCH: usize = 252;
/// Connections at a time, where each descriptor has one.
const AT_A_TIME: usize = 64;

/// The tokens of what is no connection.
const LISTENER: u64 = u64::MAX - 1;
const CHANNEL: u64 = u64::MAX;

struct Server {
    way: Way,
    poller: OwnedFd,
    listener: UnixListener,
    lock: OwnedFd,
    connections: Vec<OwnedFd>,
    state_bytes: usize,
    /// Where a descriptor's own connection goes.
    beside: PathBuf,
}

/// The first incumbent of the chain.
pub(crate) fn first(way: Way, control: &Path, count: usize, state_bytes: usize) -> anyhow::Result<()> {
    let listener = UnixListener::bind(control)?;
    let lock = lock_file(control)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let connections: Vec<OwnedFd> = connections(count)?.into_iter().map(OwnedFd::from).collect();
    register(&poller, &connections, 0)?;
    epoll::add(&poller, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    say(&"serving")?;
    Server { way, poller, listener, lock, connections, state_bytes, beside: beside(control) }.serve()
}

/// A successor of the chain.
pub(crate) fn successor(way: Way, control: &Path, state_bytes: usize) -> anyhow::Result<()> {
    let own = match way {
        Way::OneAConnection => Some(UnixListener::bind(beside(control))?),
        _ => None,
    };
    let began = now();
    let asking = UnixStream::connect(control)?;
    send(&asking, b"hello", &[])?;
    let mut channels = receive(&asking)?.descriptors;
    let (stream, channel) =
        (channels.pop().context("no stream came")?, channels.pop().context("no channel came")?);
    let lock = lock_file(control)?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    read_manifest(&receive(&channel)?.descriptors)?;
    // The listener comes first, and is registered when it is ours.
    let (mut listener, mut lent) = (None, Vec::new());
    loop {
        let mut arrived = match (way, &own) {
            (_, Some(own)) => receive_one(own)?,
            (Way::OneAMessage, _) => receive(&stream)?.descriptors,
            _ => receive(&channel)?.descriptors,
        };
        if arrived.is_empty() {
            break;
        }
        if listener.is_none() {
            listener = Some(UnixListener::from(arrived.remove(0)));
        }
        register(&poller, &arrived, lent.len() as u64)?;
        lent.extend(arrived);
    }
    let listener = listener.context("no listener came")?;
    let registered = now();
    send(&channel, b"ready", &[])?;
    read_manifest(&receive(&channel)?.descriptors)?;
    let complete = now();
    send(&channel, b"accept", &[])?;
    receive(&channel)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    send(&channel, b"taken", &[])?;
    let taken = now();
    epoll::add(&poller, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    let events = wait(&poller, None)?;
    let polled = now();
    for token in events.into_iter().filter(|&token| token != LISTENER) {
        echo(lent[token as usize].as_fd())?;
    }
    if own.is_some() {
        std::fs::remove_file(beside(control))?;
    }
    say(&Came { began, registered, checked: registered, complete, taken, polled })?;
    Server { way, poller, listener, lock, connections: lent, state_bytes, beside: beside(control) }.serve()
}

impl Server {
    fn serve(self) -> anyhow::Result<()> {
        while !self.turn(None)?.contains(&LISTENER) {}
        self.hand_over()
    }

    /// Answers the clients that ask; the tokens of all that has happened.
    fn turn(&self, timeout: Option<&Timespec>) -> anyhow::Result<Vec<u64>> {
        let events = wait(&self.poller, timeout)?;
        // What is sent on the last connection is for the successor's first poll to find.
        let last = self.connections.len() as u64 - 1;
        for &token in events.iter().filter(|&&token| token < last) {
            echo(self.connections[token as usize].as_fd())?;
        }
        Ok(events)
    }

    fn hand_over(self) -> anyhow::Result<()> {
        let (asking, _) = self.listener.accept()?;
        receive(&asking)?;
        let pair = |kind| rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
        let (channel, theirs) = pair(SocketType::SEQPACKET)?;
        let (stream, their_stream) = pair(SocketType::STREAM)?;
        send(&asking, b"welcome", &[theirs.as_fd(), their_stream.as_fd()])?;
        drop((theirs, their_stream));
        let count = self.connections.len();
        send(&channel, b"offer", &[sealed(MANIFEST + count * (ITEM + self.state_bytes))?.as_fd()])?;
        let lent: Vec<BorrowedFd<'_>> =
            std::iter::once(self.listener.as_fd()).chain(self.connections.iter().map(AsFd::as_fd)).collect();
        for batch in lent.chunks(BATCH) {
            match self.way {
                Way::OneAMessage => batch.iter().try_for_each(|&one| send(&stream, b"one", &[one]))?,
                Way::OneAConnection => send_each(&self.beside, batch)?,
                _ => send(&channel, b"batch", batch)?,
            }
            self.turn(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        }
        match self.way {
            Way::OneAMessage => send(&stream, b"end", &[])?,
            Way::OneAConnection => send(UnixStream::connect(&self.beside)?, b"end", &[])?,
            _ => send(&channel, b"offered", &[])?,
        }
        epoll::add(&self.poller, &channel, EventData::new_u64(CHANNEL), EventFlags::IN)?;
        while !self.turn(None)?.contains(&CHANNEL) {}
        let frozen = now();
        receive(&channel)?;
        send(&channel, b"freeze", &[sealed(MANIFEST)?.as_fd()])?;
        receive(&channel)?;
        rustix::fs::flock(&self.lock, FlockOperation::Unlock)?;
        send(&channel, b"released", &[])?;
        receive(&channel)?;
        leave(frozen)
    }
}

/// Passes each descriptor on a connection of its own, and waits until all are acknowledged.
fn send_each(to: &Path, descriptors: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    for some in descriptors.chunks(AT_A_TIME) {
        let sent = some.iter().map(|&one| {
            let connection = UnixStream::connect(to)?;
            send(&connection, b"one", &[one])?;
            Ok(connection)
        });
        let sent: Vec<UnixStream> = sent.collect::<anyhow::Result<_>>()?;
        sent.iter().try_for_each(|connection| receive(connection).map(drop))?;
    }
    Ok(())
}

/// The descriptor that came on the next connection; none at the end.
fn receive_one(listener: &UnixListener) -> anyhow::Result<Vec<OwnedFd>> {
    let (connection, _) = listener.accept()?;
    let descriptors = receive(&connection)?.descriptors;
    if !descriptors.is_empty() {
        send(&connection, b"ack", &[])?;
    }
    Ok(descriptors)
}

fn beside(control: &Path) -> PathBuf {
    control.with_extension("each")
}

fn lock_file(control: &Path) -> anyhow::Result<OwnedFd> {
    let path = control.with_extension("lock");
    Ok(std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?.into())
}

/// As mio registers for reading.
fn register(poller: &OwnedFd, connections: &[OwnedFd], first: u64) -> anyhow::Result<()> {
    for (connection, token) in connections.iter().zip(first..) {
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(poller, connection, EventData::new_u64(token), flags)?;
    }
    Ok(())
}

fn wait(poller: &OwnedFd, timeout: Option<&Timespec>) -> anyhow::Result<Vec<u64>> {
    let mut events = Vec::with_capacity(1024);
    epoll::wait(poller, rustix::buffer::spare_capacity(&mut events), timeout)?;
    Ok(events.iter().map(|event| event.data.u64()).collect())
}

fn sealed(bytes: usize) -> anyhow::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(
        "floor",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL,
    )?;
    rustix::io::pwrite(&memfd, &vec![7; bytes], 0)?;
    rustix::fs::fcntl_add_seals(
        &memfd,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    Ok(memfd)
}

fn read_manifest(descriptors: &[OwnedFd]) -> anyhow::Result<()> {
    let memfd = descriptors.first().context("no manifest came")?;
    rustix::fs::fcntl_get_seals(memfd)?;
    let bytes = rustix::fs::fstat(memfd)?.st_size as usize;
    let mut manifest = Vec::with_capacity(bytes);
    let read = rustix::io::pread(memfd, rustix::buffer::spare_capacity(&mut manifest), 0)?;
    if read != bytes {
        bail!("{read} of {bytes} bytes of a manifest");
    }
    Ok(())
}

fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    send_with(socket, bytes, descriptors, Wait::Block)?;
    Ok(())
}

fn receive(socket: impl AsFd) -> anyhow::Result<Received> {
    let received = receive_with(socket, &mut [0; 64], Wait::Block)?;
    if received.bytes == 0 {
        bail!("the other process of the measurement has ended");
    }
    Ok(received)
}
