//! A shell on a terminal that one talks to from another terminal, by socat on both ends.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::support::{Process, Scratch, have, skip, wait_for};

/// What the shell shows when it waits for a command.
const PROMPT: &str = "shell> ";

/// A server that gives everybody a shell on a terminal of its own.
pub(crate) struct Shells {
    _server: Process,
    address: String,
}

impl Shells {
    /// Starts it, or skips the test.
    pub(crate) fn start() -> Option<Shells> {
        if !have("socat") || !have("bash") {
            skip("socat or bash is not installed (apt-get install socat bash)");
            return None;
        }
        let mut socat = Command::new("socat");
        socat.args(["-d", "-d", "TCP-LISTEN:0,bind=127.0.0.1,fork"]);
        // With a terminal that is the shell's own, it does jobs and takes Control-C.
        socat.arg("EXEC:bash --noprofile --norc -i,pty,setsid,ctty,stderr,echo=1");
        let server = Process::start(socat.env("PS1", PROMPT).env("TERM", "dumb").env("HISTFILE", ""));
        let mut address = None;
        wait_for("socat to listen", || {
            let log = server.stderr();
            let line = log.lines().find(|line| line.contains("listening on"));
            address = line.and_then(|line| Some(line.split_whitespace().last()?.to_owned()));
            address.is_some()
        });
        Some(Shells { _server: server, address: address.expect("waited for") })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

/// The terminal at which somebody sits, with a socat that connects it to an address.
pub(crate) struct Terminal {
    socat: Process,
    keyboard: File,
    shown: Arc<Mutex<Vec<u8>>>,
    _scratch: Scratch,
}

impl Terminal {
    pub(crate) fn connect(address: &str) -> Terminal {
        let scratch = Scratch::new();
        let path = scratch.path("terminal");
        let mut socat = Command::new("socat");
        socat.arg(format!("PTY,link={},raw,echo=0,wait-slave", path.display())).arg(format!("TCP:{address}"));
        let socat = Process::start(&mut socat);
        wait_for("a terminal", || path.exists());
        let open = || File::options().read(true).write(true).open(&path).expect("the terminal can be opened");
        let (keyboard, mut screen) = (open(), open());
        let shown = Arc::<Mutex<Vec<u8>>>::default();
        let into = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal whose other end is closed is an error, EIO.
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                into.lock().expect("no panic while reading").extend_from_slice(&buffer[..count]);
            }
        });
        Terminal { socat, keyboard, shown, _scratch: scratch }
    }

    /// What the screen shows.
    pub(crate) fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("no panic while reading")).into_owned()
    }

    /// Presses these keys.
    pub(crate) fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("the terminal takes it");
    }

    /// Waits until so many lines are shown that are just this.
    #[track_caller]
    pub(crate) fn wait_for_lines(&mut self, line: &str, count: usize) {
        wait_for(line, || {
            assert!(self.socat.is_running(), "socat has ended: {}\n{}", self.socat.stderr(), self.shown());
            self.shown().lines().filter(|shown| *shown == line).count() >= count
        });
    }

    /// Types a command, as soon as the shell waits for one: before, it would be typed into a terminal whose mode changes.
    #[track_caller]
    pub(crate) fn command(&mut self, command: &str) {
        wait_for("the prompt", || {
            assert!(self.socat.is_running(), "socat has ended: {}\n{}", self.socat.stderr(), self.shown());
            self.shown().ends_with(PROMPT)
        });
        self.type_in(&format!("{command}\r"));
    }

    /// Runs a command, and returns the one line that it writes.
    #[track_caller]
    pub(crate) fn run(&mut self, command: &str) -> String {
        let before = self.shown().len();
        // What is typed is echoed, behind the prompt, but it is not the result.
        self.command(&format!("echo \"<$({command})>\""));
        let mut answer = None;
        wait_for(command, || {
            assert!(self.socat.is_running(), "socat has ended: {}\n{}", self.socat.stderr(), self.shown());
            let shown = self.shown()[before..].to_owned();
            let line = shown.lines().find(|line| line.starts_with('<') && line.ends_with('>'));
            answer = line.map(|line| line[1..line.len() - 1].to_owned());
            answer.is_some()
        });
        answer.expect("waited for")
    }

    /// Leaves the shell: socat ends as it should.
    pub(crate) fn leave(mut self) {
        self.command("exit");
        let status = self.socat.wait_for_exit();
        assert!(status.success(), "{status}: {}", self.socat.stderr());
    }
}
