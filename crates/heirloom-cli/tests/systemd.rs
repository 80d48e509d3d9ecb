//! The units of this project under a real systemd: whatever happens to a service, its connections live on, systemd knows its
//! main process, and its store holds what it should.

mod stream;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use heirloom::control::Status;
use stream::Stream;
use support::guests::*;
use support::systemd::Systemd;
use support::talk::{Talk, assert_everything_was_heard};
use support::*;

const SERVER: &str = "heirloom-chat-server.service";
const CLIENT: &str = "heirloom-chat.service";
const RUN: &str = "heirloom-run-chat-server.service";

/// How many talk all the time.
const TALKERS: usize = 12;
/// What a chat server has in the store beside its clients: the listener, the journal, the ledger.
const OWN: usize = 3;
/// How often everything happens.
const ROUNDS: usize = 3;

/// What happens to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Reload,
    Restart,
    Kill,
    /// `heirloom upgrade --in-place`.
    InPlace,
    DaemonReexec,
    DaemonReload,
}

impl Event {
    const ALL: [Event; 8] = [
        Event::Reload,
        Event::DaemonReexec,
        Event::Kill,
        Event::InPlace,
        Event::Restart,
        Event::DaemonReload,
        Event::Reload,
        Event::Restart,
    ];

    fn happen(self, systemd: &Systemd, unit: &str) {
        match self {
            Event::Reload => systemd.ctl(&["reload", unit]),
            Event::Restart => systemd.ctl(&["restart", unit]),
            Event::Kill => systemd.kill_main(unit),
            Event::InPlace => {
                let control = format!("/run/{}/control.sock", name(unit));
                systemd.run(&["heirloom", "upgrade", "--in-place", "--control", &control]);
            }
            Event::DaemonReexec => systemd.ctl(&["daemon-reexec"]),
            Event::DaemonReload => systemd.ctl(&["daemon-reload"]),
        }
    }

    /// Whether another process serves afterwards, and by how much the generation has grown; `None` where it begins anew.
    fn changes(self) -> (bool, Option<u64>) {
        match self {
            Event::Reload => (true, Some(1)),
            Event::Restart | Event::Kill => (true, None),
            Event::InPlace => (false, Some(1)),
            Event::DaemonReexec | Event::DaemonReload => (false, Some(0)),
        }
    }

    #[track_caller]
    fn check(self, before: &Status, after: &Status) {
        let (other, grown) = self.changes();
        assert_eq!(after.pid != before.pid, other, "{self:?}: {before:?}, {after:?}");
        if let Some(grown) = grown {
            assert_eq!(after.generation, before.generation + grown, "{self:?}");
        }
    }
}

fn name(unit: &str) -> &str {
    unit.strip_suffix(".service").expect("a service")
}

fn control(systemd: &Systemd, unit: &str) -> PathBuf {
    systemd.path(&format!("/run/{}/control.sock", name(unit)))
}

#[test]
fn a_chat_server_keeps_its_clients() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    systemd.ctl(&["start", SERVER]);
    let control = control(&systemd, SERVER);
    let guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(systemd.address)).collect();
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(guests, &names);
    for _ in 0..ROUNDS {
        for event in Event::ALL {
            talk.wait_for_progress();
            let before = status(&control);
            event.happen(&systemd, SERVER);
            if event == Event::Kill {
                wait_for("the next process", || {
                    try_status(&control).is_some_and(|now| now.pid != before.pid)
                });
            }
            systemd.wait_until_settled(SERVER, &control);
            event.check(&before, &status(&control));
            talk.wait_for_progress();
            assert_eq!(systemd.stored(SERVER), TALKERS + OWN, "{event:?}");
        }
    }
    let talkers = talk.finish();
    assert_everything_was_heard(&talkers);
    drop(talkers);
    wait_for("nothing of them to be stored", || systemd.stored(SERVER) == OWN);
    wait_for("systemd to be told so", || systemd.property(SERVER, "StatusText") == "clients: 0");
    assert_in_order(&systemd, SERVER);
}

