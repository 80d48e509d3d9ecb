//! A program that serves, and a conversation through it, in both directions, in which nothing may be missing.

use std::io::{ErrorKind, PipeReader, PipeWriter, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::ioctl_fionbio;

use crate::stream::{self, Stream};
use crate::support::ears::{Ear, last, numbered};
use crate::support::guests::{Guest, address_of, listening, serve};
use crate::support::upgrading::Reader;
use crate::support::{LONG, Process, Scratch, chat, heirloom, try_status, wait_for, wait_until_connected};

/// The pause between two things that one says.
const PAUSE: Duration = Duration::from_millis(10);
/// More than go in a batch, so that there are two.
const CROWD: usize = 260;

/// Which program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// `heirloom chat`.
    Client,
    /// `heirloom chat --listen`.
    Server,
    /// `heirloom chat --listen`, with so many connected that they do not go in one batch.
    Crowded,
    /// `heirloom proxy`, in front of a chat server that nobody touches.
    Proxy,
}

/// The conversation.
pub(crate) enum Talk {
    Client(Box<Client>),
    Server(Box<Server>),
}

impl Talk {
    /// Starts the program as `prepare` has it, and the conversation.
    pub(crate) fn start(program: Program, control: &Path, prepare: impl Fn(&mut Command)) -> (Talk, Process) {
        match program {
            Program::Client => {
                let client = Client::start();
                let incumbent = client.process(control, "never", prepare);
                wait_until_connected(control);
                (Talk::Client(Box::new(client)), incumbent)
            }
            Program::Server | Program::Crowded => {
                let incumbent = Process::start(&mut Server::command(control, "never", &prepare, None));
                let address = address_of(&incumbent);
                let crowd = if program == Program::Crowded { CROWD } else { 0 };
                (Talk::Server(Box::new(Server::start(address, crowd, None))), incumbent)
            }
            Program::Proxy => {
                let backend = Backend::start();
                let mut command = Server::command(control, "never", &prepare, Some(&backend));
                let mut incumbent = Process::start(&mut command);
                let address = proxied_at(control, &mut incumbent);
                (Talk::Server(Box::new(Server::start(address, 0, Some(backend)))), incumbent)
            }
        }
    }

    /// Another process of the program.
    pub(crate) fn process(&self, control: &Path, replace: &str, prepare: impl Fn(&mut Command)) -> Process {
        match self {
            Talk::Client(client) => client.process(control, replace, prepare),
            Talk::Server(server) => {
                Process::start(&mut Server::command(control, replace, prepare, server.behind.as_ref()))
            }
        }
    }

    /// Waits until some more is said and heard, in both directions.
    #[track_caller]
    pub(crate) fn goes_on(&self) {
        let before = self.heard();
        wait_for("the conversation to go on", || {
            self.heard().iter().zip(before).all(|(heard, before)| *heard >= before + 10)
        });
    }

    /// How many lines have arrived, by direction.
    fn heard(&self) -> [u64; 2] {
        match self {
            Talk::Client(client) => {
                let lines = |bytes: usize, line: usize| (bytes / line) as u64;
                let there = lines(client.stream.heard().len(), typed_line(0).len());
                [there, lines(client.screen.len(), stream::line(0).len())]
            }
            Talk::Server(server) => server.talkers.each_ref().map(Talker::heard),
        }
    }

    /// Comes to its end: everything that was said was heard.
    #[track_caller]
    pub(crate) fn ends_exact(self) {
        match self {
            Talk::Client(client) => client.ends_exact(),
            Talk::Server(server) => server.ends_exact(),
        }
    }

    /// Has lost the server: what was heard until then is the beginning of what was said.
    #[track_caller]
    pub(crate) fn breaks_off(self) {
        match self {
            Talk::Client(client) => client.breaks_off(),
            Talk::Server(server) => server.breaks_off(),
        }
    }
}

/// With a chat client: a server streams, and somebody types. All processes share stdin and stdout.
pub(crate) struct Client {
    stream: Stream,
    typist: Typist,
    stdin: PipeReader,
    stdout: PipeWriter,
    screen: Reader,
}

