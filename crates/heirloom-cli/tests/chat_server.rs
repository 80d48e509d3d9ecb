//! The chat server, one process: what its clients hear, beside ncat's, and what it does at the edges.

mod support;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

use heirloom::{Config, NoRequests, Replace, Service, Start};
use rustix::process::Signal;
use support::generations::{assert_same, lines};
use support::guests::*;
use support::*;

/// What a script does. Somebody is to hear each step, so that the next one comes after it.
#[derive(Clone, Copy)]
enum Step {
    Join(usize),
    Say(usize, &'static str),
    Leave(usize),
}

const SCRIPT: &[Step] = &[
    Step::Join(0),
    Step::Join(1),
    Step::Say(1, "hello"),
    Step::Say(0, "a\ttab, a backslash \\ and \x1b[1ma steering\x07 \x7f"),
    Step::Join(2),
    Step::Join(3),
    Step::Say(2, ""),
    Step::Say(3, "carriage return\r"),
    Step::Leave(1),
    Step::Say(0, "again"),
    Step::Say(0, "and again"),
    Step::Leave(0),
    Step::Join(4),
    Step::Say(4, "new here"),
    Step::Leave(3),
    Step::Say(2, "bye"),
    Step::Leave(2),
];

/// Plays the script, and returns what each client has heard, with names instead of numbers.
///
/// `already_connected`: lists of who is there go to everybody, not only to who comes.
fn play(address: SocketAddr, already_connected: bool) -> Vec<Vec<String>> {
    let mut guests: HashMap<usize, Guest> = HashMap::new();
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut heard: Vec<Vec<String>> = Vec::new();
    let anonymous = |names: &HashMap<String, usize>, mut line: String| {
        for (name, number) in names {
            line = line.replace(&format!("<{name}>"), &format!("<guest {number}>"));
        }
        line
    };
    for &step in SCRIPT {
        if let Step::Join(number) = step {
            let socket = TcpStream::connect(address).expect("the server listens");
            let (guest, greeting) = Guest::greeting(socket);
            names.insert(guest.name.clone(), number);
            heard.push(greeting.into_iter().map(|line| anonymous(&names, line)).collect());
            guests.insert(number, guest);
        }
        let who = match step {
            Step::Join(number) => number,
            Step::Say(number, line) => {
                guests.get_mut(&number).expect("here").say(format!("{line}\n"));
                number
            }
            Step::Leave(number) => {
                guests.remove(&number).expect("here");
                number
            }
        };
        for (&number, guest) in guests.iter_mut().filter(|(number, _)| **number != who) {
            heard[number].push(anonymous(&names, guest.line()));
            if already_connected && matches!(step, Step::Join(_)) {
                let list = guest.line();
                assert!(list.starts_with("<announce> already connected: "), "{list:?}");
            }
        }
    }
    heard
}

#[test]
fn guests_hear_what_they_would_hear_from_ncat() {
    if !have("ncat") {
        return skip("there is no ncat");
    }
    let scratch = Scratch::new();
    let (_server, address) = serve(&scratch.path("chat.sock"), &[]);
    let (_ncat, ncat_address) = ncat();
    let (ours, theirs) = (play(address, false), play(ncat_address, true));
    assert_eq!(ours, theirs);
    assert_eq!(ours[0][0], "<announce> 127.0.0.1 is connected as <guest 0>.");
    assert_eq!(ours[1][2], r"<guest 0> a	tab, a backslash \ and \033[1ma steering\007 \177");
}

/// ncat as a chat server.
fn ncat() -> (Process, SocketAddr) {
    for _ in 0..10 {
        // ncat cannot choose a port itself. Somebody else may take this one first: then another one may do.
        let free = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = free.local_addr().expect("bound");
        drop(free);
        let mut command = Command::new("ncat");
        command.args(["-l", "127.0.0.1", &address.port().to_string(), "--chat", "--keep-open"]);
        let mut ncat = Process::start_between(&mut command, Stdio::piped(), Stdio::null());
        wait_for("ncat to listen or to fail", || listens(address) || !ncat.is_running());
        if ncat.is_running() {
            return (ncat, address);
        }
    }
    panic!("ncat finds no free port");
}

/// Whether somebody listens there, without connecting: the kernel's table tells.
fn listens(address: SocketAddr) -> bool {
    const LISTEN: &str = "0A";
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").expect("procfs");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next(), fields.nth(1));
        local.is_some_and(|local| local.ends_with(&port)) && state == Some(LISTEN)
    })
}

