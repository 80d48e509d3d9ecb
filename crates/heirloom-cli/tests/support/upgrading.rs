//! What the tests of upgrades share: the command, programs to upgrade to, and a stdout that the test may close.

use std::io::{PipeReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::ioctl_fionbio;

use super::proc::kill_one_that_serves;
use super::{Scratch, heirloom, try_status};

/// How an upgrade is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The new program takes over.
    Beside,
    /// The incumbent becomes it.
    InPlace,
}

impl Place {
    pub(crate) const BOTH: [Place; 2] = [Place::Beside, Place::InPlace];

    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            Place::Beside => &[],
            Place::InPlace => &["--in-place"],
        }
    }
}

/// What `heirloom upgrade` said, and its code.
#[derive(Debug)]
pub(crate) struct Upgraded {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Upgraded {
    #[track_caller]
    pub(crate) fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Fails unless it ended with this code, and said all of this.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, says: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        for part in says {
            assert!(self.stderr.contains(part), "{part:?} is not in\n{}", self.stderr);
        }
        self.stderr
    }
}

/// Runs `heirloom upgrade --control PATH` with further options.
pub(crate) fn upgrade<S: AsRef<std::ffi::OsStr>>(control: &Path, options: &[S]) -> Upgraded {
    let mut command = heirloom();
    command.arg("upgrade").arg("--control").arg(control).args(options).stdin(Stdio::null());
    let output = command.output().expect("it can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Upgraded { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

/// Ends whoever serves at a control socket at last: a successor that an incumbent has started is nobody's child.
pub(crate) struct EndsServing(pub(crate) PathBuf);

impl Drop for EndsServing {
    fn drop(&mut self) {
        if let Some(status) = try_status(&self.0) {
            kill_one_that_serves(&self.0, status.pid);
        }
    }
}

/// The path of the program under test.
pub(crate) fn this_program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_heirloom"))
}

impl Scratch {
    /// A file with these contents and this mode. Written by another process: one that this process has open for writing may
    /// be so in a child of another test's too for a moment, and cannot be executed meanwhile (ETXTBSY).
    pub(crate) fn file(&self, name: &str, mode: &str, contents: &[u8]) -> PathBuf {
        let (plain, path) = (self.path(&format!("{name}.contents")), self.path(name));
        std::fs::write(&plain, contents).expect("write");
        install(&plain, &path, mode);
        path
    }

    /// A shell script; `$REAL` in it is the program under test.
    pub(crate) fn script(&self, name: &str, text: &str) -> PathBuf {
        let text = format!("#!/bin/sh\nREAL='{}'\n{text}\n", this_program().display());
        self.file(name, "755", text.as_bytes())
    }

    /// The program under test in a file of its own.
    pub(crate) fn copy_of_this_program(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        install(this_program(), &path, "755");
        path
    }
}

pub(crate) fn install(from: &Path, to: &Path, mode: &str) {
    let status = Command::new("install").args(["-m", mode]).arg(from).arg(to).status();
    assert!(status.expect("install can be started").success());
}

/// Reads a stdout, until it is told to close it.
pub(crate) struct Reader {
    read: Arc<Mutex<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Reader {
    pub(crate) fn start(mut from: PipeReader) -> Reader {
        ioctl_fionbio(&from, true).expect("the reader's end has a description of its own");
        let (read, stop) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<AtomicBool>::default());
        let thread = std::thread::spawn({
            let (read, stop) = (read.clone(), stop.clone());
            move || {
                let mut buffer = vec![0; 64 * 1024];
                while !stop.load(Ordering::SeqCst) {
                    match from.read(&mut buffer) {
                        Ok(0) => return,
                        Ok(count) => {
                            read.lock().expect("no panic while reading").extend_from_slice(&buffer[..count]);
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
            }
        });
        Reader { read, stop, thread }
    }

    pub(crate) fn len(&self) -> usize {
        self.read.lock().expect("no panic while reading").len()
    }

    /// What was read so far.
    pub(crate) fn output(&self) -> Vec<u8> {
        self.read.lock().expect("no panic while reading").clone()
    }

    /// Closes it.
    pub(crate) fn close(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the reader does not fail");
    }
}
