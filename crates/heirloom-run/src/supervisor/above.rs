//! What the supervisor above is told and given to keep: see [`crate::above`].

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use heirloom::notify::Message;
use heirloom::store::Activated;
use heirloom::{Cbor, Codec};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::life::{Known, Phase, Then};
use super::{Core, Listening, NOTIFY, PREVIOUS};
use crate::above::{Above, Holder, Lent, Record, Role};
use crate::clock::Moment;
use crate::error::RunError;
use crate::notify::socket::NotifySocket;
use crate::options::Command;

/// How long the command waits for a supervisor above that does not read.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the supervisor above was told last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Announced {
    #[default]
    Starting,
    Ready,
    Reloading,
    Stopping,
}

/// Why it ends, if it was told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ending {
    /// By a signal: whoever keeps the vault knows whether there is a next time.
    Signal,
    /// For good.
    Quit,
}

/// What has been learned, and what a new run under the same supervisor goes on with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Memory {
    known: Known,
    /// The command of the command line, and the one that is run.
    asked: Option<Command>,
    command: Option<Command>,
}

/// What is in the vault beside what is stored and listened at.
#[derive(Debug, Default)]
pub(super) struct Noted {
    processes: Vec<NotedProcess>,
    memory: Option<(u64, OwnedFd, Memory)>,
    /// Those of the processes that a run before has left.
    previous: Vec<u32>,
}

#[derive(Debug)]
struct NotedProcess {
    number: u64,
    pid: u32,
    pidfd: OwnedFd,
}

impl Noted {
    /// Processes that are left from before, and have not ended yet.
    pub(super) fn previous(&self) -> &[u32] {
        &self.previous
    }
}

/// What a run before has left.
#[derive(Debug, Default)]
pub(super) struct Left {
    pub(super) notify: Option<(u64, OwnedFd)>,
    pub(super) listening: Vec<(u64, String, OwnedFd)>,
    stored: Vec<(Record<'static>, OwnedFd)>,
    processes: Vec<NotedProcess>,
    memory: Option<(u64, OwnedFd)>,
    next_id: u64,
}

impl Left {
    pub(super) fn of(found: Vec<(Record<'static>, OwnedFd)>) -> Left {
        let mut left = Left::default();
        for (record, descriptor) in found {
            let number = record.number;
            left.next_id = left.next_id.max(number + 1);
            match record.role {
                Role::Stored => left.stored.push((record, descriptor)),
                Role::Listening => left.listening.push((number, record.name.into_owned(), descriptor)),
                Role::Notify => left.notify = Some((number, descriptor)),
                Role::Process => {
                    left.processes.push(NotedProcess { number, pid: record.put_by, pidfd: descriptor });
                }
                Role::Memory => left.memory = Some((number, descriptor)),
                Role::Pen | Role::Unknown => {}
            }
        }
        left
    }
}

impl Holder for Core {
    fn lend(&self, number: u64) -> Option<Lent<'_>> {
        if let Some(held) = self.store.get(number) {
            let record = Record::new(number, Role::Stored, &held.name);
            let record = Record { put_by: held.put_by, polled: held.polled, ..record };
            return Some(Lent { record, descriptor: held.descriptor.as_fd() });
        }
        if number == self.notify_id {
            let record = Record::new(number, Role::Notify, "");
            return Some(Lent { record, descriptor: self.notify.as_fd() });
        }
        if let Some(listening) = self.listening.iter().find(|listening| listening.id == number) {
            let record = Record::new(number, Role::Listening, &listening.option);
            return Some(Lent { record, descriptor: listening.socket.as_fd() });
        }
        if let Some(process) = self.noted.processes.iter().find(|process| process.number == number) {
            let record = Record { put_by: process.pid, ..Record::new(number, Role::Process, "") };
            return Some(Lent { record, descriptor: process.pidfd.as_fd() });
        }
        let (_, memory, _) = self.noted.memory.as_ref().filter(|(id, ..)| *id == number)?;
        Some(Lent { record: Record::new(number, Role::Memory, ""), descriptor: memory.as_fd() })
    }
}

impl Core {
    fn with_above<T>(&mut self, with: impl FnOnce(&mut Above, &Core) -> T) -> Option<T> {
        let mut above = self.above.take()?;
        let result = with(&mut above, self);
        self.above = Some(above);
        Some(result)
    }