#[test]
fn a_line_is_heard_when_its_end_has_come() {
    let scratch = Scratch::new();
    let (_server, address) = serve(&scratch.path("chat.sock"), &[]);
    let (mut slow, mut quick, mut other) = (Guest::join(address), Guest::join(address), Guest::join(address));
    for byte in "it is late".bytes() {
        slow.say([byte]);
        quick.say(b"tick\n");
        let tick = format!("<{}> tick", quick.name);
        while other.line() != tick {}
    }
    slow.say(b"\n");
    other.hears(&[&format!("<{}> it is late", slow.name)]);

    // Three lines and a half in one go; the half one is heard when nothing more can come.
    slow.say(b"one\n\nthree\nfour");
    slow.shutdown();
    let said = |line: &str| format!("<{}> {line}", slow.name);
    let gone = format!("<announce> <{}> is disconnected.", slow.name);
    other.hears(&[&said("one"), &said(""), &said("three"), &said("four"), &gone]);
}

#[test]
fn what_steers_a_terminal_is_escaped_and_text_is_not() {
    let scratch = Scratch::new();
    let (_server, address) = serve(&scratch.path("chat.sock"), &[]);
    let (mut guest, mut other) = (Guest::join(address), Guest::join(address));
    guest.say("é 漢 🦀\t\u{1b}]0;title\u{7}\u{9b}2J\r\n");
    guest.say(b"latin-1: \xe9\xff\n");
    let name = &guest.name;
    other.hears(&[
        &format!("<{name}> é 漢 🦀\t\\033]0;title\\007\\302\\2332J\r"),
        &format!("<{name}> latin-1: \\351\\377"),
    ]);
}

#[test]
fn an_endless_line_comes_in_pieces() {
    const PIECE: usize = 64 * 1024;
    let scratch = Scratch::new();
    let (_server, address) = serve(&scratch.path("chat.sock"), &[]);
    let (mut guest, mut other) = (Guest::join(address), Guest::join(address));
    let name = guest.name.clone();
    let talking = std::thread::spawn(move || {
        guest.say("x".repeat(3 * PIECE + 5) + "\nnext\n");
        guest
    });
    let piece = format!("<{name}> {}", "x".repeat(PIECE));
    other.hears(&[&piece, &piece, &piece, &format!("<{name}> xxxxx"), &format!("<{name}> next")]);
    drop(talking.join().expect("it talks"));
}

/// A guest, and so much for it to hear that the server has to keep a part of it.
fn guest_with_unheard_lines(control: &Path, address: SocketAddr) -> (Guest, Guest, Vec<u8>) {
    /// More than the kernel keeps (tcp_wmem is 4 MiB at most by default).
    const LINES: u64 = 450_000;
    let (mut talker, slow) = (Guest::join(address), Guest::join_narrow(address));
    let said = lines(0..LINES);
    talker.say(&said);
    wait_for("everything to be read by the server", || {
        status(control).counters.get("bytes_in") == Some(&(said.len() as u64))
    });
    let mut heard = Vec::new();
    for line in said.split_inclusive(|&byte| byte == b'\n') {
        heard.extend_from_slice(format!("<{}> ", talker.name).as_bytes());
        heard.extend_from_slice(line);
    }
    (talker, slow, heard)
}

#[test]
fn who_leaves_hears_what_was_said_before_and_nothing_new() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (_server, address) = serve(&control, &["--backlog", "64M"]);
    let (mut talker, mut slow, heard) = guest_with_unheard_lines(&control, address);
    slow.shutdown();
    let came = format!("<announce> 127.0.0.1 is connected as <{}>.", slow.name);
    talker.hears(&[&came, &format!("<announce> <{}> is disconnected.", slow.name)]);
    assert!(status(&control).items.iter().any(|item| item.name == slow.name), "it still hears");
    talker.say(b"nobody is there\n");
    assert_same(&slow.rest().expect("a clean end"), &heard);
    wait_for("its connection to end", || status(&control).items.iter().all(|item| item.name != slow.name));
    drop(talker);
}

