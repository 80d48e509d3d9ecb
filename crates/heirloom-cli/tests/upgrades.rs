//! `heirloom upgrade` and `heirloom inspect`: every way to a new program, and who is told to wait meanwhile.

mod rogue;
mod stream;
mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use heirloom::NoRequests;
use heirloom::control::{Client, FailureCode, Reply, Request, Status};
use heirloom::upgrade::Upgrade;
use rogue::{Plot, Role};
use rustix::process::Signal;
use stream::Stream;
use support::generations::{Sender, accept, assert_same, listen, read_all};
use support::proc::{has_ended, only_child, program, settled_footprint, signal, wait_for_footprint};
use support::random::Random;
use support::upgrading::*;
use support::*;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

/// A chat that streams. The programs that it is upgraded to have its stdin, stdout and stderr, so that everything that any of
/// them writes is the first one's.
struct Serving {
    _ends: EndsServing,
    first: Process,
    control: PathBuf,
    stream: Stream,
    typed: String,
    scratch: Scratch,
}

impl Serving {
    fn start(options: &[&str]) -> Serving {
        Serving::start_with(Scratch::new(), this_program().as_os_str().into(), options)
    }

    fn start_with(scratch: Scratch, program: std::ffi::OsString, options: &[&str]) -> Serving {
        let mut command = Command::new(program);
        let stream = Stream::start();
        let control = scratch.path("chat.sock");
        command.args(["chat", stream.address(), "--control"]).arg(&control).args(options);
        Serving::start_by(scratch, stream, &mut command)
    }

    fn start_by(scratch: Scratch, stream: Stream, command: &mut Command) -> Serving {
        let control = scratch.path("chat.sock");
        let first = Process::start(command);
        wait_until_connected(&control);
        Serving { _ends: EndsServing(control.clone()), first, control, stream, typed: String::new(), scratch }
    }

    fn status(&self) -> Status {
        status(&self.control)
    }

    fn upgrade(&self, options: &[&str]) -> Upgraded {
        upgrade(&self.control, options)
    }

    /// Upgrades, and looks at what became of it.
    fn upgrades(&mut self, place: Place, options: &[&str]) -> Status {
        let before = self.status();
        let said = self.upgrade(&[place.options(), options].concat()).done();
        let now = self.status();
        let (was, is) = (before.generation, now.generation);
        let version = env!("CARGO_PKG_VERSION");
        let upgraded = match place {
            Place::Beside => "upgraded: ",
            Place::InPlace => "upgraded in place: ",
        };
        let expected = format!(
            "{upgraded}generation {was} (heirloom {version}, pid {}) became generation {is} (heirloom {version}, pid {}); 2 items, pause ",
            before.pid, now.pid
        );
        assert!(
            said.starts_with(&expected) && said.ends_with(" µs\n"),
            "{said} does not begin with {expected}"
        );
        self.has_become(place, &before, &now);
        now
    }

    /// Upgrades by SIGUSR2.
    fn upgrades_by_signal(&mut self) -> Status {
        let before = self.status();
        signal(before.pid, Signal::USR2);
        self.wait_for_next_after(&before, Place::Beside);
        let now = self.status();
        self.has_become(Place::Beside, &before, &now);
        now
    }

    fn wait_for_next_after(&self, before: &Status, place: Place) {
        wait_for_generation(&self.control, before.generation + 1);
        // It answers at the control socket, too, until it knows that the new program serves.
        wait_for("the old program's end", || place == Place::InPlace || has_ended(before.pid));
    }

    fn has_become(&mut self, place: Place, before: &Status, now: &Status) {
        assert_eq!(now.generation, before.generation + 1);
        assert_eq!(now.pid == before.pid, place == Place::InPlace, "{before:?}\n{now:?}");
        assert_eq!(now.items, before.items);
        assert!(now.counters["bytes_in"] >= before.counters["bytes_in"]);
        let last = now.last_takeover.as_ref().expect("it was upgraded");
        assert_eq!((last.outcome.as_str(), last.items), ("taken", 2));
        let seen = self.first.stdout_len();
        wait_for("more of the stream", || self.first.stdout_len() > seen);
        let word = format!("typed in generation {}\n", now.generation);
        self.first.write(word.as_bytes());
        self.typed.push_str(&word);
        wait_for("what was typed", || self.stream.heard() == self.typed);
    }

