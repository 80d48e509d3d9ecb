//! The store as a program sees it: what is put comes back, whatever the program died of, and what cannot be put is refused.

mod support;

use heirloom::control::{Client, Request};
use rustix::process::Signal;
use support::{Run, has_python, wait_for};

#[test]
fn sockets_and_what_is_stored_come_back_after_a_kill() {
    if !has_python() {
        return;
    }
    let (run, mut first) = Run::puppet(&["--listen", "web=127.0.0.1:0", "--listen", "127.0.0.1:0"]);
    assert_eq!((first.given, first.names.as_str()), (2, "web:listen"));
    let port = first.number("socket.socket(fileno=os.dup(3)).getsockname()[1]");
    first.tell("r, w = os.pipe(); os.write(w, b'kept'); put('pipe', r, w); put('one', os.dup(r), w)");
    first.tell("f = os.memfd_create('x'); put('', f); put('memory', f); barrier()");
    let status = run.status();
    let supervised = status.supervised.expect("it supervises");
    assert_eq!(supervised.pid, Some(first.pid));
    assert_eq!(status.items.len(), 5, "{:?}", status.items);
    assert_eq!(status.items[2].put_by, Some(first.pid));
    // The second pipe put was of what is there already; a name has to have letters.
    assert_eq!(
        (status.counters["puts"], status.counters["duplicates"], status.counters["refused"]),
        (3, 2, 1)
    );
    first.kill(Signal::KILL);

    let mut second = run.next();
    assert_eq!((second.given, second.names.as_str()), (5, "web:listen:pipe:pipe:memory"));
    assert_eq!(second.number("socket.socket(fileno=os.dup(3)).getsockname()[1]"), port);
    assert_eq!(second.text("os.read(5, 10).decode()"), "kept");
    second.tell("os.write(6, b'again')");
    second.tell(
        "notify('FDSTOREREMOVE=1\\nFDNAME=memory'); notify('FDSTOREREMOVE=1\\nFDNAME=nothing'); barrier()",
    );
    assert_eq!(run.counter("removes"), 1);
    assert!(first.is_gone());
}

#[test]
fn a_crash_by_any_signal_keeps_it() {
    if !has_python() {
        return;
    }
    let (mut run, mut puppet) = Run::puppet(&[]);
    puppet.tell("r, w = os.pipe(); put('pipe', r, w); barrier()");
    let inode = puppet.number("os.fstat(r).st_ino");
    for signal in [Signal::SEGV, Signal::KILL, Signal::TERM] {
        puppet.kill(signal);
        puppet = run.next();
        assert_eq!((puppet.given, puppet.number("os.fstat(3).st_ino")), (2, inode));
    }
    // Back-off has grown meanwhile; a failure by code is one as well.
    puppet.begin("os._exit(3)");
    puppet = run.next();
    assert_eq!((puppet.given, puppet.names.as_str()), (2, "pipe:pipe"));
    assert_eq!(run.counter("restarts"), 4);
    puppet.begin("os._exit(0)");
    assert_eq!(run.code(), 0);
}

#[test]
fn beyond_the_limit_a_put_is_refused_and_nothing_is_left_of_it() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&["--store-max", "5"]);
    assert_eq!(puppet.text("os.environ['FDSTORE']"), "5");
    puppet.tell("put('a', *[os.memfd_create('x') for _ in range(4)]); barrier()");
    let before = run.descriptors();
    for _ in 0..50 {
        puppet.tell("put('b', *[os.memfd_create('x') for _ in range(2)]); barrier()");
    }
    assert_eq!(run.counter("stored"), 4);
    run.has_descriptors(before);
    puppet.tell("put('c', os.memfd_create('x')); barrier()");
    let status = run.status();
    let supervised = status.supervised.unwrap();
    assert_eq!((status.counters["stored"], status.counters["refused"]), (5, 50));
    assert!(
        supervised.refused.iter().all(|why| why.contains("at most 5") && why.contains("\"b\"")),
        "{supervised:?}"
    );
    wait_for("the option to be named", || run.log().contains("--store-max"));
    // After a removal there is room again.
    puppet.tell("notify('FDSTOREREMOVE=1\\nFDNAME=a'); put('d', *[os.memfd_create('x') for _ in range(4)]); barrier()");
    assert_eq!(run.counter("stored"), 5);
}

#[test]
fn names_that_are_none_are_refused_with_a_reason() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    for (name, reason) in
        [("'a:b'", "colon"), ("'ä'", "ASCII"), ("'x' * 256", "longer than 255"), ("'a\\tb'", "\u{fffd}")]
    {
        puppet.tell(&format!("put({name}, os.memfd_create('x')); barrier()"));
        let refused = run.status().supervised.unwrap().refused;
        assert!(refused.last().unwrap().contains(reason), "{refused:?}");
    }
    puppet.tell("put('x' * 255, os.memfd_create('x')); notify('FDSTORE=1', os.memfd_create('x')); barrier()");
    puppet.tell(
        "notify('FDSTORE=1'); notify('FDSTOREREMOVE=1'); notify('READY=1', os.memfd_create('x')); barrier()",
    );
    let status = run.status();
    let names: Vec<&str> = status.items.iter().map(|item| item.name.as_str()).collect();
    assert_eq!(names, [&"x".repeat(255), "stored"]);
    assert_eq!(status.counters["refused"], 7);
}

