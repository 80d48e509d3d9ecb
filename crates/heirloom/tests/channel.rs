//! The channel: packets and descriptors arrive whole, nothing leaks, and the end is seen when it is due.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use heirloom::channel::{Channel, ChannelError, Incoming, MAX_DESCRIPTORS, MAX_PACKET, SendError};
use heirloom::descriptors::{Wait, open_descriptors, raise_limit, receive_with, room, send_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Set in a process that runs one test again by itself.
const ALONE: &str = "HEIRLOOM_TEST_ALONE";

/// The tests of this file count the descriptors of their common process: one at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Both ends of a new channel.
fn channel() -> (Channel, Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    (ours, Channel::adopt(theirs).unwrap())
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

fn packet(channel: &Channel) -> (Vec<u8>, Vec<OwnedFd>) {
    match channel.receive().unwrap() {
        Incoming::Packet { bytes, descriptors } => (bytes, descriptors),
        other => panic!("expected a packet: {other:?}"),
    }
}

fn assert_closed(channel: &Channel) {
    let incoming = channel.receive().unwrap();
    assert!(matches!(incoming, Incoming::Closed), "{incoming:?}");
}

#[test]
fn packets_arrive_whole_in_order_and_in_both_directions() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    assert!(matches!(theirs.receive().unwrap(), Incoming::Empty));
    ours.send(b"one", &[]).unwrap();
    ours.send(&vec![7; MAX_PACKET], &[]).unwrap();
    theirs.send(b"back", &[]).unwrap();
    assert_eq!(packet(&theirs).0, b"one");
    assert_eq!(packet(&theirs).0, vec![7; MAX_PACKET]);
    assert_eq!(packet(&ours).0, b"back");
    assert!(matches!(theirs.receive().unwrap(), Incoming::Empty));
}

#[test]
fn a_full_load_of_descriptors_arrives_in_order_close_on_exec_and_without_a_leak() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    let files: Vec<File> = (0..MAX_DESCRIPTORS).map(|_| tempfile::tempfile().unwrap()).collect();
    let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(File::as_fd).collect();
    let before = open_descriptors().unwrap();
    for _ in 0..3 {
        ours.send(b"all", &borrowed).unwrap();
        let (bytes, descriptors) = packet(&theirs);
        assert_eq!(bytes, b"all");
        assert_eq!(descriptors.len(), MAX_DESCRIPTORS);
        for (sent, received) in files.iter().zip(&descriptors) {
            let (sent, got) = (rustix::fs::fstat(sent).unwrap(), rustix::fs::fstat(received).unwrap());
            assert_eq!((sent.st_dev, sent.st_ino), (got.st_dev, got.st_ino));
            let flags = rustix::io::fcntl_getfd(received).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
        assert_eq!(open_descriptors().unwrap(), before + MAX_DESCRIPTORS as u64);
        drop(descriptors);
        assert_eq!(open_descriptors().unwrap(), before);
    }
}

#[test]
fn both_ends_are_close_on_exec() {
    let _turn = one_at_a_time();
    let (ours, theirs) = Channel::pair().unwrap();
    for end in [ours.as_fd(), theirs.as_fd()] {
        let flags = rustix::io::fcntl_getfd(end).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn what_the_rules_forbid_is_not_sent() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    let file = null();
    let descriptors = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
    assert!(matches!(ours.send(b"", &[]), Err(SendError::Length { bytes: 0 })));
    let long = vec![0; MAX_PACKET + 1];
    assert!(matches!(ours.send(&long, &[]), Err(SendError::Length { .. })));
    assert!(matches!(
        ours.send(b"x", &descriptors),
        Err(SendError::Descriptors { count }) if count == MAX_DESCRIPTORS + 1
    ));
    assert!(matches!(theirs.receive().unwrap(), Incoming::Empty));
}

#[test]
fn a_full_queue_is_told_and_passes() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    let load = vec![1; MAX_PACKET];
    let mut sent = 0;
    loop {
        match ours.send(&load, &[]) {
            Ok(()) => sent += 1,
            Err(SendError::Full) => break,
            Err(other) => panic!("{other}"),
        }
        assert!(sent < 100_000, "the queue is endless");
    }
    assert!(sent > 0);
    for _ in 0..sent {
        packet(&theirs);
    }
    ours.send(&load, &[]).unwrap();
}

#[test]
fn after_a_shutdown_nothing_is_added_and_what_was_queued_is_still_there() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    theirs.send(b"before", &[]).unwrap();
    ours.shutdown_receive().unwrap();
    assert!(matches!(theirs.send(b"after", &[]), Err(SendError::Closed)));
    assert_eq!(packet(&ours).0, b"before");
    assert_closed(&ours);

    // The other direction goes on.
    ours.send(b"still", &[]).unwrap();
    assert_eq!(packet(&theirs).0, b"still");
    ours.shutdown_receive().unwrap();
}

#[test]
fn packets_outlive_their_sender() {
    let _turn = one_at_a_time();
    let before = open_descriptors().unwrap();
    let (ours, theirs) = channel();
    let file = null();
    theirs.send(b"one", &[]).unwrap();
    theirs.send(b"two", &[file.as_fd()]).unwrap();
    drop(theirs);
    assert!(matches!(ours.send(b"late", &[]), Err(SendError::Closed)));
    assert_eq!(packet(&ours).0, b"one");
    let (bytes, descriptors) = packet(&ours);
    assert_eq!((bytes.as_slice(), descriptors.len()), (&b"two"[..], 1));
    assert_closed(&ours);
    assert_closed(&ours);
    ours.shutdown_receive().unwrap();
    drop((ours, file, descriptors));
    assert_eq!(open_descriptors().unwrap(), before);
}

