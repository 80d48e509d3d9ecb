//! Protocol 0, both ways, with a program of the old kind that knows nothing of this project.

mod stream;
mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use stream::Stream;
use support::generations::{Sender, accept, assert_same, listen};
use support::*;

/// The old program: a chat client that buffers nothing. `old.py ADDRESS CONTROL` takes over if somebody listens at CONTROL;
/// with a third argument it plays a part: `unconnected` (an incumbent without a connection), `dies` (a successor that ends
/// when it has the descriptor) or `waits` (one that says so then, and commits once it reads a line).
const OLD_PROGRAM: &str = r#"
import array, os, select, socket, sys
address, control = sys.argv[1], sys.argv[2]
part = sys.argv[3] if len(sys.argv) > 3 else ""
tcp = None
try:
    old = socket.socket(socket.AF_UNIX)
    old.connect(control)
    old.sendall(b'"RequestFds"\n')
    data, ancillary, _, _ = old.recvmsg(2, socket.CMSG_SPACE(4))
    assert data == b"hi", data
    for level, kind, payload in ancillary:
        tcp = socket.socket(fileno=array.array("i", payload)[0])
    if part == "dies":
        sys.exit(9)
    if part == "waits":
        print("handed", file=sys.stderr, flush=True)
        sys.stdin.readline()
    old.sendall(b'"Quit"\n')
    while old.recv(100): pass
    old.close()
except (FileNotFoundError, ConnectionRefusedError):
    pass
if tcp is None and part != "unconnected":
    host, port = address.rsplit(":", 1)
    tcp = socket.create_connection((host, int(port)))
if os.path.exists(control): os.unlink(control)
listener = socket.socket(socket.AF_UNIX)
listener.bind(control)
listener.listen(5)
print("serving", file=sys.stderr, flush=True)
clients = {}
while True:
    ready, _, _ = select.select([listener, *clients] + ([tcp] if tcp else []), [], [])
    for sock in ready:
        if sock is listener:
            client, _ = listener.accept()
            clients[client] = b""
        elif sock is tcp:
            data = tcp.recv(65536)
            if not data: sys.exit(1)
            while data: data = data[os.write(1, data):]
        else:
            data = sock.recv(4096)
            if not data:
                del clients[sock]
                sock.close()
                continue
            clients[sock] += data
            while b"\n" in clients[sock]:
                line, clients[sock] = clients[sock].split(b"\n", 1)
                if line == b'"Ping"':
                    sock.sendall(b'"Pong"\n')
                elif line == b'"RequestFds"':
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tcp.fileno()]))] if tcp else []
                    sock.sendmsg([b"hi"], rights)
                    # It touches nothing more: the next thing it wants to hear is Quit.
                    while clients[sock].find(b'"Quit"') < 0:
                        more = sock.recv(100)
                        if not more: sys.exit(2)
                        clients[sock] += more
                    sys.exit(0)
"#;

fn old(address: &str, control: &Path, part: &str) -> Process {
    let mut command = Command::new("python3");
    command.arg("-c").arg(OLD_PROGRAM).arg(address).arg(control);
    if !part.is_empty() {
        command.arg(part);
    }
    Process::start(&mut command)
}

/// Waits until this process has written something since now.
fn wait_for_more(process: &Process) {
    let seen = process.stdout_len();
    wait_for(&format!("more of the stream; {}", process.stderr()), || process.stdout_len() > seen);
}

#[test]
fn old_and_new_programs_replace_each_other_in_a_chain() {
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut all = vec![old(stream.address(), &control, "")];
    wait_for("the old program", || all[0].stderr().contains("serving"));
    wait_for_more(&all[0]);
    for kind in ["new", "new", "old", "new", "old", "old", "new"] {
        let next = match kind {
            "new" => Process::start(&mut chat(stream.address(), &control, &["--replace", "must"])),
            _ => old(stream.address(), &control, ""),
        };
        let last = all.last_mut().expect("one");
        let code = last.wait().code();
        assert_eq!(code, Some(0), "{}", last.stderr());
        wait_for_more(&next);
        all.push(next);
    }
    assert!(all[2].stderr().contains("replaced by a program of protocol 0"), "{}", all[2].stderr());
    assert!(all[1].stderr().contains("took over from an incumbent of protocol 0"), "{}", all[1].stderr());
    stream.ends_exact(0, &all.iter().collect::<Vec<_>>());
}