    /// Nothing is missing of the stream, and everybody has ended as they should.
    fn finish(mut self) -> String {
        self.stream.ends_exact(0, &[&self.first]);
        Process::start(heirloom().arg("quit").arg("--control").arg(&self.control)).wait_for_code(0);
        self.first.wait_for_code(0);
        let log = self.first.stderr();
        assert!(!log.contains("ERROR"), "{log}");
        log
    }
}

#[test]
fn the_same_program_again_beside_and_in_place() {
    let mut serving = Serving::start(&["--replace", "never"]);
    let first = serving.status();
    assert_ne!(serving.upgrades(Place::Beside, &[]).pid, first.pid);
    serving.upgrades(Place::InPlace, &[]);
    serving.upgrades(Place::InPlace, &[]);
    serving.upgrades(Place::Beside, &[]);
    serving.upgrades_by_signal();
    assert_eq!(serving.status().started_unix_ms, first.started_unix_ms);
    let log = serving.finish();
    assert_eq!(log.matches("took over").count(), 3, "{log}");
    assert_eq!(log.matches("upgraded in place").count(), 2, "{log}");
}

#[test]
fn another_file_and_what_a_signal_means_afterwards() {
    let mut serving = Serving::start(&[]);
    let copy = serving.scratch.copy_of_this_program("a copy");
    let link = serving.scratch.path("a-link");
    std::fs::hard_link(&copy, &link).expect("a hard link");
    for place in Place::BOTH {
        for path in [&copy, &link] {
            let now = serving.upgrades(place, &["--program", path.to_str().expect("UTF-8")]);
            assert_eq!(program(now.pid), *path);
            let now = serving.upgrades_by_signal();
            assert_eq!(program(now.pid), *path);
        }
    }
    // A path that is relative to the directory of who asks.
    let mut command = heirloom();
    command.args(["upgrade", "--program", "./a copy", "--control"]).arg(&serving.control);
    Process::start(command.current_dir(link.parent().expect("a directory"))).wait_for_code(0);
    assert_eq!(program(serving.status().pid), copy);
    serving.finish();
}

#[test]
fn other_arguments_and_a_script_that_starts_the_program() {
    for place in Place::BOTH {
        let mut serving = Serving::start(&[]);
        let (address, control) = (serving.stream.address().to_owned(), serving.control.clone());
        let control = control.to_str().expect("UTF-8");
        let arguments = ["--", "chat", &address, "--control", control, "--log-format", "json"];
        serving.upgrades(place, &arguments);
        serving.upgrades(place, &[]);
        let script = serving.scratch.script("start", "exec \"$REAL\" \"$@\"");
        serving.upgrades(place, &["--program", script.to_str().expect("UTF-8")]);
        let log = serving.finish();
        let message = if place == Place::Beside { "took over" } else { "upgraded in place" };
        let json = |line: &&str| {
            serde_json::from_str::<serde_json::Value>(line).is_ok_and(|line| line["message"] == message)
        };
        assert_eq!(log.lines().filter(json).count(), 3, "{log}");
    }
}

#[test]
fn a_file_that_was_replaced_is_the_new_program() {
    for place in Place::BOTH {
        let scratch = Scratch::new();
        let (program_file, next) = (scratch.copy_of_this_program("program"), scratch.path("next"));
        let mut serving = Serving::start_with(scratch, program_file.clone().into(), &[]);
        for _ in 0..2 {
            let next_file = serving.scratch.copy_of_this_program("next");
            std::fs::rename(&next_file, &program_file).expect("rename");
            let deleted = format!("{} (deleted)", program_file.display());
            assert_eq!(program(serving.status().pid), Path::new(&deleted));
            let now = serving.upgrades(place, &[]);
            assert_eq!(program(now.pid), program_file);
        }
        serving.finish();

        // One whose file is replaced before it can look what it is called.
        let scratch = Scratch::new();
        let program_file = scratch.copy_of_this_program("program");
        let next =
            scratch.copy_of_this_program(next.file_name().and_then(|name| name.to_str()).expect("a name"));
        let stream = Stream::start();
        let mut command = Command::new("sh");
        let script = "exec 9<\"$1\"; mv \"$2\" \"$1\"; shift 2; exec /proc/self/fd/9 \"$@\"";
        command.args(["-c", script, "sh"]).arg(&program_file).arg(&next);
        command.args(["chat", stream.address(), "--control"]).arg(scratch.path("chat.sock"));
        let mut serving = Serving::start_by(scratch, stream, &mut command);
        let deleted = format!("{} (deleted)", program_file.display());
        assert_eq!(program(serving.status().pid), Path::new(&deleted));
        assert_eq!(program(serving.upgrades(place, &[]).pid), program_file);
        serving.finish();
    }
}