#[test]
fn a_reset_is_not_the_end_of_what_is_queued() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    ours.send(b"never read by them", &[]).unwrap();
    theirs.send(b"Taken", &[]).unwrap();
    drop(theirs);

    // The kernel does report the reset first: what the channel has to see through.
    let (raw, other) = channel();
    raw.send(b"never read by them", &[]).unwrap();
    other.send(b"Taken", &[]).unwrap();
    drop(other);
    let error = receive_with(&raw, &mut [0; 16], Wait::DontWait).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    assert_eq!(packet(&ours).0, b"Taken");
    assert_closed(&ours);
}

#[test]
fn only_a_seqpacket_socket_is_a_channel() {
    let _turn = one_at_a_time();
    let before = open_descriptors().unwrap();
    let (stream, _other) = UnixStream::pair().unwrap();
    let others: Vec<OwnedFd> = vec![
        stream.into(),
        UnixDatagram::unbound().unwrap().into(),
        TcpListener::bind("127.0.0.1:0").unwrap().into(),
        null().into(),
    ];
    for other in others {
        let error = Channel::adopt(other).unwrap_err();
        assert!(matches!(error, ChannelError::NotAChannel { .. }), "{error}");
    }
    drop(_other);
    assert_eq!(open_descriptors().unwrap(), before);
}

#[test]
fn a_packet_that_is_too_long_is_an_error_and_its_descriptors_are_closed() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    let file = null();
    let long = vec![0; MAX_PACKET + 1];
    send_with(&theirs, &long, &[file.as_fd()], Wait::DontWait).unwrap();
    let before = open_descriptors().unwrap();
    assert!(matches!(ours.receive(), Err(ChannelError::PacketTooLong)));
    assert_eq!(open_descriptors().unwrap(), before);
}

#[test]
fn surplus_descriptors_are_taken_in_so_that_none_leaks() {
    let _turn = one_at_a_time();
    let (ours, theirs) = channel();
    let file = null();
    let before = open_descriptors().unwrap();
    // One more than a channel sends, as a foreign sender might.
    send_with(&theirs, b"x", &vec![file.as_fd(); 253], Wait::DontWait).unwrap();
    let (_, descriptors) = packet(&ours);
    assert_eq!(descriptors.len(), 253);
    drop(descriptors);
    // Sent and never received: they go with the socket.
    theirs.send(b"y", &vec![file.as_fd(); MAX_DESCRIPTORS]).unwrap();
    assert_eq!(open_descriptors().unwrap(), before);
}

#[test]
fn impossible_sends_are_errors() {
    let _turn = one_at_a_time();
    let (stream, _other) = UnixStream::pair().unwrap();
    let file = null();
    let too_many = vec![file.as_fd(); 254];
    for (bytes, descriptors) in [(&b"x"[..], too_many.as_slice()), (b"", &too_many[..1])] {
        let error = send_with(&stream, bytes, descriptors, Wait::DontWait).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
}

#[test]
fn the_number_of_open_descriptors_is_what_proc_lists() {
    let _turn = one_at_a_time();
    let before = open_descriptors().unwrap();
    let room_before = room().unwrap();
    let files: Vec<File> = (0..10).map(|_| null()).collect();
    assert_eq!(open_descriptors().unwrap(), before + 10);
    assert_eq!(room().unwrap(), room_before - 10);
    let listed = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
    assert_eq!(open_descriptors().unwrap(), listed);
    drop(files);
}

/// In a process of its own, because the limit is the whole process's.
#[test]
fn a_receiver_without_room_gets_an_error_with_the_numbers_and_leaks_nothing() {
    const NAME: &str = "a_receiver_without_room_gets_an_error_with_the_numbers_and_leaks_nothing";
    let _turn = one_at_a_time();
    if std::env::var_os(ALONE).is_none() {
        return run_alone(NAME);
    }
    let hard = getrlimit(Resource::Nofile).maximum;
    let (ours, theirs) = channel();
    let file = null();
    theirs.send(b"many", &vec![file.as_fd(); 100]).unwrap();
    theirs.send(b"few", &[file.as_fd()]).unwrap();
    let open = open_descriptors().unwrap();
    let low = open + 40;
    let current = Some(low);
    setrlimit(Resource::Nofile, Rlimit { current, maximum: hard }).unwrap();
    assert_eq!(room().unwrap(), 40);

    let error = ours.receive().unwrap_err();
    let ChannelError::NoRoom { received, limit, .. } = error else {
        panic!("{error}");
    };
    assert!((1..100).contains(&received), "{received}");
    assert_eq!(limit, low);
    assert!(error.to_string().contains(&low.to_string()), "{error}");
    assert_eq!(open_descriptors().unwrap(), open);
    assert_eq!(packet(&ours).1.len(), 1);

    let (before, now) = raise_limit().unwrap();
    assert_eq!((before, now), (low, hard.unwrap_or(u64::MAX)));
    assert_eq!(getrlimit(Resource::Nofile).current, hard);
}

fn run_alone(name: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
