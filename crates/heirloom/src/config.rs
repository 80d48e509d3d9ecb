//! What an operator may want to set: who may ask, how much is accepted, how long is waited.

use crate::limits::Limits;
use crate::peer::PeerPolicy;
use crate::protocol::{Fencing, Times};

/// The settings of either side; the defaults suit most programs.
///
/// ```
/// use heirloom::Config;
/// use std::time::Duration;
///
/// let mut config = Config::default();
/// config.times.ready = Duration::from_secs(120);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Which users' and groups' processes may ask anything at the control socket.
    pub peers: PeerPolicy,
    /// What is accepted from the other side at most.
    pub limits: Limits,
    /// How long each side waits for the other.
    pub times: Times,
    /// What the incumbent does about an aborted successor that keeps the service lock. By default it is killed.
    pub fencing: Fencing,
    /// Which requests the application answers itself.
    pub delegate: Delegate,
}

/// Requests that are otherwise answered by the library, and that an application takes itself, as
/// [`Turn::Delegated`](crate::Turn::Delegated).
///
/// ```
/// use heirloom::Config;
/// use heirloom::config::Delegate;
///
/// // A supervisor: an upgrade is of what it supervises.
/// let config = Config { delegate: Delegate { upgrade: true, status: true }, ..Config::default() };
/// assert_ne!(config.delegate, Delegate::default());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delegate {
    /// [`Request::Upgrade`](crate::control::Request::Upgrade).
    pub upgrade: bool,
    /// [`Request::Status`](crate::control::Request::Status).
    pub status: bool,
}