/// As where each release has a directory of its own, and a link says which is the current one.
#[test]
fn a_link_that_leads_elsewhere_is_followed_anew() {
    let scratch = Scratch::new();
    let (one, two) = (scratch.copy_of_this_program("one"), scratch.copy_of_this_program("two"));
    let (current, fresh) = (scratch.path("current"), scratch.path("fresh"));
    let lead_to = |program: &Path| {
        std::os::unix::fs::symlink(program, &fresh).expect("symlink");
        std::fs::rename(&fresh, &current).expect("rename");
    };
    lead_to(&one);
    let mut serving = Serving::start_with(scratch, current.clone().into(), &[]);
    assert_eq!(program(serving.status().pid), one);
    for place in Place::BOTH {
        lead_to(&two);
        assert_eq!(program(serving.upgrades(place, &[]).pid), two);
        lead_to(&one);
        assert_eq!(program(serving.upgrades_by_signal().pid), one);
    }
    serving.finish();
}

#[test]
fn a_dry_run_changes_nothing() {
    let serving = Serving::start(&[]);
    let footprint = settled_footprint(serving.first.id());
    let before = serving.status();
    let version = env!("CARGO_PKG_VERSION");
    for (place, how) in Place::BOTH.into_iter().zip(["", " in place"]) {
        let said = serving.upgrade(&[place.options(), &["--dry-run"]].concat()).done();
        let expected = format!("could be upgraded{how} to heirloom {version}: 2 items, ");
        assert!(said.starts_with(&expected) && said.ends_with(" bytes of manifest\n"), "{said}");
        let options = [place.options(), &["--dry-run", "--program", "/bin/true"]].concat();
        serving.upgrade(&options).failed(5, &["without an answer"]);
        wait_for_footprint("everything as before", serving.first.id(), &footprint);
        let now = serving.status();
        assert_eq!((now.pid, now.generation, now.last_takeover), (before.pid, before.generation, None));
    }
    serving.finish();
}

/// Both directions at full speed, with the same stdin and stdout throughout.
#[test]
fn streams_through_upgrades_of_both_kinds() {
    const UPGRADES: u64 = 20;
    const LINES: u64 = 200_000;
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    let (stdin, keyboard) = std::io::pipe().expect("pipe");
    let (screen, stdout) = std::io::pipe().expect("pipe");
    let mut first = Process::start_between(&mut chat(&address, &control, &[]), stdin, stdout);
    let _ends = EndsServing(control.clone());
    let server = accept(&listener);
    wait_until_connected(&control);
    let (shown, heard) = (read_all(screen), read_all(server.try_clone().expect("dup")));
    let (sender, typist) = (Sender::start(server, LINES), Sender::start(keyboard, LINES));
    let mut pid = first.id();
    for generation in 1..=UPGRADES {
        // Each kind after each kind.
        let place = if matches!(generation % 4, 0 | 1) { Place::Beside } else { Place::InPlace };
        upgrade(&control, place.options()).done();
        let now = status(&control);
        assert_eq!((now.generation, now.pid == pid), (generation, place == Place::InPlace));
        pid = now.pid;
    }
    let (sent, typed) = (sender.finish(), typist.finish());
    wait_for("everything on its way", || {
        let status = status(&control);
        let counted = |name| status.counters.get(name).copied().unwrap_or(0);
        (counted("bytes_in"), counted("bytes_out")) == (sent.len() as u64, typed.len() as u64)
    });
    Process::start(heirloom().arg("quit").arg("--control").arg(&control)).wait_for_code(0);
    first.wait_for_code(0);
    assert_same(&shown.join().expect("the screen reads"), &sent);
    assert_same(&heard.join().expect("the server reads"), &typed);
}

