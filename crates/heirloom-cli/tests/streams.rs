//! Streams at full speed through twenty replacements of the client: nothing is lost, repeated or reordered.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::set_socket_send_buffer_size;
use support::generations::*;
use support::*;

/// How often the client is replaced.
const REPLACEMENTS: u64 = 20;
/// How many lines are sent at least. They are sent again until the last replacement is done.
const LINES: u64 = 200_000;

#[test]
fn what_a_server_streams_is_on_the_stdouts_in_order() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let next = || Process::start(&mut chat(&address, &control, &[]));
    let mut generations = Generations::new(next(), &control);
    let server = accept(&listener);
    let sender = Sender::start(server.try_clone().expect("dup"), LINES);
    for _ in 0..REPLACEMENTS {
        generations.replace(next());
    }
    let sent = sender.finish();
    assert_same(&generations.finish(sent.len()), &sent);
}

#[test]
fn what_a_slow_stdout_has_not_taken_yet_goes_to_the_successor() {
    /// How long a megabyte takes at the reader of stdout.
    const PACE: Duration = Duration::from_secs(1);
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let slowly = |count: usize| std::thread::sleep(PACE * count as u32 / 1_000_000);
    let next = || Process::start_reading(&mut chat(&address, &control, &[]), slowly);
    let mut generations = Generations::new(next(), &control);
    let server = accept(&listener);
    // What waits in the kernel at the end takes as long as the reader likes.
    set_socket_send_buffer_size(&server, 64 * 1024).expect("setsockopt");
    let sender = Sender::start(server.try_clone().expect("dup"), LINES);
    let mut most_carried = 0;
    for _ in 0..REPLACEMENTS {
        let last = generations.replace(next());
        most_carried = most_carried.max(last.bytes);
    }
    assert!(most_carried > 10_000, "at most {most_carried} bytes were carried over, so this shows nothing");
    let sent = sender.finish();
    assert_same(&generations.finish(sent.len()), &sent);
}

#[test]
fn both_directions_at_once() {
    const TYPED_AT_ONCE: u64 = 500;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let next = || Process::start(&mut chat(&address, &control, &[]));
    let mut generations = Generations::new(next(), &control);
    let server = accept(&listener);
    let sender = Sender::start(server.try_clone().expect("dup"), LINES);
    let mut typed = 0..0;
    let mut more = || {
        typed = typed.end..typed.end + TYPED_AT_ONCE;
        lines(typed.clone())
    };
    let heard = read_exactly(&server, lines(0..(2 * REPLACEMENTS + 1) * TYPED_AT_ONCE).len());
    for _ in 0..REPLACEMENTS {
        // Read by the incumbent, and on its way while it is replaced.
        generations.type_in(&more());
        let mut successor = next();
        // To be read after the takeover, and to be sent after what the incumbent has read.
        successor.write(&more());
        generations.replace(successor);
    }
    generations.type_in(&more());
    assert_same(&heard.join().expect("the server reads"), &lines(0..typed.end));
    let sent = sender.finish();
    assert_same(&generations.finish(sent.len()), &sent);
}

/// As in a shell, where every program has the same terminal: what one generation has not read from stdin, the next reads.
#[test]
fn generations_that_share_stdin_and_stdout() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (stdin, keyboard) = std::io::pipe().expect("pipe");
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let next = || {
        let (stdin, stdout) = (stdin.try_clone().expect("dup"), stdout.try_clone().expect("dup"));
        Process::start_between(&mut chat(&address, &control, &[]), stdin, stdout)
    };
    let mut generations = Generations::new(next(), &control);
    let server = accept(&listener);
    let shown = read_all(screen);
    let heard = read_all(server.try_clone().expect("dup"));
    let sender = Sender::start(server.try_clone().expect("dup"), LINES);
    let typist = Sender::start(keyboard, LINES);
    for _ in 0..REPLACEMENTS {
        generations.replace(next());
    }
    let (sent, typed) = (sender.finish(), typist.finish());
    wait_for("everything on its way", || {
        let status = status(&control);
        let counted = |name| status.counters.get(name).copied().unwrap_or(0);
        (counted("bytes_in"), counted("bytes_out")) == (sent.len() as u64, typed.len() as u64)
    });
    generations.finish(0);
    drop(stdout);
    assert_same(&shown.join().expect("the screen reads"), &sent);
    // The client has ended, so that the server's reader comes to an end too.
    assert_same(&heard.join().expect("the server reads"), &typed);
}

