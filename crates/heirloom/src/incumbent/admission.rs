//! Hello: who may take over, checked before anything is offered.

use std::time::Instant;

use rustix::event::epoll;

use super::connection::ConnectionId;
use super::{CHANNEL, Incumbent, SUCCESSOR};
use crate::channel::Channel;
use crate::clock;
use crate::control::request::{Failure, FailureCode, Hello, Reply, VersionRange, Welcome};
use crate::control::status::LastTakeover;
use crate::peer::Peer;
use crate::protocol;
use crate::transport::socket::takeover::Takeover;

/// Descriptors that a successor needs beside the items: manifests, channel, epoll, lock and some air.
const SPARE_DESCRIPTORS: u64 = 16;

impl<A> Incumbent<A> {
    /// Checks a Hello, and starts the takeover that it asks for.
    pub(super) fn hello(&mut self, now: Instant, id: ConnectionId, hello: Hello) {
        // A takeover that has been given up, and only not been read so yet, keeps nobody out.
        if let Some(takeover) = &mut self.takeover {
            takeover.receive_all(now);
            self.run_takeover(now);
            if self.is_over() {
                return;
            }
        }
        let admitted = self.identify(id).and_then(|peer| {
            let protocol = self.admit(&hello, &peer)?;
            self.admit_in_upgrade(&peer, now)?;
            let (channel, other) = Channel::pair().map_err(failed)?;
            let token = |token| epoll::EventData::new_u64(token);
            epoll::add(&self.epoll, &channel, token(CHANNEL), epoll::EventFlags::IN).map_err(failed)?;
            if let Some(pidfd) = peer.pidfd() {
                epoll::add(&self.epoll, pidfd, token(SUCCESSOR), epoll::EventFlags::IN).map_err(failed)?;
            }
            Ok((protocol, peer, channel, other))
        });
        match admitted {
            Ok((protocol, peer, channel, other)) => {
                tracing::info!(successor = %peer, program = hello.program, version = hello.version, "takeover begins");
                let welcome = Reply::Takeover(Welcome {
                    protocol,
                    generation: self.record.generation,
                    pid: std::process::id(),
                    program: self.service.program.clone(),
                    version: self.service.version.clone(),
                    schema: self.service.writes,
                    items: self.items.len() as u64 + 1,
                });
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.send(welcome.to_line(), vec![other]);
                }
                let machine = protocol::Incumbent::new(now, self.config.times);
                self.takeover = Some(Box::new(Takeover::new(machine, channel, peer, hello)));
            }
            Err(refusal) => {
                tracing::warn!(pid = hello.pid, reason = refusal.message, "takeover refused");
                if refusal.code != FailureCode::Busy {
                    self.last_takeover = Some(LastTakeover {
                        outcome: "refused".into(),
                        reason: Some(refusal.message.clone()),
                        peer_pid: Some(hello.pid),
                        items: 0,
                        bytes: 0,
                        pause_us: None,
                        total_us: 0,
                        at_unix_ms: clock::unix_ms(),
                    });
                }
                self.successor_refused(id, &refusal.message);
                self.reply(id, Reply::Error(refusal).to_line());
            }
        }
    }

    fn identify(&self, id: ConnectionId) -> Result<Peer, Failure> {
        let connection = self.connections.get(&id).ok_or_else(|| failed("the connection has ended"))?;
        Peer::of(connection).map_err(failed)
    }

    fn admit(&self, hello: &Hello, successor: &Peer) -> Result<u32, Failure> {
        if let Some(running) = &self.takeover {
            return Err(Failure {
                code: FailureCode::Busy,
                message: format!(
                    "a takeover by {} is going on; try again when it has ended",
                    running.successor
                ),
            });
        }
        if std::process::id() == 1 && successor.pid.is_some() {
            return Err(Failure {
                code: FailureCode::Failed,
                message: "the incumbent is PID 1 of its pid namespace, whose end would be the successor's too; upgrade it in place (heirloom upgrade)".into(),
            });
        }
        if hello.service != self.service.name {
            return Err(Failure {
                code: FailureCode::WrongService,
                message: format!(
                    "this process serves `{}`, the successor is for `{}`; give it another control path or name",
                    self.service.name, hello.service
                ),
            });
        }
        let ours: VersionRange = protocol::VERSIONS;
        let Some(protocol) = ours.meet(hello.protocol) else {
            return Err(Failure {
                code: FailureCode::Protocol,
                message: format!(
                    "the incumbent ({} {}) speaks takeover protocol {ours}, the successor ({} {}) {}; go by a version that speaks both",
                    self.service.program, self.service.version, hello.program, hello.version, hello.protocol
                ),
            });
        };
        if !hello.schema.contains(self.service.writes) {
            return Err(Failure {
                code: FailureCode::Schema,
                message: format!(
                    "the incumbent ({} {}) writes state of schema {}, the successor ({} {}) reads {}",
                    self.service.program,
                    self.service.version,
                    self.service.writes,
                    hello.program,
                    hello.version,
                    hello.schema
                ),
            });
        }
        let needed = self.items.len() as u64 + 1 + SPARE_DESCRIPTORS;
        if hello.room < needed {
            return Err(Failure {
                code: FailureCode::Room,
                message: format!(
                    "the successor has room for {} descriptors, {needed} are needed; raise its limit (ulimit -n, LimitNOFILE=)",
                    hello.room
                ),
            });
        }
        Ok(protocol)
    }
}

fn failed(error: impl ToString) -> Failure {
    let message = format!("it cannot begin a takeover, and serves on: {}", error.to_string());
    Failure { code: FailureCode::Failed, message }
}
