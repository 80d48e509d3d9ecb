//! What the command says, and what follows from it.

use std::os::fd::OwnedFd;

use heirloom_sys::Datagram;

use super::Core;
use super::life::Phase;
use crate::clock::Moment;
use crate::notify::message::{Message, Watchdog};
use crate::notify::sender::{Sender, descends};

impl Core {
    /// Reads messages, at most so many.
    pub(super) fn read_messages(&mut self, most: usize) {
        for _ in 0..most {
            match self.notify.receive() {
                Ok(Some((bytes, datagram))) => {
                    let message = Message::parse(bytes);
                    self.hear(message, datagram);
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot receive a message");
                    return;
                }
            }
        }
    }

    fn hear(&mut self, message: Message, datagram: Datagram) {
        let Datagram { sender: credentials, descriptors, truncated, descriptors_truncated, .. } = datagram;
        let pid = credentials.map_or(0, |credentials| credentials.pid);
        let now = Moment::now();
        let Some(sender) = Sender::of(credentials, self.known_processes()) else {
            self.counters.strangers += 1;
            if let Some(unsaid) = self.strangers.now(now) {
                tracing::warn!(
                    pid,
                    unsaid,
                    "a message of a process that does not descend from this one is ignored"
                );
            }
            return;
        };
        if truncated || descriptors_truncated {
            let what =
                if truncated { "a message is too long" } else { "no room for the descriptors of a message" };
            return self.refuse(format!("pid {pid}: {what}, which is ignored"));
        }
        self.hear_state(&message, &sender, now);
        if message.store {
            self.put(&message, descriptors, pid);
        } else if message.remove {
            self.remove(message.name.as_deref(), pid);
        } else if message.barrier {
            // That they are closed says that everything before is done; where they are only looked at, that is not yet it.
            drop::<Vec<OwnedFd>>(descriptors);
        } else if !descriptors.is_empty() {
            self.refuse(format!("pid {pid}: descriptors came without FDSTORE=1, and are closed"));
        }
    }

    fn hear_state(&mut self, message: &Message, sender: &Sender, now: Moment) {
        self.known.fetches |= message.fetches;
        if message.control.is_some() {
            self.known.control.clone_from(&message.control);
        }
        self.known.says_ready |= message.ready;
        if let Some(status) = &message.status {
            self.text.clone_from(status);
        }
        if let Some(errno) = message.errno
            && self.complaints.now(now).is_some()
        {
            tracing::info!("the command says that it fails: {}", std::io::Error::from_raw_os_error(errno));
        }
        if let Some(pid) = message.main_pid {
            self.hear_main_pid(pid, now);
        }
        let main_is_gone = self.main.is_none();
        let beside = self.upgrade.as_mut().and_then(|upgrade| upgrade.beside_mut());
        let process = match beside {
            Some(beside) if main_is_gone || sender.is_within(beside.pid) => Some(beside),
            _ => self.main.as_mut(),
        };
        let Some(process) = process else { return };
        if message.reloading {
            process.reloading = true;
        }
        if message.ready {
            process.reloading = false;
            process.ready.get_or_insert(now);
        }
        process.stopping |= message.stopping;
        if let Some(every) = message.watchdog_every {
            process.watchdog = Some(every).filter(|every| !every.is_zero());
            process.alive = Some(now);
        }
        match message.watchdog {
            Some(Watchdog::Alive) => process.alive = Some(now),
            Some(Watchdog::Trigger) => {
                let pid = process.pid;
                self.trigger_watchdog(pid, "it asked for that", now);
            }
            None => {}
        }
        self.look_at_upgrade();
    }

    /// Another process is to be the main one.
    fn hear_main_pid(&mut self, pid: u32, now: Moment) {
        let beside = self.upgrade.as_ref().and_then(|upgrade| upgrade.beside());
        let is_beside = beside.is_some_and(|beside| beside.pid == pid);
        let settled = matches!(self.phase, Phase::Up | Phase::Stopping { .. });
        // One that is started by an upgrade becomes it when the upgrade is done.
        if is_beside || !settled || self.main.as_ref().is_none_or(|main| main.pid == pid) {
            return;
        }
        if !descends(pid) {
            return self.refuse(format!("MAINPID={pid} is no process of this command"));
        }
        if let Some(main) = &mut self.main {
            tracing::info!(before = main.pid, now = pid, "another process is the main one");
            main.pid = pid;
            main.stopping = false;
            main.started = now;
        }
        self.watch_main();
    }
}
