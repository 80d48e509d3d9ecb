//! Real servers and clients, each started by the test that needs it: what they share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod http;
pub(crate) mod postgres;
pub(crate) mod redis;
pub(crate) mod terminal;
pub(crate) mod websocket;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::support::proxy::Gate;
use crate::support::{Process, wait_for};

/// Starts a server that cannot choose a port itself, and waits until it accepts connections. Returns its address.
pub(crate) fn start_on_a_free_port(command: impl Fn(u16) -> Command) -> (Process, String) {
    for _ in 0..10 {
        let free = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = free.local_addr().expect("bound");
        drop(free);
        // Somebody else may take the port first: then another one may do.
        let mut server = Process::start(&mut command(address.port()));
        let mut connected = false;
        wait_for("a server that listens or fails", || {
            let running = server.is_running();
            connected = running && TcpStream::connect(address).is_ok();
            connected || !running
        });
        if connected {
            return (server, address.to_string());
        }
        println!("it does not run at {address}:\n{}", server.stderr());
    }
    panic!("no free port is found");
}

/// Host and port of an address.
pub(crate) fn host_and_port(address: &str) -> (&str, &str) {
    address.rsplit_once(':').expect("a port")
}

/// Copies on a thread, from end to end, as the gate lets it. Returns what it was copied to.
pub(crate) fn copy_through<W: Write + Send + 'static>(
    gate: &Arc<Gate>,
    mut from: impl Read + Send + 'static,
    mut to: W,
) -> JoinHandle<W> {
    let gate = gate.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let most = gate.wait(buffer.len());
            let count = from.read(&mut buffer[..most]).expect("it can be read");
            if count == 0 {
                return to;
            }
            to.write_all(&buffer[..count]).expect("it is taken");
            gate.pass(count);
        }
    })
}

/// SHA-256 of what is written to it, by sha256sum(1).
pub(crate) struct Checksum {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Checksum {
    pub(crate) fn start() -> Checksum {
        let mut command = Command::new("sha256sum");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum can be started");
        Checksum { stdin: child.stdin.take(), child }
    }

    /// What is to be written to.
    pub(crate) fn input(&mut self) -> ChildStdin {
        self.stdin.take().expect("not taken yet")
    }

    /// That of what can be read.
    pub(crate) fn of(mut from: impl Read) -> String {
        let mut checksum = Checksum::start();
        std::io::copy(&mut from, &mut checksum.input()).expect("it can be copied");
        checksum.finish()
    }

    /// The sum, as soon as its input has ended.
    pub(crate) fn finish(self) -> String {
        drop(self.stdin);
        let output = self.child.wait_with_output().expect("sha256sum ends");
        assert!(output.status.success());
        let line = String::from_utf8(output.stdout).expect("text");
        line.split_whitespace().next().expect("a sum").to_owned()
    }
}

/// Waits for a thread, and fails if it does not end.
#[track_caller]
pub(crate) fn join<T>(what: &str, thread: JoinHandle<T>) -> T {
    wait_for(what, || thread.is_finished());
    thread.join().unwrap_or_else(|_| panic!("{what}: it has failed"))
}
