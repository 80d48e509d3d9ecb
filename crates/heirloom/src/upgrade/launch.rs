//! What an upgrade starts: a program, its arguments, and whether it is to be in place.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use heirloom_sys::{SignalMask, Spawn, SpawnFailure, spawn, spawn_sibling};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitpid,
};

use super::request::Upgrade;
use super::role::{Role, environment, parent};
use crate::{courtesy, notify, unit};

/// A program to start, and how.
///
/// ```
/// use heirloom::upgrade::Launch;
///
/// let launch = Launch::current();
/// assert!(launch.program.is_absolute());
/// assert_eq!(launch.arguments.len(), std::env::args_os().count() - 1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The file to run.
    pub program: PathBuf,
    /// What the program is told it is called: `argv[0]`.
    pub name: OsString,
    /// Its arguments, without its own name.
    pub arguments: Vec<OsString>,
    /// Whether to become it in place instead of starting a successor beside.
    pub in_place: bool,
}

impl Launch {
    /// This process's own program and arguments; in place when stdin is a terminal, which a process in the background
    /// cannot read, or when it is PID 1, whose end is that of its whole pid namespace.
    ///
    /// The program is the *path* by which it was called, so that it means whatever lies there when it is started: a link
    /// that leads to another file by then is followed anew. Call this early: a file that has been replaced since is
    /// still found, one that was moved away is not.
    pub fn current() -> Launch {
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_default();
        let program = called(&name)
            .unwrap_or_else(|| std::env::current_exe().map_or_else(|_| PathBuf::from(&name), undeleted));
        let in_place = std::process::id() == 1 || rustix::termios::isatty(rustix::stdio::stdin());
        Launch { program, name, arguments: arguments.collect(), in_place }
    }

    /// This launch, changed as a request has it.
    pub(crate) fn for_request(&self, request: &Upgrade) -> Launch {
        let mut launch = self.clone();
        if let Some(program) = &request.program {
            launch.name = program.into();
            launch.program.clone_from(program);
        }
        if let Some(arguments) = &request.arguments {
            launch.arguments = arguments.iter().map(OsString::from).collect();
        }
        launch.in_place |= request.in_place;
        launch
    }

    /// The command that starts it in this role.
    pub(crate) fn command(&self, role: Role) -> Command {
        let mut command = Command::new(&self.program);
        command.arg0(&self.name).args(&self.arguments).env_clear().envs(environment(role));
        command
    }
}

/// The path by which this process's program was called, if what lies there is this program.
fn called(name: &OsStr) -> Option<PathBuf> {
    let candidates: Vec<PathBuf> = if name.as_bytes().contains(&b'/') {
        vec![name.into()]
    } else {
        std::env::split_paths(&std::env::var_os("PATH")?).map(|directory| directory.join(name)).collect()
    };
    let file = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let this = file(Path::new("/proc/self/exe"))?;
    candidates
        .iter()
        .filter_map(|path| std::path::absolute(path).ok())
        // What is called /proc/self/fd/9 or /dev/fd/9 is something else in each process.
        .filter(|path| !path.starts_with("/proc") && !path.starts_with("/dev"))
        .find(|path| file(path) == Some(this))
}

/// The path of a file that was replaced: Linux marks the link of what the process runs (proc_pid_exe(5)).
fn undeleted(path: PathBuf) -> PathBuf {
    match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(before) if !path.exists() => Path::new(OsStr::from_bytes(before)).into(),
        _ => path,
    }
}

/// A successor that this incumbent has started. Unless it is [let go](StartedSuccessor::let_go), it is killed when
/// this is dropped: an aborted successor must not keep duplicates of the descriptors.
#[derive(Debug)]
pub(crate) struct StartedSuccessor {
    started: Option<Started>,
    pidfd: OwnedFd,
}

#[derive(Clone, Copy, Debug)]
enum Started {
    /// A child of ours.
    Child(Pid),
    /// A child of our supervisor's.
    Sibling(Pid),
}