    /// Puts what has this number into the vault.
    pub(super) fn keep_above(&mut self, number: u64) {
        self.with_above(|above, core| {
            if let Some(lent) = core.lend(number) {
                above.keep(&lent);
            }
        });
    }

    /// Goes on with what a run before has left in the vault.
    pub(super) fn take_left(&mut self, left: Left) {
        self.next_id = self.next_id.max(left.next_id);
        for (record, descriptor) in left.stored {
            if self.store.put(record.number, &record.name, descriptor, record.put_by, record.polled)
                && record.polled
            {
                self.watch_for_hang_up(record.number);
            }
        }
        if let Some((number, memfd)) = left.memory
            && let Some(memory) = read_memory(&memfd)
        {
            self.known = memory.known.clone();
            self.known.says_ready |= self.options.expect_ready;
            if memory.asked.as_ref() == Some(&self.options.command)
                && let Some(command) = &memory.command
            {
                self.command = command.clone();
            }
            self.noted.memory = Some((number, memfd, memory));
        }
        for process in left.processes {
            if is_alive(&process.pidfd) {
                let token = epoll::EventData::new_u64(PREVIOUS);
                let _ = epoll::add(&self.epoll, &process.pidfd, token, epoll::EventFlags::IN);
                self.noted.previous.push(process.pid);
                self.noted.processes.push(process);
            }
        }
        if !self.store.is_empty() {
            tracing::info!(stored = self.store.len(), "goes on with what a run before has left");
        }
    }

    /// Sockets that somebody else holds for the command, who gives them to a next run as well.
    pub(super) fn take_activated(&mut self, sockets: Vec<Activated>) {
        for Activated { name, descriptor } in sockets {
            let id = self.new_id();
            self.listening.push(Listening { id, name, option: String::new(), socket: descriptor });
        }
    }

    /// Makes the vault keep all that is here, and nothing else.
    pub(super) fn reconcile_vault(&mut self) {
        let mut numbers: Vec<u64> = self.store.iter().map(|(number, _)| number).collect();
        numbers.push(self.notify_id);
        let own = self.listening.iter().filter(|listening| !listening.option.is_empty());
        numbers.extend(own.map(|listening| listening.id));
        numbers.extend(self.noted.processes.iter().map(|process| process.number));
        numbers.extend(self.noted.memory.iter().map(|(number, ..)| *number));
        self.with_above(|above, core| above.reconcile(&numbers, core));
    }

    /// Begins: starts the command, but when processes of before have ended.
    pub(super) fn begin(&mut self, now: Moment) -> Result<(), crate::start::StartFailure> {
        self.phase = Phase::Clearing { kill_at: Some(now.after(self.options.stop_timeout)) };
        // What they have said before this process was there to hear it.
        self.read_messages(self.queue);
        if self.noted.previous.is_empty() {
            return self.start_main(now);
        }
        tracing::warn!(pids = ?self.noted.previous, "processes of before are still there, and are told to end");
        self.tell_previous(Signal::TERM);
        Ok(())
    }

    pub(super) fn tell_previous(&self, signal: Signal) {
        for process in &self.noted.processes {
            if self.noted.previous.contains(&process.pid) {
                let _ = pidfd_send_signal(&process.pidfd, signal);
            }
        }
    }

    /// Some process of before has ended.
    pub(super) fn previous_ended(&mut self, now: Moment) {
        let alive = |pid: &u32| {
            self.noted.processes.iter().any(|process| process.pid == *pid && is_alive(&process.pidfd))
        };
        let previous: Vec<u32> = self.noted.previous.iter().copied().filter(alive).collect();
        if previous.is_empty() && matches!(self.phase, Phase::Clearing { .. }) {
            // Their last words count, while they are known.
            self.read_messages(self.queue);
            self.noted.previous = previous;
            self.note_processes();
            self.start_again(now);
        } else {
            self.noted.previous = previous;
            self.note_processes();
        }
    }