#[test]
fn a_stop_sends_what_is_unsent() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &["--backlog", "64M"]);
    let (mut talker, mut slow, heard) = guest_with_unheard_lines(&control, address);
    server.signal(Signal::TERM);
    // It is not heard any more.
    talker.say(b"too late");
    assert_same(&slow.rest().expect("a clean end"), &heard);
    server.wait_for_code(0);
    assert!(!server.stderr().contains("nobody took"), "{}", server.stderr());
    assert!(!control.exists(), "nobody is there any more");
}

/// What the kernel has taken, and the client has not read, is lost if the server closes with something unread.
#[test]
fn a_stop_loses_nothing_for_who_is_talking() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &[]);
    let (mut talker, mut slow) = (Guest::join(address), Guest::join_narrow(address));
    let said = lines(0..10_000);
    talker.say(&said);
    wait_for("everything to be sent", || {
        status(&control).counters.get("lines_in") == Some(&10_000)
            && status(&control).counters["bytes_out"] > said.len() as u64
    });
    server.signal(Signal::STOP);
    slow.say(vec![b'x'; 200_000]);
    server.signal(Signal::TERM);
    server.signal(Signal::CONT);
    server.wait_for_code(0);
    let heard = slow.rest().expect("a clean end");
    assert_eq!(heard.iter().filter(|&&byte| byte == b'\n').count(), 10_000);
}

#[test]
fn a_stop_does_not_wait_for_who_does_not_read() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &["--backlog", "64M"]);
    let (_talker, mut slow, heard) = guest_with_unheard_lines(&control, address);
    let mut quit = Process::start(heirloom().arg("quit").arg("--control").arg(&control));
    quit.wait_for_code(0);
    server.wait_for_code(0);
    assert!(server.stderr().contains("nobody took"), "{}", server.stderr());
    let mut got = Vec::new();
    let end = slow.read_into(&mut got);
    assert_eq!(end.expect_err("it must not take this for everything").kind(), ErrorKind::ConnectionReset);
    assert!(heard.starts_with(&got) && got.len() < heard.len());
}

#[test]
fn who_does_not_read_is_cut_off_and_the_others_hear_everything() {
    let scratch = Scratch::new();
    let (server, address) = serve(&scratch.path("chat.sock"), &["--backlog", "100k"]);
    let (mut talker, mut slow, mut other) =
        (Guest::join(address), Guest::join_narrow(address), Guest::join(address));
    let gone = format!("<announce> <{}> is disconnected.", slow.name);
    let text = "x".repeat(1000);
    let mut cut_off = false;
    for number in 0.. {
        talker.say(format!("{number} {text}\n"));
        let said = format!("<{}> {number} {text}", talker.name);
        let mut line = other.line();
        if line == gone {
            assert!(!cut_off, "announced twice");
            cut_off = true;
            line = other.line();
        }
        assert_eq!(line, said);
        if cut_off && number % 1000 == 0 {
            break;
        }
    }
    let is_warned = |log: String| log.contains("does not read") && log.contains(&slow.name);
    wait_for("a warning that names it", || is_warned(server.stderr()));
    let mut heard = Vec::new();
    let end = slow.read_into(&mut heard);
    assert_eq!(end.expect_err("it must not take this for everything").kind(), ErrorKind::ConnectionReset);
    assert!(heard.starts_with(format!("<announce> 127.0.0.1 is connected as <{}>", other.name).as_bytes()));
}