#[test]
fn names_that_do_not_fit_the_environment_need_a_program_that_fetches() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    // 131,072 bytes less the variable's name, at 200 bytes each with the colon: 655 fit.
    puppet.tell("held = [os.memfd_create('x') for _ in range(700)]");
    puppet.tell("for i, f in enumerate(held): put('n%0198d' % i, f)");
    puppet.tell("barrier()");
    assert_eq!((run.counter("stored"), run.counter("refused")), (655, 45));
    assert!(run.status().supervised.unwrap().refused[0].contains("shorter names, or let the program fetch"));
    puppet.kill(Signal::KILL);
    let mut puppet = run.next();
    assert_eq!(puppet.given, 655);
    puppet.tell("notify('X_HEIRLOOM_FETCH=1')");
    puppet.tell("for i in range(200): put('m%0198d' % i, os.memfd_create('x'))");
    puppet.tell("barrier()");
    assert_eq!(run.counter("stored"), 855);
    puppet.kill(Signal::KILL);
    let mut puppet = run.next();
    assert_eq!((puppet.given, puppet.names.as_str()), (0, ""));
    assert_eq!(puppet.number("len(fetch())"), 855);
}

#[test]
fn what_hangs_up_is_let_go_unless_it_is_to_be_kept() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    let before = run.descriptors();
    puppet.tell("a, b = socket.socketpair(); put('polled', a.fileno())");
    puppet.tell("c, d = socket.socketpair(); put('kept', c.fileno(), more='FDPOLL=0\\n')");
    puppet.tell("put('file', os.open('/etc/passwd', os.O_RDONLY)); barrier()");
    assert_eq!(run.counter("stored"), 3);
    puppet.tell("b.close(); d.close()");
    wait_for("the hang-up", || run.counter("hung_up") == 1);
    let names: Vec<String> = run.status().items.into_iter().map(|item| item.name).collect();
    assert_eq!(names, ["kept", "file"]);
    run.has_descriptors(before + 2);
    // Its duplicate lives here still: it is watched no more, or this would spin.
    puppet.tell("notify('FDSTOREREMOVE=1\\nFDNAME=kept'); barrier()");
    run.has_descriptors(before + 1);
    let spent = |run: &Run| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", run.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let ticks = spent(&run);
    puppet.tell("time.sleep(0.3)");
    assert!(spent(&run) - ticks < 10, "it is busy with nothing");
}

#[test]
fn a_barrier_is_the_end_of_all_before_and_leaves_nothing_open() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    let before = run.descriptors();
    for round in 1..=20 {
        puppet.tell("f = os.memfd_create('x'); put('x', f); os.close(f); barrier()");
        assert_eq!(run.counter("puts"), round);
    }
    puppet.tell("notify('FDSTOREREMOVE=1\\nFDNAME=x'); barrier(); barrier()");
    run.has_descriptors(before);
}

#[test]
fn thousands_are_fetched_in_their_order_and_stay() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    let limit = puppet.number("__import__('resource').getrlimit(7)[1]") - 800;
    let count = limit.min(15_000);
    puppet.tell("import resource; hard = resource.getrlimit(7)[1]; resource.setrlimit(7, (hard, hard))");
    puppet.tell("notify('X_HEIRLOOM_FETCH=1')");
    puppet.tell(&format!(
        "for i in range({count}):\n    a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    put('h%d' % i, a.fileno(), more='FDPOLL=0\\n')\n    a.close()"
    ));
    puppet.tell("barrier()");
    assert_eq!(run.counter("stored"), count as u64);
    puppet.kill(Signal::KILL);
    let mut puppet = run.next();
    assert_eq!(puppet.given, 0);
    puppet.tell("import resource; hard = resource.getrlimit(7)[1]; resource.setrlimit(7, (hard, hard))");
    for _ in 0..2 {
        puppet.tell("held = fetch()");
        assert_eq!(puppet.number("len(held)"), count);
        assert_eq!(puppet.tell("[name for name, _ in held] == ['h%d' % i for i in range(len(held))]"), true);
        puppet.tell("for _, f in held: os.close(f)");
    }
    assert_eq!(run.status().items.len(), count as usize);
    // Who does not read is dropped, and nobody waits for it; who goes is forgotten.
    let before = run.descriptors();
    let mut client = Client::connect(run.control()).unwrap();
    client.send(&Request::Application("Fetch")).unwrap();
    let (_, channel) = client.receive().unwrap();
    assert_eq!(channel.len(), 1);
    puppet.tell("put('last', os.memfd_create('x')); barrier()");
    drop((channel, client));
    run.has_descriptors(before + 1);
}
