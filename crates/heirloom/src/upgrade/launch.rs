//! What an upgrade starts: a program, its arguments, and whether it is to be in place.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::request::Upgrade;
use super::role::{Role, environment};

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
    child: Option<Child>,
    pidfd: OwnedFd,
}

impl StartedSuccessor {
    /// Starts it, with our standard streams.
    pub(crate) fn start(launch: &Launch) -> io::Result<StartedSuccessor> {
        let mut child = launch.command(Role::Successor { incumbent: std::process::id() }).spawn()?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(StartedSuccessor { child: Some(child), pidfd }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Readable once it has exited.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        Some(status.to_string())
    }

    /// It serves now.
    pub(crate) fn let_go(mut self) {
        self.child = None;
    }
}

impl Drop for StartedSuccessor {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
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
