//! How long messages wait for their answers, sampled so often that no pause can hide between two of them, and so seldom that they
//! do not wait for each other; in a process of its own.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::bail;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};

use crate::process::{now, say, told};
use crate::proxy::backend::send_some;
use crate::proxy::load::{connect, exchange};

/// At most so many connections are sampled.
const SAMPLED: usize = 100;
/// Between two messages, each on the next connection that waits for no answer.
const EVERY: Duration = Duration::from_micros(100);
/// The length of a message.
const MESSAGE: usize = 64;

const STDIN: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What is sampled when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Task {
    Begin,
    /// Say the longest time that one has waited since, in nanoseconds.
    End,
}

/// Connects, and does what it is told until there is nobody any more.
pub(crate) fn run(to: SocketAddr, count: usize) -> anyhow::Result<()> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let connection = connect(to)?;
        exchange(&connection)?;
        connections.push(connection);
    }
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poller, std::io::stdin(), EventData::new_u64(STDIN), EventFlags::IN)?;
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    epoll::add(&poller, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
    // They are spread over all: a proxy may treat the first ones otherwise than the last.
    let sampled: Vec<&TcpStream> = connections.iter().step_by(count.div_ceil(SAMPLED)).collect();
    for (token, connection) in sampled.iter().enumerate() {
        epoll::add(&poller, connection, EventData::new_u64(token as u64), EventFlags::IN)?;
    }
    say(&"connected")?;
    let mut sent: Vec<Option<u64>> = vec![None; sampled.len()];
    let (mut next, mut longest, mut sampling) = (0, 0, false);
    let mut events = Vec::with_capacity(SAMPLED);
    let message = [b'm'; MESSAGE];
    let mut buffer = [0; 2 * MESSAGE];
    loop {
        if !sampling && longest > 0 && sent.iter().all(Option::is_none) {
            say(&longest)?;
            longest = 0;
        }
        events.clear();
        epoll::wait(&poller, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            match event.data.u64() {
                STDIN => {
                    let every = match told()? {
                        Some(Task::Begin) => EVERY,
                        Some(Task::End) => Duration::ZERO,
                        None => return Ok(()),
                    };
                    sampling = every > Duration::ZERO;
                    let every = Timespec::try_from(every)?;
                    let times = Itimerspec { it_interval: every, it_value: every };
                    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
                }
                TIMER => {
                    // A late one is not made up for.
                    let _ = rustix::io::read(&timer, &mut [0; 8]);
                    if sent[next].is_none() {
                        sent[next] = Some(now());
                        send_some(sampled[next], &message)?;
                    }
                    next = (next + 1) % sampled.len();
                }
                token => match recv(sampled[token as usize], &mut buffer, RecvFlags::DONTWAIT) {
                    Ok((_, MESSAGE)) => {
                        let waited = sent[token as usize].take().map_or(0, |sent| now() - sent);
                        longest = longest.max(waited);
                    }
                    Err(Errno::AGAIN) => {}
                    Ok((_, read)) => bail!("{read} bytes came for a message of {MESSAGE}"),
                    Err(error) => return Err(error.into()),
                },
            }
        }
    }
}
