//! Starting the command: where it is found, and what it is given.

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use heirloom_sys::{SignalMask, Spawn, SpawnStage, spawn};
use rustix::io::Errno;

use crate::exit;
use crate::options::Command;

/// The longest string in an environment, with its null byte (`MAX_ARG_STRLEN`, execve(2)).
const LONGEST_STRING: usize = 131_072;
/// The variable that holds the names.
const NAMES: &str = "LISTEN_FDNAMES";
/// How long all names may be together, each with a separator.
pub(crate) const LONGEST_NAMES: usize = LONGEST_STRING - NAMES.len() - 1;

/// How many descriptors a program can open beside those that it is given, at least.
const ROOM: u64 = 512;

/// What is this process's own business, and not inherited.
const OWN: &[&str] = &[
    "NOTIFY_SOCKET",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PIDFDID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "FDSTORE",
    "HEIRLOOM_STORE",
    "HEIRLOOM_UPGRADE",
];

/// What a process is given.
#[derive(Debug)]
pub(crate) struct Given<'a> {
    /// Descriptors with their names; `None`: it gets none, and is not told of any.
    pub(crate) descriptors: Option<Vec<(&'a str, BorrowedFd<'a>)>>,
    pub(crate) notify: &'a Path,
    pub(crate) control: &'a Path,
    pub(crate) store_max: u64,
    pub(crate) watchdog: Option<Duration>,
    pub(crate) signal_mask: SignalMask,
    /// The soft limit on open files that this process was started with.
    pub(crate) open_files: u64,
}

/// Why it cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot run {program}: {why}")]
pub(crate) struct StartFailure {
    /// The code to end with.
    pub(crate) code: u8,
    program: String,
    why: String,
}

/// Starts the command, and returns its process id.
pub(crate) fn start(command: &Command, given: &Given<'_>) -> Result<u32, StartFailure> {
    let failure =
        |code, why: String| StartFailure { code, program: command.program.to_string_lossy().into(), why };
    let program = find(&command.program).map_err(|(code, why)| failure(code, why.into()))?;
    let string = |bytes: Vec<u8>| {
        CString::new(bytes).map_err(|_| failure(exit::CANNOT_RUN, "there is a null byte in it".into()))
    };
    let program = string(program.into_os_string().into_vec())?;
    let words = [&command.program].into_iter().chain(&command.arguments);
    let arguments: Vec<CString> =
        words.map(|word| string(word.as_bytes().to_vec())).collect::<Result<_, _>>()?;
    let variables: Vec<CString> = environment(given).map(string).collect::<Result<_, _>>()?;
    let mut pid_variables = Vec::new();
    if given.descriptors.is_some() {
        pid_variables.push(c"LISTEN_PID");
    }
    if given.watchdog.is_some() {
        pid_variables.push(c"WATCHDOG_PID");
    }
    let descriptors: Vec<BorrowedFd<'_>> =
        given.descriptors.iter().flatten().map(|&(_, descriptor)| descriptor).collect();
    let call = Spawn {
        program: &program,
        arguments: &arguments,
        environment: &variables,
        pid_variables: &pid_variables,
        descriptors: &descriptors,
        signal_mask: given.signal_mask,
        open_files: open_files(given.open_files, descriptors.len() as u64),
    };
    spawn(&call).map_err(|failed| {
        let code = match (failed.stage, Errno::from_io_error(&failed.source)) {
            (SpawnStage::Exec, Some(Errno::NOENT | Errno::NOTDIR)) => exit::NOT_FOUND,
            (SpawnStage::Exec, _) => exit::CANNOT_RUN,
            _ => exit::RUN_FAILED,
        };
        let why = match Errno::from_io_error(&failed.source) {
            Some(Errno::TOOBIG) => {
                "its arguments and environment are too long together, the names of stored descriptors among \
                                    them: give shorter names, or let it fetch"
                    .into()
            }
            Some(Errno::NOEXEC) => {
                "it is no program of this machine, nor a script that says by what it is run (#!)".into()
            }
            _ => failed.source.to_string(),
        };
        failure(code, why)
    })
}

/// The file that a command means: looked for along `PATH` if there is no slash in it.
fn find(program: &OsStr) -> Result<PathBuf, (u8, &'static str)> {
    if program.as_bytes().contains(&b'/') {
        return Ok(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
    let mut found = Err((exit::NOT_FOUND, "there is no such program along PATH"));
    for directory in std::env::split_paths(&path) {
        let candidate = directory.join(program);
        if !candidate.is_file() {
            continue;
        }
        if rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK).is_ok() {
            return Ok(candidate);
        }
        found = Err((exit::CANNOT_RUN, "what is called so along PATH may not be executed"));
    }
    found
}

/// This process's environment without what is its own, and what a program expects of its supervisor.
fn environment(given: &Given<'_>) -> impl Iterator<Item = Vec<u8>> {
    let inherited = std::env::vars_os().filter(|(name, _)| !OWN.iter().any(|own| name == own));
    let mut ours: Vec<(&str, OsString)> = vec![
        ("NOTIFY_SOCKET", given.notify.into()),
        ("HEIRLOOM_STORE", given.control.into()),
        ("FDSTORE", given.store_max.to_string().into()),
    ];
    if let Some(descriptors) = &given.descriptors {
        let names: Vec<&str> = descriptors.iter().map(|&(name, _)| name).collect();
        ours.push(("LISTEN_FDS", descriptors.len().to_string().into()));
        ours.push((NAMES, names.join(":").into()));
    }
    if let Some(every) = given.watchdog {
        ours.push(("WATCHDOG_USEC", every.as_micros().to_string().into()));
    }
    let ours = ours.into_iter().map(|(name, value)| (OsString::from(name), value));
    inherited.chain(ours).map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
}

/// The limit for the program: what it would have without us, unless that leaves it little room beside what it is given.
fn open_files(before: u64, given: u64) -> Option<(u64, u64)> {
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let soft = if given == 0 { before } else { before.max(given + ROOM) };
    Some((soft.min(hard), hard))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_as_a_shell_finds_it() {
        assert!(find(OsStr::new("sh")).unwrap().ends_with("sh"));
        assert_eq!(find(OsStr::new("no such program")).unwrap_err().0, exit::NOT_FOUND);
        assert_eq!(find(OsStr::new("./x")).unwrap(), Path::new("./x"));
    }

    #[test]
    fn there_is_room_beside_what_is_given() {
        let (soft, hard) = open_files(64, 2).unwrap();
        assert_eq!(soft, (ROOM + 2).min(hard));
        assert_eq!(open_files(64, 0).unwrap().0, 64);
        assert_eq!(open_files(u64::MAX, 3).unwrap().0, hard);
    }
}
