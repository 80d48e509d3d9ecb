//! The floor of a takeover: the system calls that it cannot do without, in the same order and number, and nothing else. No
//! checks, no time limits, nobody watched, blocking calls.
//!
//! A connect; a SEQPACKET pair whose one end is passed; a sealed memfd, the listener and the connection passed ahead;
//! the connection registered with an epoll; a second sealed memfd in the freeze; eight packets; the lock released and
//! taken.

use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use heirloom::descriptors::{Received, Wait, receive_with, send_with};
use rustix::event::epoll;
use rustix::fs::{FlockOperation, MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::takeover::{Round, monotonic_ns, say};

/// About the size of the library's manifests here.
const MANIFEST: [u8; 300] = [7; 300];

/// The first incumbent of the floor's chain.
pub(crate) fn first(control: &Path, server: &str) -> anyhow::Result<()> {
    let listener = UnixListener::bind(control)?;
    let server = TcpStream::connect(server)?;
    let lock = lock_file(control)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    say("serving")?;
    serve(&listener, &server, &lock)
}

/// A successor of the floor's chain.
pub(crate) fn successor(control: &Path) -> anyhow::Result<()> {
    let begun = Instant::now();
    let asking = UnixStream::connect(control)?;
    send(&asking, b"hello", &[])?;
    let channel = receive(&asking)?.descriptors.pop().context("no channel came")?;
    let lock = lock_file(control)?;
    let base = receive(&channel)?;
    read_manifest(&base.descriptors)?;
    let mut lent = receive(&channel)?.descriptors;
    send(&channel, b"credit", &[])?;
    receive(&channel)?;
    let server: TcpStream = lent.pop().context("no connection came")?.into();
    let listener: UnixListener = lent.pop().context("no listener came")?.into();
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &poller,
        &server,
        epoll::EventData::new_u64(1),
        epoll::EventFlags::IN | epoll::EventFlags::ET,
    )?;
    send(&channel, b"ready", &[])?;
    let mut bytes = [0; 64];
    let delta = receive_with(&channel, &mut bytes, Wait::Block)?;
    read_manifest(&delta.descriptors)?;
    let frozen_at = u64::from_le_bytes(bytes[..8].try_into()?);
    send(&channel, b"accept", &[])?;
    receive(&channel)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    send(&channel, b"taken", &[])?;
    let whole = begun.elapsed();
    (&server).read_exact(&mut [0])?;
    let round = Round { pause: monotonic_ns() - frozen_at, whole: whole.as_nanos() as u64 };
    say(&serde_json::to_string(&round)?)?;
    serve(&listener, &server, &lock)
}

fn serve(listener: &UnixListener, server: &TcpStream, lock: &OwnedFd) -> anyhow::Result<()> {
    let (asking, _) = listener.accept()?;
    receive(&asking)?;
    let (channel, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    send(&asking, b"welcome", &[theirs.as_fd()])?;
    drop(theirs);
    send(&channel, b"offer", &[sealed()?.as_fd()])?;
    send(&channel, b"batch", &[listener.as_fd(), server.as_fd()])?;
    send(&channel, b"offered", &[])?;
    receive(&channel)?;
    receive(&channel)?;
    let frozen_at = monotonic_ns();
    send(&channel, &frozen_at.to_le_bytes(), &[sealed()?.as_fd()])?;
    receive(&channel)?;
    rustix::fs::flock(lock, FlockOperation::Unlock)?;
    send(&channel, b"released", &[])?;
    receive(&channel)?;
    Ok(())
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

fn receive(socket: impl AsFd) -> anyhow::Result<Received> {
    let received = receive_with(socket, &mut [0; 64], Wait::Block)?;
    if received.bytes == 0 {
        bail!("the other process of the measurement has ended");
    }
    Ok(received)
}
