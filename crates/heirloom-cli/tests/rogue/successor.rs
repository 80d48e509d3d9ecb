//! A successor that misbehaves.

use heirloom::NoRequests;
use heirloom::channel::Channel;
use heirloom::control::{Client, Hello, Reply, Request, VersionRange};
use heirloom::lock::{LockFile, lock_path};
use heirloom::protocol::{ToIncumbent, ToSuccessor};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::{Acts, Rogue, give_up, next_packet, say, send};

/// The points, in order.
pub(super) fn run(rogue: &Rogue) {
    let mut client = Client::connect(&rogue.control).expect("connect");
    let hello = Hello {
        protocol: VersionRange::new(1, 1),
        service: format!("chat {}", rogue.server),
        program: "rogue".into(),
        version: "6".into(),
        pid: std::process::id(),
        schema: VersionRange::new(1, 2),
        room: 1_000_000,
        generation: None,
        force: false,
    };
    client.send(&Request::<NoRequests>::Takeover(hello)).expect("send");
    let (line, mut descriptors) = client.receive().expect("an answer");
    let Reply::Takeover(_) = Reply::parse(&line).expect("a reply") else {
        give_up(&String::from_utf8_lossy(&line));
    };
    let mut channel = Some(Channel::adopt(descriptors.pop().expect("the channel")).expect("a channel"));
    let early = || Acts { abort: abort(), wrong: ToIncumbent::Taken.to_packet() };
    let late = || Acts { abort: abort(), wrong: ToIncumbent::Ready.to_packet() };

    rogue.at("hello", &mut channel, early());
    if rogue.point == "no room" {
        lower_the_limit();
    }
    let mut held = Vec::new();
    let (message, memfd) = next(&channel);
    assert_eq!(message, ToSuccessor::Offer);
    held.extend(memfd);
    rogue.at("offer", &mut channel, early());
    loop {
        let (message, descriptors) = next(&channel);
        if message == ToSuccessor::Offered {
            break;
        }
        held.extend(descriptors);
        rogue.at("batch", &mut channel, early());
        tell(&channel, &ToIncumbent::Credit);
    }
    rogue.at("offered", &mut channel, early());
    tell(&channel, &ToIncumbent::Ready);
    rogue.at("ready", &mut channel, early());
    loop {
        let (message, descriptors) = next(&channel);
        held.extend(descriptors);
        match message {
            // What is new since, such as the pipes of a chat that a supervisor keeps.
            ToSuccessor::Batch { .. } => tell(&channel, &ToIncumbent::Credit),
            message => break assert_eq!(message, ToSuccessor::Freeze),
        }
    }
    rogue.at("freeze", &mut channel, early());
    tell(&channel, &ToIncumbent::Accept);
    rogue.at("accept", &mut channel, late());
    let (message, _) = next(&channel);
    assert_eq!(message, ToSuccessor::Released);
    rogue.at("released", &mut channel, late());
    let file = LockFile::open(lock_path(&rogue.control)).expect("the lock file");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
    let Ok(_lock) = file.lock_until(deadline) else { give_up("the lock is held") };
    rogue.at("locked", &mut channel, late());
    tell(&channel, &ToIncumbent::Taken);
    say("SERVES");
}

fn abort() -> Vec<u8> {
    ToIncumbent::abort("the rogue has had enough").to_packet()
}

/// The next message; gives up when it is an Abort.
fn next(channel: &Option<Channel>) -> (ToSuccessor, Vec<std::os::fd::OwnedFd>) {
    let (packet, descriptors) = next_packet(channel);
    match ToSuccessor::from_packet(&packet, descriptors.len()).expect("a message") {
        ToSuccessor::Abort { reason } => give_up(&reason),
        message => (message, descriptors),
    }
}

/// Sends; where that is refused, an Abort has come before.
fn tell(channel: &Option<Channel>, message: &ToIncumbent) {
    if !send(channel, &message.to_packet(), &[]) {
        loop {
            next(channel);
        }
    }
}

/// From now on this process can take no further descriptor but one: it lied about its room.
fn lower_the_limit() {
    let one_more = std::fs::File::open("/dev/null").expect("open");
    let lowest_free = std::os::fd::AsRawFd::as_raw_fd(&one_more) as u64;
    let limit = Some(lowest_free + 2);
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).expect("setrlimit");
}