#[test]
fn who_is_gone_was_heard() {
    let scratch = Scratch::new();
    let (_server, address) = serve(&scratch.path("chat.sock"), &[]);
    let mut other = Guest::join(address);
    for round in 0..50 {
        let mut guest = Guest::join(address);
        // It closes with something unread, so that its kernel resets the connection.
        other.say(b"unread\n");
        let mut byte = [0];
        wait_for("something unread", || guest.socket().peek(&mut byte).is_ok_and(|count| count == 1));
        guest.say(format!("{round}\n"));
        let name = std::mem::take(&mut guest.name);
        drop(guest);
        other.hears(&[
            &format!("<announce> 127.0.0.1 is connected as <{name}>."),
            &format!("<{name}> {round}"),
            &format!("<announce> <{name}> is disconnected."),
        ]);
    }
}

#[test]
fn without_descriptors_for_more_those_who_are_in_go_on_and_others_come_in_later() {
    const WAITING: usize = 40;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let mut command = Command::new("sh");
    let program = listening("127.0.0.1:0", &control, &[]);
    command
        .args(["-c", "ulimit -n 32; exec \"$@\"", "sh"])
        .arg(program.get_program())
        .args(program.get_args());
    let server = Process::start(&mut command);
    let address = address_of(&server);
    let (mut one, mut two) = (Guest::join(address), Guest::join(address));
    let came = |guest: &Guest| format!("<announce> 127.0.0.1 is connected as <{}>.", guest.name);
    one.hears(&[&came(&two)]);
    let waiting: Vec<TcpStream> =
        (0..WAITING).map(|_| TcpStream::connect(address).expect("the kernel queues it")).collect();
    wait_for("the server to run out of descriptors", || server.stderr().contains("cannot let anybody in"));
    for _ in 0..3 {
        one.say(b"still here\n");
        let said = format!("<{}> still here", one.name);
        while two.line() != said {}
    }
    // One after the other they come in, as those before them leave.
    for socket in waiting {
        let guest = Guest::greeted(socket);
        let said = format!("<{}> at last", guest.name);
        let mut guest = guest;
        guest.say(b"at last\n");
        while one.line() != said {}
    }
    one.say(b"done\n");
    let said = format!("<{}> done", one.name);
    while two.line() != said {}
}

#[test]
fn status_shows_who_is_there_and_what_was_said() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (_server, address) = serve(&control, &[]);
    let items = || status(&control).items.into_iter().map(|item| item.name).collect::<Vec<_>>();
    assert_eq!(items(), ["listener"]);
    let (mut one, mut two) = (Guest::join(address), Guest::join(address));
    one.say(b"hello\nhal");
    two.hears(&[&format!("<{}> hello", one.name)]);
    assert_eq!(items(), ["listener", &one.name, &two.name]);
    wait_for("both reads", || status(&control).counters["bytes_in"] == 9);
    let counters = status(&control).counters;
    assert_eq!(counters["lines_in"], 1);
    assert!(counters["bytes_out"] > 100, "{counters:?}");
    assert_eq!(status(&control).name, "chat server 127.0.0.1:0");
}

/// The client of this program, and a server of the other role at the same control socket.
#[test]
fn a_chat_client_of_ours_is_a_guest_and_no_successor() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &[]);
    let mut one = Guest::join(address);
    let mut client = Process::start(&mut chat(&address.to_string(), &scratch.path("client.sock"), &[]));
    let came = one.line();
    assert!(came.contains("is connected as"), "{came}");
    one.say(b"hello\n");
    let said = format!("<{}> hello\n", one.name);
    wait_for("the client to hear it", || client.stdout().ends_with(said.as_bytes()));
    client.write(b"hello yourself\n");
    assert!(one.line().ends_with("> hello yourself"));
    let mut wrong = Process::start(&mut chat(&address.to_string(), &control, &[]));
    wrong.wait_for_code(4);
    let mut never = Process::start(&mut listening("127.0.0.1:0", &control, &["--replace", "never"]));
    never.wait_for_code(4);
    assert!(server.is_running());
}

