//! The signals that a serving command listens to: SIGTERM and SIGINT ask it to stop, SIGUSR2 to upgrade, and SIGHUP one of the two.
//!
//! A handler only makes a descriptor readable, so that signals are one more thing to poll for. They are to be watched
//! before `heirloom::start`: a program that is upgraded in place gets then what came in between.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use anyhow::Context;
use heirloom_sys::SignalMask;
use rustix::net::{RecvFlags, recv};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::low_level::pipe;

/// The signals of this process, from [`Signals::watch`] on.
pub(crate) struct Signals {
    stop: UnixStream,
    upgrade: UnixStream,
}

/// What SIGHUP means: that the terminal has gone, or, to a server with a configuration, that this has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hangup {
    Stop,
    Upgrade,
}

impl Signals {
    /// Begins to watch.
    pub(crate) fn watch(hangup: Hangup) -> anyhow::Result<Signals> {
        let (stop, upgrade): (&[i32], &[i32]) = match hangup {
            Hangup::Stop => (&[SIGTERM, SIGINT, SIGHUP], &[SIGUSR2]),
            Hangup::Upgrade => (&[SIGTERM, SIGINT], &[SIGUSR2, SIGHUP]),
        };
        let signals =
            || -> io::Result<Signals> { Ok(Signals { stop: watch(stop)?, upgrade: watch(upgrade)? }) };
        undisturbed(signals).context("cannot watch for signals")
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

/// Sets handlers up. signal-hook has a handler before it knows what that is to do: whoever comes in between would not be heard, and
/// comes afterwards instead. No other thread may get signals by then.
pub(crate) fn undisturbed<T>(set_up: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mask = SignalMask::block_all()?;
    let set = set_up();
    mask.set()?;
    set
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
    use signal_hook::consts::SIGUSR1;

    use super::*;

    #[test]
    fn several_signals_are_one_request_and_each_kind_has_its_own() {
        let signals = Signals::watch(Hangup::Stop).unwrap();
        assert!(!signals.take_stop() && !signals.take_upgrade());
        signal_hook::low_level::raise(SIGUSR2).unwrap();
        signal_hook::low_level::raise(SIGUSR2).unwrap();
        assert!(signals.take_upgrade() && !signals.take_upgrade() && !signals.take_stop());
        assert!(!signals.stop_waits());
        signal_hook::low_level::raise(SIGHUP).unwrap();
        assert!(signals.stop_waits());
        assert!(signals.take_stop() && !signals.take_stop() && !signals.take_upgrade());
    }

    #[test]
    fn whoever_comes_while_handlers_are_set_up_is_heard_afterwards() {
        let heard = undisturbed(|| {
            signal_hook::low_level::raise(SIGUSR1)?;
            let heard = watch(&[SIGUSR1])?;
            assert!(!take(&heard));
            Ok(heard)
        });
        assert!(take(&heard.unwrap()));
    }
}