/// A successor that was admitted and does nothing more.
fn stalled_takeover(serving: &Serving) -> Process {
    let plot = Plot { role: Role::Successor, point: "offered", act: "pause" };
    let rogue = rogue::start(plot, &serving.control, serving.stream.address());
    rogue::wait_until_there(&rogue);
    rogue
}

#[test]
fn during_a_takeover_an_upgrade_is_refused_and_inspect_waits() {
    let mut serving = Serving::start(&[]);
    let mut rogue = stalled_takeover(&serving);
    let busy = format!("a takeover by pid {} (uid ", rogue.id());
    let busy = [busy.as_str(), "is going on; try again when it has ended"];
    for place in Place::BOTH {
        serving.upgrade(place.options()).failed(4, &busy);
    }
    serving.upgrade(&["--dry-run"]).failed(4, &busy);
    serving.first.signal(Signal::USR2);
    wait_for("the signal's refusal", || serving.first.stderr().contains("no upgrade "));
    let mut inspect = Process::start(heirloom().args(["inspect", "--control"]).arg(&serving.control));
    for _ in 0..20 {
        assert!(serving.status().takeover_running);
    }
    assert!(inspect.is_running(), "{}", String::from_utf8_lossy(&inspect.stdout()));
    rogue.kill();
    inspect.wait_for_code(0);
    assert!(String::from_utf8_lossy(&inspect.stdout()).contains("items          2"));
    serving.upgrades(Place::Beside, &[]);
    serving.stream.ends_exact(0, &[&serving.first]);
}

/// A new program whose preflight waits until this file is there.
fn waits_for(serving: &Serving, name: &str) -> (String, PathBuf) {
    let file = serving.scratch.path(name);
    let text = format!("while ! [ -e '{}' ]; do sleep 0.01; done; exec \"$REAL\" \"$@\"", file.display());
    let script = serving.scratch.script(&format!("waits-for-{name}"), &text);
    (script.to_str().expect("UTF-8").into(), file)
}

fn start_upgrade(serving: &Serving, place: Place, program: &str) -> Process {
    let mut command = heirloom();
    command.arg("upgrade").arg("--control").arg(&serving.control).args(place.options());
    let process = Process::start(command.args(["--program", program]));
    wait_for("the upgrade to begin", || serving.status().takeover_running);
    process
}

#[test]
fn during_an_upgrade_others_are_refused_and_inspect_waits() {
    for place in Place::BOTH {
        let mut serving = Serving::start(&[]);
        let (script, go) = waits_for(&serving, "go");
        let mut first = start_upgrade(&serving, place, &script);
        serving.upgrade(&[]).failed(4, &["another upgrade is going on; try again when it has ended"]);
        serving.upgrade(&["--in-place"]).failed(4, &["another upgrade is going on"]);
        let foreign = &mut chat(serving.stream.address(), &serving.control, &["--replace", "must"]);
        let mut foreign = Process::start(foreign);
        foreign.wait_for_code(4);
        assert!(foreign.stderr().contains("an upgrade is going on"), "{}", foreign.stderr());
        serving.first.signal(Signal::USR2);
        wait_for("the signal's refusal", || serving.first.stderr().contains("no upgrade "));
        let mut inspect = Process::start(heirloom().args(["inspect", "--control"]).arg(&serving.control));
        for _ in 0..20 {
            assert!(serving.status().takeover_running);
        }
        assert!(inspect.is_running(), "{}", String::from_utf8_lossy(&inspect.stdout()));
        let seen = serving.first.stdout_len();
        wait_for("more of the stream meanwhile", || serving.first.stdout_len() > seen);
        std::fs::write(go, "").expect("write");
        first.wait_for_code(0);
        inspect.wait_for_code(0);
        assert_eq!(serving.status().generation, 1);
        serving.stream.ends_exact(0, &[&serving.first]);
    }
}