    /// Keeps in the vault what another run has to know, beside what is stored and listened at.
    pub(super) fn note(&mut self) {
        if self.above.is_some() {
            self.note_processes();
            self.note_memory();
        }
    }

    /// Keeps the processes that are looked after in the vault: another run has to wait for their end.
    pub(super) fn note_processes(&mut self) {
        if self.above.is_none() {
            return;
        }
        let now: Vec<u32> = self.known_processes().collect();
        let ended: Vec<u64> = self
            .noted
            .processes
            .iter()
            .filter(|noted| !now.contains(&noted.pid))
            .map(|noted| noted.number)
            .collect();
        self.noted.processes.retain(|noted| now.contains(&noted.pid));
        for number in ended {
            self.forget_above(number);
        }
        for pid in now {
            if self.noted.processes.iter().any(|noted| noted.pid == pid) {
                continue;
            }
            let Some(id) = Pid::from_raw(pid as i32) else { continue };
            if let Ok(pidfd) = pidfd_open(id, PidfdFlags::empty()) {
                let number = self.new_id();
                self.noted.processes.push(NotedProcess { number, pid, pidfd });
                self.keep_above(number);
            }
        }
    }

    fn note_memory(&mut self) {
        let is_same = |noted: &Memory| {
            noted.known == self.known
                && noted.asked.as_ref() == Some(&self.options.command)
                && noted.command.as_ref() == Some(&self.command)
        };
        if self.noted.memory.as_ref().is_some_and(|(.., noted)| is_same(noted)) {
            return;
        }
        let memory = Memory {
            known: self.known.clone(),
            asked: Some(self.options.command.clone()),
            command: Some(self.command.clone()),
        };
        let Ok(memfd) = write_memory(&memory) else { return };
        let number = self.new_id();
        let before = self.noted.memory.replace((number, memfd, memory));
        self.keep_above(number);
        if let Some((number, ..)) = before {
            self.forget_above(number);
        }
    }

    pub(super) fn forget_above(&mut self, number: u64) {
        if let Some(above) = &mut self.above {
            above.forget(number);
        }
    }

    /// Has the vault hold what is held here. What was heard is done then, and barriers are answered.
    pub(super) fn settle(&mut self, now: Moment) {
        let behind = self.with_above(|above, core| {
            above.settle(core);
            above.is_behind()
        });
        match behind {
            Some(true) if *self.behind_until.get_or_insert(now.after(PATIENCE)) > now => {
                self.hear_more(false);
            }
            Some(true) => {
                if !std::mem::replace(&mut self.impatient, true) {
                    tracing::warn!("the supervisor above does not read: not all that is held is kept by it");
                }
                self.hear_more(true);
            }
            _ => {
                self.behind_until = None;
                self.impatient = false;
                self.hear_more(true);
            }
        }
    }

