//! The floor of a takeover: the system calls that it cannot do without, in the same order, and nothing else. No checks, no
//! time limits, nobody watched, blocking calls.
//!
//! Ahead of the freeze: a connect to a path; a request, and as its answer one end of a SEQPACKET pair; a memfd written,
//! sealed, passed and read; the listener and the connections passed, 252 a packet; each connection registered with an
//! epoll. In the freeze: a second memfd, an answer, the lock released, a packet, the lock taken, a packet. One packet
//! for each that the library sends: Offer, Batch, Credit, Offered, Ready, Freeze, Accept, Released, Taken.

use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, bail};
use heirloom::descriptors::{Received, Wait, receive_with, send_with};
use rustix::event::epoll;
use rustix::fs::{FlockOperation, MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::chain::{Came, Left, connections, now, say};

/// About the size of the library's manifests for one connection.
const MANIFEST: [u8; 300] = [7; 300];
/// Descriptors a packet, as many as the library sends.
const BATCH: usize = 252;

/// The first incumbent of the floor's chain.
pub(crate) fn first(control: &Path, count: usize) -> anyhow::Result<()> {
    let listener = UnixListener::bind(control)?;
    let lock = lock_file(control)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    let connections = connections(count)?.into_iter().map(OwnedFd::from).collect::<Vec<_>>();
    say(&"serving")?;
    serve(&listener, &connections, &lock)
}

/// A successor of the floor's chain.
pub(crate) fn successor(control: &Path) -> anyhow::Result<()> {
    let began = now();
    let asking = UnixStream::connect(control)?;
    send(&asking, b"hello", &[])?;
    let channel = receive(&asking)?.0.descriptors.pop().context("no channel came")?;
    let lock = lock_file(control)?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    read_manifest(&receive(&channel)?.0.descriptors)?;
    let mut lent = Vec::new();
    loop {
        let batch = receive(&channel)?.0.descriptors;
        if batch.is_empty() {
            break;
        }
        lent.extend(batch);
        send(&channel, b"credit", &[])?;
    }
    let listener: UnixListener = lent.remove(0).into();
    for (connection, token) in lent.iter().zip(0..) {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&poller, connection, epoll::EventData::new_u64(token), flags)?;
    }
    let registered = now();
    send(&channel, b"ready", &[])?;
    read_manifest(&receive(&channel)?.0.descriptors)?;
    send(&channel, b"accept", &[])?;
    receive(&channel)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    send(&channel, b"taken", &[])?;
    let serving = now();
    let mut connection: TcpStream = lent.pop().context("no connection came")?.into();
    connection.read_exact(&mut [0])?;
    let read = now();
    lent.push(connection.into());
    say(&Came { began, registered, serving, read })?;
    serve(&listener, &lent, &lock)
}

fn serve(listener: &UnixListener, connections: &[OwnedFd], lock: &OwnedFd) -> anyhow::Result<()> {
    let (asking, _) = listener.accept()?;
    receive(&asking)?;
    let (channel, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    send(&asking, b"welcome", &[theirs.as_fd()])?;
    drop(theirs);
    send(&channel, b"offer", &[sealed()?.as_fd()])?;
    let lent: Vec<BorrowedFd<'_>> =
        std::iter::once(listener.as_fd()).chain(connections.iter().map(AsFd::as_fd)).collect();
    for batch in lent.chunks(BATCH) {
        send(&channel, b"batch", batch)?;
    }
    send(&channel, b"offered", &[])?;
    while receive(&channel)?.1 != b"ready" {}
    let frozen = now();
    send(&channel, b"freeze", &[sealed()?.as_fd()])?;
    receive(&channel)?;
    rustix::fs::flock(lock, FlockOperation::Unlock)?;
    send(&channel, b"released", &[])?;
    receive(&channel)?;
    say(&Left { frozen })
}

fn lock_file(control: &Path) -> anyhow::Result<OwnedFd> {
    let path = control.with_extension("lock");
    Ok(std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?.into())
}

fn sealed() -> anyhow::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(
        "floor",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL,
    )?;
    rustix::io::pwrite(&memfd, &MANIFEST, 0)?;
    rustix::fs::fcntl_add_seals(
        &memfd,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    Ok(memfd)
}

fn read_manifest(descriptors: &[OwnedFd]) -> anyhow::Result<()> {
    let memfd = descriptors.first().context("no manifest came")?;
    rustix::fs::fcntl_get_seals(memfd)?;
    rustix::fs::fstat(memfd)?;
    let read = rustix::io::pread(memfd, &mut [0; MANIFEST.len()], 0)?;
    if read != MANIFEST.len() {
        bail!("a manifest of {read} bytes");
    }
    Ok(())
}

fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    send_with(socket, bytes, descriptors, Wait::Block)?;
    Ok(())
}

fn receive(socket: impl AsFd) -> anyhow::Result<(Received, Vec<u8>)> {
    let mut bytes = [0; 64];
    let received = receive_with(socket, &mut bytes, Wait::Block)?;
    if received.bytes == 0 {
        bail!("the other process of the measurement has ended");
    }
    let bytes = bytes[..received.bytes].to_vec();
    Ok((received, bytes))
}
