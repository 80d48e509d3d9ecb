//! Hello: who may take over, checked before anything is offered.

use std::time::Instant;

use rustix::event::epoll;

use super::connection::ConnectionId;
use super::{CHANNEL, Incumbent, SUCCESSOR};
use crate::channel::Channel;
use crate::clock;
use crate::control::request::{Failure, FailureCode, Hello, Reply, VersionRange, Welcome};
use crate::control::status::LastTakeover;
use crate::crash::{self, Point};
use crate::peer::Peer;
use crate::protocol::{self, Step};
use crate::service::{Service, named};
use crate::transport::socket::takeover::Takeover;
use crate::unit::Outsider;

/// Descriptors that a successor needs beside the items: manifests, channel, epoll, lock and some air.
const SPARE_DESCRIPTORS: u64 = 16;

impl<A> Incumbent<A> {
    /// Checks a Hello, and starts the takeover that it asks for.
    pub(super) fn hello(&mut self, now: Instant, id: ConnectionId, hello: Hello) {
        let admitted = self.identify(id).and_then(|peer| {
            let protocol = self.admit(&hello, &peer)?;
            let outsider = Outsider::find(&peer, self.config.outsiders);
            if let Some(outsider) = outsider.as_ref().filter(|_| !hello.force) {
                return Err(Failure { code: FailureCode::Outsider, message: outsider.to_string() });
            }
            self.admit_in_upgrade(&peer, now)?;
            let (channel, other) = Channel::pair().map_err(failed)?;
            let token = |token| epoll::EventData::new_u64(token);
            epoll::add(&self.epoll, &channel, token(CHANNEL), epoll::EventFlags::IN).map_err(failed)?;
            if let Some(pidfd) = peer.pidfd() {
                epoll::add(&self.epoll, pidfd, token(SUCCESSOR), epoll::EventFlags::IN).map_err(failed)?;
            }
            Ok((protocol, peer, outsider.is_some(), channel, other))
        });
        match admitted {
            Ok((protocol, peer, outsider, channel, other)) => {
                tracing::info!(
                    successor = %peer,
                    peer_pid = peer.pid,
                    generation = self.record.generation,
                    program = hello.program,
                    version = hello.version,
                    outsider,
                    "takeover begins"
                );
                crash::reach(Point::HelloAdmitted);
                let welcome = Reply::Takeover(Welcome {
                    protocol,
                    generation: self.record.generation,
                    pid: std::process::id(),
                    program: self.service.program.clone(),
                    version: self.service.version.clone(),
                    schema: self.service.writes,
                    items: self.item_count() + 1,
                    outsider,
                });
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.send(welcome.to_line(), vec![other]);
                }
                let machine = protocol::Incumbent::new(now, self.config.times).fencing(self.config.fencing);
                let look = self.config.times.look;
                let takeover = Takeover::new(machine, channel, peer, outsider, hello, look);
                self.takeover = Some(Box::new(takeover));
            }
            Err(refusal) => {
                let peer = self.connections.get(&id).map(|connection| &connection.peer);
                tracing::warn!(
                    successor = peer.map(tracing::field::display),
                    peer_pid = peer.and_then(|peer| peer.pid),
                    generation = self.record.generation,
                    step = %Step::Hello,
                    reason = refusal.message,
                    "takeover refused"
                );
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

    /// Why the process on this connection may not take over by its place, if so.
    pub(super) fn refuse_outsider(&self, id: ConnectionId) -> Result<(), Failure> {
        let connection = self.connections.get(&id).ok_or_else(|| failed("the connection has ended"))?;
        match Outsider::find(&connection.peer, self.config.outsiders) {
            Some(outsider) => Err(Failure { code: FailureCode::Outsider, message: outsider.to_string() }),
            None => Ok(()),
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
        let protocol = agree(protocol::VERSIONS, &self.service, hello)?;
        let needed = self.item_count() + 1 + SPARE_DESCRIPTORS;
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

/// The version of the conversation, where the incumbent speaks `ours`; or why there is none, or no state that the successor
/// could read.
fn agree(ours: VersionRange, service: &Service, hello: &Hello) -> Result<u32, Failure> {
    let incumbent = named("the incumbent", &service.program, &service.version);
    let successor = named("the successor", &hello.program, &hello.version);
    let Some(protocol) = ours.meet(hello.protocol) else {
        let message = format!(
            "{incumbent} speaks takeover protocol {ours}, {successor} {}; go by a version that speaks both",
            hello.protocol
        );
        return Err(Failure { code: FailureCode::Protocol, message });
    };
    if !hello.schema.contains(service.writes) {
        let message = format!(
            "{incumbent} writes state of schema {}, {successor} reads {}; go by a version that reads both",
            service.writes, hello.schema
        );
        return Err(Failure { code: FailureCode::Schema, message });
    }
    Ok(protocol)
}

fn failed(error: impl ToString) -> Failure {
    let message = format!("it cannot begin a takeover, and serves on: {}", error.to_string());
    Failure { code: FailureCode::Failed, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(protocol: VersionRange, schema: VersionRange) -> Hello {
        Hello {
            protocol,
            service: "test".into(),
            program: "next".into(),
            version: "2.1".into(),
            pid: 1,
            schema,
            room: 100,
            generation: None,
            force: false,
        }
    }

    fn agreed(ours: VersionRange, theirs: VersionRange) -> Result<u32, Failure> {
        let service = Service::new("test").program("prog", "1.9");
        agree(ours, &service, &hello(theirs, VersionRange::new(1, 1)))
    }

    #[test]
    fn the_newest_version_that_both_speak_whoever_is_older() {
        let range = VersionRange::new;
        for (ours, theirs, agreed_on) in [
            (range(1, 1), range(1, 3), 1),
            (range(1, 3), range(1, 1), 1),
            (range(1, 4), range(2, 3), 3),
            (range(2, 3), range(1, 4), 3),
            (range(2, 5), range(5, 9), 5),
        ] {
            assert_eq!(agreed(ours, theirs).map_err(|failure| failure.message), Ok(agreed_on));
        }
        // An empty range has nothing in common with anything.
        for (ours, theirs) in
            [(range(1, 1), range(2, 3)), (range(2, 3), range(1, 1)), (range(1, 3), range(3, 1))]
        {
            let failure = agreed(ours, theirs).expect_err("nothing in common");
            assert_eq!(failure.code, FailureCode::Protocol);
            for part in ["prog 1.9", "next 2.1", &ours.to_string(), &theirs.to_string()] {
                assert!(failure.message.contains(part), "{part:?} is not in: {failure}");
            }
        }
    }

    #[test]
    fn a_schema_is_read_or_refused_with_both_sides() {
        let service = Service::new("test").program("prog", "1.9").schema(4, 2..=4);
        let asked = |min, max| {
            agree(protocol::VERSIONS, &service, &hello(protocol::VERSIONS, VersionRange::new(min, max)))
        };
        assert!(asked(4, 4).is_ok() && asked(1, 9).is_ok());
        for (min, max) in [(1, 3), (5, 6), (9, 1)] {
            let failure = asked(min, max).expect_err("it cannot read it");
            assert_eq!(failure.code, FailureCode::Schema);
            for part in ["prog 1.9", "schema 4", "next 2.1", &format!("{min}..={max}")] {
                assert!(failure.message.contains(part), "{part:?} is not in: {failure}");
            }
        }
    }
}
