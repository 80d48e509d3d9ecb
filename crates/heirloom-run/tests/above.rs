//! Under a supervisor: what it is told, and that what is held survives a SIGKILL of heirloom-run with it.

mod support;

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use heirloom::control::{Client, Reply, Request, Status};
use heirloom::upgrade::Upgrade;
use rustix::process::{Pid, Signal, kill_process};
use support::{LONG, Run, has_python, puppet, wait_for};

/// A supervisor that only listens.
struct Ear {
    directory: tempfile::TempDir,
    socket: UnixDatagram,
}

impl Ear {
    fn new() -> Ear {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Ear { directory, socket }
    }

    fn run(&self, options: &[&str]) -> Run {
        let by = |program: &str| {
            let mut command = Command::new(program);
            command.env("NOTIFY_SOCKET", self.directory.path().join("notify")).env("WATCHDOG_USEC", "200000");
            command
        };
        Run::start_by(by, options, &puppet())
    }

    /// The next message that is about the life of the service; descriptors, texts and signs of life are passed over.
    #[track_caller]
    fn next(&self) -> String {
        loop {
            let message = self.any();
            if !["FDSTORE", "BARRIER", "WATCHDOG", "STATUS"].iter().any(|other| message.starts_with(other)) {
                return message;
            }
        }
    }

    #[track_caller]
    fn any(&self) -> String {
        let mut buffer = [0; 4096];
        let count = self.socket.recv(&mut buffer).expect("a message");
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }

    /// Waits for a message that begins so.
    #[track_caller]
    fn wait_for(&self, start: &str) {
        let give_up = Instant::now() + LONG;
        while !self.any().starts_with(start) {
            assert!(Instant::now() < give_up, "{start} is not said");
        }
    }
}

#[test]
fn a_supervisor_is_told_what_goes_on() {
    if !has_python() {
        return;
    }
    let ear = Ear::new();
    let mut run = ear.run(&["--expect-ready", "--restart-delay", "2s"]);
    let pid = run.pid();
    let mut first = run.next();
    assert!(ear.any().starts_with("FDSTORE=1\nFDNAME=heirloom.page."), "the vault comes first");
    ear.wait_for("STATUS=starting");
    ear.wait_for("WATCHDOG=1");
    first.tell("notify('READY=1\\nSTATUS=7 guests')");
    let ready = format!("READY=1\nMAINPID={pid}\nSTATUS=ready");
    assert!(ear.next().starts_with(&ready));
    first.tell("notify('STATUS=8 guests')");
    ear.wait_for("STATUS=ready: 8 guests");
    // The command reloads.
    first.tell("notify('RELOADING=1')");
    assert!(ear.next().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    first.tell("notify('READY=1')");
    assert!(ear.next().starts_with(&ready));
    // It fails: that is nothing to the one above.
    first.begin("os._exit(3)");
    ear.wait_for("STATUS=waiting to be started again, since it ended with code 3");
    let mut second = run.next();
    second.tell("notify('READY=1')");
    ear.wait_for("STATUS=ready");
    // It is upgraded.
    let mut third = std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| run.upgrade(Upgrade::default()));
        assert!(ear.next().starts_with("RELOADING=1\n"));
        ear.wait_for("STATUS=starting");
        let mut third = run.next();
        third.tell("notify('READY=1')");
        assert!(ear.next().starts_with(&ready));
        upgrade.join().unwrap().unwrap();
        third
    });
    // And so is heirloom-run.
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| run.upgrade(Upgrade { itself: true, ..Upgrade::default() }));
        assert!(ear.next().starts_with("RELOADING=1\n"));
        assert!(ear.next().starts_with(&ready));
        ear.wait_for("WATCHDOG=1");
        upgrade.join().unwrap().unwrap();
    });
    third.tell("signal.signal(signal.SIGTERM, lambda *_: os._exit(0))");
    run.signal(Signal::TERM);
    assert_eq!(ear.next(), "STOPPING=1\n");
    assert_eq!(run.code(), 0);
}

