//! The store: what it costs a program to put descriptors into the store of `heirloom run` or of systemd, and to remove them
//! again.
//!
//! Three processes in each way: the keeper, its child, which puts and removes, and this one, which tells it when. The floor's
//! keeper only receives each datagram, and keeps or closes the descriptor that came. systemd is a real one in namespaces of
//! its own (`scripts/systemd-box.sh`), and the child a transient unit there.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use heirloom::descriptors::{Wait, receive_with};
use heirloom::notify::{Message, Notifier, NotifyError};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::figure::{Measured, Unit};
use crate::process::{Process, now, say, told};

/// How many descriptors are held.
pub(crate) const HELD: [usize; 5] = [10, 100, 1000, 5000, 15_000];
/// How long a keeper may take for all of it.
const PATIENCE: Duration = Duration::from_secs(300);
/// With more descriptors than these systemd is asked once: that takes it seconds.
const OFTEN: usize = 1000;

/// What boots a systemd.
const BOX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/systemd-box.sh");

/// What the child is to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Task {
    Put,
    Remove,
    /// Say what the keeper is.
    Keeper,
    End,
}

/// Measures putting and removing at each of these numbers.
pub(crate) fn measure(counts: &[usize], rounds: usize) -> anyhow::Result<Vec<Measured>> {
    let mut all = Vec::new();
    for &count in counts {
        let directory = tempfile::tempdir()?;
        let mut run = Keeper::start("run-keeper", directory.path(), count)?;
        let mut floor = Keeper::start("floor-keeper", directory.path(), count)?;
        let mut systemd = Keeper::systemd(directory.path(), count)?;
        // At first: what was used once is not given back to the system.
        let memory = (vec![run.memory()?], vec![floor.memory()?]);
        let (mut puts, mut removals) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        let mut systemds = (Vec::new(), Vec::new());
        for round in 0..rounds {
            if let Some(systemd) = systemd.as_mut().filter(|_| count <= OFTEN || round == 0) {
                systemds.0.push(systemd.ask(Task::Put)?);
                systemds.1.push(systemd.ask(Task::Remove)?);
            }
            puts.0.push(run.ask(Task::Put)?);
            puts.1.push(floor.ask(Task::Put)?);
            removals.0.push(run.ask(Task::Remove)?);
            removals.1.push(floor.ask(Task::Remove)?);
        }
        let each = |(ours, floors): (Vec<u64>, Vec<u64>)| {
            let share = |all: Vec<u64>| all.into_iter().map(|all| all / count as u64).collect();
            (share(ours), share(floors))
        };
        let case = |what: &str| format!("{count} held, {what}");
        if let Some(systemd) = systemd {
            let beside = |theirs, floors: &Vec<u64>| each((theirs, floors.clone()));
            let measured = |what, both| Measured::new("store", case(what), Unit::Nanoseconds, both);
            all.push(measured("put, systemd", beside(systemds.0, &puts.1)));
            all.push(measured("remove, systemd", beside(systemds.1, &removals.1)));
            systemd.end()?;
        }
        all.push(Measured::new("store", case("put"), Unit::Nanoseconds, each(puts)));
        all.push(Measured::new("store", case("remove"), Unit::Nanoseconds, each(removals)));
        all.push(Measured::new("store", case("memory each"), Unit::Bytes, each(memory)));
        run.end()?;
        floor.end()?;
    }
    Ok(all)
}

/// A keeper with its child.
struct Keeper {
    child: Process,
    pid: u64,
}

impl Keeper {
    fn start(part: &str, directory: &Path, count: usize) -> anyhow::Result<Keeper> {
        let directory = directory.to_str().context("the path is no UTF-8")?;
        Keeper::of(Process::start([part, directory, &count.to_string()])?)
    }

    /// A systemd, if one can be booted here. The directory is its to share.
    fn systemd(directory: &Path, count: usize) -> anyhow::Result<Option<Keeper>> {
        let can = Command::new(BOX).arg("true").stdin(Stdio::null()).status();
        if !can.is_ok_and(|status| status.success()) {
            eprintln!("systemd's store is left out: none can be booted here (it takes root, see {BOX})");
            return Ok(None);
        }
        let program = directory.join("heirloom-bench");
        std::fs::copy(std::env::current_exe()?, &program)?;
        let limit = heirloom::descriptors::limit().to_string();
        let mut command = Command::new(BOX);
        command.arg("--share").arg(directory).args([
            "systemd-run",
            "--pipe",
            "--wait",
            "--quiet",
            "--collect",
        ]);
        for property in
            ["NotifyAccess=all", "FileDescriptorStoreMax=1048576", &format!("LimitNOFILE={limit}")]
        {
            command.args(["--property", property]);
        }
        command.args(["/share/heirloom-bench", "putter", &count.to_string()]);
        Keeper::of(Process::start_by(&mut command)?).map(Some)
    }

