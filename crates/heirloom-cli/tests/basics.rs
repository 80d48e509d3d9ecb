//! The program's plain behaviour: questions, exit codes, a replacement.

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;

use support::*;

#[test]
fn nobody_there_is_code_3_and_wrong_usage_code_2() {
    let scratch = Scratch::new();
    for command in ["ping", "status", "quit"] {
        let mut process =
            Process::start(heirloom().arg(command).arg("--control").arg(scratch.path("none.sock")));
        process.wait_for_code(3);
        assert!(process.stderr().contains("nobody"), "{}", process.stderr());
    }
    Process::start(heirloom().args(["chat", "--replace", "perhaps"])).wait_for_code(2);
    Process::start(heirloom().arg("--help")).wait_for_code(0);
    let must = &mut chat("127.0.0.1:1", &scratch.path("none.sock"), &["--replace", "must"]);
    Process::start(must).wait_for_code(3);
}

#[test]
fn a_chat_is_replaced_and_its_connection_lives_on() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let mut first = Process::start(&mut chat(&address, &control, &[]));
    let (mut server, _) = listener.accept().expect("accept");
    server.write_all(b"one\n").expect("write");
    wait_for("the first line", || first.stdout() == b"one\n");
    first.write(b"hello from the first\n");

    let mut second = Process::start(&mut chat(&address, &control, &["--replace", "must"]));
    first.wait_for_code(0);
    assert!(first.stderr().contains(&format!(
        "replaced by heirloom {} (pid {})",
        env!("CARGO_PKG_VERSION"),
        second.id()
    )));
    server.write_all(b"two\n").expect("write");
    wait_for("the second line", || second.stdout() == b"two\n");
    second.write(b"hello from the second\n");
    let mut heard = vec![0; "hello from the first\nhello from the second\n".len()];
    server.read_exact(&mut heard).expect("both lines");
    assert_eq!(heard, b"hello from the first\nhello from the second\n");

    let status = status(&control);
    assert_eq!((status.generation, status.pid), (1, second.id()));
    assert_eq!(status.counters["bytes_in"], 8);
    assert_eq!(status.counters["bytes_out"], heard.len() as u64);
    let last = status.last_takeover.expect("there was one");
    assert_eq!((last.outcome.as_str(), last.peer_pid, last.items), ("taken", Some(first.id()), 2));
    assert!(last.pause_us.is_some());

    Process::start(heirloom().arg("quit").arg("--control").arg(&control)).wait_for_code(0);
    second.wait_for_code(0);
    assert!(!control.exists(), "the control socket is removed by who ends for good");
}

#[test]
fn never_refuses_to_replace() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let mut first = Process::start(&mut chat(&address, &control, &[]));
    wait_until_connected(&control);
    for never in ["never", "nope"] {
        let mut second = Process::start(&mut chat(&address, &control, &["--replace", never]));
        second.wait_for_code(4);
        assert!(second.stderr().contains("already serves"), "{}", second.stderr());
    }
    let mut other = Process::start(&mut chat("127.0.0.1:9", &control, &[]));
    other.wait_for_code(4);
    assert!(other.stderr().contains(&format!("serves `chat {address}`")), "{}", other.stderr());
    assert!(first.is_running());
}

#[test]
fn a_demonstration_that_is_interrupted_cleans_up() {
    let scratch = Scratch::new();
    let directory = scratch.path("tmp");
    std::fs::create_dir(&directory).expect("mkdir");
    let mut demo = Process::start(
        heirloom()
            .args(["demo", "--rounds", "1000", "--other", env!("CARGO_BIN_EXE_heirloom")])
            .env("TMPDIR", &directory),
    );
    wait_for("a replacement", || demo.stderr().contains("replacement 2"));
    demo.signal(rustix::process::Signal::INT);
    demo.wait_for_code(1);
    assert!(demo.stderr().contains("interrupted"), "{}", demo.stderr());
    assert_eq!(std::fs::read_dir(&directory).expect("a directory").count(), 0, "something was left behind");
}

/// What a test can make a process do (`tests/crash_matrix.rs`) is not in a program that is built as usual.
#[test]
#[cfg(not(feature = "crash-points"))]
fn no_crash_point_is_in_the_program() {
    let documentation = include_str!("../../../docs/guarantees.md");
    let points = documentation.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let names: Vec<&str> = points.chain(["HEIRLOOM_CRASH"]).collect();
    assert!(names.contains(&"incumbent.delta-sent"), "{names:?}");
    let program = std::fs::read(env!("CARGO_BIN_EXE_heirloom")).expect("a program");
    let program = String::from_utf8_lossy(&program);
    for name in names {
        assert!(!program.contains(name), "{name} is in the program");
    }
}
