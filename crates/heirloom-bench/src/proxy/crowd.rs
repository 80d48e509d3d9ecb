//! Very many connections across handovers, in a process of their own: some echo without a pause and check every byte, the others
//! are idle and must stay.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde::{Deserialize, Serialize};

use crate::process::{say, told};
use crate::proxy::backend::send_some;
use crate::proxy::load::{connect, exchange, see_echo};

/// The longest message.
const LONGEST: usize = 4096;
/// After so many bytes a connection's bytes come again: a prime, so that no message is like the one before.
const PERIOD: usize = 65_521;
/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(5);
const STDIN: u64 = u64::MAX;

/// What the crowd is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Task {
    /// End an idle connection, open another one for it, and say whether it works.
    Renew,
    /// Wait for the answers that are due, see whether the idle ones work, and say what became of them all.
    End,
}

/// What became of the connections.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Fates {
    /// Connections that were ended, or had nothing more to say.
    pub(crate) dropped: u64,
    /// Bytes that were not what had been sent, or that nobody had sent.
    pub(crate) wrong: u64,
    /// Bytes that came back as they should.
    pub(crate) echoed: u64,
}

/// Connects, echoes, and does what it is told until there is nobody any more.
pub(crate) fn run(to: SocketAddr, count: usize, echoing: usize) -> anyhow::Result<()> {
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut crowd =
        Crowd { to, members: Vec::new(), poller, bytes: bytes(), fates: Fates::default(), ending: false };
    for number in 0..count {
        // Those that echo are among the others, not before them.
        let echoes = number * echoing / count != (number + 1) * echoing / count;
        let member = crowd.member(number, echoes)?;
        crowd.members.push(Some(member));
    }
    epoll::add(&crowd.poller, std::io::stdin(), EventData::new_u64(STDIN), EventFlags::IN)?;
    say(&"established")?;
    for number in 0..count {
        crowd.send(number);
    }
    crowd.go_on()
}

struct Crowd {
    to: SocketAddr,
    members: Vec<Option<Member>>,
    poller: OwnedFd,
    bytes: Vec<u8>,
    fates: Fates,
    ending: bool,
}

struct Member {
    connection: TcpStream,
    /// Of one that echoes.
    progress: Option<Progress>,
}

/// Positions in what a connection sends.
#[derive(Default)]
struct Progress {
    sent: usize,
    received: usize,
}

impl Crowd {
    fn member(&self, number: usize, echoes: bool) -> anyhow::Result<Member> {
        let connection = connect(self.to)?;
        exchange(&connection)?;
        epoll::add(&self.poller, &connection, EventData::new_u64(number as u64), EventFlags::IN)?;
        Ok(Member { connection, progress: echoes.then(Progress::default) })
    }

    fn go_on(mut self) -> anyhow::Result<()> {
        let mut events = Vec::with_capacity(1024);
        let mut buffer = vec![0; 2 * LONGEST];
        let mut next = 0;
        loop {
            events.clear();
            epoll::wait(&self.poller, rustix::buffer::spare_capacity(&mut events), None)?;
            for event in &events {
                match event.data.u64() {
                    STDIN => match told()? {
                        Some(Task::Renew) => say(&self.renew(&mut next))?,
                        Some(Task::End) => return self.end(&mut buffer),
                        None => return Ok(()),
                    },
                    number => self.hear(number as usize, &mut buffer),
                }
            }
        }
    }

    /// Something has happened to a connection.
    fn hear(&mut self, number: usize, buffer: &mut [u8]) {
        let Some(member) = &mut self.members[number] else { return };
        let read = match recv(&member.connection, &mut *buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => return,
            Ok((_, read)) if read > 0 => read,
            // It has ended, or was reset.
            _ => {
                self.members[number] = None;
                self.fates.dropped += 1;
                return;
            }
        };
        let Some(Progress { sent, received }) = &mut member.progress else {
            self.fates.wrong += read as u64;
            return;
        };
        let due = read.min(*sent - *received);
        let expected = &self.bytes[at(number, *received)..][..due];
        let right = buffer.iter().zip(expected).filter(|(one, other)| one == other).count();
        self.fates.echoed += right as u64;
        self.fates.wrong += (read - right) as u64;
        *received += due;
        if sent == received && !self.ending {
            self.send(number);
        }
    }

    /// Sends the next message on a connection that echoes.
    fn send(&mut self, number: usize) {
        let Some(Member { connection, progress: Some(Progress { sent, .. }) }) = &mut self.members[number]
        else {
            return;
        };
        // Their lengths are all over the place.
        let length = 1 + (number * 31 + *sent * 7919) % LONGEST;
        let Ok(some) = send_some(connection, &self.bytes[at(number, *sent)..][..length]) else {
            // It is heard of.
            return;
        };
        *sent += some;
    }

    /// Ends the next idle connection for a new one: whether that works.
    fn renew(&mut self, next: &mut usize) -> bool {
        for _ in 0..self.members.len() {
            let number = *next % self.members.len();
            *next += 1;
            if self.members[number].as_ref().is_some_and(|member| member.progress.is_none()) {
                self.members[number] = self.member(number, false).ok();
                return self.members[number].is_some();
            }
        }
        false
    }

    fn end(mut self, buffer: &mut [u8]) -> anyhow::Result<()> {
        self.ending = true;
        let give_up = Instant::now() + PATIENCE;
        for number in 0..self.members.len() {
            while let Some(Member { connection, progress: Some(Progress { sent, received }) }) =
                &self.members[number]
                && sent != received
            {
                let left = give_up.saturating_duration_since(Instant::now());
                let left = rustix::event::Timespec::try_from(left)?;
                let mut readable = [rustix::event::PollFd::new(connection, rustix::event::PollFlags::IN)];
                if rustix::event::poll(&mut readable, Some(&left))? == 0 {
                    self.fates.dropped += 1;
                    self.members[number] = None;
                } else {
                    self.hear(number, buffer);
                }
            }
        }
        for member in self.members.iter().flatten() {
            if see_echo(&member.connection).is_err() {
                self.fates.dropped += 1;
            }
        }
        say(&self.fates)
    }
}

/// Where in the bytes a connection's message begins.
fn at(number: usize, position: usize) -> usize {
    (number * 7919 + position) % PERIOD
}

/// What connections send: a period of bytes without a pattern, and again as many as the longest message has.
fn bytes() -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 24) as u8
    })
    .take(PERIOD)
    .collect();
    bytes.extend_from_within(..LONGEST);
    bytes
}