#[test]
fn a_stream_at_full_speed_through_old_and_new_programs_is_exact() {
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let mut all = vec![old(&address, &control, "")];
    let sender = Sender::start(accept(&listener), 200_000);
    wait_for_more(&all[0]);
    for kind in ["new", "new", "old"] {
        let next = match kind {
            "new" => Process::start(&mut chat(&address, &control, &["--replace", "must"])),
            _ => old(&address, &control, ""),
        };
        all.last_mut().expect("one").wait_for_code(0);
        wait_for_more(&next);
        all.push(next);
    }
    let sent = sender.finish();
    let written = || all.iter().map(Process::stdout_len).sum::<usize>();
    wait_for("the end of the stream", || written() >= sent.len());
    assert_same(&all.iter().flat_map(Process::stdout).collect::<Vec<_>>(), &sent);
}

#[test]
fn an_old_successor_that_dies_without_quit_changes_nothing() {
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut incumbent = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    for _ in 0..3 {
        old(stream.address(), &control, "dies").wait_for_code(9);
        wait_for_more(&incumbent);
    }
    assert!(incumbent.is_running());
    assert!(incumbent.stderr().contains("left without taking over"), "{}", incumbent.stderr());
    stream.ends_exact(0, &[&incumbent]);
}

#[test]
fn an_old_incumbent_without_a_connection_is_replaced_too() {
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut incumbent = old(stream.address(), &control, "unconnected");
    wait_for("the old program", || incumbent.stderr().contains("serving"));
    let successor = Process::start(&mut chat(stream.address(), &control, &["--replace", "must"]));
    incumbent.wait_for_code(0);
    wait_for_more(&successor);
    assert!(successor.stderr().contains("connected=false"), "{}", successor.stderr());
    stream.ends_exact(0, &[&successor]);
}

/// What the new program has buffered for a slow stdout is written before the old one gets the connection.
#[test]
fn buffers_are_emptied_before_an_old_program_gets_the_connection() {
    /// What a pipe holds (pipe(7)).
    const PIPE: u64 = 64 * 1024;
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let slow = |read| std::thread::sleep(Duration::from_micros(read as u64 * 12));
    let mut incumbent = Process::start_reading(&mut chat(stream.address(), &control, &[]), slow);
    wait_until_connected(&control);
    // The stream is faster than 80 kB/s, so that more is read than is written.
    wait_for("something in the buffer", || {
        try_status(&control)
            .is_some_and(|status| status.counters["bytes_in"] > incumbent.stdout_len() as u64 + 100_000)
    });
    let mut successor = old(stream.address(), &control, "waits");
    wait_for("the descriptor", || successor.stderr().contains("handed"));
    // Written is what its reader has, and what is in the pipe to it.
    let unwritten = status(&control).counters["bytes_in"] - incumbent.stdout_len() as u64;
    assert!(unwritten <= PIPE, "{unwritten} bytes are not with the reader, more than its pipe holds");
    successor.write(b"go on\n");
    incumbent.wait_for_code(0);
    wait_for_more(&successor);
    stream.ends_exact(0, &[&incumbent, &successor]);
}