#[test]
fn a_chat_client_keeps_its_connection() {
    let Some(systemd) = Systemd::boot() else { return };
    let mut stream = Stream::start();
    systemd.install_for(stream.address().parse().expect("an address"), &[CLIENT]);
    systemd.ctl(&["start", CLIENT]);
    let control = control(&systemd, CLIENT);
    let file = systemd.path("/var/log/heirloom-chat.txt");
    let written = || std::fs::metadata(&file).map_or(0, |file| file.len() as usize);
    let wait_for_more = || {
        let before = written();
        wait_for("more of the stream", || written() > before);
    };
    let mut stored = None;
    for _ in 0..ROUNDS {
        for event in Event::ALL {
            wait_for_more();
            let before = status(&control);
            event.happen(&systemd, CLIENT);
            if event == Event::Kill {
                wait_for("the next process", || {
                    try_status(&control).is_some_and(|now| now.pid != before.pid)
                });
            }
            systemd.wait_until_settled(CLIENT, &control);
            event.check(&before, &status(&control));
            wait_for_more();
            let now = systemd.stored(CLIENT);
            assert_eq!(*stored.get_or_insert(now), now, "{event:?}");
        }
    }
    stream.ends_exact_on(0, written, || std::fs::read(&file).expect("it is there"));
    assert_in_order(&systemd, CLIENT);
}

/// Both, `heirloom run` and what it runs, are killed, restarted and upgraded.
#[test]
fn a_chat_server_under_heirloom_run_keeps_its_clients() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[RUN]);
    systemd.ctl(&["start", RUN]);
    let (run, chat) = (systemd.path(&format!("/run/{}/run.sock", name(RUN))), control(&systemd, RUN));
    let settled = || {
        wait_for("systemd, heirloom run and the chat server to agree", || {
            systemd.property(RUN, "ActiveState") == "active"
                && try_status(&run).zip(try_status(&chat)).is_some_and(|(run, chat)| {
                    let mut processes = systemd.processes(RUN);
                    processes.sort_unstable();
                    let mut expected = [run.pid, chat.pid];
                    expected.sort_unstable();
                    run.pid == systemd.main_pid(RUN)
                        && run.supervised.and_then(|supervised| supervised.pid) == Some(chat.pid)
                        && processes == expected
                })
        });
        (status(&run).pid, status(&chat).pid)
    };
    settled();
    let stored = systemd.stored(RUN);
    let guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(systemd.address)).collect();
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(guests, &names);
    let path = format!("/run/{}/run.sock", name(RUN));
    let kill = |pid: u32| systemd.run(&["sh", "-c", &format!("kill -KILL {pid}")]);
    /// What happens, and whether `heirloom run` and its command are other processes afterwards.
    type Happens<'s> = (&'s str, &'s dyn Fn(u32, u32), bool, bool);
    let events: [Happens<'_>; 7] = [
        ("reload", &|_, _| systemd.ctl(&["reload", RUN]), false, true),
        ("kill the command", &|_, chat| drop(kill(chat)), false, true),
        ("kill heirloom run", &|run, _| drop(kill(run)), true, true),
        ("daemon-reexec", &|_, _| systemd.ctl(&["daemon-reexec"]), false, false),
        (
            "upgrade --self",
            &|_, _| drop(systemd.run(&["heirloom", "upgrade", "--self", "--control", &path])),
            false,
            false,
        ),
        ("restart", &|_, _| systemd.ctl(&["restart", RUN]), true, true),
        ("daemon-reload", &|_, _| systemd.ctl(&["daemon-reload"]), false, false),
    ];
    for _ in 0..ROUNDS {
        for (what, happen, other_run, other_chat) in &events {
            talk.wait_for_progress();
            let before = settled();
            happen(before.0, before.1);
            let gone = |control: &Path, pid, other: bool| {
                wait_for("the next process", || {
                    !other || try_status(control).is_some_and(|now| now.pid != pid)
                });
            };
            gone(&run, before.0, *other_run);
            gone(&chat, before.1, *other_chat);
            let after = settled();
            assert_eq!((after.0 != before.0, after.1 != before.1), (*other_run, *other_chat), "{what}");
            talk.wait_for_progress();
        }
    }
    let talkers = talk.finish();
    assert_everything_was_heard(&talkers);
    drop(talkers);
    wait_for("nothing of them to be stored", || systemd.stored(RUN) == stored);
}

/// systemd has always known whom it supervises, and has waited for its end.
fn assert_in_order(systemd: &Systemd, unit: &str) {
    let journal = systemd.journal(unit);
    for complaint in ["not our child", "remains running", "left-over process", "with signal SIGKILL"] {
        assert!(!journal.contains(complaint), "{complaint:?} is in {journal}");
    }
}

