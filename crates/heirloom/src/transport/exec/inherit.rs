//! The new program's side: find what was left open, and serve.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use heirloom_sys::{SignalMask, adopt};
use serde::de::DeserializeOwned;

use super::record::{Record, SECTION};
use crate::bundle::{Bundle, BundleError};
use crate::clock;
use crate::config::Config;
use crate::control::status::LastTakeover;
use crate::crash::{self, Point};
use crate::incumbent::Standby;
use crate::item::ItemId;
use crate::lock::{LockError, LockFile, lock_path};
use crate::manifest::{Base, ManifestError, read_sealed};
use crate::peer::Peer;
use crate::service::Service;
use crate::transport::socket::Taken;
use crate::upgrade::Role;

/// Why a program that took its predecessor's place cannot serve. Nobody else does either.
///
/// ```
/// use heirloom::transport::exec::InPlaceError;
///
/// let error = InPlaceError::Descriptor { what: "item 7".into(), source: std::io::ErrorKind::NotFound.into() };
/// assert!(error.to_string().contains("item 7"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InPlaceError {
    /// The manifest cannot be read.
    #[error(
        "took the incumbent's place, but cannot read its manifest, so that its connections are lost: {0}"
    )]
    Manifest(#[from] ManifestError),
    /// What was left open is not there.
    #[error("took the incumbent's place, but {what} was not left open: {source}")]
    Descriptor {
        /// What is missing.
        what: String,
        /// What the system says.
        source: io::Error,
    },
    /// What was left open is not what the manifest says.
    #[error("took the incumbent's place, but cannot use what it left open: {0}")]
    Bundle(#[from] BundleError),
    /// The service lock is not ours.
    #[error("took the incumbent's place, but does not hold its lock: {0}")]
    Lock(#[from] LockError),
    /// A system call failed.
    #[error("took the incumbent's place, but cannot serve: {0}")]
    Io(#[from] io::Error),
}

/// Everything that the program which this process was before has left, if it was one. In any case the signals that waited
/// are delivered by the end of this.
pub(crate) fn inherit<A: DeserializeOwned>(
    path: &Path,
    service: &Service,
    config: &Config,
) -> Result<Option<Taken<A>>, InPlaceError> {
    let Some(Role::InPlace { manifest, .. }) = Role::of_this_process() else { return Ok(None) };
    // Not open, or opened here: then everything was taken before, and the variable is only left over.
    let Ok(manifest) = adopt(manifest) else { return Ok(None) };
    crash::reach(Point::ManifestAdopted);
    let bytes = read_sealed(&manifest, config.limits.manifest_bytes)?;
    let base = Base::decode(&bytes, &config.limits)?;
    base.check_sections(&[SECTION])?;
    let record = base.sections.iter().find(|section| section.name == SECTION);
    let record = record.map(Record::from_section).transpose()?.unwrap_or_default();
    let taken = take(base, bytes.len(), &record, path, service, config);
    SignalMask(record.signal_mask).set()?;
    taken.map(Some)
}

fn take<A: DeserializeOwned>(
    base: Base,
    bytes: usize,
    record: &Record,
    path: &Path,
    service: &Service,
    config: &Config,
) -> Result<Taken<A>, InPlaceError> {
    let adopted = |what: &dyn Fn() -> String, number| {
        adopt(number).map_err(|source| InPlaceError::Descriptor { what: what(), source })
    };
    let lock = adopted(&|| "the service lock".into(), record.lock)?;
    let lock = LockFile::adopt(lock_path(path), lock)?.try_lock().map_err(|(_, error)| error)?;
    crash::reach(Point::LockAdopted);
    let descriptors = record
        .descriptors
        .iter()
        .map(|&(id, number)| Ok((ItemId(id), adopted(&|| format!("item {id}"), number)?)))
        .collect::<Result<BTreeMap<_, _>, InPlaceError>>()?;
    let items = descriptors.len() as u64;
    let mut bundle = Bundle::from_parts(base, descriptors)?;
    crash::reach(Point::BundleMade);
    let listener = bundle.take_id::<UnixListener>(ItemId::CONTROL)?.descriptor;
    let now_ns = clock::monotonic_ns();
    let pause = Duration::from_nanos(now_ns.saturating_sub(record.frozen_at_ns));
    let last = LastTakeover {
        outcome: "taken".into(),
        reason: None,
        peer_pid: Some(std::process::id()),
        items,
        bytes: bytes as u64,
        pause_us: Some(pause.as_micros() as u64),
        total_us: now_ns.saturating_sub(record.began_at_ns) / 1000,
        at_unix_ms: clock::unix_ms(),
    };
    let service_record = bundle.service().succeeded();
    let standby = Standby::new(&listener, path, service.clone(), config.clone())?;
    let incumbent = standby.serve(listener, lock, service_record, Some(last))?;
    let (ours, _) = UnixStream::pair()?;
    crash::reach(Point::ServingInPlace);
    Ok(Taken { bundle, incumbent, from: Peer::of(&ours)?, pause })
}
