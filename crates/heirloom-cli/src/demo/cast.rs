//! Who appears in the demonstration: a chat server and three chats, each a process that may become another one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, anyhow, bail};
use heirloom::NoRequests;
use heirloom::control::{Reply, Request, Status};

use super::process::{Process, wait_until};
use crate::ask::ask;

/// Where the server listens: at any free port.
const ADDRESS: &str = "127.0.0.1:0";

/// A part that is played by one process after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Server,
    Talker,
    Listener,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Server => "server",
            Part::Talker => "talker",
            Part::Listener => "listener",
        })
    }
}

/// One chat: all the processes that were started for it, the present one last. One that was upgraded beside has the
/// same stdin and stdout as the one before.
pub(super) struct Chat {
    /// What the server calls it.
    pub(super) name: String,
    control: PathBuf,
    processes: Vec<Process>,
    heard: Arc<AtomicU64>,
}

impl Chat {
    /// How many lines it has written to stdout, announcements among them.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::SeqCst)
    }

    /// Everything that it has written to stdout.
    pub(super) fn output(&self) -> Vec<u8> {
        self.processes.iter().flat_map(Process::output).collect()
    }

    fn start(&mut self, program: &Path, address: &str, replace: &str) -> anyhow::Result<()> {
        let control = utf8(&self.control)?;
        let arguments = ["--log-level", "error", "chat", address, "--control", control, "--replace", replace];
        self.processes.push(Process::start_counting(program, &arguments, self.heard.clone())?);
        Ok(())
    }
}

/// Everybody.
pub(super) struct Cast {
    directory: tempfile::TempDir,
    server: Process,
    address: String,
    pub(super) talker: Chat,
    pub(super) listener: Chat,
    pub(super) witness: Chat,
}

impl Cast {
    /// Starts everybody, and waits until all chats are at the server.
    pub(super) fn gather(program: &Path) -> anyhow::Result<Cast> {
        let directory = tempfile::Builder::new()
            .prefix("heirloom-demo-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir()
            .context("cannot make a directory for the control sockets")?;
        let chat = |name: &str| Chat {
            name: String::new(),
            control: directory.path().join(format!("{name}.sock")),
            processes: Vec::new(),
            heard: Arc::default(),
        };
        let (talker, listener, witness) = (chat("talker"), chat("listener"), chat("witness"));
        let arguments = server_arguments(&directory.path().join("server.sock"));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let server = Process::start_logging(program, &arguments)?;
        let mut cast = Cast { server, address: String::new(), talker, listener, witness, directory };
        cast.address = cast.server_address()?;
        for chat in [&mut cast.witness, &mut cast.listener, &mut cast.talker] {
            chat.start(program, &cast.address, "never")?;
            let control = cast.directory.path().join("server.sock");
            let mut newest = None;
            wait_until("a chat to come to the server", || {
                let status = status(&control)?;
                newest = status.items.last().map(|item| item.name.clone());
                Ok(chat.heard() > 0)
            })?;
            chat.name = newest.context("the server knows who came")?;
        }
        Ok(cast)
    }

    /// Where the server really listens: it says so in its log.
    fn server_address(&mut self) -> anyhow::Result<String> {
        let mut address = None;
        wait_until("the server to listen", || {
            let log = self.server.log();
            let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            let mut listening = lines.filter(|line| line["message"] == "listening");
            address = listening.find_map(|line| line["address"].as_str().map(str::to_owned));
            if address.is_none() && self.server.has_ended()? {
                bail!("the server has ended: {log}");
            }
            Ok(address.is_some())
        })?;
        address.context("the server says where it listens")
    }

    /// How the server was started.
    pub(super) fn server_arguments(&self) -> Vec<String> {
        server_arguments(&self.control(Part::Server))
    }

    pub(super) fn control(&self, part: Part) -> PathBuf {
        self.directory.path().join(format!("{part}.sock"))
    }

    pub(super) fn status(&self, part: Part) -> anyhow::Result<Status> {
        status(&self.control(part))
    }

    /// What the talker is told to say.
    pub(super) fn talkers_stdin(&mut self) -> anyhow::Result<ChildStdin> {
        let talker = self.talker.processes.last_mut().context("there is a talker")?;
        talker.take_stdin().context("the talker's stdin is a pipe")
    }

    pub(super) fn listener_says(&mut self, text: &[u8]) -> anyhow::Result<()> {
        self.listener.processes.last_mut().context("there is a listener")?.write(text)
    }

    /// How many lines each of those who are to keep up with the talker has heard.
    pub(super) fn heard(&self) -> [Arc<AtomicU64>; 2] {
        [self.listener.heard.clone(), self.witness.heard.clone()]
    }

    /// Starts a new chat for the listener, and waits until the old one has ended.
    pub(super) fn replace_listener(&mut self, program: &Path) -> anyhow::Result<()> {
        self.listener.start(program, &self.address, "must")?;
        let old = self.listener.processes.iter_mut().nth_back(1).context("there was a listener")?;
        let code = old.wait()?;
        if code != Some(0) {
            bail!("the listener that was to be replaced ended with {code:?}");
        }
        Ok(())
    }

    /// Starts a successor of the server that goes as far as it can without committing.
    pub(super) fn greedy_successor(&self, program: &Path) -> anyhow::Result<Process> {
        let (control, service) = (self.control(Part::Server), format!("chat server {ADDRESS}"));
        let arguments = ["demo-successor", "--control", utf8(&control)?, "--service", &service];
        Process::start(program, &arguments)
    }

    /// Ends everybody, chats first, and waits for what they still have to write.
    pub(super) fn dismiss(&mut self) -> anyhow::Result<()> {
        for chat in [&mut self.talker, &mut self.listener, &mut self.witness] {
            ask(&chat.control, &Request::<NoRequests>::Quit).map_err(|failure| anyhow!("{failure}"))?;
            for process in &mut chat.processes {
                process.wait()?;
            }
        }
        ask(&self.control(Part::Server), &Request::<NoRequests>::Quit)
            .map_err(|failure| anyhow!("{failure}"))?;
        self.server.wait()?;
        Ok(())
    }
}

impl Drop for Cast {
    /// Those who were upgraded beside are nobody's children that could be ended: they are asked.
    fn drop(&mut self) {
        for name in ["talker", "listener", "witness", "server"] {
            let control = self.directory.path().join(format!("{name}.sock"));
            if let Ok(mut client) = heirloom::control::Client::connect(&control) {
                let _ = client.request(&Request::<NoRequests>::Quit);
            }
        }
    }
}

fn server_arguments(control: &Path) -> Vec<String> {
    let control = control.to_string_lossy().into_owned();
    let arguments = ["--log-format", "json", "chat", ADDRESS, "--listen", "--control", &control];
    arguments.map(String::from).into()
}

fn status(control: &Path) -> anyhow::Result<Status> {
    match ask(control, &Request::<NoRequests>::Status).map_err(|failure| anyhow!("{failure}"))?.0 {
        Reply::Status(status) => Ok(status),
        reply => bail!("an answer {reply:?} to a question for the status"),
    }
}

fn utf8(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("the temporary directory's path is not UTF-8")
}
