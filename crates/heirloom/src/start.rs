//! How a process comes to serve: nobody is there and it starts fresh, or somebody is and it takes over.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::channel::{Channel, ChannelError};
use crate::clock;
use crate::config::Config;
use crate::control::client::{Client, ClientError};
use crate::control::path::{PathError, bind, prepare_directory};
use crate::control::request::{Failure, Hello, NoRequests, Reply, Request, VersionRange, Welcome};
use crate::crash::{self, Point};
use crate::descriptors;
use crate::incumbent::{Incumbent, Standby};
use crate::lock::{LockError, LockFile, ServiceLock, lock_path};
use crate::manifest::ServiceRecord;
use crate::notify;
use crate::peer::{Peer, Refused};
use crate::protocol::{self, ToIncumbent};
use crate::service::{Service, named};
use crate::transport::OlderIncumbent;
use crate::transport::exec::{self, InPlaceError};
use crate::transport::socket::{Successor, Taken};
use crate::upgrade::{Preflight, PreflightError, Role};

/// How long a start waits for another process that is just starting, ending or being replaced.
const PATIENCE: Duration = Duration::from_secs(3);
/// The pause between two looks at a path where somebody is starting or ending.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Whether an incumbent is to be replaced.
///
/// ```
/// assert_eq!(heirloom::Replace::default(), heirloom::Replace::Try);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replace {
    /// Start fresh; somebody there is an error.
    Never,
    /// Take over if somebody is there, start fresh if not.
    #[default]
    Try,
    /// Take over; nobody there is an error.
    Must,
}

/// What a start has led to.
///
/// ```
/// use heirloom::{NoRequests, Start};
///
/// fn say(start: &Start<NoRequests>) -> &'static str {
///     match start {
///         Start::Fresh(_) => "serving",
///         Start::Successor(_) => "an incumbent hands over",
///         Start::Older(_) => "an incumbent of protocol 0 hands over",
///         Start::InPlace(_) => "serving, as another program before",
///         Start::Preflight(_) => "only asked whether it could",
///     }
/// }
/// ```
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in the life of a process")]
pub enum Start<A = NoRequests> {
    /// Nobody was there: this process serves now.
    Fresh(Incumbent<A>),
    /// An incumbent has admitted this process.
    Successor(Successor),
    /// An incumbent that speaks protocol 0.
    Older(OlderIncumbent),
    /// This process served already, as another program, and was upgraded in place: it serves now.
    InPlace(Box<Taken<A>>),
    /// The incumbent asks whether this program could take over: answer, and exit.
    Preflight(Preflight),
}

