//! Who may not ask, and who asks badly: other users' processes, and peers that send garbage.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use heirloom::descriptors::{PER_MESSAGE, Wait, send_with};
use support::*;

/// Longer than an answer takes on a loaded machine; far shorter than anything that is waited for when it is held up.
const SOON: Duration = Duration::from_secs(5);

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
}

/// The program, where every user can run it.
fn public_copy(scratch: &Scratch) -> PathBuf {
    let program = scratch.path("heirloom");
    std::fs::copy(env!("CARGO_BIN_EXE_heirloom"), &program).expect("copy");
    set_mode(&program, 0o755);
    set_mode(program.parent().expect("a directory"), 0o755);
    program
}

#[test]
fn another_user_can_neither_take_over_nor_ask_nor_stop_anything() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root can become another user");
    }
    let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
    let control = scratch.path("chat.sock");
    let (_listener, address, mut incumbent) = connected_chat(&control);
    let program = public_copy(&elsewhere);
    let attempts = |expected: &str| {
        // The second is the overflow user, as which users of other namespaces may appear.
        for uid in [12345, 65534] {
            for command in ["ping", "status", "quit", "chat"] {
                let mut stranger = Command::new(&program);
                stranger.arg(command).arg("--control").arg(&control).uid(uid).gid(uid).current_dir("/");
                if command == "chat" {
                    stranger.args(["--replace", "must", &address]);
                }
                let mut stranger = Process::start(&mut stranger);
                stranger.wait_for_code(4);
                let said = stranger.stderr();
                assert!(said.contains(expected), "{command} as {uid}: {said}");
                assert_eq!(stranger.stdout(), b"", "{command} as {uid} learns nothing");
            }
        }
    };
    attempts("no permission to connect");

    // Even with the doors open.
    let directory = control.parent().expect("a directory");
    set_mode(directory, 0o755);
    set_mode(&control, 0o666);
    attempts("may not ask here");
    for uid in [12345, 65534] {
        wait_for("the log of it", || incumbent.stderr().contains(&format!("uid {uid}")));
    }
    assert!(incumbent.is_running());
    let status = status(&control);
    assert_eq!((status.generation, status.pid), (0, incumbent.id()));
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let scratch = Scratch::new();
    let directory = scratch.path("open");
    std::fs::create_dir(&directory).expect("mkdir");
    for mode in [0o777, 0o1777, 0o770] {
        set_mode(&directory, mode);
        let mut process = Process::start(&mut chat("127.0.0.1:9", &directory.join("chat.sock"), &[]));
        process.wait_for_code(1);
        assert!(process.stderr().contains("700"), "mode {mode:o}: {}", process.stderr());
    }
}

/// Reads until the end of the connection, or until nothing comes for a while.
fn read_to_end(stream: &mut UnixStream) -> (String, bool) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("setsockopt");
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (String::from_utf8_lossy(&all).into_owned(), true),
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(_) => return (String::from_utf8_lossy(&all).into_owned(), false),
        }
    }
}

/// Fails unless a new client is answered soon, and the incumbent has closed its connection afterwards.
fn ping(control: &Path) {
    let begun = Instant::now();
    let mut stream = UnixStream::connect(control).expect("connect");
    stream.write_all(b"\"Ping\"\n").expect("write");
    stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
    assert_eq!(read_to_end(&mut stream), ("\"Pong\"\n".into(), true));
    assert!(begun.elapsed() < SOON, "held up for {:?}", begun.elapsed());
}

#[test]
fn peers_that_ask_badly_hold_nothing_up_and_leave_nothing_behind() {
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (_listener, _address, mut incumbent) = connected_chat(&control);
    // The files that the incumbent has open, by what they are.
    let table = format!("/proc/{}/fd", incumbent.id());
    let open = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&table).expect("proc");
        entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect()
    };
    ping(&control);
    // A connection's pidfd is closed just after the connection.
    let pidfd = Path::new("anon_inode:[pidfd]");
    wait_for("the last client to be forgotten", || open().iter().all(|file| file != pidfd));
    let before = open().len();

    let mut garbage = UnixStream::connect(&control).expect("connect");
    for _ in 0..20 {
        // The last of them may find the connection closed.
        let _ = garbage.write_all(b"}{ nonsense\n");
    }
    let (said, ended) = read_to_end(&mut garbage);
    assert!(ended, "it is cut off");
    assert_eq!(said.lines().count(), 8, "{said}");
    assert!(said.lines().all(|line| line.contains("malformed")), "{said}");
    ping(&control);

    let mut endless = UnixStream::connect(&control).expect("connect");
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);
    assert!(read_to_end(&mut endless).0.contains("too-long"));
    ping(&control);

    // A peer that asks much and never reads.
    let mut deaf = UnixStream::connect(&control).expect("connect");
    deaf.set_nonblocking(true).expect("fcntl");
    let request = b"\"Status\"\n".repeat(1000);
    wait_for(
        "the incumbent to cut it off, or to stop reading",
        || matches!(deaf.write(&request), Err(error) if error.kind() != ErrorKind::Interrupted),
    );
    ping(&control);

    // Descriptors that nobody asked for, beside good lines and beside a line that never ends.
    let gift = scratch.path("gift");
    let file = std::fs::File::create(&gift).expect("create");
    let mut giver = UnixStream::connect(&control).expect("connect");
    let handful = [file.as_fd(); 3];
    for _ in 0..50 {
        send_with(&giver, b"\"Ping\"\n", &handful, Wait::Block).expect("send");
    }
    giver.read_exact(&mut [0; 50 * "\"Pong\"\n".len()]).expect("an answer to each");
    send_with(&giver, b"\"Pi", &[file.as_fd(); PER_MESSAGE], Wait::Block).expect("send");
    let half = giver;
    ping(&control);
    wait_for("all gifts to be closed", || !open().contains(&gift));

    // More connections than there is room for: the oldest of them, such as the half line, go.
    let mut crowd: Vec<UnixStream> =
        (0..100).map(|_| UnixStream::connect(&control).expect("connect")).collect();
    ping(&control);
    for mut old in [half, crowd.swap_remove(0)] {
        let (said, ended) = read_to_end(&mut old);
        assert!(ended && said.contains("too many control connections"), "{said}");
    }
    let newest = crowd.last_mut().expect("many");
    newest.write_all(b"\"Ping\"\n").expect("it has room");
    newest.read_exact(&mut [0; "\"Pong\"\n".len()]).expect("an answer");
    ping(&control);

    drop((deaf, crowd));
    wait_for("everything to be closed", || open().len() == before);
    assert!(incumbent.is_running());
}