/// An old program cannot be handed what a failed stdout did not take. It is refused, and the incumbent goes on as before.
#[test]
fn an_old_program_is_refused_while_stdout_fails() {
    /// A disk that is full after a few kilobytes. The signal that says so as well would end the program.
    const SMALL_DISK: &str = "trap '' XFSZ; ulimit -S -f 16; exec \"$@\"";
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let (control, path) = (scratch.path("chat.sock"), scratch.path("stdout"));
    let stream = Stream::start();
    let file = std::fs::File::create(&path).expect("create");
    let mut command = Command::new("sh");
    command.args(["-c", SMALL_DISK, "sh", env!("CARGO_BIN_EXE_heirloom"), "chat"]);
    command.arg(stream.address()).arg("--control").arg(&control);
    let mut incumbent = Process::start_between(&mut command, Stdio::null(), file);
    wait_for("stdout to fail", || incumbent.stderr().contains("cannot write to stdout"));
    let mut successor = old(stream.address(), &control, "");
    successor.wait_for_code(1);
    assert!(incumbent.is_running());
    // The disk has room again.
    let pid = Pid::from_raw(incumbent.id() as i32);
    let unlimited = Rlimit { current: None, maximum: None };
    prlimit(pid, Resource::Fsize, unlimited).expect("prlimit");
    wait_for("much more on stdout", || std::fs::metadata(&path).expect("stat").len() > 1_000_000);
    let written = std::fs::read(&path).expect("read");
    let expected: Vec<u8> = (0..).flat_map(stream::line).take(written.len()).collect();
    assert!(written == expected, "something is missing");
}

/// The old program's connection takes two descriptors, itself and the pidfd of who asks; the one to hand over finds no room.
#[test]
fn an_incumbent_short_of_descriptors_refuses_an_old_program_and_serves_on() {
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut stream = Stream::start();
    let mut incumbent = Process::start(&mut chat(stream.address(), &control, &[]));
    wait_until_connected(&control);
    let table = format!("/proc/{}/fd", incumbent.id());
    let open = || -> std::collections::BTreeSet<u64> {
        let entries = std::fs::read_dir(&table).expect("proc");
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    };
    // The connection that asked for the status, and the pidfd of who asked, are closed a moment later.
    let is_to_stay = |number: &u64| {
        let link = std::fs::read_link(format!("{table}/{number}"));
        link.is_ok_and(|link| !link.to_string_lossy().contains("pidfd"))
    };
    let mut open_now = open();
    wait_for("an incumbent that nobody asks anything", || {
        open_now = open();
        open_now.iter().all(is_to_stay)
    });
    let limit = (0..).filter(|number| !open_now.contains(number)).nth(2).expect("numbers do not end");
    let pid = rustix::process::Pid::from_raw(incumbent.id() as i32);
    let limited = rustix::process::Rlimit { current: Some(limit), maximum: Some(limit) };
    rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limited).expect("prlimit");

    let mut successor = old(stream.address(), &control, "");
    successor.wait_for_code(1);
    assert!(successor.stderr().contains("AssertionError"), "{}", successor.stderr());
    wait_for("the log of it", || incumbent.stderr().contains("is refused: the incumbent cannot duplicate"));
    wait_for_more(&incumbent);
    assert!(incumbent.is_running());
    stream.ends_exact(0, &[&incumbent]);
}

/// An old program knows no store: what is kept for the chat is let go.
#[test]
fn from_a_chat_under_a_supervisor_that_lets_go_of_everything_then() {
    if !have("python3") {
        return skip("python3 plays the old program");
    }
    let scratch = Scratch::new();
    let (control, address_of_run) = (scratch.path("chat.sock"), scratch.path("run.sock"));
    let (listener, address) = listen();
    let mut run = heirloom();
    run.arg("run").arg("--control").arg(&address_of_run).args(["--restart", "always", "--"]);
    // The next one does not take it back.
    let chat = chat(&address, &control, &["--replace", "never"]);
    run.arg(chat.get_program()).args(chat.get_args());
    let run = Process::start(&mut run);
    let mut server = accept(&listener);
    wait_until_connected(&control);
    let sender = Sender::start(server.try_clone().expect("dup"), 300_000);
    let mut old = old(&address, &control, "");
    wait_for_more(&old);
    let sent = sender.finish();
    wait_for("everything", || run.stdout_len() + old.stdout_len() >= sent.len());
    assert_same(&[run.stdout(), old.stdout()].concat(), &sent);
    // Nobody else has the connection.
    old.kill();
    old.wait();
    assert_eq!(std::io::Read::read(&mut server, &mut [0]).expect("an end"), 0);
}
