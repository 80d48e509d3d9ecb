//! Upgrades as the application sees them: what it is asked for, and what is left when it or the new program says no.

mod support;

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use heirloom::control::{Client, Failure, FailureCode, Reply, Request};
use heirloom::manifest::{Base, read_sealed};
use heirloom::protocol::Step;
use heirloom::upgrade::{AskError, Launch, Upgrade, Upgraded, ask};
use heirloom::{
    Bundle, Config, Incumbent, Limits, NoRequests, Outcome, Preflights, Replace, Service, Start, Turn,
};
use heirloom_sys::SignalMask;
use rustix::io::{FdFlags, fcntl_getfd};
use support::*;

/// A shell script that passes a preflight: the checksum is where a manifest's header has it.
const PASSES: &str = r#"crc=$(od -An -tu4 -j12 -N4 | tr -d ' ')
echo '{"Ready":{"program":"new","version":"2","crc":'$crc'}}'
"#;

/// What the serving thread has done.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Offered,
    Frozen,
    Resumed(Step, String),
}

/// How the application answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Willing,
    RefusesOffers,
    DropsOffers,
    ResumesAtTheFreeze,
    DropsTheFreeze,
    LendsNothing,
}

struct Server {
    control: PathBuf,
    events: Receiver<Event>,
    thread: JoinHandle<()>,
    _scratch: Scratch,
    script: PathBuf,
}

impl Server {
    /// Serves one file on a thread of its own, and is upgraded to a shell script.
    fn start(manner: Manner, script: &str) -> Server {
        Server::start_with(manner, script, Config::default())
    }

    fn start_with(manner: Manner, script: &str, config: Config) -> Server {
        Server::start_for(manner, script, config, true)
    }

    fn start_for(manner: Manner, script: &str, config: Config, in_place: bool) -> Server {
        let scratch = Scratch::new();
        let control = scratch.control();
        let file = scratch.path("new program");
        write_script(&file, script);
        let service = Service::new("upgraded").program("old", "1");
        let mut incumbent = match heirloom::start(&control, service, config, Replace::Never) {
            Ok(Start::Fresh(incumbent)) => incumbent,
            other => panic!("{other:?}"),
        };
        incumbent.set_launch(Launch {
            program: file.clone(),
            name: "new".into(),
            arguments: Vec::new(),
            in_place,
        });
        let (sender, events) = channel();
        let thread = thread::spawn(move || {
            let mut bundle = Bundle::new();
            bundle.set_state("a topic").expect("state");
            let id = bundle.add_plain("null", File::open("/dev/null").expect("open")).expect("an item");
            let mask = SignalMask::current().expect("a mask");
            while serve_once(&mut incumbent, &bundle, manner, &|event| {
                if event == Event::Frozen {
                    assert_ne!(SignalMask::current().expect("a mask"), mask, "signals wait in the freeze");
                }
                sender.send(event).expect("the test listens");
            }) {
                assert_eq!(SignalMask::current().expect("a mask"), mask);
                let flags = fcntl_getfd(bundle.descriptor(id).expect("it stays")).expect("it is open");
                assert_eq!(flags, FdFlags::CLOEXEC);
            }
            let _ = bundle.close_rest();
        });
        Server { control, events, thread, _scratch: scratch, script: file }
    }

    fn ask(&self, request: Upgrade) -> Result<Upgraded, AskError> {
        ask(&self.control, request, LONG)
    }

    #[track_caller]
    fn fails(&self, request: Upgrade) -> Failure {
        match self.ask(request) {
            Err(AskError::Refused(failure)) => failure,
            other => panic!("{other:?}"),
        }
    }

    fn events(&self) -> Vec<Event> {
        self.events.try_iter().collect()
    }

    fn end(self) {
        let mut client = Client::connect(&self.control).unwrap();
        assert_eq!(client.request(&Request::<NoRequests>::Quit).unwrap(), Reply::Bye);
        self.thread.join().unwrap();
    }
}

