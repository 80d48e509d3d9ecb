//! Twenty replacements under a server that says nothing: the connection stays the same one, and what is typed
//! meanwhile arrives once.

mod support;

use std::io::{Read, Write};
use std::process::Command;

use rustix::net::sockopt::set_socket_recv_buffer_size;
use support::generations::*;
use support::*;

/// How often the client is replaced.
const REPLACEMENTS: u64 = 20;

#[test]
fn the_connection_of_a_silent_server_is_the_same_afterwards() {
    if !have("ss") {
        return skip("there is no ss");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let next = || Process::start(&mut chat(&address, &control, &[]));
    let mut generations = Generations::new(next(), &control);
    let mut server = accept(&listener);
    wait_until_connected(&control);
    let before = connections_to(&address);
    assert_eq!(before.len(), 1, "{before:?}");
    assert_eq!(before[0].local, server.peer_addr().expect("connected").to_string());
    assert_eq!(before[0].owner, generations.current().id(), "{before:?}");
    for _ in 0..REPLACEMENTS {
        let last = generations.replace(next());
        assert_eq!(last.items, 2, "the connection and the control socket are handed over");
    }
    let after = connections_to(&address);
    let expected = Connection { local: before[0].local.clone(), owner: generations.current().id() };
    assert_eq!(after, [expected]);

    generations.current().write(b"?");
    let mut byte = [0];
    server.read_exact(&mut byte).expect("the connection lives");
    server.write_all(&byte).expect("the connection lives");
    wait_for("the echo", || generations.written() == 1);
    assert_eq!(generations.output(), b"?");
    nobody_else_came(listener);
}

#[test]
fn what_is_typed_while_the_server_says_nothing_arrives_once() {
    const TYPED_AT_ONCE: u64 = 10;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let next = || Process::start(&mut chat(&address, &control, &[]));
    let mut generations = Generations::new(next(), &control);
    let server = accept(&listener);
    let mut typed = 0..0;
    let mut more = || {
        typed = typed.end..typed.end + TYPED_AT_ONCE;
        lines(typed.clone())
    };
    for _ in 0..REPLACEMENTS {
        generations.type_in(&more());
        let mut successor = next();
        successor.write(&more());
        generations.replace(successor);
    }
    generations.type_in(&more());
    generations.finish(0);
    assert_same(&read_to_end(server), &lines(0..typed.end));
    nobody_else_came(listener);
}

/// The server does not read, so that typed bytes wait in the client, and move from one generation to the next.
#[test]
fn what_could_not_be_sent_yet_is_handed_over() {
    /// More than what the kernel keeps for a server that does not read (tcp_wmem is 4 MiB at most by default).
    const LINES: u64 = 1_500_000;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    set_socket_recv_buffer_size(&listener, 64 * 1024).expect("setsockopt");
    let (stdin, mut keyboard) = std::io::pipe().expect("pipe");
    let next = || {
        let stdin = stdin.try_clone().expect("dup");
        Process::start_between(&mut chat(&address, &control, &[]), stdin, std::process::Stdio::null())
    };
    let mut generations = Generations::new(next(), &control);
    let server = accept(&listener);
    let typist = std::thread::spawn(move || keyboard.write_all(&lines(0..LINES)).expect("stdin is read"));
    let mut carried = 0;
    wait_for("a takeover with typed bytes", || {
        carried = generations.replace(next()).bytes;
        carried > 60_000
    });
    for _ in 0..REPLACEMENTS {
        assert!(generations.replace(next()).bytes > 60_000, "the server read something?");
    }
    // Now it reads, and the client is replaced all the while.
    let heard = read_all(server);
    for _ in 0..REPLACEMENTS {
        generations.replace(next());
    }
    typist.join().expect("everything is typed");
    let expected = lines(0..LINES);
    wait_for("everything to be sent", || {
        status(&control).counters.get("bytes_out") == Some(&(expected.len() as u64))
    });
    generations.finish(0);
    assert_same(&heard.join().expect("the server reads"), &expected);
    nobody_else_came(listener);
}

/// An established connection, as ss sees it.
#[derive(Debug, PartialEq, Eq)]
struct Connection {
    local: String,
    /// The process that has it.
    owner: u32,
}

/// The established connections to this address.
fn connections_to(address: &str) -> Vec<Connection> {
    let output = Command::new("ss")
        .args(["-H", "-t", "-n", "-p", "state", "established", "dst", address])
        .output()
        .expect("ss can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let connection = |line: &str| {
        // Recv-Q Send-Q Local:Port Peer:Port users:(("heirloom",pid=123,fd=7))
        let owner = line.split("pid=").nth(1).and_then(|rest| rest.split(',').next());
        Connection {
            local: line
                .split_whitespace()
                .nth(2)
                .unwrap_or_else(|| panic!("no address in {line}"))
                .to_owned(),
            owner: owner.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no process in {line}")),
        }
    };
    String::from_utf8_lossy(&output.stdout).lines().map(connection).collect()
}