/// Why a process neither serves nor may take over.
///
/// ```
/// use heirloom::{Config, NoRequests, Replace, Service, StartError, start};
///
/// let path = std::env::temp_dir().join("no such directory").join("x").join("echo.sock");
/// let started = start::<NoRequests>(&path, Service::new("echo"), Config::default(), Replace::Must);
/// assert!(matches!(started, Err(StartError::Path(_))));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// [`Replace::Must`], and nobody is there.
    #[error("nobody answers at {}, so there is nothing to take over; start without requiring a takeover", .0.display())]
    Nobody(PathBuf),
    /// An upgrade has started this process, and the incumbent has died. What it leaves is for the process that its supervisor
    /// starts.
    #[error(
        "the incumbent at {} has died; its supervisor starts the next process, with everything that is stored, and this one, which was to be its successor, ends",
        .0.display()
    )]
    Orphaned(PathBuf),
    /// [`Replace::Never`], and somebody is there.
    #[error("a process already serves at {}; let this one take over, or give it another path", .0.display())]
    AlreadyServed(PathBuf),
    /// The incumbent refused, and serves on.
    #[error("the incumbent refused: {}", .0.message)]
    Refused(Failure),
    /// The process at the control socket is not one that this process may trust.
    #[error("the incumbent is not trusted: {0}")]
    Untrusted(Refused),
    /// Another process holds the service lock, but does not answer.
    #[error(
        "a process holds {} but does not answer at the control socket; it may be stopped or starting: look who it is (fuser), end it or try again",
        .0.display()
    )]
    LockHeld(PathBuf),
    /// The incumbent answered with something that is no answer.
    #[error("the process at {} answers a takeover with nonsense ({what}); it may not be an incumbent; choose another path", path.display())]
    Nonsense {
        /// The control socket's path.
        path: PathBuf,
        /// What it said.
        what: String,
    },
    /// The incumbent goes on in a version that was not offered to it. It serves on.
    #[error("{incumbent} {does} {theirs}, {successor} {reads} {ours}; go by a version that suits both")]
    Version {
        /// The incumbent, with the program's name and version as it says.
        incumbent: String,
        /// What it does in that version.
        does: &'static str,
        /// The version.
        theirs: u32,
        /// This process, with the program's name and version.
        successor: String,
        /// What it does in its versions.
        reads: &'static str,
        /// Its versions.
        ours: VersionRange,
    },
    /// The path cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The lock file cannot be used.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The conversation at the control socket failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The channel that came with the welcome cannot be used.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// An incumbent asked whether this program could take over, and it could not.
    #[error("this program cannot take over: {0}")]
    Preflight(#[from] PreflightError),
    /// This process was upgraded in place, and cannot go on.
    #[error(transparent)]
    InPlace(#[from] InPlaceError),
    /// A system call failed.
    #[error("cannot start serving: {0}")]
    Io(#[from] io::Error),
}

/// Finds out whether somebody serves at this control path: starts fresh if not, asks to take over if so.
///
/// A process that was started by an upgrade learns so here, and `replace` does not count: one that an incumbent has
/// started takes over, whatever its arguments say of that. Signal handlers are best installed before: in an upgrade in
/// place, signals that came meanwhile are delivered by the end of this.
///
/// At most one process ever comes out of this as `Fresh`, however many start at once: the service lock (the control
/// path with `.lock` appended) is taken before the control socket is bound.
///
/// # Errors
///
/// See [`StartError`]. In every case an incumbent that was there still serves.
pub fn start<A: DeserializeOwned>(
    path: &Path,
    service: Service,
    config: Config,
    replace: Replace,
) -> Result<Start<A>, StartError> {
    if let Some(taken) = exec::inherit(path, &service, &config)? {
        return Ok(Start::InPlace(Box::new(taken)));
    }
    if let Some(preflight) = Preflight::of_this_process(path, &service, &config)? {
        return Ok(Start::Preflight(preflight));
    }
    let is_successor = matches!(Role::of_this_process(), Some(Role::Successor { .. }));
    let replace = if is_successor { Replace::Must } else { replace };
    prepare_directory(path)?;
    let patience = Instant::now() + PATIENCE;
    loop {
        match Client::connect(path) {
            Ok(_) if replace == Replace::Never => return Err(StartError::AlreadyServed(path.into())),
            Ok(client) => match ask(client, path, &service, &config)? {
                Some(start) => return Ok(start),
                // It ended before it answered: it was just being replaced, or quit.
                None if Instant::now() < patience => {}
                None => return Err(ClientError::Closed { path: path.into() }.into()),
            },
            Err(ClientError::Nobody { .. }) if is_successor && notify::is_supervised() => {
                return Err(StartError::Orphaned(path.into()));
            }
            Err(ClientError::Nobody { .. }) if replace == Replace::Must => {
                return Err(StartError::Nobody(path.into()));
            }
            Err(ClientError::Nobody { .. }) => {
                if let Some(incumbent) = start_fresh(path, &service, &config)? {
                    return Ok(Start::Fresh(incumbent));
                }
                if Instant::now() >= patience {
                    return Err(StartError::LockHeld(lock_path(path)));
                }
            }
            Err(error) => return Err(error.into()),
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Takes the lock and binds the control socket, unless somebody else is about to.
fn start_fresh<A: DeserializeOwned>(
    path: &Path,
    service: &Service,
    config: &Config,
) -> Result<Option<Incumbent<A>>, StartError> {
    let Ok(lock) = LockFile::open(lock_path(path))?.try_lock() else { return Ok(None) };
    // Somebody may have come and gone since we looked; under the lock the answer stays true.
    if Client::connect(path).is_ok() {
        return Ok(None);
    }
    serve_fresh(path, lock, service, config, ServiceRecord::default()).map(Some)
}

/// Binds the control socket under the lock and serves there.
pub(crate) fn serve_fresh<A: DeserializeOwned>(
    path: &Path,
    lock: ServiceLock,
    service: &Service,
    config: &Config,
    record: ServiceRecord,
) -> Result<Incumbent<A>, StartError> {
    let listener = bind(path, &lock)?;
    let record = ServiceRecord { started_unix_ms: clock::unix_ms(), ..record };
    let standby = Standby::new(&listener, path, service.clone(), config.clone())?;
    Ok(standby.serve(listener, lock, record, None)?)
}

/// Says Hello. `None`: the other ended without an answer.
fn ask<A: DeserializeOwned>(
    mut client: Client,
    path: &Path,
    service: &Service,
    config: &Config,
) -> Result<Option<Start<A>>, StartError> {
    let hello = Hello {
        protocol: protocol::VERSIONS,
        service: service.name.clone(),
        program: service.program.clone(),
        version: service.version.clone(),
        pid: std::process::id(),
        schema: service.reads,
        room: descriptors::room()?,
        generation: None,
        force: config.force,
    };
    client.set_timeout(config.times.offer);
    crash::reach(Point::Connected);
    // An incumbent of protocol 0 ignores the first line and answers the second.
    let sent = client
        .send(&Request::<NoRequests>::Takeover(hello))
        .and_then(|()| client.send(&Request::<NoRequests>::Ping));
    crash::reach(Point::HelloSent);
    let received = match sent {
        // It may have answered all the same, before it closed or while it died.
        Ok(()) | Err(ClientError::Closed { .. }) => client.receive(),
        Err(error) => Err(error),
    };
    let (line, mut descriptors) = match received {
        Ok(answer) => answer,
        Err(ClientError::Closed { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let nonsense = |what: String| StartError::Nonsense { path: path.into(), what };
    match Reply::parse(&line).map_err(|error| nonsense(error.to_string()))? {
        Reply::Takeover(welcome) => {
            let (Some(channel), true) = (descriptors.pop(), descriptors.is_empty()) else {
                return Err(nonsense("its welcome came without a channel".into()));
            };
            admitted(welcome, Channel::adopt(channel)?, path, service, config).map(Some)
        }
        Reply::Pong => {
            Ok(Some(Start::Older(OlderIncumbent::new(client, path, service.clone(), config.clone()))))
        }
        Reply::Error(failure) => Err(StartError::Refused(failure)),
        other => Err(nonsense(format!("{other:?}"))),
    }
}

fn admitted<A: DeserializeOwned>(
    welcome: Welcome,
    channel: Channel,
    path: &Path,
    service: &Service,
    config: &Config,
) -> Result<Start<A>, StartError> {
    crash::reach(Point::WelcomeRead);
    // The incumbent made the channel, so its credentials name it; those of the control socket may name a dead ancestor.
    let incumbent = Peer::of(&channel)?;
    config.peers.check(&incumbent).map_err(StartError::Untrusted)?;
    if let Err(error) = check_versions(&welcome, service) {
        // Rule 7: a channel is not closed without a word. If it cannot be said, the end of the channel has to do.
        let _ = channel.send(&ToIncumbent::abort(&error).to_packet(), &[]);
        return Err(error);
    }
    let lock = LockFile::open(lock_path(path))?;
    Ok(Start::Successor(Successor::new(
        channel,
        incumbent,
        welcome,
        lock,
        path,
        service.clone(),
        config.clone(),
    )))
}

/// An incumbent that has understood our Hello goes on in a version that it offers; another cannot be followed.
fn check_versions(welcome: &Welcome, service: &Service) -> Result<(), StartError> {
    let error = |does, theirs, reads, ours| {
        let incumbent = named("the incumbent", &welcome.program, &welcome.version);
        let successor = named("the successor", &service.program, &service.version);
        Err(StartError::Version { incumbent, does, theirs, successor, reads, ours })
    };
    if !protocol::VERSIONS.contains(welcome.protocol) {
        return error("goes on in takeover protocol", welcome.protocol, "speaks", protocol::VERSIONS);
    }
    if !service.reads.contains(welcome.schema) {
        return error("writes state of schema", welcome.schema, "reads", service.reads);
    }
    Ok(())
}
