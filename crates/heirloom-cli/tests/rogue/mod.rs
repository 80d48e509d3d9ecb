//! Processes that take part in a takeover and misbehave at a given point of it.
//!
//! They are made of the library's public pieces and run in a real process, this test binary itself, so that they can be
//! killed and stopped. Each test binary that uses them has a test `rogue` that calls [`run`].
#![allow(dead_code, reason = "each test binary uses a part of it")]

mod crowd;
mod incumbent;
mod library;
mod successor;

use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use heirloom::channel::{Channel, Incoming, SendError};
use heirloom::descriptors::{Wait, send_with};
use rustix::event::{PollFd, PollFlags, poll};

use crate::support::{Process, wait_for};

const ROLE: &str = "HEIRLOOM_TEST_ROGUE";
const CONTROL: &str = "HEIRLOOM_TEST_CONTROL";
const SERVER: &str = "HEIRLOOM_TEST_SERVER";
const POINT: &str = "HEIRLOOM_TEST_POINT";
const ACT: &str = "HEIRLOOM_TEST_ACT";

/// How many descriptors a crowded incumbent has.
pub(crate) const CROWD: usize = crowd::DESCRIPTORS;

/// The exit code of a rogue that was told that the takeover is over.
pub(crate) const GAVE_UP: i32 = 5;

/// Which part a rogue plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Speaks the protocol by itself, and misbehaves.
    Successor,
    /// Uses the library as a program does, and pauses.
    LibrarySuccessor,
    /// Speaks the protocol by itself, and misbehaves.
    Incumbent,
    /// Uses the library, behaves well, and has very many descriptors.
    CrowdedIncumbent,
}

impl Role {
    const ALL: [Role; 4] = [Role::Successor, Role::LibrarySuccessor, Role::Incumbent, Role::CrowdedIncumbent];

    fn play(self, rogue: &Rogue) {
        match self {
            Role::Successor => successor::run(rogue),
            Role::LibrarySuccessor => library::run(rogue),
            Role::Incumbent => incumbent::run(rogue),
            Role::CrowdedIncumbent => crowd::run(rogue),
        }
    }
}

/// Where it misbehaves and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plot<'a> {
    pub(crate) role: Role,
    pub(crate) point: &'a str,
    pub(crate) act: &'a str,
}

/// Starts a rogue for the chat with the server at `address`.
pub(crate) fn start(plot: Plot<'_>, control: &Path, address: &str) -> Process {
    Process::start(&mut command(plot, control, address))
}

/// The command that [`start`] starts.
pub(crate) fn command(plot: Plot<'_>, control: &Path, address: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(["rogue", "--exact", "--nocapture", "--test-threads=1"])
        .env(ROLE, format!("{:?}", plot.role))
        .env(CONTROL, control)
        .env(SERVER, address)
        .env(POINT, plot.point)
        .env(ACT, plot.act);
    command
}

/// Waits until the rogue has come to its point and done its act.
pub(crate) fn wait_until_there(rogue: &Process) {
    wait_for(&format!("the rogue at its point; it says {}", rogue.stderr()), || {
        says(rogue).contains("done at")
    });
}

/// What the rogue has to say.
pub(crate) fn says(rogue: &Process) -> String {
    String::from_utf8_lossy(&rogue.stdout()).into_owned()
}

/// Plays the part that the environment gives to this process; none, usually.
pub(crate) fn run() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let variable = |name| std::env::var(name).expect("set by whoever started the rogue");
    let rogue = Rogue {
        control: PathBuf::from(variable(CONTROL)),
        server: variable(SERVER),
        point: variable(POINT),
        act: variable(ACT),
    };
    let known = Role::ALL.into_iter().find(|known| format!("{known:?}") == role);
    known.expect("a role").play(&rogue);
}

struct Rogue {
    control: PathBuf,
    server: String,
    point: String,
    act: String,
}

/// The messages with which a role misbehaves.
struct Acts {
    /// What it says to withdraw.
    abort: Vec<u8>,
    /// A message that is wrong at this point.
    wrong: Vec<u8>,
}

impl Rogue {
    /// Misbehaves if this is the point for it. `channel` is taken to close it.
    fn at(&self, point: &str, channel: &mut Option<Channel>, acts: Acts) {
        if point != self.point {
            return;
        }
        let send = |channel: &Option<Channel>, packet: &[u8], descriptors: &[_]| {
            let channel = channel.as_ref().expect("there is a channel from the welcome on");
            send_with(channel, packet, descriptors, Wait::DontWait).expect("send");
        };
        match self.act.as_str() {
            "pause" => {}
            "close" => drop(channel.take()),
            "withdraw" => {
                send(channel, &acts.abort, &[]);
                self.done();
                // The process ends without a word, as a program would that has said all it has to.
                std::process::exit(GAVE_UP);
            }
            "garbage" => send(channel, b"\xffgarbage", &[]),
            "wrong" => send(channel, &acts.wrong, &[]),
            "descriptor" => {
                let null = std::fs::File::open("/dev/null").expect("open");
                send(channel, &acts.wrong, &[null.as_fd()]);
            }
            "long" => send(channel, &[0; 40_000], &[]),
            act => panic!("unknown act {act}"),
        }
        self.done();
        self.pause();
    }

    /// Does nothing but wait, if this is the point for it.
    fn pause_at(&self, point: &str) {
        if point == self.point {
            self.done();
            self.pause();
        }
    }

    fn done(&self) {
        say(&format!("done at {}: {}", self.point, self.act));
    }

    /// Waits to be told to go on.
    fn pause(&self) {
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).expect("stdin") == 0 {
            std::process::exit(GAVE_UP);
        }
    }
}

fn say(what: &str) {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{what}").and_then(|()| stdout.flush()).expect("the test reads");
}

/// The takeover is over.
fn give_up(why: &str) -> ! {
    say(&format!("gave up: {why}"));
    std::process::exit(GAVE_UP);
}

/// The next packet; gives up at the end.
fn next_packet(channel: &Option<Channel>) -> (Vec<u8>, Vec<OwnedFd>) {
    let Some(channel) = channel else { give_up("the channel is closed by ourselves") };
    loop {
        match channel.receive() {
            Ok(Incoming::Packet { bytes, descriptors }) => return (bytes, descriptors),
            Ok(Incoming::Closed) => give_up("the channel is closed"),
            Ok(Incoming::Empty) => {
                let timeout = Duration::from_secs(60).try_into().expect("short");
                poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&timeout)).expect("poll");
            }
            Err(error) => {
                let abort = heirloom::protocol::ToIncumbent::abort(format!("cannot receive: {error}"));
                let _ = channel.send(&abort.to_packet(), &[]);
                give_up(&error.to_string());
            }
        }
    }
}

/// Sends; false if the other side receives no more.
fn send(channel: &Option<Channel>, packet: &[u8], descriptors: &[OwnedFd]) -> bool {
    let Some(channel) = channel else { give_up("the channel is closed by ourselves") };
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    match channel.send(packet, &borrowed) {
        Ok(()) => true,
        Err(SendError::Closed) => false,
        Err(error) => panic!("cannot send: {error}"),
    }
}