impl Client {
    fn start() -> Client {
        let (stdin, keyboard) = std::io::pipe().expect("pipe");
        let (screen, stdout) = std::io::pipe().expect("pipe");
        let typist = Typist::start(keyboard);
        Client { stream: Stream::start_paced(PAUSE), typist, stdin, stdout, screen: Reader::start(screen) }
    }

    fn process(&self, control: &Path, replace: &str, prepare: impl Fn(&mut Command)) -> Process {
        let mut command = chat(self.stream.address(), control, &["--replace", replace]);
        prepare(&mut command);
        let (stdin, stdout) = (self.stdin.try_clone().expect("dup"), self.stdout.try_clone().expect("dup"));
        Process::start_between(&mut command, stdin, stdout)
    }

    fn ends_exact(mut self) {
        let typed = self.typist.finish();
        wait_for("everything typed to arrive", || self.stream.heard().len() >= typed.len());
        assert_eq!(self.stream.heard(), typed);
        self.stream.ends_exact_on(0, || self.screen.len(), || self.screen.output());
    }

    fn breaks_off(mut self) {
        let typed = self.typist.finish();
        assert!(typed.starts_with(&self.stream.heard()), "{}", self.stream.heard());
        self.stream.breaks_off(|| self.screen.output());
    }
}

/// Somebody who types numbered lines as long as there is room for them.
struct Typist {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<String>,
}

impl Typist {
    fn start(mut keyboard: PipeWriter) -> Typist {
        ioctl_fionbio(&keyboard, true).expect("this end has a description of its own");
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut typed = String::new();
            for number in 0.. {
                // As short as this it is written whole or not at all (pipe(7)).
                let line = typed_line(number);
                loop {
                    std::thread::sleep(PAUSE);
                    if stopped.load(Ordering::SeqCst) {
                        return typed;
                    }
                    match keyboard.write(line.as_bytes()) {
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        // The conversation is over.
                        Err(_) => return typed,
                        Ok(written) => break assert_eq!(written, line.len()),
                    }
                }
                typed.push_str(&line);
            }
            typed
        });
        Typist { stop, thread }
    }

    fn finish(self) -> String {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("typing does not fail")
    }
}

/// A line of somebody who types; all are of one length.
fn typed_line(number: u64) -> String {
    numbered(1_000_000 + number)
}

/// A chat server behind a proxy.
pub(crate) struct Backend {
    address: SocketAddr,
    _process: Process,
    _scratch: Scratch,
}

impl Backend {
    fn start() -> Backend {
        let scratch = Scratch::new();
        let (process, address) = serve(&scratch.path("backend.sock"), &["--replace", "never"]);
        Backend { address, _process: process, _scratch: scratch }
    }
}

/// Where a proxy listens, once it serves.
fn proxied_at(control: &Path, proxy: &mut Process) -> SocketAddr {
    let mut address = None;
    wait_for("the proxy to serve", || {
        assert!(proxy.is_running(), "{}", proxy.stderr());
        let report = try_status(control).and_then(|status| status.application);
        address = report.and_then(|report| report["listeners"][0]["address"].as_str()?.parse().ok());
        address.is_some()
    });
    address.expect("waited for")
}

/// With a chat server, or a proxy in front of one: two talk with each other.
pub(crate) struct Server {
    address: SocketAddr,
    talkers: [Talker; 2],
    _crowd: Vec<Guest>,
    behind: Option<Backend>,
}

impl Server {
    /// The program, which is a proxy if there is something behind it.
    fn command(
        control: &Path,
        replace: &str,
        prepare: impl Fn(&mut Command),
        behind: Option<&Backend>,
    ) -> Command {
        let mut command = match behind {
            None => listening("127.0.0.1:0", control, &["--replace", replace]),
            Some(backend) => {
                let mut command = heirloom();
                command.args(["proxy", "--listen", "127.0.0.1:0", "--to", &backend.address.to_string()]);
                command.args(["--threads", "2", "--replace", replace, "--control"]).arg(control);
                command
            }
        };
        prepare(&mut command);
        command
    }

