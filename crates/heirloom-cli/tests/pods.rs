//! Takeovers between two pods of a node: an old one and a new one, as a rolling update with a surge makes them.

mod pod;
mod rogue;
mod stream;
mod support;

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Command;
use std::thread;
use std::time::Duration;

use heirloom::lock::lock_path;
use pod::*;
use rogue::{Plot, Role};
use rustix::net::sockopt::set_tcp_user_timeout;
use rustix::process::Signal;
use stream::Stream;
use support::guests::Guest;
use support::random::Random;
use support::talk::{Talk, Talker};
use support::traffic::Traffic;
use support::*;

/// How many talk all the time.
const TALKERS: usize = 8;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

fn talk(address: SocketAddr) -> Talk {
    let guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(address)).collect();
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(guests, &names);
    talk.wait_for_progress();
    talk
}

/// Fails unless everybody has heard everything that the others have said, and those who have come and gone.
#[track_caller]
fn assert_heard(talkers: &[Talker], visitors: &[String]) {
    for listener in talkers {
        for speaker in talkers.iter().filter(|speaker| speaker.guest.name != listener.guest.name) {
            let heard = listener.ear.count(&speaker.guest.name);
            assert_eq!(heard, speaker.said, "lines of {} at {}", speaker.guest.name, listener.guest.name);
        }
        assert_eq!(listener.ear.left, talkers[0].ear.left, "everybody hears of the same");
        for visitor in visitors {
            assert_eq!(listener.ear.count(visitor), 1, "of {visitor} at {}", listener.guest.name);
        }
        assert_eq!(listener.ear.left.len(), visitors.len(), "somebody was disconnected");
    }
}

/// The old pod's namespaces end with it but for its network, which is without a process and without a name then: the connections
/// keep it, and the listener, at which others still come in.
#[test]
fn a_new_pod_takes_over_and_the_old_network_goes_on() {
    let Some(node) = Node::new() else { return };
    let networks = [node.network(1), node.network(2)];
    let spec = |number: usize| Spec { network: Some(&networks[number]), ..Spec::default() };
    let mut old = node.server(spec(0), "try");
    let address = old.address(Some(&networks[0]));
    let namespaces = old.namespaces();
    let talk = talk(address);
    let traffic = Traffic::start(address);
    let mut new = node.server(spec(1), "try");
    old.process.wait_for_code(0);
    talk.wait_for_progress();
    let (mut visitors, lost) = traffic.finish();
    assert_eq!(lost, 0, "not let in");
    namespaces.iter().for_each(Namespace::assert_empty);
    let status = node.wait_for_generation(1);
    assert_eq!((status.pid, status.last_takeover.expect("one").peer_pid), (1, None));

    let new_address = SocketAddr::new(networks[1].address().into(), address.port());
    TcpStream::connect(new_address).expect_err("the listener is in the old pod's network, and only there");

    node.namespace_of(&networks[0]).assert_empty();
    node.forget(&networks[0]);
    talk.wait_for_progress();
    let traffic = Traffic::start(address);
    talk.wait_for_progress();
    let (more, lost) = traffic.finish();
    assert_eq!(lost, 0, "not let in");
    visitors.extend(more);
    assert_heard(&talk.finish(), &visitors);
    assert!(node.is_plugged(&networks[0]));
    new.signal(Signal::TERM);
    new.process.wait_for_code(0);
    wait_for("the old network to end with its last socket", || !node.is_plugged(&networks[0]));
    assert!(node.is_plugged(&networks[1]), "it has a name");
}

/// What is lost when a network plugin takes the pod's link away with the pod: everybody on it. Nobody is told, on either side.
#[test]
fn who_came_by_the_old_pods_own_link_is_lost_with_it() {
    let Some(node) = Node::new() else { return };
    let networks = [node.network(1), node.network(2)];
    let spec = |number: usize| Spec { network: Some(&networks[number]), ..Spec::default() };
    let mut old = node.server(spec(0), "try");
    let address = old.address(Some(&networks[0]));
    let mut guest = Guest::join(address);
    let mut new = node.server(spec(1), "try");
    old.process.wait_for_code(0);
    guest.say("here\n");
    wait_for("it to be heard", || node.status().counters["lines_in"] == 1);

    node.forget(&networks[0]);
    node.unplug(&networks[0]);
    TcpStream::connect(address).expect_err("there is no way there");
    // How long it tries. Without that it would be a quarter of an hour.
    set_tcp_user_timeout(guest.socket(), 500).expect("setsockopt");
    guest.say("still here\n");
    let error = guest.try_line().expect_err("nobody answers");
    assert_ne!(error.kind(), ErrorKind::WouldBlock, "it is given up");
    let status = node.status();
    assert_eq!(status.counters["lines_in"], 1);
    assert!(status.items.iter().any(|item| item.name == guest.name), "the server does not know of it");
    new.signal(Signal::TERM);
    new.process.wait_for_code(0);
}