#[test]
fn an_upgrade_of_another_generation_is_refused_and_nobody_is_nobody() {
    let mut serving = Serving::start(&[]);
    serving.upgrades(Place::InPlace, &[]);
    for meant in [0, 2] {
        let mut client = Client::connect(&serving.control).expect("connect");
        let request = Upgrade { generation: Some(meant), ..Upgrade::default() };
        let Ok(Reply::Error(failure)) = client.request(&Request::<NoRequests>::Upgrade(request)) else {
            panic!("it was not refused")
        };
        assert_eq!(failure.code, FailureCode::Busy);
        let expected = format!("generation 1 serves by now, and generation {meant} was to be upgraded");
        assert!(failure.message.contains(&expected), "{}", failure.message);
    }
    let nobody = serving.scratch.path("nobody.sock");
    upgrade(&nobody, &[] as &[&str]).failed(3, &["nobody serves at"]);
    serving.finish();
}

/// The incumbent is killed while the new program looks at its manifest: whoever asked hears of it, and the new program, whose
/// stdin is a manifest, does not take itself for one that was started by hand.
#[test]
fn an_incumbent_that_is_killed_in_a_preflight_leaves_nobody() {
    for place in Place::BOTH {
        let serving = Serving::start(&[]);
        let pid_file = serving.scratch.path("pid");
        let go = serving.scratch.path("go");
        let text = format!(
            "echo $$ >'{0}.new'; mv '{0}.new' '{0}'\nwhile ! [ -e '{1}' ]; do sleep 0.01; done; exec \"$REAL\" \"$@\"",
            pid_file.display(),
            go.display()
        );
        let script = serving.scratch.script("waits", &text);
        let mut asked = start_upgrade(&serving, place, script.to_str().expect("UTF-8"));
        wait_for("the preflight", || pid_file.exists());
        let preflight = std::fs::read_to_string(&pid_file).expect("read");
        let mut first = serving.first;
        first.kill();
        assert_eq!(first.wait().code(), None);
        std::fs::write(go, "").expect("write");
        let preflight = preflight.trim().parse().expect("a pid");
        let gone = || has_ended(preflight);
        wait_for("the preflight to end by itself, or to serve", || {
            gone() || try_status(&serving.control).is_some()
        });
        assert_eq!(try_status(&serving.control), None, "it serves, with a manifest as its stdin");
        asked.wait_for_code(1);
        let said = asked.stderr();
        assert!(said.contains("nobody answers at") && said.contains("see its log"), "{said}");
        assert_eq!(serving.stream.heard(), "", "it was sent to the server");
    }
}

/// Whoever asked is told, and the new program is ended too.
#[test]
fn an_incumbent_that_is_told_to_stop_gives_up_the_upgrade() {
    for by_signal in [true, false] {
        let mut serving = Serving::start(&[]);
        let (script, _) = waits_for(&serving, "never");
        let mut asked = start_upgrade(&serving, Place::InPlace, &script);
        let preflight = only_child(serving.first.id());
        if by_signal {
            serving.first.signal(Signal::TERM);
        } else {
            Process::start(heirloom().arg("quit").arg("--control").arg(&serving.control)).wait_for_code(0);
        }
        serving.first.wait_for_code(0);
        asked.wait_for_code(1);
        assert!(asked.stderr().contains("the incumbent was told to"), "{}", asked.stderr());
        assert!(has_ended(preflight), "the preflight lives on");
        assert!(!serving.control.exists(), "the control socket is removed");
    }
}

#[test]
fn whoever_does_not_wait_for_the_outcome_does_not_change_it() {
    for place in Place::BOTH {
        let mut serving = Serving::start(&[]);
        let (script, go) = waits_for(&serving, "go");
        let options = [place.options(), &["--program", &script, "--timeout", "100ms"]].concat();
        serving.upgrade(&options).failed(1, &["no outcome within 100ms", "goes on"]);
        let before = serving.status();
        assert!(before.takeover_running);
        std::fs::write(go, "").expect("write");
        serving.wait_for_next_after(&before, place);
        serving.upgrades(place, &[]);
        serving.finish();
    }
}

