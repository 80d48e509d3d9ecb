//! The service lock excludes other processes, is free when its holder is dead, and is passed on by an
//! inherited descriptor.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use heirloom::lock::{LockError, LockFile, ServiceLock, lock_path};

/// Tells a process that runs one test of this file again which lock file to use.
const HOLDER: &str = "HEIRLOOM_TEST_LOCK";

const SOON: Duration = Duration::from_secs(20);

fn lock(path: &Path) -> ServiceLock {
    LockFile::open(path).unwrap().try_lock().unwrap()
}

fn is_held(path: &Path) -> bool {
    match LockFile::open(path).unwrap().try_lock() {
        Ok(_) => false,
        Err((_, LockError::Held { .. })) => true,
        Err((_, other)) => panic!("{other}"),
    }
}

/// Another process that holds the lock until its stdin ends, or it is killed.
struct Holder {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Holder {
    fn start(path: &Path) -> Holder {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "holder", "--nocapture"])
            .env(HOLDER, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Holder { child, said }
    }

    /// Waits for what it says about the lock.
    fn holds(&mut self) -> bool {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it has died");
            if let Some(at) = line.find("lock: ") {
                return line[at..].trim() == "lock: held by me";
            }
        }
    }

    fn finish(mut self) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        while self.said.read_line(&mut rest).unwrap() > 0 {}
        assert!(self.child.wait().unwrap().success());
    }
}

/// Not a test of its own: what the other process does.
#[test]
fn holder() {
    let Some(path) = std::env::var_os(HOLDER).map(PathBuf::from) else {
        return;
    };
    let result = LockFile::open(path).unwrap().try_lock();
    let what = if result.is_ok() { "held by me" } else { "refused" };
    println!("\nlock: {what}");
    std::io::stdout().flush().unwrap();
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}

#[test]
fn two_processes_never_hold_it_together() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");

    let ours = lock(&path);
    let mut refused = Holder::start(&path);
    assert!(!refused.holds());
    refused.finish();

    let file = ours.release();
    let mut holder = Holder::start(&path);
    assert!(holder.holds());
    let (file, error) = file.try_lock().unwrap_err();
    assert!(matches!(error, LockError::Held { .. }));
    assert!(error.to_string().contains("another process serves"));

    holder.finish();
    assert!(file.try_lock().is_ok());
}

#[test]
fn it_is_free_once_its_holder_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    let mut holder = Holder::start(&path);
    assert!(holder.holds());
    assert!(is_held(&path));
    holder.child.kill().unwrap();
    let waiting = LockFile::open(&path).unwrap().lock_until(Instant::now() + SOON);
    assert!(waiting.is_ok());
    holder.child.wait().unwrap();
}

#[test]
fn waiting_ends_with_the_lock_or_at_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    let ours = lock(&path);

    let file = LockFile::open(&path).unwrap();
    let begun = Instant::now();
    let (file, error) = file.lock_until(begun + Duration::from_millis(30)).unwrap_err();
    assert!(matches!(error, LockError::Held { .. }));
    assert!(begun.elapsed() >= Duration::from_millis(30));

    // A deadline that is past is one try.
    let (file, _) = file.lock_until(begun).unwrap_err();

    let (sender, receiver) = mpsc::channel();
    let waiting = thread::spawn(move || {
        sender.send(()).unwrap();
        file.lock_until(Instant::now() + SOON).is_ok()
    });
    receiver.recv().unwrap();
    drop(ours);
    assert!(waiting.join().unwrap());
    // Dropped there, but a process that another test is just starting may share it until it execs.
    let again = LockFile::open(&path).unwrap();
    assert!(again.lock_until(Instant::now() + SOON).is_ok());
}

#[test]
fn a_duplicate_of_the_descriptor_keeps_it_until_it_is_unlocked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");

    let ours = lock(&path);
    let duplicate = ours.as_fd().try_clone_to_owned().unwrap();
    drop(ours);
    assert!(is_held(&path));

    // As after an exec: the inherited descriptor proves the lock.
    let inherited = LockFile::adopt(&path, duplicate).unwrap().try_lock().unwrap();
    let another: OwnedFd = inherited.as_fd().try_clone_to_owned().unwrap();
    assert!(is_held(&path));
    let file = inherited.release();
    assert!(!is_held(&path));
    drop((file, another));
}

#[test]
fn a_descriptor_of_another_file_is_not_adopted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    drop(LockFile::open(&path).unwrap());
    let other: OwnedFd = tempfile::tempfile().unwrap().into();
    let error = LockFile::adopt(&path, other).unwrap_err();
    assert!(matches!(error, LockError::AnotherFile { .. }), "{error}");
    let other: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let error = LockFile::adopt(&path, other).unwrap_err();
    assert!(matches!(error, LockError::NotAFile { .. }), "{error}");
}

#[test]
fn only_a_regular_file_is_a_lock_file() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("directory")).unwrap();
    symlink(at("nowhere"), at("link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), rustix::fs::Mode::RWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for name in ["directory", "link", "fifo", "socket"] {
        let error = LockFile::open(at(name)).unwrap_err();
        assert!(matches!(error, LockError::NotAFile { .. }), "{name}: {error}");
    }
    assert!(!at("nowhere").exists());
    let error = LockFile::open(at("missing/lock")).unwrap_err();
    assert!(matches!(error, LockError::Io { .. }), "{error}");
}

#[test]
fn the_file_is_ours_alone_close_on_exec_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = lock_path(&directory.path().join("chat.sock"));
    let ours = lock(&path);
    assert_eq!(ours.path(), directory.path().join("chat.sock.lock"));
    let flags = rustix::io::fcntl_getfd(ours.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    drop(ours);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn another_users_file_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return support::skip("only root can make a file of another user's");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    std::fs::write(&path, "").unwrap();
    std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
    let error = LockFile::open(&path).unwrap_err();
    assert!(matches!(error, LockError::NotOurs { owner: 12345, .. }), "{error}");
}