#[test]
fn a_supervisor_that_does_not_read_or_is_gone_holds_nothing_up() {
    if !has_python() {
        return;
    }
    for gone in [false, true] {
        let ear = Ear::new();
        let mut run = ear.run(&[]);
        let mut first = run.next();
        if gone {
            std::fs::remove_file(ear.directory.path().join("notify")).unwrap();
        }
        for round in 0..50 {
            first.tell(&format!(
                "notify('RELOADING=1\\nSTATUS={round}'); put('x{round}', os.memfd_create('x'))"
            ));
            first.tell("notify('READY=1')");
        }
        wait_for("all to be stored", || run.counter("puts") == 50);
        first.kill(Signal::KILL);
        let mut second = run.next();
        assert_eq!(second.given, 50);
        second.begin("os._exit(0)");
        assert_eq!(run.code(), 0);
        assert!(run.log().matches("supervisor").count() < 12, "{}", run.log());
    }
}

#[test]
fn a_signal_that_the_command_gets_as_well_is_not_passed_on_twice() {
    if !has_python() {
        return;
    }
    let ear = Ear::new();
    let mut run = ear.run(&["--stop-timeout", "60s"]);
    let mut puppet = run.next();
    puppet.tell(
        "signals = []; signal.signal(signal.SIGTERM, lambda *_: (signals.append(1), notify('STOPPING=1')))",
    );
    run.signal(Signal::TERM);
    puppet.kill(Signal::TERM);
    // Longer than a signal is put off.
    puppet.tell("time.sleep(0.6)");
    assert_eq!(puppet.number("len(signals)"), 1);
    puppet.begin("os._exit(0)");
    assert_eq!(run.code(), 0);

    // One that the command did not get is passed on.
    let mut run = ear.run(&[]);
    let mut puppet = run.next();
    puppet.tell("signal.signal(signal.SIGTERM, lambda *_: os._exit(7))");
    run.signal(Signal::TERM);
    assert_eq!(run.code(), 7);
}

/// A heirloom-run with a puppet under a heirloom-run that keeps what it holds.
struct Nested {
    outer: Run,
    directory: tempfile::TempDir,
}

impl Nested {
    fn start(options: &[&str]) -> Nested {
        Nested::under(&[], options)
    }

    /// With options for the outer one, too.
    fn under(outer: &[&str], options: &[&str]) -> Nested {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .expect("chmod");
        let words = Nested::words(&directory, options);
        let outer = [&["--tries", "0", "--restart", "always", "--restart-delay", "0s"], outer].concat();
        Nested { outer: Run::start(&outer, &words), directory }
    }

    fn words(directory: &tempfile::TempDir, options: &[&str]) -> Vec<String> {
        let inner = [env!("CARGO_BIN_EXE_heirloom-run"), "--control"].map(String::from).into_iter();
        let inner = inner.chain([directory.path().join("inner").to_str().expect("text").to_owned()]);
        let inner = inner.chain(options.iter().map(|&option| option.to_owned())).chain(["--".to_owned()]);
        inner.chain(puppet()).collect()
    }

    fn inner_pid(&self) -> Option<u32> {
        self.outer.status().supervised.expect("it").pid
    }

    fn kill_inner(&self, signal: Signal) {
        let pid = self.inner_pid().and_then(|pid| Pid::from_raw(pid as i32)).expect("it runs");
        kill_process(pid, signal).expect("it is there");
    }

    fn control(&self) -> std::path::PathBuf {
        self.directory.path().join("inner")
    }

