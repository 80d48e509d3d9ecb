//! What can be got ready ahead of serving, so that the pause of a takeover is short.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::event::epoll;
use serde::de::DeserializeOwned;

use super::{FIRST_CONNECTION, Incumbent, LISTENER};
use crate::clock;
use crate::config::Config;
use crate::control::request::Request;
use crate::control::status::LastTakeover;
use crate::lock::{Holding, ServiceLock};
use crate::manifest::ServiceRecord;
use crate::service::Service;
use crate::upgrade::Launch;

/// What an incumbent needs beside the lock and the listener, had ready before either is its own: of what is shared it
/// changes nothing.
#[derive(Debug)]
pub(crate) struct Standby {
    epoll: OwnedFd,
    launch: Launch,
    path: PathBuf,
    service: Service,
    config: Config,
}

impl Standby {
    /// Gets it ready for this listener, which is only watched.
    pub(crate) fn new(
        listener: impl AsFd,
        path: &Path,
        service: Service,
        config: Config,
    ) -> io::Result<Standby> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        Ok(Standby { epoll, launch: Launch::current(), path: path.into(), service, config })
    }

    /// Serves, with the listener that it was made for.
    pub(crate) fn serve<A: DeserializeOwned>(
        self,
        listener: UnixListener,
        lock: ServiceLock,
        record: ServiceRecord,
        last_takeover: Option<LastTakeover>,
    ) -> io::Result<Incumbent<A>> {
        let Standby { epoll, launch, path, service, config } = self;
        // Whoever had it before may have left it blocking; from here on it is ours to change.
        listener.set_nonblocking(true)?;
        Ok(Incumbent {
            epoll,
            listener,
            path,
            lock: Holding::Held(lock),
            record: ServiceRecord {
                name: service.name.clone(),
                program: service.program.clone(),
                version: service.version.clone(),
                schema: service.writes,
                ..record
            },
            service,
            config,
            serving_since_ms: clock::unix_ms(),
            items: Vec::new(),
            unlisted: None,
            connections: BTreeMap::new(),
            next_connection: FIRST_CONNECTION,
            takeover: None,
            launch,
            upgrade: None,
            inspectors: Vec::new(),
            last_takeover,
            ended: None,
            notices: VecDeque::new(),
            replied: Vec::new(),
            listen_again: None,
            parse: Request::<A>::parse,
            again: false,
        })
    }
}
