//! The other ends of all connections, in a process of their own: it shows that each generation serves, and measures how
//! long connections wait for an answer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::Context;
use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use crate::member::SHARE;
use crate::process::{now, say, told};

/// How many connections are sampled, where there are as many.
const SAMPLED: usize = 100;
/// The token of standard input among those of the connections.
const STDIN: u64 = u64::MAX;

/// What the clients are told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Send a byte on the last connection.
    Send,
    /// Receive the answer to it.
    Receive,
    /// Send, receive and send again on each sampled connection, as fast as the server answers.
    Sample,
    /// End that, and say for each the longest time between two answers, in nanoseconds.
    Stop,
}

/// Connects, to one address after the other, and does what it is told until there is nobody any more.
pub(crate) fn run(count: usize, servers: &[SocketAddr]) -> anyhow::Result<()> {
    let mut connections = Vec::with_capacity(count);
    for number in 0..count {
        let connection = TcpStream::connect(servers[number / SHARE])?;
        connection.set_nodelay(true)?;
        connections.push(connection);
    }
    say(&"connected")?;
    while let Some(task) = told()? {
        let last = connections.last_mut().context("no connection")?;
        match task {
            Task::Send => last.write_all(b".")?,
            Task::Receive => last.read_exact(&mut [0])?,
            Task::Sample => {
                say(&"sampling")?;
                let step = count.div_ceil(SAMPLED);
                // The last one is not answered at every time.
                let sampled: Vec<&TcpStream> = connections[..count - 1].iter().step_by(step).collect();
                say(&sample(&sampled)?)?;
                continue;
            }
            Task::Stop => {}
        }
        say(&"done")?;
    }
    Ok(())
}

/// Has every connection wait for an answer at every instant, until the next task comes.
fn sample(connections: &[&TcpStream]) -> anyhow::Result<Vec<u64>> {
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let stdin = std::io::stdin();
    epoll::add(&poller, &stdin, epoll::EventData::new_u64(STDIN), epoll::EventFlags::IN)?;
    for (&connection, token) in connections.iter().zip(0..) {
        epoll::add(&poller, connection, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
    }
    let mut samples = vec![Sample { answered: now(), longest: 0 }; connections.len()];
    for mut connection in connections.iter().copied() {
        connection.write_all(b"?")?;
    }
    let mut events = Vec::with_capacity(SAMPLED + 1);
    let mut sampling = true;
    while sampling {
        events.clear();
        epoll::wait(&poller, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let token = event.data.u64();
            if token == STDIN {
                let _: Option<Task> = told()?;
                sampling = false;
                continue;
            }
            let mut connection = connections[token as usize];
            connection.read_exact(&mut [0])?;
            samples[token as usize].answer();
            connection.write_all(b"?")?;
        }
    }
    // Each has one answer to come, perhaps the one that has waited longest.
    for (mut connection, sample) in connections.iter().copied().zip(&mut samples) {
        connection.read_exact(&mut [0])?;
        sample.answer();
    }
    Ok(samples.iter().map(|sample| sample.longest).collect())
}

#[derive(Clone)]
struct Sample {
    answered: u64,
    longest: u64,
}

impl Sample {
    fn answer(&mut self) {
        let now = now();
        self.longest = self.longest.max(now - self.answered);
        self.answered = now;
    }
}
