//! An upgrade of heirloom-run itself, in place: everything that it holds stays, and no child notices.

mod support;

use heirloom::upgrade::{AskError, Upgrade, Upgraded};
use rustix::process::Signal;
use support::{Puppet, Run, has_python, wait_for};

fn itself() -> Upgrade {
    Upgrade { itself: true, ..Upgrade::default() }
}

#[track_caller]
fn upgrade(run: &Run) {
    let before = run.pid();
    match run.upgrade(itself()) {
        Ok(Upgraded::Replaced { before: old, now }) => {
            assert_eq!((old.pid, now.pid), (before, before));
            assert_eq!(now.generation, old.generation + 1);
        }
        other => panic!("{other:?}"),
    }
}

fn main_pid(run: &Run) -> Option<u32> {
    run.status().supervised.unwrap().pid
}

#[test]
fn all_that_is_held_stays_and_so_does_the_child() {
    if !has_python() {
        return;
    }
    let (mut run, mut puppet) = Run::puppet(&["--listen", "web=127.0.0.1:0", "--store-max", "2000"]);
    let port = puppet.number("socket.socket(fileno=os.dup(3)).getsockname()[1]");
    puppet.tell("r, w = os.pipe(); os.write(w, b'kept'); put('heirloom.pipe', r, w); put('x:', r)");
    puppet.tell("a, b = socket.socketpair(); put('pair', a.fileno()); c, d = socket.socketpair()");
    puppet.tell("put('kept', c.fileno(), more='FDPOLL=0\\n'); notify('READY=1\\nSTATUS=text'); barrier()");
    puppet.tell("import resource; resource.setrlimit(7, (3000, 3000))");
    puppet.tell("for i in range(1000): put(f'n{i}', os.memfd_create('x'))");
    puppet.tell("barrier()");
    let before = run.status();
    let descriptors = run.descriptors();
    for _ in 0..3 {
        upgrade(&run);
    }
    let after = run.status();
    let pids: Vec<_> = after.items.iter().map(|item| item.put_by).collect();
    assert_eq!(pids, before.items.iter().map(|item| item.put_by).collect::<Vec<_>>());
    assert_eq!(after.items, before.items);
    assert_eq!(after.supervised, before.supervised);
    assert_eq!(after.counters, before.counters);
    run.has_descriptors(descriptors);
    // It speaks as before, and what is watched is watched.
    puppet.tell("b.close(); d.close()");
    wait_for("the hang-up", || run.counter("hung_up") == 1);
    puppet.tell("notify('STATUS=more'); notify('FDSTOREREMOVE=1\\nFDNAME=n7'); put('new', os.memfd_create('x')); barrier()");
    assert_eq!(run.status().supervised.unwrap().text, "more");
    puppet.kill(Signal::KILL);
    let mut second = run.next();
    assert_eq!(second.given, 1 + 2 + 1 + 999 + 1);
    assert!(second.names.starts_with("web:heirloom.pipe:heirloom.pipe:kept:n0:"), "{}", second.names);
    assert!(second.names.ends_with(":new"));
    assert_eq!(second.number("socket.socket(fileno=os.dup(3)).getsockname()[1]"), port);
    assert_eq!(second.text("os.read(4, 9).decode()"), "kept");
    assert_eq!(second.tell("signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()"), true);
    second.begin("os._exit(0)");
    assert_eq!(run.code(), 0);
}

#[test]
fn what_ends_meanwhile_is_not_missed() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&["--tries", "0"]);
    for round in 0..5 {
        puppet.tell("put('f', os.memfd_create('x')); barrier()");
        puppet.begin(&format!("time.sleep({}); os._exit(1)", round as f64 * 0.05));
        upgrade(&run);
        puppet = run.next();
        assert_eq!(puppet.given, round + 1);
        assert_eq!(main_pid(&run), Some(puppet.pid));
    }
}

