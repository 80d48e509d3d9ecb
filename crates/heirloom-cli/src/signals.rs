//! The signals that a serving command listens to: SIGTERM, SIGINT and SIGHUP ask it to stop, SIGUSR2 to upgrade.
//!
//! A handler only makes a descriptor readable, so that signals are one more thing to poll for. They are to be watched
//! before `heirloom::start`: a program that is upgraded in place gets then what came in between.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use anyhow::Context;
use rustix::net::{RecvFlags, recv};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::low_level::pipe;

/// The signals of this process, from [`Signals::watch`] on.
pub(crate) struct Signals {
    stop: UnixStream,
    upgrade: UnixStream,
}

impl Signals {
    /// Begins to watch.
    pub(crate) fn watch() -> anyhow::Result<Signals> {
        let signals = || -> io::Result<Signals> {
            Ok(Signals { stop: watch(&[SIGTERM, SIGINT, SIGHUP])?, upgrade: watch(&[SIGUSR2])? })
        };
        signals().context("cannot watch for signals")
    }

    /// Readable when somebody asks for a stop.
    pub(crate) fn stop(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }

    /// Readable when somebody asks for an upgrade.
    pub(crate) fn upgrade(&self) -> BorrowedFd<'_> {
        self.upgrade.as_fd()
    }

    /// Whether a stop was asked for and not taken yet.
    pub(crate) fn stop_waits(&self) -> bool {
        matches!(recv(&self.stop, &mut [0u8; 1], RecvFlags::DONTWAIT | RecvFlags::PEEK), Ok((_, 1..)))
    }

    /// Whether a stop was asked for since the last time; several requests count as one.
    pub(crate) fn take_stop(&self) -> bool {
        take(&self.stop)
    }

    /// Whether an upgrade was asked for since the last time; several requests count as one.
    pub(crate) fn take_upgrade(&self) -> bool {
        take(&self.upgrade)
    }
}

fn watch(signals: &[i32]) -> io::Result<UnixStream> {
    let (receiver, sender) = UnixStream::pair()?;
    for &signal in signals {
        pipe::register(signal, sender.try_clone()?)?;
    }
    Ok(receiver)
}

fn take(receiver: &UnixStream) -> bool {
    let mut asked = false;
    while matches!(recv(receiver, &mut [0u8; 64], RecvFlags::DONTWAIT), Ok((_, 1..))) {
        asked = true;
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_signals_are_one_request_and_each_kind_has_its_own() {
        let signals = Signals::watch().unwrap();
        assert!(!signals.take_stop() && !signals.take_upgrade());
        signal_hook::low_level::raise(SIGUSR2).unwrap();
        signal_hook::low_level::raise(SIGUSR2).unwrap();
        assert!(signals.take_upgrade() && !signals.take_upgrade() && !signals.take_stop());
        assert!(!signals.stop_waits());
        signal_hook::low_level::raise(SIGHUP).unwrap();
        assert!(signals.stop_waits());
        assert!(signals.take_stop() && !signals.take_stop() && !signals.take_upgrade());
    }
}