/// ncat's broker marks what it passes on with the sender's name, once for each of its own reads, in the middle of a line
/// too. So the yardstick is a witness who is never replaced: both hear the same.
#[test]
fn a_chat_at_ncat_hears_what_a_witness_hears() {
    const END: &[u8] = b"the end\n";
    if !have("ncat") {
        return skip("there is no ncat");
    }
    let scratch = Scratch::new();
    let (control, witness_control) = (scratch.path("chat.sock"), scratch.path("witness.sock"));
    let (mut broker, talker) = ncat_chat();
    let address = talker.peer_addr().expect("connected").to_string();
    let never = &mut chat(&address, &witness_control, &["--replace", "never"]);
    let mut witness = Process::start(never);
    let announcements = |output: &[u8]| without_announcements(output).1;
    let came = |output: &[u8]| count(&announcements(output), "is connected as");
    wait_for("the witness to be announced", || came(&witness.stdout()) == 1);
    let next = || Process::start(&mut chat(&address, &control, &[]));
    let mut generations = Generations::new(next(), &control);
    wait_for("the chat to be announced", || came(&witness.stdout()) == 2);

    let _unheard = read_all(talker.try_clone().expect("dup"));
    let sender = Sender::start(talker.try_clone().expect("dup"), LINES);
    for _ in 0..REPLACEMENTS {
        generations.replace(next());
    }
    assert!(broker.is_running(), "ncat has ended by itself: {}", broker.stderr());
    let mut sent = sender.finish();
    sent.extend_from_slice(END);
    (&talker).write_all(END).expect("ncat reads");
    let complete = |output: &[u8]| without_marks(&without_announcements(tail(output)).0).ends_with(END);
    wait_for("the witness hears the end", || complete(&witness.stdout()));
    wait_for("the chat hears the end", || complete(&generations.output()));

    let (witnessed, announced) = without_announcements(&witness.stdout());
    let (heard, _) = without_announcements(&generations.output());
    assert_same(&heard, &witnessed);
    assert_same(&without_marks(&heard), &sent);
    // ncat has noticed nothing of the replacements: nobody else came, and nobody went.
    assert_eq!(count(&announced, "is connected as"), 2, "{announced:?}");
    assert_eq!(count(&announced, "is disconnected"), 0, "{announced:?}");
    assert!(witness.is_running());
}

/// A broker of ncat's, and a connection to it.
fn ncat_chat() -> (Process, TcpStream) {
    for _ in 0..10 {
        // ncat cannot choose a port itself. Somebody else may take this one first: then another one may do.
        let free = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = free.local_addr().expect("bound");
        drop(free);
        let mut command = Command::new("ncat");
        command.args(["-l", "127.0.0.1", &address.port().to_string(), "--chat", "--keep-open"]);
        let mut broker = Process::start_between(&mut command, Stdio::piped(), Stdio::null());
        let mut connection = None;
        wait_for("ncat to listen or to fail", || {
            connection = TcpStream::connect(address).ok().filter(|_| broker.is_running());
            connection.is_some() || !broker.is_running()
        });
        if let Some(connection) = connection {
            return (broker, connection);
        }
    }
    panic!("ncat finds no free port");
}

/// What was said, without ncat's announcements, and these. ncat sends each in one go, so that it is never interrupted,
/// but it may come in the middle of somebody's line.
fn without_announcements(output: &[u8]) -> (Vec<u8>, Vec<String>) {
    const ANNOUNCEMENT: &[u8] = b"<announce> ";
    let (mut rest, mut said, mut announced) = (output, Vec::new(), Vec::new());
    while let Some(start) = find(rest, ANNOUNCEMENT) {
        said.extend_from_slice(&rest[..start]);
        let end = find(&rest[start..], b"\n").map_or(rest.len(), |length| start + length + 1);
        announced.push(String::from_utf8_lossy(&rest[start..end]).into_owned());
        rest = &rest[end..];
    }
    said.extend_from_slice(rest);
    (said, announced)
}

/// What was said, without ncat's marks of who said it: `<user7> `.
fn without_marks(output: &[u8]) -> Vec<u8> {
    let (mut rest, mut said) = (output, Vec::new());
    while let Some(start) = find(rest, b"<user") {
        said.extend_from_slice(&rest[..start]);
        let end = find(&rest[start..], b"> ").map_or(rest.len(), |length| start + length + 2);
        rest = &rest[end..];
    }
    said.extend_from_slice(rest);
    said
}

fn count(lines: &[String], what: &str) -> usize {
    lines.iter().filter(|line| line.contains(what)).count()
}

/// The end of it: what came in many reads of ncat's is long.
fn tail(output: &[u8]) -> &[u8] {
    &output[output.len().saturating_sub(4096)..]
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Reads so many bytes on a thread.
fn read_exactly(from: &TcpStream, length: usize) -> JoinHandle<Vec<u8>> {
    let mut from = from.try_clone().expect("dup");
    std::thread::spawn(move || {
        let mut all = vec![0; length];
        from.read_exact(&mut all).expect("so much can be read");
        all
    })
}
