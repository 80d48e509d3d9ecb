//! Programs that misbehave: nothing leaks, nothing grows, nothing ends, and others are heard all the while.

mod support;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rustix::process::Signal;
use support::{Run, has_python, wait_for};

/// Resident memory, in kB.
fn memory(run: &Run) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", run.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_flood_of_garbage_with_descriptors_leaves_nothing() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    let before = run.descriptors();
    puppet.tell(
        "import random
random.seed(7)
words = [b'FDSTORE=1', b'FDSTORE', b'FDNAME=', b'FDNAME=a:b', b'FDNAME=x', b'FDPOLL=0', b'BARRIER=1', b'READY=1', b'STATUS=\\xff\\x00',
         b'MAINPID=1', b'MAINPID=99999999999', b'WATCHDOG=maybe', b'FDSTOREREMOVE=1', b'WATCHDOG_USEC=x', b'=', b'\\n', b'ERRNO=2', b'X']
def garbage(rounds):
    for _ in range(rounds):
        lines = random.choices(words, k=random.randrange(5)) + [random.randbytes(random.randrange(60))]
        random.shuffle(lines)
        text = b'\\n'.join(lines) or b'x'
        notify(text, *random.choices([0, 1, 2, 0, 0], k=random.randrange(4)))
garbage(20000)
notify('FDSTOREREMOVE=1\\nFDNAME=x')
notify('FDSTOREREMOVE=1\\nFDNAME=stored')
barrier()",
    );
    let settled = memory(&run);
    puppet.tell("garbage(20000); notify('FDSTOREREMOVE=1\\nFDNAME=x'); notify('FDSTOREREMOVE=1\\nFDNAME=stored'); barrier()");
    assert!(run.counter("refused") > 1000);
    assert_eq!(run.counter("stored"), 0, "{:?}", run.status().items);
    run.has_descriptors(before);
    assert!(memory(&run) < settled + 2000, "{settled} kB grew to {} kB", memory(&run));
    assert!(run.log().len() < 100_000, "the log is flooded");
    assert_eq!(run.status().supervised.unwrap().pid, Some(puppet.pid));
}

#[test]
fn any_datagram_is_taken_without_harm() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&["--restart", "never"]);
    let before = run.descriptors();
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let speaking = std::cell::RefCell::new(&mut puppet);
    let datagram = prop::collection::vec(any::<u8>(), 0..5000);
    runner
        .run(&(datagram, 0..254usize), |(bytes, descriptors)| {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            speaking.borrow_mut().tell(&format!("notify(bytes.fromhex('{hex}'), *[0] * {descriptors})"));
            Ok(())
        })
        .unwrap();
    puppet.tell("barrier()");
    run.has_descriptors(before);
    // Too long is refused as a whole.
    puppet.tell("notify(b'FDSTORE=1\\nFDNAME=long\\nSTATUS=' + b'x' * 5000, 0); barrier()");
    assert_eq!(run.counter("stored"), 0);
    assert!(run.status().supervised.unwrap().refused.last().unwrap().contains("too long"));
}

#[test]
fn many_processes_put_and_remove_at_once() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    puppet.tell(
        "def work(k):
    connection.close()
    for i in range(200):
        f = os.memfd_create('x')
        put(f'p{k}-{i}', f)
        os.close(f)
        if i % 2: notify(f'FDSTOREREMOVE=1\\nFDNAME=p{k}-{i}')
    barrier()
    os._exit(0)
children = []
for k in range(12):
    child = os.fork()
    if child == 0: work(k)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]",
    );
    assert_eq!(puppet.tell("codes == [0] * 12"), true);
    assert_eq!((run.counter("stored"), run.counter("puts"), run.counter("refused")), (1200, 2400, 0));
    puppet.kill(Signal::KILL);
    let mut next = run.next();
    assert_eq!(next.given, 1200);
    let expected = "sorted(os.environ['LISTEN_FDNAMES'].split(':')) == sorted(f'p{k}-{i}' for k in range(12) for i in range(0, 200, 2))";
    assert_eq!(next.tell(expected), true);
}

#[test]
fn a_death_in_the_middle_of_puts_leaves_whole_puts_alone() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&["--tries", "0"]);
    let before = run.descriptors();
    for round in 0..4 {
        puppet.tell("a = os.memfd_create('y')");
        puppet.begin("for i in range(1 << 30): f = os.memfd_create('x'); put(f'r{i}', f, a); os.close(f)");
        wait_for("some puts", || run.counter("puts") > 300 * (round + 1));
        puppet.kill(Signal::KILL);
        puppet = run.next();
        // What was sent before it died is held, in order and without a gap; what came with each was put once.
        let names = "[n for n in os.environ['LISTEN_FDNAMES'].split(':')]";
        let whole = format!("(lambda n: n == [n[0]] + [f'r{{i}}' for i in range(len(n) - 1)])({names})");
        assert_eq!(puppet.tell(&whole), true, "{}", puppet.names);
        puppet.tell("for i in range(given): notify(f'FDSTOREREMOVE=1\\nFDNAME=r{i}')");
        puppet.tell("barrier()");
        assert_eq!(run.counter("stored"), 0);
        run.has_descriptors(before);
    }
}

#[test]
fn a_flood_does_not_keep_others_waiting() {
    if !has_python() {
        return;
    }
    let (mut run, mut puppet) = Run::puppet(&["--stop-timeout", "300ms"]);
    puppet.tell(
        "def flood():
    connection.close()
    while True: notify('STATUS=flood')
floods = []
for _ in range(3):
    child = os.fork()
    if child == 0: flood()
    floods.append(child)",
    );
    for _ in 0..20 {
        assert_eq!(run.status().supervised.unwrap().pid, Some(puppet.pid));
    }
    puppet.tell("put('f', os.memfd_create('x')); barrier()");
    puppet.kill(Signal::KILL);
    let mut next = run.next();
    assert_eq!(next.given, 1);
    let orphans = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.pid())).unwrap();
    assert_eq!(orphans.split_whitespace().count(), 4);
    for orphan in orphans.split_whitespace().filter(|&pid| pid != next.pid.to_string()) {
        let pid = rustix::process::Pid::from_raw(orphan.parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }
    wait_for("the floods' end", || run.counter("reaped") == 3);
    next.begin("os._exit(0)");
    assert_eq!(run.code(), 0);
}

#[test]
fn one_that_stores_more_than_there_is_room_for_is_told_and_run_goes_on() {
    if !has_python() {
        return;
    }
    let (run, mut puppet) = Run::puppet(&[]);
    puppet.tell("import resource; hard = resource.getrlimit(7)[1]; resource.setrlimit(7, (hard, hard))");
    let most = puppet.number("int(os.environ['FDSTORE'])");
    puppet.tell(
        "notify('X_HEIRLOOM_FETCH=1')
i = 0
while i < int(os.environ['FDSTORE']) + 2000:
    put(f'{i}', *[os.memfd_create('x') for _ in range(100)])
    for n in os.listdir('/proc/self/fd'):
        if os.path.realpath('/proc/self/fd/' + n).startswith('/memfd'): os.close(int(n))
    i += 100
barrier()",
    );
    let stored = run.counter("stored") as i64;
    assert!(stored <= most && stored > most - 100, "{stored} of {most}");
    assert!(run.counter("refused") >= 20);
    // It can be started all the same.
    puppet.kill(Signal::KILL);
    let next = run.next();
    assert_eq!(next.given, 0);
    assert_eq!(run.counter("stored") as i64, stored);
}