#[test]
fn of_many_upgrades_at_once_each_is_done_or_refused() {
    const AT_ONCE: usize = 12;
    for place in Place::BOTH {
        let serving = Serving::start(&[]);
        let asked: Vec<_> = std::thread::scope(|scope| {
            let ask = || scope.spawn(|| serving.upgrade(place.options()));
            let asking: Vec<_> = (0..AT_ONCE).map(|_| ask()).collect();
            asking.into_iter().map(|one| one.join().expect("it is waited for")).collect()
        });
        let done = asked.iter().filter(|one| one.code == Some(0)).count();
        for one in asked.into_iter().filter(|one| one.code != Some(0)) {
            one.failed(4, &[]);
        }
        let generation = serving.status().generation;
        assert!((1..=done as u64).contains(&generation), "generation {generation} after {done} upgrades");
        serving.finish();
    }
}

/// Three ask over and over, each as soon as it has its answer, for either kind: one upgrade follows another at once, often by whoever
/// has only just begun to serve.
#[test]
fn upgrades_back_to_back_by_several_who_ask() {
    const ASKERS: usize = 3;
    const EACH: usize = 8;
    let mut serving = Serving::start(&[]);
    let random = Mutex::new(Random::seeded());
    let done = std::thread::scope(|scope| {
        let (serving, random) = (&serving, &random);
        let ask = || {
            let mut done = 0;
            while done < EACH {
                let place = Place::BOTH[random.lock().expect("no panic").below(2) as usize];
                let asked = serving.upgrade(place.options());
                match asked.code {
                    Some(0) => done += 1,
                    // Another one's is going on.
                    _ => drop(asked.failed(4, &[])),
                }
            }
            done
        };
        let asking: Vec<_> = (0..ASKERS).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|one| one.join().expect("it is waited for")).sum::<usize>()
    });
    let generation = serving.status().generation;
    // Who asks one that is just being replaced may be told of the upgrade that is going on anyway.
    assert!(
        (EACH as u64..=done as u64).contains(&generation),
        "generation {generation} after {done} upgrades"
    );
    println!("{done} were done, in {generation} generations");
    // The last one is as good as the first.
    serving.upgrades(Place::Beside, &[]);
    serving.upgrades(Place::InPlace, &[]);
    serving.finish();
}

/// While the new program looks at the manifest, the connection in it is lost, and another one made.
#[test]
fn what_changes_during_a_preflight_is_handed_over_as_it_is_then() {
    for place in Place::BOTH {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let (listener, address) = listen();
        let mut chat = Process::start(&mut chat(&address, &control, &[]));
        let _ends = EndsServing(control.clone());
        let mut expected = Vec::new();
        for round in 0..3 {
            let server = accept(&listener);
            wait_until_connected(&control);
            let go = scratch.path(&format!("go {round}"));
            let text =
                format!("while ! [ -e '{}' ]; do sleep 0.01; done; exec \"$REAL\" \"$@\"", go.display());
            let script = scratch.script(&format!("waits {round}"), &text);
            let mut command = heirloom();
            command.arg("upgrade").arg("--control").arg(&control).args(place.options());
            let mut asked = Process::start(command.arg("--program").arg(script));
            wait_for("the upgrade to begin", || status(&control).takeover_running);
            drop(server);
            let mut server = accept(&listener);
            let greeting = format!("hello {round}\n");
            server.write_all(greeting.as_bytes()).expect("write");
            expected.extend(greeting.bytes());
            wait_for("the new connection's bytes", || chat.stdout() == expected);
            std::fs::write(go, "").expect("write");
            asked.wait_for_code(0);
            server.write_all(b"and on\n").expect("the new connection lives");
            expected.extend(b"and on\n");
            wait_for("bytes after the upgrade", || chat.stdout() == expected);
            assert_eq!(status(&control).generation, round + 1);
            chat.write(b"?");
            let mut byte = [0];
            server.read_exact(&mut byte).expect("the new connection lives");
        }
    }
}