/// systemd listens; the server comes with the first client, and goes and comes again.
#[test]
fn a_socket_of_systemds() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&["heirloom-chat-server.socket", SERVER]);
    systemd.ctl(&["start", "heirloom-chat-server.socket"]);
    assert_eq!(systemd.property(SERVER, "ActiveState"), "inactive");
    let mut guest = Guest::join(systemd.address);
    let control = control(&systemd, SERVER);
    for event in [Event::Kill, Event::Reload, Event::Restart] {
        let before = status(&control);
        event.happen(&systemd, SERVER);
        if event == Event::Kill {
            wait_for("the next process", || try_status(&control).is_some_and(|now| now.pid != before.pid));
        }
        systemd.wait_until_settled(SERVER, &control);
        let mut other = Guest::join(systemd.address);
        guest.hears(&[&format!("<announce> 127.0.0.1 is connected as <{}>.", other.name)]);
        guest.say("still here\n");
        other.hears(&[&format!("<{}> still here", guest.name)]);
        let name = other.name.clone();
        drop(other);
        guest.hears(&[&format!("<announce> <{name}> is disconnected.")]);
        // A socket that systemd gives to each process is not stored; a successor, which was not given any, stores it.
        let own = if event == Event::Reload { OWN } else { OWN - 1 };
        wait_for("the store to be right", || systemd.stored(SERVER) == 1 + own);
    }
    // A stop is the end of all that is stored, and the socket is systemd's.
    systemd.ctl(&["stop", SERVER]);
    assert_eq!(guest.try_line().unwrap_or(None), None, "disconnected");
    assert_eq!(systemd.stored(SERVER), 0);
    Guest::join(systemd.address);
    systemd.wait_until_settled(SERVER, &control);
}

/// A new program that is none leaves everything as it is, and systemctl says so.
#[test]
fn a_reload_that_fails_changes_nothing() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    let reload = "/usr/local/bin/heirloom upgrade --control %t/%N/control.sock --program /bin/false";
    systemd.drop_in(SERVER, &format!("[Service]\nExecReload=\nExecReload={reload}\n"));
    systemd.ctl(&["start", SERVER]);
    let control = control(&systemd, SERVER);
    let mut guests = [Guest::join(systemd.address), Guest::join(systemd.address)];
    guests[0].line();
    let before = status(&control);
    let failed = systemd.output(&["systemctl", "reload", SERVER]);
    assert!(!failed.status.success(), "{failed:?}");
    systemd.wait_until_settled(SERVER, &control);
    let after = status(&control);
    assert_eq!((after.pid, after.generation), (before.pid, before.generation));
    guests[0].say("still here\n");
    guests[1].hears(&[&format!("<{}> still here", guests[0].name)]);
    let journal = systemd.journal(SERVER);
    assert!(
        journal.contains("Reload failed")
            && journal.contains("cannot take over, and the incumbent serves on"),
        "{journal}"
    );
}

/// Who is not in the unit is refused, and told what to do. If it insists, it is replaced by the next process of the unit.
#[test]
fn a_process_outside_of_the_unit() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    // Another user could not even try.
    systemd.drop_in(SERVER, "[Service]\nDynamicUser=no\n");
    systemd.ctl(&["start", SERVER]);
    let control = control(&systemd, SERVER);
    let mut guests = [Guest::join(systemd.address), Guest::join(systemd.address)];
    guests[0].line();
    let before = status(&control);
    let address = systemd.address.to_string();
    let path = format!("/run/{}/control.sock", name(SERVER));
    let by_hand = ["heirloom", "chat", "--listen", &address, "--control", &path];
    let refused = systemd.output(&by_hand);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{why}");
    for part in [SERVER, "could start a rival", "systemctl reload heirloom-chat-server.service", "--force"] {
        assert!(why.contains(part), "{part:?} is not in {why}");
    }
    systemd.wait_until_settled(SERVER, &control);
    assert_eq!(status(&control).pid, before.pid);

    let mut outsider = Process::start(systemd.command(&by_hand).arg("--force"));
    outsider.wait_for_code(0);
    systemd.wait_until_settled(SERVER, &control);
    assert_eq!(status(&control).generation, before.generation + 2, "{}", outsider.stderr());
    guests[0].say("still here\n");
    guests[1].hears(&[&format!("<{}> still here", guests[0].name)]);
    // It was handed over without the store, and is in it again.
    wait_for("the store to be right", || systemd.stored(SERVER) == 2 + OWN);
    systemd.kill_main(SERVER);
    guests[0].say("and here\n");
    guests[1].hears(&[&format!("<{}> and here", guests[0].name)]);
}