/// In the node's own network, as with `hostNetwork`, nothing of a pod is needed any more once it has been replaced. Who the pods'
/// user is to themselves does not matter.
#[test]
fn one_pod_after_the_other() {
    let Some(node) = Node::new() else { return };
    let mut current = node.server(Spec::default(), "try");
    let address = current.address(None);
    let talk = talk(address);
    let mut visitors = Vec::new();
    for (generation, uid) in (1..).zip([0, 1000, 65_533, 0, 7]) {
        let traffic = Traffic::start(address);
        let namespaces = current.namespaces();
        let next = node.server(Spec { uid, ..Spec::default() }, "must");
        current.process.wait_for_code(0);
        current = next;
        let status = node.wait_for_generation(generation);
        assert_eq!((status.pid, status.last_takeover.expect("one").peer_pid), (1, None));
        namespaces.iter().for_each(Namespace::assert_empty);
        talk.wait_for_progress();
        let (names, lost) = traffic.finish();
        assert_eq!(lost, 0, "not let in");
        visitors.extend(names);
    }
    let talkers = talk.finish();
    assert_heard(&talkers, &visitors);
    let log = current.process.stderr();
    assert!(log.contains("from=a process of another pid namespace"), "{log}");

    // PID 1 gets no signal that it has no handler for: this one has.
    let mut guest = talkers.into_iter().next().expect("somebody").guest;
    current.signal(Signal::TERM);
    current.process.wait_for_code(0);
    while guest.try_line().expect("a clean end").is_some() {}
}

#[test]
fn nothing_is_written_to_but_the_shared_directory() {
    let Some(node) = Node::new() else { return };
    let spec = Spec::default();
    let mut old = node.server(spec, "try");
    let mut guests = [Guest::join(old.address(None)), Guest::join(old.address(None))];
    let mut new = node.server(spec, "try");
    old.process.wait_for_code(0);
    // A new configuration, say: it starts the file that it was made of.
    let upgrade = new.exec(spec, &format!("heirloom upgrade --control {CONTROL}"));
    assert!(
        upgrade.stdout().starts_with(b"upgraded in place: "),
        "{} {}",
        String::from_utf8_lossy(&upgrade.stdout()),
        upgrade.stderr()
    );
    assert_eq!(node.wait_for_generation(2).pid, 1);
    guests[0].say("here\n");
    let said = format!("<{}> here", guests[0].name);
    while guests[1].line() != said {}

    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", new.init())).expect("it runs");
    let mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let writable: Vec<_> =
        mounts.filter(|mount| mount[5].starts_with("rw")).map(|mount| (mount[4], mount[5])).collect();
    assert_eq!(writable.len(), 2, "{writable:?}");
    for (directory, options) in writable {
        assert!(["/proc", "/shared"].contains(&directory));
        assert!(["nosuid", "nodev", "noexec"].iter().all(|option| options.contains(option)), "{options}");
    }
    // Nor does anything stay behind there.
    new.signal(Signal::TERM);
    new.process.wait_for_code(0);
    let left: Vec<_> =
        fs::read_dir(node.shared()).expect("it is there").map(|entry| entry.expect("one").path()).collect();
    assert_eq!(left, [lock_path(&node.control())], "the lock file stays, for the next one");
}

/// Both pods are somebody whom the other's user namespace does not know, in a directory that each sees as its own, which is how
/// Kubernetes makes pods with `hostUsers: false`.
#[test]
fn pods_of_different_users_do_not_trust_each_other() {
    let Some(node) = Node::new() else { return };
    if !have("python3") {
        return skip("directories are mapped by a program in Python");
    }
    let mut old = node.server(Spec::default(), "try");
    let mut guest = Guest::join(old.address(None));
    let stranger = Spec { host_uid: USER + 1, ..Spec::default() };
    let mut new = node.server(Spec { idmapped: true, ..stranger }, "try");
    new.process.wait_for_code(4);
    let said = new.process.stderr();
    assert!(said.contains("may not ask here") && said.contains("same user namespace"), "{said}");
    wait_for("its log", || old.process.stderr().contains("a process of another pid namespace (uid 65534)"));

    // Where the directory is not mapped they do not even meet.
    let mut new = node.server(stranger, "try");
    new.process.wait_for_code(1);
    let said = new.process.stderr();
    assert!(said.contains("uid 65534"), "{said}");

    // The node's root is nobody to them either.
    let asked = node.ask_as(0, &["status"]);
    assert!(asked.stderr().contains("may not ask here"), "{}", asked.stderr());

    guest.say("here\n");
    wait_for("it to be heard", || node.status().counters["lines_in"] == 1);
    assert_eq!(node.status().generation, 0);
    old.signal(Signal::TERM);
    old.process.wait_for_code(0);
}