    fn status(&self) -> Status {
        let mut client = Client::connect(self.control()).expect("it answers");
        client.set_timeout(LONG);
        match client.request(&Request::<heirloom::NoRequests>::Status).expect("a reply") {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    fn stored_above(&self) -> usize {
        self.outer.status().items.len()
    }
}

const LISTEN: &str = "web=127.0.0.1:0";

#[test]
fn what_is_held_survives_every_end_of_run_but_the_last() {
    if !has_python() {
        return;
    }
    let nested = Nested::start(&["--listen", LISTEN]);
    let mut first = nested.outer.next();
    let port = first.number("socket.socket(fileno=os.dup(3)).getsockname()[1]");
    let mut client = std::net::TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    first.tell("l = socket.socket(fileno=os.dup(3)); c, _ = l.accept(); put('client', c.fileno())");
    first.tell("r, w = os.pipe(); os.write(w, b'kept'); put('pipe', r, w, more='FDPOLL=0\\n'); barrier()");
    let status = nested.status();
    assert_eq!(status.supervised.unwrap().kept_above, Some(4));
    assert_eq!(status.items.len(), 4);

    let mut puppets = vec![first];
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL, Signal::INT] {
        let before = nested.inner_pid();
        nested.kill_inner(signal);
        let mut next = nested.outer.next();
        assert_eq!(next.names, "web:client:pipe:pipe");
        assert_ne!(nested.inner_pid(), before);
        assert_eq!(next.number("socket.socket(fileno=os.dup(3)).getsockname()[1]"), port);
        next.tell("c = socket.socket(fileno=os.dup(4)); c.sendall(b'still here\\n')");
        let mut bytes = [0; 11];
        std::io::Read::read_exact(&mut client, &mut bytes).unwrap();
        // An upgrade in place does not change anything.
        heirloom::upgrade::ask(&nested.control(), Upgrade { itself: true, ..Upgrade::default() }, LONG)
            .unwrap();
        assert_eq!(nested.status().supervised.unwrap().kept_above, Some(4));
        next.tell("put('more', os.memfd_create('x')); notify('FDSTOREREMOVE=1\\nFDNAME=more'); barrier()");
        // One that is let go of ends by itself.
        puppets.push(next);
    }
    let mut last = {
        nested.kill_inner(Signal::KILL);
        nested.outer.next()
    };
    assert_eq!(last.text("os.read(5, 9).decode()"), "kept");
    // What is removed is closed at once, whatever is in flight.
    last.tell("notify('FDSTOREREMOVE=1\\nFDNAME=client'); barrier(); os.close(4)");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut client, &mut rest).unwrap();
    assert!(rest.is_empty());
    // The end for good: nothing is left above.
    last.begin("os._exit(0)");
    assert_eq!(nested.outer.next().names, "web");
}

#[test]
fn sockets_stay_with_the_clients_that_wait_in_them() {
    if !has_python() {
        return;
    }
    let sockets = tempfile::tempdir().unwrap();
    let option = |name: &str| format!("{name}={}", sockets.path().join(name).display());
    let (a, b, c) = (option("a"), option("b"), option("c"));
    let nested = Nested::under(&["--listen", "above=127.0.0.1:0"], &["--listen", &a, "--listen", &b]);
    let mut first = nested.outer.next();
    assert_eq!(first.names, "a:b:above");
    let port = "socket.socket(fileno=os.dup(5)).getsockname()[1]";
    let at = first.number(port);
    // They wait where nobody has accepted them yet.
    let mut tcp = std::net::TcpStream::connect(("127.0.0.1", at as u16)).unwrap();
    let mut unix = std::os::unix::net::UnixStream::connect(sockets.path().join("a")).unwrap();
    tcp.set_read_timeout(Some(LONG)).unwrap();
    unix.set_read_timeout(Some(LONG)).unwrap();
    first.tell("put('kept', os.memfd_create('x')); barrier()");
    nested.kill_inner(Signal::KILL);
    let mut second = nested.outer.next();
    assert_eq!(second.names, "a:b:above:kept");
    assert_eq!(second.number(port), at);
    heirloom::upgrade::ask(&nested.control(), Upgrade { itself: true, ..Upgrade::default() }, LONG).unwrap();
    second.kill(Signal::KILL);
    let mut third = nested.outer.next();
    assert_eq!(third.names, "a:b:above:kept");
    for (descriptor, client) in [(3, &mut unix as &mut dyn std::io::Read), (5, &mut tcp)] {
        third.tell(&format!("socket.socket(fileno=os.dup({descriptor})).accept()[0].sendall(b'hello')"));
        let mut bytes = [0; 5];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
    }

    // With other options: what is asked for no more is closed, what is new is bound, the rest stays.
    let words = Nested::words(&nested.directory, &["--listen", &c, "--listen", &a]);
    let request = Upgrade { arguments: Some(words[1..].to_vec()), ..Upgrade::default() };
    let fourth = std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| nested.outer.upgrade(request));
        let fourth = nested.outer.next();
        upgrade.join().unwrap().unwrap();
        fourth
    });
    assert_eq!(fourth.names, "c:a:above:kept");
    for (name, is_there) in [("a", true), ("b", false), ("c", true)] {
        let connected = std::os::unix::net::UnixStream::connect(sockets.path().join(name));
        assert_eq!(connected.is_ok(), is_there, "{name}");
    }
}