    fn of(mut child: Process) -> anyhow::Result<Keeper> {
        child.tell(&Task::Keeper)?;
        let pid = child.said()?;
        Ok(Keeper { child, pid })
    }

    fn ask(&mut self, task: Task) -> anyhow::Result<u64> {
        self.child.tell(&task)?;
        self.child.said()
    }

    /// How much its memory grows when everything is put, in bytes. What the kernel keeps of a descriptor is not in it.
    fn memory(&mut self) -> anyhow::Result<u64> {
        let before = resident(self.pid)?;
        self.ask(Task::Put)?;
        let after = resident(self.pid)?;
        self.ask(Task::Remove)?;
        Ok(after.saturating_sub(before))
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.child.tell(&Task::End)?;
        self.child.ended()
    }
}

/// `heirloom run` itself, whose command is the child.
pub(crate) fn run_keeper(directory: &Path, count: usize) -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    let command = heirloom_run::Command::new(program, ["putter", &count.to_string()]);
    let mut options = heirloom_run::Options::new(command);
    options.control = Some(directory.join("run.sock"));
    options.restart = heirloom_run::Restart::Never;
    match heirloom_run::run(options)? {
        0 => Ok(()),
        code => bail!("the keeper ended with code {code}"),
    }
}

/// The least that a keeper does.
pub(crate) fn floor_keeper(directory: &Path, count: usize) -> anyhow::Result<()> {
    let path = directory.join("floor");
    let socket = UnixDatagram::bind(&path)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["putter", &count.to_string()])
        .env("NOTIFY_SOCKET", &path)
        .spawn()?;
    let mut held: Vec<OwnedFd> = Vec::with_capacity(count);
    loop {
        let mut buffer = [0; 4096];
        let received = receive_with(&socket, &mut buffer, Wait::Block)?;
        match &buffer[..received.bytes] {
            b"STOPPING=1\n" => break,
            b"BARRIER=1\n" => {}
            put if put.starts_with(b"FDSTORE=1") => held.extend(received.descriptors),
            _ => drop(held.pop()),
        }
    }
    match child.wait()? {
        status if status.success() => Ok(()),
        status => bail!("the child ended with {status}"),
    }
}

/// The child: does what it is told, and says how long it took in nanoseconds.
pub(crate) fn putter(count: usize) -> anyhow::Result<()> {
    let keeper = Notifier::from_environment()?.context("there is no keeper")?;
    let sockets: Vec<UnixDatagram> = (0..count).map(|_| UnixDatagram::unbound()).collect::<Result<_, _>>()?;
    let puts: Vec<Message> = (0..count).map(|number| Message::new().store(&format!("h{number}"))).collect();
    let removals: Vec<Message> =
        (0..count).map(|number| Message::new().remove(&format!("h{number}"))).collect();
    while let Some(task) = told::<Task>()? {
        let begin = now();
        match task {
            Task::Keeper => {
                say(&rustix::process::getppid().context("it has a parent")?.as_raw_nonzero().get())?;
                continue;
            }
            Task::End => {
                send(&keeper, &Message::new().stopping(), None)?;
                return Ok(());
            }
            Task::Put => {
                for (message, socket) in puts.iter().zip(&sockets) {
                    send(&keeper, message, Some(socket))?;
                }
            }
            Task::Remove => {
                for message in &removals {
                    send(&keeper, message, None)?;
                }
            }
        }
        keeper.barrier(PATIENCE)?;
        say(&(now() - begin))?;
    }
    Ok(())
}

/// Sends, as soon as the keeper has read enough of what was sent before.
fn send(keeper: &Notifier, message: &Message, socket: Option<&UnixDatagram>) -> anyhow::Result<()> {
    let descriptor = socket.map(AsFd::as_fd);
    loop {
        match keeper.send_with(message, descriptor.as_slice()) {
            Err(NotifyError::Full) => poll(&mut [PollFd::new(keeper, PollFlags::OUT)], None)?,
            sent => return Ok(sent?),
        };
    }
}

/// The memory of a process, in bytes.
fn resident(pid: u64) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has memory")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