    /// Whether more messages are to be heard; then those that were heard are done.
    fn hear_more(&mut self, more: bool) {
        if more {
            self.notify.done();
        }
        if more == self.deaf {
            self.deaf = !more;
            let interest = if more { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
            let token = epoll::EventData::new_u64(NOTIFY);
            let _ = epoll::modify(&self.epoll, &self.notify, token, interest);
        }
    }

    /// At the end of each turn: the vault has what is held here, and the supervisor above knows what goes on.
    pub(super) fn report(&mut self, now: Moment) {
        if self.above.is_none() {
            return;
        }
        self.note();
        let command = self.main.as_ref().map(|main| main.pid);
        if let Some(above) = &mut self.above {
            above.look_at_limit(command, now);
        }
        self.settle(now);
        self.announce(self.to_announce());
        let text = self.text_above();
        if let Some(above) = &mut self.above {
            above.run_timers(now);
            above.say_text(text, now);
            above.watch();
        }
    }

    /// Before an upgrade in place: all that can wait nowhere is said.
    pub(super) fn begin_reload(&mut self, now: Moment) {
        self.settle(now);
        if self.announced == Announced::Ready {
            self.announce(Announced::Reloading);
        }
        if let Some(above) = &mut self.above {
            above.pause();
        }
    }

    /// Says what has changed.
    pub(super) fn announce(&mut self, announced: Announced) {
        let text = self.text_above();
        let Some(above) = &mut self.above else { return };
        if std::mem::replace(&mut self.announced, announced) == announced {
            return;
        }
        let message = match announced {
            Announced::Starting => return,
            Announced::Ready => Message::new().ready().main_pid(std::process::id()).status(&text),
            Announced::Reloading => Message::new().reloading(),
            Announced::Stopping => Message::new().stopping(),
        };
        above.say(&message);
    }

    fn to_announce(&self) -> Announced {
        let main = self.main.as_ref();
        let ends = matches!(self.phase, Phase::Stopping { then: Then::End, .. } | Phase::Sweeping { .. });
        if ends || self.over.is_some() {
            return Announced::Stopping;
        }
        // Once it was ready it stays so for whoever is above: failures are this supervisor's to mend.
        let is_up = match main {
            Some(main) => main.ready.is_some() || !self.known.says_ready,
            None => false,
        };
        if self.announced == Announced::Starting && !is_up {
            Announced::Starting
        } else if self.upgrade.is_some() || main.is_some_and(|main| main.reloading) {
            Announced::Reloading
        } else {
            Announced::Ready
        }
    }

    fn text_above(&self) -> String {
        let ended = self.ended.filter(|_| matches!(self.phase, Phase::Waiting { .. }));
        let ended = ended.map_or(String::new(), |ended| format!(", since it ended with {ended}"));
        let says = if self.text.is_empty() { String::new() } else { format!(": {}", self.text) };
        format!("{}{ended}{says}", self.state())
    }

    /// How many of what is shown is kept above as well.
    pub(super) fn kept_above(&self) -> Option<u64> {
        let above = self.above.as_ref().filter(|above| above.has_vault())?;
        // Who holds a socket for the command keeps it in any case.
        let listening = self
            .listening
            .iter()
            .filter(|listening| listening.option.is_empty() || above.keeps(listening.id));
        let stored = self.store.iter().filter(|(number, _)| above.keeps(*number));
        Some((listening.count() + stored.count()) as u64)
    }

    /// The notify socket of a run before, if what is said at its path still arrives there.
    pub(super) fn adopt_notify(
        path: &std::path::Path,
        left: Option<(u64, OwnedFd)>,
    ) -> Option<(u64, NotifySocket)> {
        let (number, socket) = left?;
        NotifySocket::is_at(&socket, path).then(|| (number, NotifySocket::adopt(socket)))
    }
}

fn is_alive(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
}

fn write_memory(memory: &Memory) -> std::io::Result<OwnedFd> {
    let bytes = Cbor::encode(memory).map_err(std::io::Error::other)?;
    let memfd = memfd_create(c"heirloom.memory", MemfdFlags::CLOEXEC)?;
    rustix::io::pwrite(&memfd, &bytes, 0)?;
    Ok(memfd)
}

/// What was learned; nothing if it cannot be read, for it is learned again.
fn read_memory(memfd: &OwnedFd) -> Option<Memory> {
    let length = rustix::fs::fstat(memfd).ok()?.st_size;
    let mut bytes = vec![0; usize::try_from(length).ok().filter(|length| *length <= 1 << 20)?];
    let read = rustix::io::pread(memfd, &mut bytes[..], 0).ok()?;
    Cbor::decode(&bytes[..read]).ok()
}

/// Whatever cannot be gone on with is an error that says so, and leaves it where it is.
pub(super) fn unreadable(error: &crate::above::PageError) -> RunError {
    RunError::Vault(error.to_string())
}