#[test]
fn what_there_is_no_room_for_above_is_counted_and_the_rest_survives() {
    if !has_python() {
        return;
    }
    // A page, and what is put there for a moment to see whether it was kept.
    let nested = Nested::under(&["--store-max", "2"], &[]);
    let mut first = nested.outer.next();
    first.tell("for i in range(400): put(f'n{i}', os.memfd_create('x'))");
    first.tell("barrier()");
    let kept = |nested: &Nested| nested.status().supervised.unwrap().kept_above.unwrap_or(0) as i64;
    wait_for("the second page to be refused", || nested.outer.log().contains("no room for more"));
    wait_for("its entries to be taken back", || (1..300).contains(&kept(&nested)));
    assert_eq!(nested.status().items.len(), 400);
    // Room is made, and used.
    first.tell("for i in range(150): notify(f'FDSTOREREMOVE=1\\nFDNAME=n{i}')");
    first.tell("barrier()");
    wait_for("more to be kept", || kept(&nested) > 240);
    let most = kept(&nested);
    nested.kill_inner(Signal::KILL);
    let second = nested.outer.next();
    assert_eq!(second.given, most);
}

#[test]
fn what_ends_for_good_leaves_nothing_above_and_what_fails_leaves_all() {
    if !has_python() {
        return;
    }
    let nested = Nested::start(&["--tries", "1"]);
    let mut first = nested.outer.next();
    first.tell("put('kept', os.memfd_create('x')); barrier()");
    first.begin("os._exit(3)");
    // It gave up, and was started again by the one above.
    let mut second = nested.outer.next();
    assert_eq!(second.names, "kept");
    let mut client = Client::connect(nested.control()).unwrap();
    client.set_timeout(LONG);
    second.tell("signal.signal(signal.SIGTERM, lambda *_: os._exit(4))");
    client.request(&Request::<heirloom::NoRequests>::Quit).unwrap();
    let third = nested.outer.next();
    assert_eq!(third.names, "");
}

#[test]
fn without_a_vault_it_is_as_it_was() {
    if !has_python() {
        return;
    }
    let nested = Nested::start(&["--store-above", "never"]);
    let mut first = nested.outer.next();
    first.tell("put('gone', os.memfd_create('x')); barrier()");
    assert_eq!((nested.status().supervised.unwrap().kept_above, nested.stored_above()), (None, 0));
    first.kill(Signal::KILL);
    // Held: one that is let go of ends by itself, and the inner run with it.
    let second = nested.outer.next();
    assert_eq!(second.names, "gone");
    nested.kill_inner(Signal::KILL);
    let mut third = nested.outer.next();
    third.tell("0");
    assert_eq!(third.names, "");
}

/// Puts and removes pipes at random, and writes down what it is about to do and what is certain.
const WORK: &str = r"
import random
def work(path, first, held):
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = first
    while True:
        for _ in range(random.randrange(1, 30)):
            if held and random.random() < 0.47:
                name = held.pop(random.randrange(len(held)))
                os.write(log, f'- {name}\n'.encode())
                notify(f'FDSTOREREMOVE=1\nFDNAME={name}')
            else:
                name, number = f'p{number}', number + 1
                os.write(log, f'+ {name}\n'.encode())
                r, w = os.pipe()
                put(name, r, w, more='FDPOLL=0\n')
                os.close(r)
                os.close(w)
                held.append(name)
        barrier()
        os.write(log, b'=\n')
def check():
    names = os.environ['LISTEN_FDNAMES'].split(':')[1:]
    for place in range(0, len(names), 2):
        assert names[place] == names[place + 1], names
        r, w = 4 + place, 5 + place
        os.write(w, b'alive')
        assert os.read(r, 9) == b'alive'
    for place in range(len(names)):
        os.close(4 + place)
    return names[::2]
";