/// The first process of the new pod is killed at any moment before it has taken over.
#[test]
fn a_new_pod_that_is_killed_leaves_everything_with_the_old_one() {
    /// How many die in a takeover, and not before or after it.
    const DEATHS: usize = 6;
    let Some(node) = Node::new() else { return };
    let mut random = Random::seeded();
    let mut current = node.server(Spec::default(), "try");
    let talk = talk(current.address(None));
    let lock = lock_path(&node.control());
    let mut deaths = 0;
    while deaths < DEATHS {
        let begun = |pod: &Pod| pod.process.stderr().matches("takeover begins").count();
        let before = begun(&current);
        let mut doomed = node.server(Spec::default(), "must");
        let init = doomed.init();
        if random.one_in(2) {
            wait_for("the takeover to begin", || begun(&current) > before || !current.process.is_running());
        }
        // The stimulus, not a wait.
        thread::sleep(Duration::from_micros(random.below(4_000)));
        proc::signal(init, Signal::STOP);
        wait_for("it to be stopped", || proc::is_stopped(init));
        if proc::holds_lock(init, &lock) || !current.process.is_running() {
            // It serves, or is about to.
            proc::signal(init, Signal::CONT);
            current.process.wait_for_code(0);
            current = doomed;
            continue;
        }
        proc::signal(init, Signal::KILL);
        doomed.process.wait();
        let mut status = node.status();
        wait_for("the old pod to go on", || {
            status = node.status();
            !status.takeover_running
        });
        if begun(&current) > before {
            let last = status.last_takeover.expect("one");
            assert_eq!((last.outcome.as_str(), last.peer_pid), ("resumed", None), "{last:?}");
            deaths += 1;
        }
        talk.wait_for_progress();
    }
    assert_heard(&talk.finish(), &[]);
    current.signal(Signal::TERM);
    current.process.wait_for_code(0);
}

/// The old pod has handed over everything, and its first process is killed before it lets go: the new one is sure that it is dead,
/// though it can neither see nor signal it, and serves.
#[test]
fn the_new_pod_notices_that_the_old_one_is_dead() {
    let Some(node) = Node::new() else { return };
    let mut stream = Stream::start();
    for point in ["freeze", "accept", "released"] {
        let plot = Plot { role: Role::Incumbent, point, act: "pause" };
        let rogue = rogue::command(plot, CONTROL.as_ref(), stream.address());
        let mut old = node.pod_of(Spec::default(), &rogue);
        wait_for("the rogue to serve", || rogue::says(&old.process).contains("serving"));
        let arguments = ["chat", stream.address(), "--control", CONTROL, "--replace", "must"];
        let mut new = node.pod(Spec::default(), &arguments);
        rogue::wait_until_there(&old.process);
        old.signal(Signal::KILL);
        old.process.wait();
        let status = node.wait_for_generation(1);
        assert_eq!(status.last_takeover.expect("one").peer_pid, None);
        let seen = new.process.stdout_len();
        wait_for("more of the stream", || new.process.stdout_len() > seen);
        stream.ends_exact(0, &[&new.process]);
        new.signal(Signal::TERM);
        new.process.wait_for_code(0);
        stream = Stream::start();
    }
}

/// In a DaemonSet a container that has ended is started again, that of the old pod too. It must not take everything back; it may
/// serve where nobody else does.
#[test]
fn the_old_pods_container_is_started_again() {
    let Some(node) = Node::new() else { return };
    let start = of_the_manifest("exec heirloom chat").replace("31337", "0");
    let own = [node.directory("old"), node.directory("new")];
    let spec = |number: usize| Spec { own: Some(&own[number]), ..Spec::default() };
    let mut old = node.script(spec(0), &start);
    let address = old.address(None);
    let mut guest = Guest::join(address);
    let mut new = node.script(spec(1), &start);
    old.process.wait_for_code(0);
    let mut again = node.script(spec(0), &start);
    again.process.wait_for_code(4);
    guest.say("here\n");
    wait_for("it to be heard", || node.status().counters["lines_in"] == 1);
    assert_eq!(node.status().generation, 1);

    new.signal(Signal::KILL);
    new.process.wait();
    let mut again = node.script(spec(0), &start);
    Guest::join(again.address(None));
    assert_eq!(node.wait_for_generation(0).pid, 1);
    again.signal(Signal::TERM);
    again.process.wait_for_code(0);
}