impl StartedSuccessor {
    /// Starts it, with our standard streams. Of our other descriptors it has those alone that are not close-on-exec and have a number
    /// below 256.
    ///
    /// Under a supervisor whose child this process is, the successor is another child of that. systemd does not wait for the end
    /// of a main process that was not its own child when it heard of it, and kills it right after SIGTERM.
    pub(crate) fn start(launch: &Launch) -> io::Result<StartedSuccessor> {
        let role = Role::Successor { incumbent: std::process::id() };
        if is_child_of_supervisor() {
            match courtesy::starting(|| start(launch, role, spawn_sibling)) {
                Ok((pid, pidfd)) => {
                    return Ok(StartedSuccessor { started: Some(Started::Sibling(to_pid(pid)?)), pidfd });
                }
                // Where that cannot be, it is a child as anywhere.
                Err(error) => tracing::debug!(%error, "no sibling can be started"),
            }
        }
        let pid = to_pid(courtesy::starting(|| start(launch, role, spawn))?)?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(StartedSuccessor { started: Some(Started::Child(pid)), pidfd }),
            Err(error) => {
                // Nobody else waits for it, so that the number is its own.
                let _ = kill_process(pid, Signal::KILL);
                let _ = retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
                Err(error.into())
            }
        }
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.started.map(|(Started::Child(pid) | Started::Sibling(pid))| pid.as_raw_nonzero().get() as u32)
    }

    /// Readable once it has exited.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<String> {
        if !self.has_exited(Some(&Timespec::default())) {
            return None;
        }
        // A child that was waited for is nobody any more.
        Some(match self.started.take()? {
            Started::Child(pid) => match retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty())) {
                Ok(Some((_, status))) => ExitStatus::from_raw(status.as_raw()).to_string(),
                _ => "somebody else waited for it and knows how".into(),
            },
            Started::Sibling(_) => "its supervisor knows how".into(),
        })
    }

    /// It serves now.
    pub(crate) fn let_go(mut self) {
        self.started = None;
    }

    fn has_exited(&self, within: Option<&Timespec>) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        retry_on_intr(|| poll(&mut polled, within)).is_ok_and(|ready| ready > 0)
    }
}

impl Drop for StartedSuccessor {
    fn drop(&mut self) {
        let Some(started) = self.started.take() else { return };
        let killed = pidfd_send_signal(&self.pidfd, Signal::KILL);
        match started {
            Started::Child(pid) => {
                let _ = retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
            }
            Started::Sibling(_) => {
                let _ = killed.is_ok_and(|()| self.has_exited(None));
            }
        }
    }
}

/// Whether our parent is the supervisor: it is PID 1, or of another unit. Not a shell in between.
fn is_child_of_supervisor() -> bool {
    notify::is_supervised()
        && parent().is_some_and(|parent| parent == 1 || unit::contains(parent) == Some(false))
}

/// Starts it by one of the two functions that do so.
fn start<T>(
    launch: &Launch,
    role: Role,
    by: impl FnOnce(&Spawn<'_>) -> Result<T, SpawnFailure>,
) -> io::Result<T> {
    let c_string = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
    let program = c_string(launch.program.as_os_str())?;
    let arguments = [&launch.name].into_iter().chain(&launch.arguments).map(|argument| c_string(argument));
    let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
    let environment = environment(role).map(|(mut variable, value)| {
        variable.push("=");
        variable.push(value);
        c_string(&variable)
    });
    let environment = environment.collect::<Result<Vec<_>, _>>()?;
    let spawn = Spawn {
        program: &program,
        arguments: &arguments,
        environment: &environment,
        pid_variables: &[],
        descriptors: &[],
        signal_mask: SignalMask(0),
        open_files: None,
    };
    by(&spawn).map_err(|failure| failure.source)
}

fn to_pid(pid: u32) -> io::Result<Pid> {
    Pid::from_raw(pid as i32).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_changes_what_it_names() {
        let own = Launch {
            program: "/bin/echod".into(),
            name: "echod".into(),
            arguments: vec!["--port".into(), "7".into()],
            in_place: false,
        };
        assert_eq!(own.for_request(&Upgrade::default()), own);
        let request = Upgrade {
            program: Some("/bin/new".into()),
            arguments: Some(vec![]),
            in_place: true,
            ..Upgrade::default()
        };
        let launch = own.for_request(&request);
        assert_eq!((launch.program, launch.name), ("/bin/new".into(), "/bin/new".into()));
        assert!(launch.arguments.is_empty() && launch.in_place);
    }

    #[test]
    fn a_program_is_what_it_was_called_by_and_nothing_else_that_has_the_name() {
        let this = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("current");
        std::os::unix::fs::symlink(&this, &link).unwrap();
        assert_eq!(called(link.as_os_str()), Some(link));
        for other in ["/bin/true", "/proc/self/exe", "/nowhere/echod", "no such program", ""] {
            assert_eq!(called(other.as_ref()), None, "{other}");
        }
    }

    #[test]
    fn a_replaced_file_is_meant_by_its_path() {
        assert_eq!(undeleted("/nowhere/echod (deleted)".into()), Path::new("/nowhere/echod"));
        assert_eq!(undeleted("/nowhere/echod".into()), Path::new("/nowhere/echod"));
    }
}