#[test]
fn timers_go_on() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&["--watchdog", "4s"]);
    puppet.tell("notify('READY=1')");
    for _ in 0..5 {
        puppet.tell("notify('WATCHDOG=1')");
        upgrade(&run);
    }
    assert!(!run.log().contains("watchdog ends"), "{}", run.log());
    let next = run.next();
    wait_for("the watchdog", || run.log().contains("the watchdog ends it"));
    assert_eq!(main_pid(&run), Some(next.pid));
}

#[test]
fn under_load_nothing_is_lost() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    puppet.begin(
        "for i in range(3000):
    f = os.memfd_create('x')
    os.write(f, b'%d' % i)
    put(f'n{i}', f)
    os.close(f)
    if i % 3 == 0: notify(f'FDSTOREREMOVE=1\\nFDNAME=n{i}')
barrier()",
    );
    let mut rounds = 0;
    while run.counter("puts") < 3000 {
        upgrade(&run);
        rounds += 1;
    }
    assert!(rounds >= 2, "{rounds}");
    puppet.finish();
    puppet.kill(Signal::KILL);
    let mut second = run.next();
    assert_eq!(second.given, 2000);
    let complete = "[os.pread(3 + k, 9, 0).decode() for k in range(given)] == [str(i) for i in range(3000) if i % 3] \
                    and os.environ['LISTEN_FDNAMES'].split(':') == [f'n{i}' for i in range(3000) if i % 3]";
    assert_eq!(second.tell(complete), true);
}

#[test]
fn one_that_cannot_go_on_changes_nothing() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    puppet.tell("put('f', os.memfd_create('x')); barrier()");
    let failing = [
        Upgrade { program: Some("/bin/false".into()), ..itself() },
        Upgrade { program: Some("/nowhere/at/all".into()), ..itself() },
        Upgrade { arguments: Some(vec!["--no-such-option".into()]), ..itself() },
    ];
    for request in failing {
        let failed = run.upgrade(request.clone());
        assert!(matches!(failed, Err(AskError::Refused(_))), "{request:?}: {failed:?}");
        assert_eq!(main_pid(&run), Some(puppet.pid));
    }
    let checked = run.upgrade(Upgrade { dry_run: true, ..itself() });
    assert!(matches!(&checked, Ok(Upgraded::Checked(checked)) if checked.in_place), "{checked:?}");
    // Its checks were children; they are waited for, and so are those of the command.
    puppet.tell("x = subprocess.run(['sh', '-c', '(exit 0 &)'])");
    wait_for("the orphan", || run.counter("reaped") >= 1);
    puppet.kill(Signal::KILL);
    assert_eq!(run.next().given, 1);
}

#[test]
fn the_command_of_an_upgrade_is_kept_and_a_new_command_line_counts() {
    if !has_python() {
        return;
    }
    let (mut run, puppet) = Run::puppet(&[]);
    let control = run.control();
    let request =
        Upgrade { arguments: Some(vec![support::PUPPET.into(), "second".into()]), ..Upgrade::default() };
    let asked = std::thread::spawn(move || heirloom::upgrade::ask(&control, request, support::LONG));
    let second: Puppet = run.next();
    asked.join().unwrap().unwrap();
    drop(puppet);
    upgrade(&run);
    second.kill(Signal::KILL);
    let third = run.next();
    assert_eq!(third.arguments, ["second"]);
    let control = run.control().to_str().unwrap().to_owned();
    let arguments = ["--control", &control, "--tries", "1", "--", "python3", support::PUPPET, "third"];
    let request = Upgrade { arguments: Some(arguments.map(String::from).into()), ..itself() };
    assert!(matches!(run.upgrade(request), Ok(Upgraded::Replaced { .. })));
    assert_eq!(main_pid(&run), Some(third.pid));
    assert_eq!(run.status().supervised.unwrap().command.last().unwrap(), "third");
    third.kill(Signal::KILL);
    assert_eq!(run.code(), 137);
}