/// A stop is the end of all connections, unless the store is to outlive it, which systemd can from version 254 on.
#[test]
fn a_stop_with_a_store_that_is_preserved() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    systemd.drop_in(SERVER, "[Service]\nFileDescriptorStorePreserve=yes\n");
    // As a unit that is enabled: one that nobody wants is forgotten when it is stopped.
    systemd.drop_in("basic.target", &format!("[Unit]\nWants={SERVER}\n"));
    systemd.ctl(&["start", SERVER]);
    let control = control(&systemd, SERVER);
    let mut guests = [Guest::join(systemd.address), Guest::join(systemd.address)];
    guests[0].line();
    systemd.ctl(&["stop", SERVER]);
    let said = format!("<{}> while nobody served", guests[0].name);
    if systemd.version() < 254 {
        assert_eq!(systemd.stored(SERVER), 0);
        assert_eq!(guests[0].try_line().unwrap_or(None), None, "disconnected");
    } else {
        assert_eq!(systemd.stored(SERVER), 2 + OWN);
        guests[0].say("while nobody served\n");
    }
    systemd.ctl(&["start", SERVER]);
    systemd.wait_until_settled(SERVER, &control);
    if systemd.version() >= 254 {
        guests[1].hears(&[&said]);
        drop(guests);
        wait_for("nothing of them to be stored", || systemd.stored(SERVER) == OWN);
        systemd.ctl(&["stop", SERVER]);
        systemd.ctl(&["clean", "--what=fdstore", SERVER]);
    }
}

/// One that hangs is ended by systemd, which hears of every other one that it lives, of a successor too.
#[test]
fn the_watchdog() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    systemd.drop_in(SERVER, "[Service]\nWatchdogSec=1s\nTimeoutAbortSec=100ms\n");
    systemd.ctl(&["start", SERVER]);
    let control = control(&systemd, SERVER);
    let mut guests = [Guest::join(systemd.address), Guest::join(systemd.address)];
    guests[0].line();
    systemd.ctl(&["reload", SERVER]);
    systemd.wait_until_settled(SERVER, &control);
    let successor = status(&control).pid;
    for _ in 0..3 {
        let heard = || systemd.property(SERVER, "WatchdogTimestampMonotonic");
        let before = heard();
        wait_for("a sign of life", || heard() != before);
    }
    assert_eq!(systemd.main_pid(SERVER), successor);
    systemd.ctl(&["kill", "--signal=STOP", "--kill-who=main", SERVER]);
    guests[0].say("is somebody there\n");
    guests[1].hears(&[&format!("<{}> is somebody there", guests[0].name)]);
    systemd.wait_until_settled(SERVER, &control);
    assert_ne!(status(&control).pid, successor);
    let journal = systemd.journal(SERVER);
    assert!(journal.contains("Watchdog timeout"), "{journal}");
}

/// Lines are found by their fields.
#[test]
fn the_journal_has_fields() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    systemd.ctl(&["start", SERVER]);
    systemd.ctl(&["reload", SERVER]);
    systemd.wait_until_settled(SERVER, &control(&systemd, SERVER));
    systemd.run(&["journalctl", "--sync"]);
    let find = |fields: &[&str]| -> Vec<BTreeMap<String, String>> {
        let found = systemd.run(&[&["journalctl", "-u", SERVER, "-o", "json"], fields].concat());
        found.lines().map(|line| serde_json::from_str(line).expect("text alone")).collect()
    };
    let pid = systemd.main_pid(SERVER).to_string();
    let [took_over] = &find(&["GENERATION=1", &format!("_PID={pid}")])[..] else { panic!("one line") };
    assert!(took_over["MESSAGE"].starts_with("took over"), "{took_over:?}");
    assert_eq!((took_over["PRIORITY"].as_str(), took_over["SYSLOG_IDENTIFIER"].as_str()), ("6", "heirloom"));
    took_over["PAUSE_US"].parse::<u64>().expect("a number");
    // The same takeover, as the incumbent saw it.
    let incumbent = &took_over["PEER_PID"];
    let seen = find(&["GENERATION=0", &format!("_PID={incumbent}"), &format!("PEER_PID={pid}")]);
    let messages: Vec<&str> =
        seen.iter().filter_map(|line| line["MESSAGE"].split(['=', '(']).next()).collect();
    assert!(messages.iter().any(|message| message.starts_with("takeover begins")), "{messages:?}");
    assert!(messages.iter().any(|message| message.starts_with("replaced by")), "{messages:?}");
}