fn write_script(path: &Path, script: &str) {
    // By a process of its own: a file that is open for writing while another thread forks cannot be run.
    let mut sh = Command::new("/bin/sh")
        .args(["-c", r#"cat > "$1" && chmod 700 "$1""#, "sh"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    write!(sh.stdin.take().unwrap(), "#!/bin/sh\n{script}").unwrap();
    assert!(sh.wait().unwrap().success());
}

/// Handles what there is until something was asked; false when it is to quit.
fn serve_once(incumbent: &mut Incumbent, bundle: &Bundle, manner: Manner, tell: &dyn Fn(Event)) -> bool {
    heirloom::runtime::blocking::wait(incumbent, &mut Vec::new(), None).expect("wait");
    match incumbent.turn(Instant::now()).expect("a turn") {
        Turn::Offer(offer) => {
            tell(Event::Offered);
            match manner {
                Manner::RefusesOffers => offer.refuse("not on a Wednesday"),
                Manner::DropsOffers => drop(offer),
                _ => offer.begin_bundle(bundle).expect("an offer"),
            }
        }
        Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
        Turn::Freeze(freeze) => {
            tell(Event::Frozen);
            let outcome = match manner {
                Manner::ResumesAtTheFreeze => {
                    freeze.resume("a signal came");
                    return true;
                }
                Manner::DropsTheFreeze => {
                    drop(freeze);
                    return true;
                }
                Manner::LendsNothing => freeze.release_all(bundle.base(Default::default()), |_| None),
                _ => freeze.release_bundle(bundle),
            };
            match outcome.expect("an outcome") {
                Outcome::Resumed(reason) => tell(Event::Resumed(reason.step, reason.cause.to_string())),
                other => panic!("{other:?}"),
            }
        }
        Turn::Quit(_) => return false,
        Turn::Idle | Turn::Request(_) | Turn::Closed(_) | Turn::Delegated(_) => {}
    }
    true
}

#[test]
fn a_dry_run_freezes_nothing() {
    let server = Server::start(Manner::Willing, PASSES);
    let checked = match server.ask(Upgrade { dry_run: true, ..Upgrade::default() }) {
        Ok(Upgraded::Checked(checked)) => checked,
        other => panic!("{other:?}"),
    };
    assert_eq!((checked.program.as_str(), checked.version.as_str()), ("new", "2"));
    assert_eq!((checked.items, checked.in_place), (2, true));
    assert_eq!(server.events(), [Event::Offered]);
    assert_eq!(status(&server.control).last_takeover, None);
    server.end();
}

#[test]
fn an_application_that_says_no_serves_on_and_whoever_asked_hears_why() {
    for (manner, why, frozen) in [
        (Manner::RefusesOffers, "not on a Wednesday", false),
        (Manner::DropsOffers, "did not offer anything", false),
        (Manner::ResumesAtTheFreeze, "a signal came", true),
        (Manner::DropsTheFreeze, "the application resumed", true),
        (Manner::LendsNothing, "lends no descriptor of item \"null\"", true),
    ] {
        let server = Server::start(manner, PASSES);
        for _ in 0..2 {
            let failure = server.fails(Upgrade::default());
            assert_eq!(failure.code, FailureCode::RolledBack, "{manner:?}");
            assert!(failure.message.contains(why), "{manner:?}: {failure}");
            assert!(failure.message.contains("serves on"), "{failure}");
            let last = status(&server.control).last_takeover.unwrap();
            assert_eq!(last.outcome, if frozen { "resumed" } else { "refused" });
            assert_eq!(last.pause_us.is_some(), frozen);
            assert_eq!(server.events().contains(&Event::Frozen), frozen, "{manner:?}");
        }
        assert_eq!(status(&server.control).generation, 0);
        server.end();
    }
}

/// The file is there for the preflight, and no more for the execve.
#[test]
fn an_execve_that_fails_changes_nothing() {
    let server = Server::start(Manner::Willing, &format!("rm \"$0\"\n{PASSES}"));
    let failure = server.fails(Upgrade::default());
    assert_eq!(failure.code, FailureCode::RolledBack);
    assert!(failure.message.contains("No such file"), "{failure}");
    assert!(!server.script.exists());
    let failure = server.fails(Upgrade::default());
    assert!(failure.message.contains("cannot start"), "{failure}");
    assert_eq!(status(&server.control).pid, std::process::id());
    server.end();
}

#[test]
fn another_generation_is_not_upgraded() {
    let server = Server::start(Manner::Willing, PASSES);
    let failure = server.fails(Upgrade { generation: Some(3), ..Upgrade::default() });
    assert_eq!(failure.code, FailureCode::Busy);
    assert!(failure.message.contains("generation 0 serves by now"), "{failure}");
    assert_eq!(server.events(), []);
    server.end();
}

#[test]
fn one_at_a_time() {
    let server = Server::start(Manner::Willing, "exec sleep 1000");
    let mut first = Client::connect(&server.control).unwrap();
    first.send(&Request::<NoRequests>::Upgrade(Upgrade::default())).unwrap();
    wait_for("the preflight", || status(&server.control).takeover_running);
    let failure = server.fails(Upgrade::default());
    assert_eq!(failure.code, FailureCode::Busy);
    assert!(failure.message.contains("another upgrade"), "{failure}");
    let service = Service::new("upgraded");
    match heirloom::start::<NoRequests>(&server.control, service, Config::default(), Replace::Must) {
        Err(heirloom::StartError::Refused(failure)) => assert_eq!(failure.code, FailureCode::Busy),
        other => panic!("{other:?}"),
    }
    // An incumbent that ends takes the preflight with it, and says so.
    let control = server.control.clone();
    server.end();
    first.set_timeout(LONG);
    let (line, _) = first.receive().unwrap();
    match Reply::parse(&line).unwrap() {
        Reply::Error(failure) => assert!(failure.message.contains("told to quit"), "{failure}"),
        other => panic!("{other:?}"),
    }
    match ask(&control, Upgrade::default(), LONG) {
        Err(AskError::Client(heirloom::control::ClientError::Nobody { .. })) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_preflight_that_hangs_is_ended() {
    let mut config = Config::default();
    config.times.start = Duration::from_millis(200);
    let server = Server::start_with(Manner::Willing, "echo $$ >> \"$0.pid\"; exec sleep 1000", config);
    let failure = server.fails(Upgrade::default());
    assert!(failure.message.contains("did not answer within 200ms"), "{failure}");
    let pid = std::fs::read_to_string(server.script.with_file_name("new program.pid")).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists(), "it was ended and waited for");
    server.end();
}

/// The manifest of an inspection is the one of a takeover, and waits for one that is going on: what has changed since an
/// offer is reckoned from the last that was written.
#[test]
fn where_the_takeover_finds_out_as_much_the_program_is_started_once() {
    let notes_its_role = r#"echo "${HEIRLOOM_UPGRADE%%:*}" >> "$0.roles"; exit 3"#;
    let config = || Config { preflights: Preflights::InPlace, ..Config::default() };
    let server = Server::start_for(Manner::Willing, notes_its_role, config(), false);
    let roles = server.script.with_file_name("new program.roles");
    let failure = server.fails(Upgrade::default());
    assert_eq!(failure.code, FailureCode::RolledBack);
    assert!(failure.message.contains("exit status: 3) before it took over"), "{}", failure.message);
    assert_eq!(std::fs::read_to_string(&roles).unwrap(), "successor\n");
    assert_eq!(server.events(), [], "nothing was to be written down");

    // There is one where it is asked for, and before there is no way back.
    for asked in
        [Upgrade { dry_run: true, ..Upgrade::default() }, Upgrade { in_place: true, ..Upgrade::default() }]
    {
        std::fs::remove_file(&roles).unwrap();
        let failure = server.fails(asked);
        assert!(failure.message.contains("exit status: 3) without an answer"), "{}", failure.message);
        assert_eq!(std::fs::read_to_string(&roles).unwrap(), "preflight\n");
        assert_eq!(server.events(), [Event::Offered]);
    }

    std::fs::remove_file(&server.script).unwrap();
    let failure = server.fails(Upgrade::default());
    assert_eq!(failure.code, FailureCode::RolledBack);
    assert!(failure.message.contains("cannot start") && failure.message.contains("No such file"));
    server.end();
}

#[test]
fn an_inspection_shows_what_a_takeover_would_carry() {
    let server = Server::start(Manner::Willing, PASSES);
    let inspect = |client: &mut Client| {
        client.send(&Request::<NoRequests>::Inspect).unwrap();
        client.set_timeout(LONG);
    };
    let shown = |client: &mut Client| -> Base {
        let (line, descriptors) = client.receive().unwrap();
        let summary = match Reply::parse(&line).unwrap() {
            Reply::Manifest(summary) => summary,
            other => panic!("{other:?}"),
        };
        let bytes = read_sealed(&descriptors[0], 1 << 20).unwrap();
        assert_eq!((summary.bytes, descriptors.len()), (bytes.len() as u64, 1));
        Base::decode(&bytes, &Limits::default()).unwrap()
    };
    let mut client = Client::connect(&server.control).unwrap();
    inspect(&mut client);
    let base = shown(&mut client);
    let names: Vec<&str> = base.items.iter().map(|item| item.name.as_str()).collect();
    assert_eq!(names, ["heirloom.control", "null"]);
    assert_eq!(base.service.name, "upgraded");

    let offered = successor(&server.control, &Service::new("upgraded")).receive().unwrap();
    inspect(&mut client);
    assert!(status(&server.control).takeover_running);
    assert!(!readable(&client), "it waits for the takeover");
    offered.withdraw("a test of this");
    assert_eq!(shown(&mut client).state, base.state);
    server.end();
}

fn readable(client: &Client) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::from_borrowed_fd(client.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// Whoever may ask other things may have the incumbent upgraded, but not to a program of their own.
#[test]
fn another_user_cannot_name_the_program() {
    const UID: u32 = 12345;
    if !rustix::process::geteuid().is_root() {
        return skip("only root can become another user");
    }
    if Command::new("socat").arg("-V").output().is_err()
        || Command::new("setpriv").arg("-V").output().is_err()
    {
        return skip("there is no socat, or no setpriv");
    }
    let mut config = Config::default();
    config.peers = config.peers.allow_uid(UID);
    let server = Server::start_with(Manner::Willing, PASSES, config);
    let open = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let directory = server.control.parent().unwrap();
    open(&server.control, 0o666);
    open(directory, 0o711);
    open(directory.parent().unwrap(), 0o711);
    let asks = |request: &str| -> String {
        let output = Command::new("setpriv")
            .args([&format!("--reuid={UID}"), "--clear-groups", "sh", "-c"])
            .args([r#"printf '%s\n' "$2" | socat -t 60 - "UNIX-CONNECT:$1""#, "sh"])
            .arg(&server.control)
            .arg(request)
            .output()
            .expect("setpriv can be started");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    for named in [r#""program":"/tmp/theirs""#, r#""arguments":["--evil"]"#] {
        let answer = asks(&format!(r#"{{"Upgrade":{{"dry_run":true,{named}}}}}"#));
        assert!(answer.contains(r#""code":"permission""#), "{answer}");
    }
    assert_eq!(server.events(), []);
    let answer = asks(r#"{"Upgrade":{"dry_run":true}}"#);
    assert!(answer.contains("Checked"), "{answer}");
    server.end();
}
