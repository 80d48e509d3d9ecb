//! Whose messages count.
//!
//! - Those of the main process, and of every other process that descends from this one: they are what is supervised. That
//!   is found by following parents in /proc up to this process, which is a subreaper: an orphan becomes its child.
//! - Those of a sender that has ended by the time its message is read, if its uid is this process's own: `systemd-notify`
//!   ends at once. The socket is in a directory that only this user enters, so that it is none of another user's.
//! - Nobody else's: a process of the same user that lives and is no descendant, for instance in another terminal, and a
//!   sender in another pid namespace that this one cannot see.
//!
//! A sender that counts may be any of them, for all; only for [`Message::main_pid`](super::message::Message) there is one
//! more rule: the process that is named must itself descend from this one.

use std::fs;

use heirloom_sys::Credentials;
use rustix::process::getuid;

/// How far parents are followed; a pid namespace nests 32 deep at most, and shells not much deeper.
const DEEPEST: usize = 256;

/// Who has sent a message that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// A process, and the descendants of this one that it descends from, itself first.
    Descendant(Vec<u32>),
    /// It has ended, and nothing more can be said.
    Ended,
}

impl Sender {
    /// The sender, if its messages count. `ours` are processes that are known without looking: not yet reaped children.
    pub(crate) fn of(
        credentials: Option<Credentials>,
        mut ours: impl Iterator<Item = u32>,
    ) -> Option<Sender> {
        let credentials = credentials?;
        if ours.any(|pid| pid == credentials.pid) {
            return Some(Sender::Descendant(vec![credentials.pid]));
        }
        match ancestry(credentials.pid) {
            Ancestry::Ours(line) => Some(Sender::Descendant(line)),
            Ancestry::Gone if credentials.pid != 0 && credentials.uid == getuid().as_raw() => {
                Some(Sender::Ended)
            }
            Ancestry::Gone | Ancestry::Stranger => None,
        }
    }

    /// Whether it is this process or descends from it.
    pub(crate) fn is_within(&self, pid: u32) -> bool {
        matches!(self, Sender::Descendant(line) if line.contains(&pid))
    }
}

/// Whether a process is a child of this one, which is told of its end.
pub(crate) fn is_child(pid: u32) -> bool {
    parent(pid) == Some(std::process::id())
}

/// Whether a process descends from this one.
pub(crate) fn descends(pid: u32) -> bool {
    matches!(ancestry(pid), Ancestry::Ours(_))
}

enum Ancestry {
    Ours(Vec<u32>),
    Gone,
    Stranger,
}

fn ancestry(pid: u32) -> Ancestry {
    let this = std::process::id();
    let mut line = vec![pid];
    let mut next = pid;
    for _ in 0..DEEPEST {
        match parent(next) {
            Some(parent) if parent == this => return Ancestry::Ours(line),
            Some(0 | 1) => return Ancestry::Stranger,
            Some(parent) => {
                line.push(parent);
                next = parent;
            }
            // A parent that ends meanwhile has left its children to somebody: look again from the start.
            None if next != pid => {
                line.truncate(1);
                next = pid;
            }
            None => return Ancestry::Gone,
        }
    }
    Ancestry::Stranger
}

/// A process's parent, as proc_pid_stat(5) has it; `None` when there is no such process. A zombie has one still.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name before is in parentheses and may hold anything.
    let after_name = stat.iter().rposition(|&byte| byte == b')')?;
    let mut fields = stat[after_name + 1..].split(|&byte| byte == b' ').skip(2);
    std::str::from_utf8(fields.next()?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn credentials(pid: u32) -> Option<Credentials> {
        Some(Credentials { pid, uid: getuid().as_raw(), gid: 0 })
    }

    #[test]
    fn a_child_counts_and_a_grandchild_and_neither_a_parent_nor_this_process() {
        let alone = crate::FORKS.write();
        let mut child = Command::new("/bin/sh")
            .args(["-c", "sleep 1000 & echo $!; read x; kill $!"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(alone);
        let mut line = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        let grandchild: u32 = line.trim().parse().unwrap();
        let sender = Sender::of(credentials(grandchild), std::iter::empty()).unwrap();
        assert!(sender.is_within(child.id()) && sender.is_within(grandchild), "{sender:?}");
        assert!(descends(child.id()) && !descends(std::process::id()));
        assert_eq!(Sender::of(credentials(std::os::unix::process::parent_id()), std::iter::empty()), None);
        assert_eq!(Sender::of(credentials(0), std::iter::empty()), None);
        assert_eq!(Sender::of(None, std::iter::empty()), None);
        drop(child.stdin.take());
        child.wait().unwrap();
        // It has ended and was reaped.
        assert_eq!(Sender::of(credentials(child.id()), std::iter::empty()), Some(Sender::Ended));
        let other = Credentials { uid: getuid().as_raw() + 1, ..credentials(child.id()).unwrap() };
        assert_eq!(Sender::of(Some(other), std::iter::empty()), None);
    }
}
