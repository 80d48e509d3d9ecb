//! What an operator may want to set: who may ask, how much is accepted, how long is waited.

use crate::limits::Limits;
use crate::notify;
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
    /// Which upgrades begin with a preflight.
    pub preflights: Preflights,
    /// Whether the incumbent can be replaced by a process outside of its unit.
    pub outsiders: Outsiders,
    /// Whether this process, as a successor, takes over although it is such an outsider. The incumbent's supervisor may then start
    /// another process, which may in turn take over from this one.
    pub force: bool,
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

/// Which upgrades begin with a preflight. A dry run is one, and there is always one before there is no way back: in place.
///
/// ```
/// use heirloom::{Config, Preflights};
///
/// let config = Config { preflights: Preflights::InPlace, ..Config::default() };
/// assert_ne!(config.preflights, Preflights::default());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preflights {
    /// All of them.
    #[default]
    All,
    /// Not those beside, which begin with the takeover: the new program is started once instead of twice. It is for a program whose
    /// takeover finds out whatever its preflight would, before [`Offered::ready`](crate::Offered::ready), and tells the
    /// incumbent: by [`Successor::withdraw`](crate::Successor::withdraw) of a wrong configuration.
    InPlace,
}

/// Whether a process that does not belong to the incumbent's unit may take over.
///
/// The unit is what systemd calls so: the control group whose name ends in `.service` or `.scope`, with all below it. An
/// incumbent that is in none (in a container, without systemd) admits everybody whatever is set here.
///
/// ```
/// use heirloom::{Config, config::Outsiders};
///
/// // A program that is never restarted when it is replaced, whoever has started it.
/// let config = Config { outsiders: Outsiders::Admit, ..Config::default() };
/// assert_ne!(config.outsiders, Outsiders::ByEnvironment);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outsiders {
    /// Refused by an incumbent that has a supervisor: one in whose environment NOTIFY_SOCKET is set and not empty.
    #[default]
    ByEnvironment,
    /// Refused.
    Refuse,
    /// Admitted.
    Admit,
}

impl Outsiders {
    /// Whether they are refused here.
    pub(crate) fn are_refused(self) -> bool {
        match self {
            Outsiders::ByEnvironment => notify::is_supervised(),
            Outsiders::Refuse => true,
            Outsiders::Admit => false,
        }
    }
}