/// What must be held, and what may be, after a log that begins with these.
fn promised(log: &str, held: &BTreeSet<String>) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut certain, mut possible, mut pending) = (held.clone(), held.clone(), Vec::new());
    for line in log.lines() {
        match line.split_once(' ') {
            Some(("+", name)) => {
                possible.insert(name.to_owned());
                pending.push((true, name.to_owned()));
            }
            Some(("-", name)) => {
                certain.remove(name);
                pending.push((false, name.to_owned()));
            }
            _ => {
                // In their order: what was put may have been removed right away.
                for (put, name) in pending.drain(..) {
                    let (certain, possible) = (&mut certain, &mut possible);
                    if put {
                        certain.insert(name);
                    } else {
                        certain.remove(&name);
                        possible.remove(&name);
                    }
                }
            }
        }
    }
    for (put, name) in pending {
        if !put {
            certain.remove(&name);
        }
    }
    (certain, possible)
}

#[test]
fn it_is_upgraded_in_place_while_the_command_puts_without_a_pause() {
    if !has_python() {
        return;
    }
    let nested = Nested::start(&["--listen", LISTEN]);
    let mut puppet = nested.outer.next();
    puppet.tell(WORK);
    let path = nested.directory.path().join("log");
    puppet.begin(&format!("work('{}', 0, [])", path.display()));
    let puts = || nested.status().counters["puts"];
    for _ in 0..10 {
        let before = puts();
        wait_for("further puts", || puts() > before);
        heirloom::upgrade::ask(&nested.control(), Upgrade { itself: true, ..Upgrade::default() }, LONG)
            .unwrap();
    }
    // The pages above are still those in which things are kept.
    nested.kill_inner(Signal::KILL);
    let next = nested.outer.next();
    let log = std::fs::read_to_string(&path).unwrap();
    let (certain, possible) = promised(&log, &BTreeSet::new());
    let held: BTreeSet<String> = next.names.split(':').skip(1).map(str::to_owned).collect();
    assert!(certain.is_subset(&held) && held.is_subset(&possible), "{certain:?}\n{held:?}\n{possible:?}");
}

#[test]
fn killed_at_any_moment_the_next_run_has_exactly_what_was_promised() {
    if !has_python() {
        return;
    }
    let rounds = std::env::var("HEIRLOOM_KILLS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(25);
    let nested = Nested::start(&["--listen", LISTEN, "--restart-delay", "1ms"]);
    let mut held = BTreeSet::new();
    let (mut next, mut seed, mut most) = (0_u64, 0x9e37_79b9_7f4a_7c15_u64, 0);
    let mut puppet = nested.outer.next();
    for round in 0..rounds {
        puppet.tell(WORK);
        let now: BTreeSet<String> = serde_json::from_value(puppet.tell("check()")).unwrap();
        assert_eq!(now, held);
        let path = nested.directory.path().join(format!("log{round}"));
        let names = serde_json::to_string(&held).unwrap();
        puppet.begin(&format!("work('{}', {next}, {names})", path.display()));
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((seed >> 33) % 60_000));
        match round % 5 {
            3 => {
                // In the middle of an upgrade in place, or right after it.
                let control = nested.control();
                let upgrade = std::thread::spawn(move || {
                    let request = Upgrade { itself: true, ..Upgrade::default() };
                    let _ = heirloom::upgrade::ask(&control, request, LONG);
                });
                std::thread::sleep(Duration::from_micros((seed >> 20) % 100_000));
                nested.kill_inner(Signal::KILL);
                upgrade.join().unwrap();
            }
            4 => nested.kill_inner(Signal::TERM),
            _ => nested.kill_inner(Signal::KILL),
        }
        puppet = nested.outer.next();
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        let (certain, possible) = promised(&log, &held);
        let names: Vec<&str> = puppet.names.split(':').skip(1).collect();
        held = names.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(held.len() * 2, names.len(), "{names:?}");
        let lost: Vec<_> = certain.difference(&held).collect();
        let back: Vec<_> = held.difference(&possible).collect();
        assert!(lost.is_empty() && back.is_empty(), "round {round}: lost {lost:?}, came back {back:?}");
        let numbers =
            log.lines().filter_map(|line| line.strip_prefix("+ p")).map(|number| number.parse::<u64>());
        next = numbers.map(|number| number.unwrap() + 1).max().unwrap_or(next);
        most = most.max(held.len());
    }
    // The store above has pages, and nothing else.
    let above = nested.outer.status().items;
    assert!(above.iter().all(|item| item.name.starts_with("heirloom.page.")), "{above:?}");
    eprintln!("{rounds} kills, {next} pipes put, at most {most} held, {} pages at the end", above.len());
}