/// The service lock holds between mount namespaces, also where nobody finds the other's socket any more.
#[test]
fn the_lock_is_the_same_one_in_all_pods() {
    let Some(node) = Node::new() else { return };
    let old = node.server(Spec::default(), "try");
    old.address(None);
    fs::remove_file(node.control()).expect("unlink");
    let mut rival = node.server(Spec::default(), "try");
    rival.process.wait_for_code(1);
    let said = rival.process.stderr();
    assert!(said.contains("a process holds /shared/chat.sock.lock"), "{said}");
}

/// A readiness probe must ask whether this pod serves. At the shared control socket the old one answers it as well.
#[test]
fn a_pod_is_ready_when_it_serves() {
    let Some(node) = Node::new() else { return };
    let spec = Spec::default();
    let probe = of_the_manifest("grep -q FLOCK");
    let probe =
        probe.split_once("[sh, -c, ").and_then(|(_, rest)| rest.strip_suffix("]")).expect("a command");
    let is_ready = |pod: &Pod| pod.exec(spec, probe).wait().success();
    let mut stream = Stream::start();
    let chat = ["chat", stream.address(), "--control", CONTROL];
    let old = node.pod(spec, &chat);
    wait_for("the old pod to serve", || is_ready(&old));
    let plot = Plot { role: Role::Successor, point: "ready", act: "pause" };
    let slow = node.pod_of(spec, &rogue::command(plot, CONTROL.as_ref(), stream.address()));
    rogue::wait_until_there(&slow.process);
    assert!(node.ask_as(USER, &["ping"]).wait().success(), "somebody answers");
    assert!(!is_ready(&slow) && is_ready(&old));
    drop(slow);
    let mut new = node.pod(spec, &[&chat[..], &["--replace", "must"]].concat());
    wait_for("the new pod to serve", || is_ready(&new));
    stream.ends_exact(0, &[&old.process, &new.process]);
    new.signal(Signal::TERM);
    new.process.wait_for_code(0);
}

/// Whose directory it was does not matter, and all that its container may do is that.
#[test]
fn the_directory_is_made_one_of_the_pods_user() {
    let Some(node) = Node::new() else { return };
    let directory = node.directory("made");
    let prepare = of_the_manifest("chmod 700")
        .trim_start_matches("- ")
        .replace("/shared", &directory.display().to_string());
    for (owner, mode) in [(0, 0o755), (USER, 0o700), (USER + 1, 0o777)] {
        chown(&directory, Some(owner), Some(owner)).expect("chown");
        fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).expect("chmod");
        let mut preparing = Command::new("setpriv");
        preparing.args(["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+chown,+fowner"]);
        Process::start(preparing.args(["sh", "-c", &prepare])).wait_for_code(0);
        let made = fs::metadata(&directory).expect("stat");
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (USER, USER, 0o700));
    }
}

/// With `heirloom run` as their first process: the new pod's store holds everything, and the old one's ends with its pod.
#[test]
fn pods_with_a_store_hand_over_to_each_other() {
    let Some(node) = Node::new() else { return };
    let own = [node.directory("old"), node.directory("new")];
    let run = |number: usize| {
        let arguments =
            ["run", "--control", "/pod/run.sock", "--", "/program", "chat", "--listen", "0.0.0.0:0"];
        let spec = Spec { own: Some(&own[number]), ..Spec::default() };
        node.pod(spec, &[&arguments[..], &["--control", CONTROL]].concat())
    };
    let kill = |pod: &Pod| {
        let server = proc::only_child(pod.init());
        proc::signal(server, Signal::KILL);
        wait_for("its end", || proc::has_ended(server));
    };
    let mut old = run(0);
    let talk = talk(old.address(None));
    kill(&old);
    talk.wait_for_progress();
    let mut new = run(1);
    old.process.wait_for_code(0);
    for _ in 0..3 {
        talk.wait_for_progress();
        kill(&new);
    }
    talk.wait_for_progress();
    assert_heard(&talk.finish(), &[]);
    new.signal(Signal::TERM);
    new.process.wait_for_code(0);
}

/// The line of the manifest that has this in it.
fn of_the_manifest(part: &str) -> String {
    const MANIFEST: &str = include_str!("../../../units/kubernetes/daemonset.yaml");
    let lines: Vec<_> = MANIFEST.lines().map(str::trim).collect();
    let found = lines.iter().position(|line| line.contains(part)).expect("it is there");
    // A folded text goes over two lines here.
    let above = found.checked_sub(2).filter(|&above| lines[above].ends_with(">-"));
    above.map_or(lines[found].to_owned(), |_| lines[found - 1..=found].join(" "))
}