/// A successor holds everything, the server is frozen, and then nothing comes of it. A client leaves, before the freeze
/// or in it: two processes hold its connection then.
#[test]
fn a_takeover_that_is_withdrawn_leaves_everything_as_it_was() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (mut server, address) = serve(&control, &[]);
    let (mut one, mut two) = (Guest::join(address), Guest::join(address));
    one.line();
    for leaves_before_the_freeze in [true, false, true, false] {
        let mut leaver = Guest::join(address);
        let came = |name: &str| format!("<announce> 127.0.0.1 is connected as <{name}>.");
        let gone = |name: &str| format!("<announce> <{name}> is disconnected.");
        [&mut one, &mut two].into_iter().for_each(|guest| guest.hears(&[&came(&leaver.name)]));

        let service = Service::new("chat server 127.0.0.1:0");
        let started = heirloom::start::<NoRequests>(&control, service, Config::default(), Replace::Must);
        let Ok(Start::Successor(successor)) = started else { panic!("{started:?}") };
        let offered = successor.receive().expect("an offer");
        // The control socket, the listener, and the guests.
        assert_eq!(offered.bundle().len(), 5);
        if leaves_before_the_freeze {
            leaver.shutdown();
            [&mut one, &mut two].into_iter().for_each(|guest| guest.hears(&[&gone(&leaver.name)]));
            assert_eq!(leaver.rest().expect("a clean end"), b"");
        }
        let before = status(&control).counters["bytes_in"];
        one.say(b"in ");
        wait_for("half a line to be read", || status(&control).counters["bytes_in"] == before + 3);
        let complete = offered.ready().expect("everything");
        assert_eq!(complete.bundle().len(), if leaves_before_the_freeze { 4 } else { 5 });
        one.say(b"the freeze\n");
        two.say(b"yes\n");
        let newcomer = TcpStream::connect(address).expect("the kernel queues it");
        if !leaves_before_the_freeze {
            leaver.shutdown();
        }
        complete.withdraw("it was a test");

        let mut newcomer = Guest::greeted(newcomer);
        if !leaves_before_the_freeze {
            leaver.rest().expect("a clean end");
        }
        let end = |guest: &Guest| format!("<{}> end", guest.name);
        newcomer.say(b"end\n");
        // What was said, who came and who left in the freeze may be heard in any order.
        let heard = |guest: &mut Guest| {
            let mut lines = Vec::new();
            while lines.last() != Some(&end(&newcomer)) {
                lines.push(guest.line());
            }
            lines.sort_unstable();
            lines
        };
        let mut expected = vec![came(&newcomer.name), end(&newcomer)];
        if !leaves_before_the_freeze {
            expected.push(gone(&leaver.name));
        }
        let expect = |line: String| {
            let mut all = expected.clone();
            all.push(line);
            all.sort_unstable();
            all
        };
        assert_eq!(heard(&mut one), expect(format!("<{}> yes", two.name)));
        assert_eq!(heard(&mut two), expect(format!("<{}> in the freeze", one.name)));
        let name = newcomer.name.clone();
        drop(newcomer);
        for guest in [&mut one, &mut two] {
            guest.hears(&[&gone(&name)]);
        }
    }
    assert!(server.is_running());
    assert_eq!(status(&control).generation, 0);
}

#[test]
fn what_is_no_usage_is_an_error() {
    let wrong: [&[&str]; 5] = [
        &["--listen", "--linger", "1s"],
        &["--backlog", "1M"],
        &["--listen", "--backlog", "1G"],
        &["--listen", "--backlog", "much"],
        &["--listen", "127.0.0.1:0", "127.0.0.1:0"],
    ];
    for options in wrong {
        let mut process = Process::start(heirloom().arg("chat").args(options));
        process.wait_for_code(2);
    }
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("bound").to_string();
    let control = scratch.path("chat.sock");
    for address in [address.as_str(), "nonsense", "127.0.0.1"] {
        let mut process = Process::start(&mut listening(address, &control, &[]));
        process.wait_for_code(1);
        assert!(!control.exists());
    }
}

#[test]
fn ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        return skip("there is no IPv6");
    }
    let scratch = Scratch::new();
    let server = Process::start(&mut listening("[::1]:0", &scratch.path("chat.sock"), &[]));
    let address = address_of(&server);
    let mut one = Guest::join(address);
    let two = Guest::join(address);
    one.hears(&[&format!("<announce> ::1 is connected as <{}>.", two.name)]);
}
