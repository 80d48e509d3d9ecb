//! Upgrades that fail: whatever is wrong with the new program, the incumbent serves on as if nothing had happened.

mod stream;
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use heirloom::NoRequests;
use heirloom::control::{Client, Reply, Request, Status};
use heirloom::upgrade::Upgrade;
use stream::Stream;
use support::proc::{Footprint, settled_footprint, wait_for_footprint};
use support::upgrading::*;
use support::*;

/// A new program with which something is wrong, and what is said of it.
struct Bad {
    what: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    says: &'static [&'static str],
}

impl Bad {
    fn program(what: &'static str, program: PathBuf, says: &'static [&'static str]) -> Bad {
        Bad { what, program, arguments: Vec::new(), says }
    }

    fn script(scratch: &Scratch, what: &'static str, text: &str, says: &'static [&'static str]) -> Bad {
        Bad::program(what, scratch.script(&what.replace(' ', "-"), text), says)
    }

    fn arguments(what: &'static str, arguments: &[&str], says: &'static [&'static str]) -> Bad {
        let arguments = arguments.iter().map(|argument| argument.to_string()).collect();
        Bad { what, program: this_program().into(), arguments, says }
    }
}

/// What fails at once, however the upgrade is made.
fn bad_programs(scratch: &Scratch, address: &str, control: &Path) -> Vec<Bad> {
    let mut other_machine = std::fs::read(this_program()).expect("a program");
    other_machine.truncate(4096);
    // e_machine in the header of elf(5); 2 is SPARC.
    other_machine[18..20].copy_from_slice(&2u16.to_ne_bytes());
    let script = |what, text: &str, says| Bad::script(scratch, what, text, says);
    let file = |name: &str, mode, contents: &[u8]| scratch.file(name, mode, contents);
    let blind = r#"echo '{"Ready":{"program":"heirloom","version":"9","crc":1}}'"#;
    let control = control.to_str().expect("UTF-8");
    let elsewhere = scratch.path("elsewhere.sock");
    let elsewhere = elsewhere.to_str().expect("UTF-8");
    vec![
        Bad::program(
            "missing",
            "/nowhere/heirloom".into(),
            &["cannot start /nowhere/heirloom", "No such file"],
        ),
        Bad::program("not executable", file("plain", "644", b"#!/bin/sh\n"), &["Permission denied"]),
        Bad::program("a directory", std::env::temp_dir(), &["Permission denied"]),
        Bad::program("another machine's", file("sparc", "755", &other_machine), &["Exec format error"]),
        Bad::program("no program", file("text", "755", b"echo hello\n"), &["Exec format error"]),
        Bad::program(
            "says nothing",
            "/bin/true".into(),
            &["(exit status: 0) without an answer; it said nothing"],
        ),
        script(
            "complains",
            "echo 'the port is no number' >&2; exit 1",
            &["(exit status: 1) without an answer; it said: the port is no number"],
        ),
        script("is killed", "kill -9 $$", &["(signal: 9 (SIGKILL)) without an answer"]),
        script(
            "chatters",
            "echo hello; exec sleep 1000",
            &["it answers \"hello\"", "no answer to a preflight"],
        ),
        script("is blind", blind, &["has not read the manifest"]),
        script("talks without end", "yes | tr -d '\\n'", &["it answers \"yyyy", "no answer to a preflight"]),
        script(
            "answers by itself",
            "echo '{\"Refused\":{\"reason\":\"the disk is full\"}}'",
            &["the disk is full"],
        ),
        script(
            "is started by a script without exec",
            "\"$REAL\" \"$@\"",
            &["a script is between them: let it start the program with exec"],
        ),
        Bad::arguments("wrong arguments", &["chat", "--bla"], &["(exit status: 2)", "--bla"]),
        Bad::arguments("another command", &["ping", "--control", control], &["it answers \"Pong\""]),
        Bad::arguments(
            "another server",
            &["chat", "127.0.0.1:9", "--control", control],
            &["the new program would serve `chat 127.0.0.1:9`; give it the same address or name"],
        ),
        Bad::arguments(
            "another control socket",
            &["chat", address, "--control", elsewhere],
            &["control socket would be", "elsewhere.sock", "give it the same"],
        ),
        // From here on the preflight succeeds.
        script("removes itself", "rm \"$0\"; exec \"$REAL\" \"$@\"", &["No such file"]),
        script("loses its permission", "chmod 644 \"$0\"; exec \"$REAL\" \"$@\"", &["Permission denied"]),
        script(
            "becomes garbage",
            "echo garbage >\"$0.new\"; chmod 755 \"$0.new\"; mv \"$0.new\" \"$0\"; exec \"$REAL\" \"$@\"",
            &["Exec format error"],
        ),
    ]
}

/// What fails only when it is started to take over.
fn bad_successors(scratch: &Scratch, address: &str, control: &Path) -> Vec<Bad> {
    let script = |what, act: &str, says| {
        let text = format!("case $HEIRLOOM_UPGRADE in successor:*) {act};; esac; exec \"$REAL\" \"$@\"");
        Bad::script(scratch, what, &text, says)
    };
    let stalls = format!(
        "exec \"$REAL\" demo-successor --control {} --service 'chat {address}' >/dev/null",
        control.display()
    );
    vec![
        script("dies", "kill -9 $$", &["the successor ended (signal: 9 (SIGKILL)) before it took over"]),
        script(
            "gives up",
            "echo never >&2; exit 3",
            &["the successor ended (exit status: 3) before it took over"],
        ),
        script("is another program", "exec /bin/true", &["the successor ended (exit status: 0)"]),
        script("stalls in the freeze", &stalls, &["at step accept: the other side did not answer within 2s"]),
    ]
}

/// What takes ten seconds to be given up.
fn slow_programs(scratch: &Scratch) -> [(Place, Bad); 4] {
    let script = |what, text: &str, says| Bad::script(scratch, what, text, says);
    let hangs =
        || script("hangs", "exec sleep 1000", &["did not answer within 10s and was ended; it said nothing"]);
    let complains: &[&str] = &["did not answer within 10s and was ended; it said:", "no\nno\nno"];
    let never_asks = "case $HEIRLOOM_UPGRADE in successor:*) exec sleep 1000;; esac; exec \"$REAL\" \"$@\"";
    [
        (Place::Beside, hangs()),
        (Place::InPlace, hangs()),
        (Place::Beside, script("complains without end", "exec yes no >&2", complains)),
        (
            Place::Beside,
            script("never asks", never_asks, &["the successor did not ask to take over within 10s"]),
        ),
    ]
}

/// An incumbent that streams, and what is to stay the same.
struct Serving {
    scratch: Scratch,
    control: PathBuf,
    stream: Stream,
    chat: Process,
    reader: Reader,
    typed: String,
    before: Status,
    footprint: Footprint,
}

impl Serving {
    fn start() -> Serving {
        let scratch = Scratch::new();
        let control = scratch.path("chat.sock");
        let stream = Stream::start();
        let (reader, stdout) = std::io::pipe().expect("pipe");
        let mut command = chat(stream.address(), &control, &["--linger", "0s"]);
        let chat = Process::start_between(&mut command, Stdio::piped(), stdout);
        wait_until_connected(&control);
        let footprint = settled_footprint(chat.id());
        let before = status(&control);
        let reader = Reader::start(reader);
        Serving { scratch, control, stream, chat, reader, typed: String::new(), before, footprint }
    }

    /// An upgrade to this fails, and everything is as before.
    fn survives(&mut self, bad: &Bad, place: Place) {
        let what = format!("{} ({place:?})", bad.what);
        let mut options: Vec<&str> = place.options().to_vec();
        options.extend(["--program", bad.program.to_str().expect("UTF-8")]);
        if !bad.arguments.is_empty() {
            options.push("--");
            options.extend(bad.arguments.iter().map(String::as_str));
        }
        let said = upgrade(&self.control, &options).failed(5, bad.says);
        println!("{what:>40}: {}", said.lines().next().unwrap_or_default());
        let serves_on = format!("{} cannot take over, and the incumbent serves on: ", bad.program.display());
        assert!(said.contains(&serves_on), "{what}: {said}");
        assert!(self.chat.is_running(), "{what}: {}", self.chat.stderr());
        wait_for_footprint(&what, self.chat.id(), &self.footprint);
        let now = status(&self.control);
        assert_eq!((now.pid, now.generation), (self.before.pid, self.before.generation), "{what}");
        assert_eq!((now.items, now.takeover_running), (self.before.items.clone(), false), "{what}");
        let last = now.last_takeover.expect("it is on record");
        assert!(matches!(last.outcome.as_str(), "refused" | "resumed"), "{what}: {last:?}");
        assert!(said.contains(last.reason.as_deref().expect("a reason")), "{what}: {last:?}");

        let seen = self.reader.len();
        wait_for("more of the stream", || self.reader.len() > seen);
        let word = format!("typed after {what}\n");
        self.chat.write(word.as_bytes());
        self.typed.push_str(&word);
        wait_for("what was typed", || self.stream.heard() == self.typed);
    }

    /// Nothing of the stream is missing, and the incumbent ends as it should when nobody reads its stdout.
    fn finish(mut self) {
        let reader = &self.reader;
        self.stream.ends_exact_on(0, || reader.len(), || reader.output());
        self.reader.close();
        self.chat.wait_for_code(1);
        let said = self.chat.stderr();
        assert!(said.contains("stdout was closed, and no successor came"), "{said}");
    }
}

#[test]
fn whatever_is_wrong_with_the_new_program_the_incumbent_serves_on() {
    let rows = Place::BOTH.map(|place| {
        thread::spawn(move || {
            let mut serving = Serving::start();
            let (address, control) = (serving.stream.address().to_owned(), serving.control.clone());
            let mut bad = bad_programs(&serving.scratch, &address, &control);
            if place == Place::Beside {
                bad.extend(bad_successors(&serving.scratch, &address, &control));
            }
            bad.iter().for_each(|bad| serving.survives(bad, place));
            serving.finish();
        })
    });
    all_succeed(rows);
}

#[test]
fn a_new_program_that_hangs_is_given_up_and_the_incumbent_serves_on() {
    let scratch = Scratch::new();
    all_succeed(slow_programs(&scratch).map(|(place, bad)| {
        thread::spawn(move || {
            let mut serving = Serving::start();
            serving.survives(&bad, place);
            serving.finish();
        })
    }));
}

/// What can only be asked for without the command.
#[test]
fn requests_that_cannot_be_met_leave_the_incumbent_serving() {
    let mut serving = Serving::start();
    let requests = [
        (Upgrade { arguments: Some(vec!["chat\0".into()]), ..Upgrade::default() }, "nul byte"),
        (Upgrade { program: Some("/bin/tr\0ue".into()), ..Upgrade::default() }, "nul byte"),
        // The limit on one argument is 128 KiB (execve(2)), on a request it is lower.
        (Upgrade { arguments: Some(vec!["x".repeat(300 * 1024)]), ..Upgrade::default() }, "long"),
        (Upgrade { program: Some("".into()), ..Upgrade::default() }, "No such file"),
        (Upgrade { program: Some("heirloom".into()), ..Upgrade::default() }, "heirloom"),
    ];
    for (request, why) in requests {
        for in_place in [false, true] {
            let request = Upgrade { in_place, ..request.clone() };
            let mut client = Client::connect(&serving.control).expect("connect");
            let answer = client.request(&Request::<NoRequests>::Upgrade(request));
            let Ok(Reply::Error(failure)) = answer else { panic!("{why}: {answer:?}") };
            println!("{failure:?}");
            assert!(failure.message.contains(why), "{why}: {failure:?}");
            drop(client);
            wait_for_footprint(why, serving.chat.id(), &serving.footprint);
        }
    }
    let bad = Bad::program("says nothing", "/bin/true".into(), &["said nothing"]);
    serving.survives(&bad, Place::InPlace);
    serving.finish();
}

/// At every limit on open files with which it can serve at all, an incumbent is upgraded or serves on.
#[test]
fn an_incumbent_without_descriptors_to_spare_is_upgraded_or_serves_on() {
    all_succeed(Place::BOTH.map(|place| {
        thread::spawn(move || {
            let (mut upgraded, mut served_on) = (0, 0);
            for limit in 10..32 {
                let scratch = Scratch::new();
                let control = scratch.path("chat.sock");
                let mut stream = Stream::start();
                let mut limited = Command::new("sh");
                limited
                    .arg("-c")
                    .arg(format!("ulimit -n {limit}; exec \"$@\""))
                    .arg("sh")
                    .arg(this_program());
                let mut chat =
                    Process::start(limited.args(["chat", stream.address(), "--control"]).arg(&control));
                let _ends = EndsServing(control.clone());
                wait_for("it to serve or to end", || chat.stdout_len() > 0 || !chat.is_running());
                if !chat.is_running() {
                    continue;
                }
                let answer = upgrade(&control, place.options());
                println!("{place:?}, limit {limit}: {:?} {}", answer.code, answer.stderr.trim());
                let seen = chat.stdout_len();
                wait_for("more of the stream", || chat.stdout_len() > seen);
                if answer.code == Some(0) {
                    upgraded += 1;
                } else {
                    served_on += 1;
                    assert!(matches!(answer.code, Some(1 | 4 | 5)), "limit {limit}: {answer:?}");
                    assert!(chat.is_running(), "limit {limit}: {}", chat.stderr());
                    // Why the incumbent refused its own successor, and not only that this has ended.
                    assert!(!answer.stderr.contains("the successor ended"), "limit {limit}: {answer:?}");
                }
                stream.ends_exact(0, &[&chat]);
            }
            println!("{place:?}: {upgraded} were upgraded, {served_on} served on");
            assert!(upgraded > 0 && served_on > 0, "the limits do not cover both");
        })
    }));
}

fn all_succeed<const N: usize>(rows: [thread::JoinHandle<()>; N]) {
    let failed = rows.into_iter().filter_map(|row| row.join().err()).count();
    assert_eq!(failed, 0, "{failed} rows failed: see their panics");
}