#[test]
fn a_chat_without_a_connection_is_upgraded_too() {
    for place in Place::BOTH {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        // Bound, so that nobody else can have it, and not listening yet, so that connections are refused.
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
        let socket = socket.expect("socket");
        rustix::net::bind(&socket, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
        let listener = std::net::TcpListener::from(socket);
        let address = listener.local_addr().expect("bound").to_string();
        let chat = Process::start(&mut chat(&address, &control, &[]));
        let _ends = EndsServing(control.clone());
        status(&control);
        for generation in 1..=2 {
            let said = upgrade(&control, place.options()).done();
            assert!(said.contains("; 1 items, pause "), "{said}");
            assert_eq!(status(&control).generation, generation);
        }
        rustix::net::listen(&listener, 1).expect("listen");
        let mut server = accept(&listener);
        server.write_all(b"hello\n").expect("write");
        wait_for("the greeting", || chat.stdout() == b"hello\n");
    }
}

/// A program of before preflights takes itself for a successor at once: this one, with nobody to tell it otherwise.
#[test]
fn an_older_program_can_take_over_but_not_in_place() {
    let mut serving = Serving::start(&[]);
    let older = serving.scratch.script("older", "exec env -u HEIRLOOM_UPGRADE \"$REAL\" \"$@\"");
    let older = older.to_str().expect("UTF-8");
    let why = "the new program knows nothing of preflights, and asked to take over at once";
    serving.upgrade(&["--in-place", "--program", older]).failed(5, &[why]);
    serving.upgrade(&["--dry-run", "--program", older]).failed(5, &[why]);
    let now = serving.upgrades(Place::Beside, &["--program", older]);
    assert_eq!(now.generation, 1);
    serving.finish();
}

/// An incumbent of before upgrades answers other questions.
#[test]
fn an_older_incumbent_is_recognized() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let listener = std::os::unix::net::UnixListener::bind(&control).expect("bind");
    let older = std::thread::spawn(move || {
        for _ in 0..2 {
            let (stream, _) = listener.accept().expect("a question");
            let mut question = String::new();
            BufReader::new(&stream).read_line(&mut question).expect("a line");
            let answer = match question.trim() {
                "\"Status\"" => r#"{"Status":{"name":"chat","program":"heirloom","version":"0.0.9"}}"#,
                _ => r#"{"Error":{"code":"unknown","message":"unknown request \"Upgrade\""}}"#,
            };
            writeln!(&stream, "{answer}").expect("it listens");
        }
    });
    let mut upgrade = heirloom();
    let mut upgrade = Process::start(upgrade.args(["upgrade", "--control"]).arg(&control));
    upgrade.wait_for_code(1);
    assert!(upgrade.stderr().contains("(heirloom 0.0.9) knows nothing of upgrades"), "{}", upgrade.stderr());
    older.join().expect("two questions were asked");
}

#[test]
fn inspect_shows_what_there_is_while_it_moves() {
    let mut serving = Serving::start(&[]);
    let inspect = |options: &[&str]| {
        let mut command = heirloom();
        command.arg("inspect").args(options).arg("--control").arg(&serving.control);
        let output = command.stdin(Stdio::null()).output().expect("it can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let address = serving.stream.address().to_owned();
    let mut before = 0;
    for _ in 0..20 {
        let shown: serde_json::Value = serde_json::from_str(&inspect(&["--json"])).expect("JSON");
        assert_eq!(shown["service"]["name"], format!("chat {address}"));
        assert_eq!(shown["service"]["generation"], 0);
        let items = shown["items"].as_array().expect("items");
        assert_eq!(items.len(), 2, "{shown:#}");
        assert_eq!((&items[1]["name"], &items[1]["kind"]), (&"server".into(), &"tcp-stream".into()));
        let bytes_in = shown["state"]["bytes_in"].as_u64().expect("a number");
        assert!(bytes_in >= before && shown["state"]["stdin_open"] == true, "{shown:#}");
        before = bytes_in;
        let seen = serving.first.stdout_len();
        wait_for("more of the stream", || serving.first.stdout_len() > seen);
    }
    assert!(before > 0);
    let table = inspect(&[]);
    for part in [
        &format!("service        chat {address}\n"),
        "generation     0\n",
        "items          2\n",
        "bytes_in: ",
        "server (tcp-stream, id 1)",
    ] {
        assert!(table.contains(part), "{part:?} is not in\n{table}");
    }
    let status = serving.status();
    assert_eq!((status.pid, status.generation), (serving.first.id(), 0));
    serving.upgrades(Place::Beside, &[]);
    serving.finish();
}
