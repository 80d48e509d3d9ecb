//! A chat server that sends numbered lines all the time, so that a byte which is lost, repeated or out of order shows.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::support::{LONG, Process, wait_for};

/// How many lines are sent between two pauses.
const BURST: u64 = 10;
/// How long such a pause is, if nothing else is said.
const PAUSE: Duration = Duration::from_millis(2);

/// The server, with the one connection that it ever gets: another one would mean that the first was lost.
pub(crate) struct Stream {
    address: String,
    stop: Arc<AtomicBool>,
    connections: Arc<AtomicU64>,
    sender: Option<JoinHandle<std::io::Result<u64>>>,
    listener: TcpListener,
    heard: Arc<std::sync::Mutex<Vec<u8>>>,
}

impl Stream {
    pub(crate) fn start() -> Self {
        Stream::start_paced(PAUSE)
    }

    /// Like [`Stream::start`], with pauses of this length.
    pub(crate) fn start_paced(pause: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("bound").to_string();
        let (stop, connections) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let heard = Arc::<std::sync::Mutex<Vec<u8>>>::default();
        let sender = std::thread::spawn({
            let listener = listener.try_clone().expect("dup");
            let (stop, connections, heard) = (stop.clone(), connections.clone(), heard.clone());
            move || {
                let (connection, _) = listener.accept().expect("accept");
                connections.fetch_add(1, Ordering::SeqCst);
                listen(connection.try_clone().expect("dup"), heard);
                send(connection, &stop, pause)
            }
        });
        Stream { address, stop, connections, sender: Some(sender), listener, heard }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// What the clients have sent.
    pub(crate) fn heard(&self) -> String {
        String::from_utf8_lossy(&self.heard.lock().expect("no panic while reading")).into_owned()
    }

    /// Ends the stream. The outputs of the processes, one after the other, are then all of it from byte `from` on.
    #[track_caller]
    pub(crate) fn ends_exact(&mut self, from: usize, processes: &[&Process]) {
        let written = || processes.iter().map(|process| process.stdout_len()).sum();
        self.ends_exact_on(from, written, || processes.iter().flat_map(|process| process.stdout()).collect());
    }

    /// Waits until the connection is lost, and fails unless what was found is the stream's beginning.
    #[track_caller]
    pub(crate) fn breaks_off(&mut self, found: impl Fn() -> Vec<u8>) {
        let sender = self.sender.take().expect("ends once");
        wait_for("the connection to be lost", || sender.is_finished());
        sender.join().expect("no panic").expect_err("the connection is lost");
        assert_beginning(&found());
    }

    /// Ends the stream. When so much of it has come, what was found is all of it from byte `from` on.
    #[track_caller]
    pub(crate) fn ends_exact_on(
        &mut self,
        from: usize,
        written: impl Fn() -> usize,
        found: impl Fn() -> Vec<u8>,
    ) {
        self.stop.store(true, Ordering::SeqCst);
        let lines = self.sender.take().expect("ends once").join().expect("no panic");
        let lines = lines.expect("the connection was lost");
        let expected: Vec<u8> = (0..lines).flat_map(line).collect();
        let expected = &expected[from..];
        wait_for("the end of the stream", || written() >= expected.len());
        let found = found();
        if let Some(at) = expected.iter().zip(&found).position(|(expected, found)| expected != found) {
            let end = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[at.saturating_sub(20)..bytes.len().min(at + 80)]).into_owned()
            };
            panic!("differs at byte {at}: expected {:?}, found {:?}", end(expected), end(&found));
        }
        assert_eq!(found.len(), expected.len(), "more was written than was sent");
        self.listener.set_nonblocking(true).expect("fcntl");
        assert!(self.listener.accept().is_err(), "a second connection was made");
    }
}

/// Fails unless this is what has been sent, up to anywhere.
#[track_caller]
fn assert_beginning(found: &[u8]) {
    let expected: Vec<u8> = (0..).flat_map(line).take(found.len()).collect();
    assert!(found == expected, "differs: {:?}", String::from_utf8_lossy(found));
}

/// The line with this number.
pub(crate) fn line(number: u64) -> Vec<u8> {
    format!("{number:010} is the number of this line and of no other\n").into_bytes()
}

fn send(mut connection: TcpStream, stop: &AtomicBool, pause: Duration) -> std::io::Result<u64> {
    // So that a test fails where nobody reads any more.
    connection.set_write_timeout(Some(LONG))?;
    let mut lines = 0;
    while !stop.load(Ordering::SeqCst) {
        let burst: Vec<u8> = (lines..lines + BURST).flat_map(line).collect();
        connection.write_all(&burst)?;
        lines += BURST;
        std::thread::sleep(pause);
    }
    Ok(lines)
}

fn listen(mut connection: TcpStream, heard: Arc<std::sync::Mutex<Vec<u8>>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = connection.read(&mut buffer) {
            heard.lock().expect("no panic while reading").extend_from_slice(&buffer[..n]);
        }
    });
}