    fn start(address: SocketAddr, crowd: usize, behind: Option<Backend>) -> Server {
        let crowd: Vec<Guest> = (0..crowd).map(|_| Guest::join(address)).collect();
        let (one, other) = (Guest::join(address), Guest::join(address));
        let names = [one.name.clone(), other.name.clone()];
        let [first, second] = names;
        // Each of the crowd is told everything.
        let pause = if crowd.is_empty() { PAUSE } else { 10 * PAUSE };
        let talkers = [
            Talker::start(one, Ear::default(), second, pause),
            Talker::start(other, Ear::from_the_start([&first]), first.clone(), pause),
        ];
        Server { address, talkers, _crowd: crowd, behind }
    }

    fn ends_exact(self) {
        // Who comes now is let in as well.
        drop(Guest::join(self.address));
        let [one, other] = self.finish();
        for (said, heard) in [(&one, &other), (&other, &one)] {
            assert_eq!(said.said.as_ref().expect("the connection lives"), &heard.heard);
        }
    }

    fn breaks_off(self) {
        let [one, other] = self.finish();
        for (said, heard) in [(&one, &other), (&other, &one)] {
            assert!(heard.broke_off, "the connection lives");
            assert!(said.at_most >= heard.heard);
        }
    }

    /// Lets both have their last word.
    fn finish(self) -> [Talked; 2] {
        self.talkers.iter().for_each(|talker| talker.stop.store(true, Ordering::SeqCst));
        self.talkers.map(Talker::finish)
    }
}

/// Somebody who talks with another.
struct Talker {
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    talking: JoinHandle<(std::io::Result<u64>, u64)>,
    listening: JoinHandle<Listened>,
    other: String,
}

/// What somebody has heard.
struct Listened {
    ear: Ear,
    broke_off: bool,
    /// Not closed before the other has heard everything: a close with something unread is a reset.
    _guest: Guest,
}

/// What became of a conversation, for one of the two.
struct Talked {
    said: std::io::Result<u64>,
    at_most: u64,
    heard: u64,
    broke_off: bool,
}

impl Talker {
    fn start(mut guest: Guest, mut ear: Ear, other: String, pause: Duration) -> Talker {
        let (stop, heard): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let mouth = guest.socket().try_clone().expect("dup");
        mouth.set_write_timeout(Some(LONG)).expect("setsockopt");
        let talking = std::thread::spawn({
            let stop = stop.clone();
            move || talk(mouth, &stop, pause)
        });
        let listening = std::thread::spawn({
            let (heard, other) = (heard.clone(), other.clone());
            move || {
                // A connection that is lost may end in either way.
                while let Ok(Some(line)) = guest.try_line() {
                    let said = ear.hear(&line).filter(|said| said.who == other);
                    heard.store(ear.count(&other), Ordering::SeqCst);
                    if said.is_some_and(|said| said.is_last) {
                        return Listened { ear, broke_off: false, _guest: guest };
                    }
                }
                Listened { ear, broke_off: true, _guest: guest }
            }
        });
        Talker { stop, heard, talking, listening, other }
    }

    fn heard(&self) -> u64 {
        self.heard.load(Ordering::SeqCst)
    }

    fn finish(self) -> Talked {
        let (said, at_most) = self.talking.join().expect("it does not panic");
        let listened = self.listening.join().expect("what was heard makes sense");
        Talked { said, at_most, heard: listened.ear.count(&self.other), broke_off: listened.broke_off }
    }
}

/// Says numbered lines, and a last one. How many were taken, and how many may have been.
fn talk(mut mouth: TcpStream, stop: &AtomicBool, pause: Duration) -> (std::io::Result<u64>, u64) {
    let mut said = 0;
    loop {
        let ends = stop.load(Ordering::SeqCst);
        let line = if ends { last(said) } else { numbered(said) };
        if let Err(error) = mouth.write_all(line.as_bytes()) {
            return (Err(error), said + 1);
        }
        said += 1;
        if ends {
            return (Ok(said), said);
        }
        std::thread::sleep(pause);
    }
}
