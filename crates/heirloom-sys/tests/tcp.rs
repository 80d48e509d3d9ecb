//! What the kernel has counted of a TCP connection is what was read and written.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use heirloom_sys::{TcpCounters, tcp_counters};
use rustix::net::{RecvFlags, connect_unspec, recv};

/// How many reads and writes there are.
const STEPS: usize = 20_000;

/// A connection that does not block: the end that has connected, and the one that was accepted.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    for end in [&connected, &accepted] {
        end.set_nonblocking(true).unwrap();
    }
    (connected, accepted)
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < give_up, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// One end, and what this test has read from it and written to it.
struct End {
    socket: TcpStream,
    new: TcpCounters,
    read: u64,
    written: u64,
}

impl End {
    fn new(socket: TcpStream) -> End {
        End { new: tcp_counters(&socket).unwrap(), socket, read: 0, written: 0 }
    }

    #[track_caller]
    fn agrees(&self) {
        let now = tcp_counters(&self.socket).unwrap();
        let counted = (now.consumed() - self.new.consumed(), now.written() - self.new.written());
        assert_eq!(counted, (self.read, self.written), "{now:?}");
    }
}

/// The next of a row of numbers that look random (xorshift).
fn next(seed: &mut u64) -> usize {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed as usize
}

#[test]
fn random_reads_and_writes_are_counted() {
    let (connected, accepted) = connection();
    let mut ends = [End::new(connected), End::new(accepted)];
    let mut buffer = vec![7; 100_000];
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..STEPS {
        let end = &mut ends[next(&mut seed) % 2];
        let size = 1 + next(&mut seed) % [10, 1_000, 100_000][next(&mut seed) % 3];
        let done = match next(&mut seed) % 4 {
            0 => end.socket.write(&buffer[..size]).inspect(|&count| end.written += count as u64),
            1 => end.socket.read(&mut buffer[..size]).inspect(|&count| end.read += count as u64),
            // Looking changes nothing, and throwing away is reading.
            2 => Ok(recv(&end.socket, &mut buffer[..size], RecvFlags::PEEK).map_or(0, |(count, _)| count)),
            _ => match recv(&end.socket, &mut buffer[..size], RecvFlags::TRUNC) {
                Ok((_, count)) => Ok(count).inspect(|&count| end.read += count as u64),
                Err(error) => Err(error.into()),
            },
        };
        if let Err(error) = done {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        }
        ends.iter().for_each(End::agrees);
    }
    assert!(ends.iter().all(|end| end.read > 1_000_000 && end.written > 1_000_000));
}

#[test]
fn the_end_of_a_direction_is_not_counted() {
    let (connected, accepted) = connection();
    let (mut client, mut server) = (End::new(connected), End::new(accepted));
    client.written += client.socket.write(b"one two").unwrap() as u64;
    client.socket.shutdown(Shutdown::Write).unwrap();
    client.agrees();
    wait_for("the FIN", || tcp_counters(&server.socket).unwrap().peer_has_ended());
    server.agrees();
    for size in [3, 3, 3, 3] {
        server.read += server.socket.read(&mut vec![0; size]).unwrap() as u64;
        server.agrees();
    }
    assert_eq!(server.read, 7);
    server.written += server.socket.write(b"three").unwrap() as u64;
    server.agrees();
    wait_for("the acknowledgement", || tcp_counters(&server.socket).unwrap().unacknowledged == 0);
    server.agrees();
    assert!(!tcp_counters(&server.socket).unwrap().is_over());
}

#[test]
fn after_a_reset_what_was_counted_is_still_told() {
    let (connected, accepted) = connection();
    let (mut client, mut server) = (End::new(connected), End::new(accepted));
    client.written += client.socket.write(b"one two").unwrap() as u64;
    wait_for("what was sent", || tcp_counters(&server.socket).unwrap().unread == 7);
    server.read += server.socket.read(&mut [0; 3]).unwrap() as u64;
    server.written += server.socket.write(b"three").unwrap() as u64;
    connect_unspec(&client.socket).unwrap();
    wait_for("the reset", || tcp_counters(&server.socket).unwrap().is_over());
    server.agrees();
    server.read += server.socket.read(&mut [0; 10]).unwrap() as u64;
    assert_eq!(server.read, 7, "what came before the reset can be read");
    server.agrees();
}

#[test]
fn when_all_is_over_an_end_of_the_peers_counts() {
    let (connected, accepted) = connection();
    let mut server = End::new(accepted);
    (&connected).write_all(b"one two").unwrap();
    drop(connected);
    wait_for("the FIN", || tcp_counters(&server.socket).unwrap().peer_has_ended());
    server.agrees();
    // Nobody is there to take it.
    server.written += server.socket.write(b"three").unwrap() as u64;
    wait_for("the reset", || tcp_counters(&server.socket).unwrap().is_over());
    let now = tcp_counters(&server.socket).unwrap();
    assert_eq!((now.consumed(), now.unread), (server.new.consumed() + 1, 7));
    assert_eq!(now.written() - server.new.written(), server.written);
}

#[test]
fn only_connections_are_counted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(tcp_counters(&listener).is_err());
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(tcp_counters(&unix).is_err());
    assert!(tcp_counters(std::fs::File::open("/dev/null").unwrap()).is_err());
}
