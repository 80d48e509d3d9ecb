//! A new process that gets descriptors under consecutive numbers: clone(2), and execve(2) in the child.
//!
//! std's `Command` cannot place descriptors, its `pre_exec` would be unsafe code elsewhere, and its child has a copy of all
//! descriptors, which are closed one by one when it becomes the program: half a microsecond each. Here the child that is to get
//! none shares the table until it leaves it. It also shares the memory, while the thread that starts it waits (as `vfork(2)`
//! and `posix_spawn(3)` have it), so that it makes system calls alone: everything that needs memory is made ready before.

use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::SignalMask;
use crate::mask::to_set;

/// The number of the first descriptor that is passed, as `sd_listen_fds(3)` has it.
pub const FIRST_PASSED: i32 = 3;

/// Below this number are the descriptors that a program may be started with and leave to those that it starts. All numbers would take
/// longer to look at than is saved.
const INHERITED_BELOW: i32 = 256;

/// How much stack a child has until it is the program, in bytes: it calls nothing deep.
const STACK: usize = 32 * 1024;

/// Room for a process id in decimal, and a null byte.
const PID_ROOM: usize = 11;

/// What to start, and with what.
///
/// ```
/// use std::os::fd::AsFd;
///
/// let null = std::fs::File::open("/dev/null")?;
/// let spawn = heirloom_sys::Spawn {
///     program: c"/bin/sh",
///     arguments: &[c"sh".into(), c"-c".into(), c"test $LISTEN_PID = $$ && test -e /proc/self/fd/3".into()],
///     environment: &[c"LISTEN_FDS=1".into()],
///     pid_variables: &[c"LISTEN_PID"],
///     descriptors: &[null.as_fd()],
///     signal_mask: heirloom_sys::SignalMask(0),
///     open_files: None,
/// };
/// let pid = heirloom_sys::spawn(&spawn).map_err(|failure| failure.source)?;
/// assert!(pid > 1);
/// # let pid = rustix::process::Pid::from_raw(pid as i32);
/// # let (_, status) = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty())?.unwrap();
/// # assert_eq!(status.exit_status(), Some(0));
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The file to run; it is not looked for along `PATH`.
    pub program: &'a CStr,
    /// Its arguments, its own name first.
    pub arguments: &'a [CString],
    /// Its environment, `NAME=value` each.
    pub environment: &'a [CString],
    /// Names of variables whose value is the new process's own id.
    pub pid_variables: &'a [&'a CStr],
    /// What it gets as descriptors 3, 4, 5 … Standard input, output and error are this process's; nothing else that is
    /// close-on-exec reaches it. If it gets none, what is not close-on-exec reaches it only if its number is below 256.
    pub descriptors: &'a [BorrowedFd<'a>],
    /// Its signal mask.
    pub signal_mask: SignalMask,
    /// Its soft and hard limit on open files, unless they are to stay as they are.
    pub open_files: Option<(u64, u64)>,
}

/// Why nothing was started.
///
/// ```
/// let failure = heirloom_sys::SpawnFailure { stage: heirloom_sys::SpawnStage::Exec, source: std::io::ErrorKind::NotFound.into() };
/// assert_eq!(failure.source.kind(), std::io::ErrorKind::NotFound);
/// ```
#[derive(Debug)]
pub struct SpawnFailure {
    /// How far it came.
    pub stage: SpawnStage,
    /// What the system says.
    pub source: io::Error,
}

/// How far a [`spawn`] came.
///
/// ```
/// assert_ne!(heirloom_sys::SpawnStage::Fork, heirloom_sys::SpawnStage::Exec);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnStage {
    /// There is no new process.
    Fork,
    /// It could not get what it was to have: descriptors, limits.
    Prepare,
    /// It could not become the program.
    Exec,
}

/// Starts a process, and returns its id once it has become the program.
///
/// In it every signal has its default action but those that this process ignores, SIGPIPE excepted, which Rust programs
/// ignore and others do not expect to be. It has to be waited for, as any child. On an error there is no child left.
pub fn spawn(spawn: &Spawn<'_>) -> Result<u32, SpawnFailure> {
    let (pid, _) = start(spawn, Parent::This)?;
    Ok(pid)
}

/// Starts a process as [`spawn`] does, but as a child of this process's own parent (`CLONE_PARENT`, `clone(2)`), which it is for to
/// wait for it. Returns its id, and a pidfd by which its end is seen and which is its own even if it ends at once.
///
/// ```
/// let nothing = heirloom_sys::Spawn {
///     program: c"/bin/true",
///     arguments: &[c"true".into()],
///     environment: &[],
///     pid_variables: &[],
///     descriptors: &[],
///     signal_mask: heirloom_sys::SignalMask(0),
///     open_files: None,
/// };
/// let (pid, _pidfd) = heirloom_sys::spawn_sibling(&nothing).map_err(|failure| failure.source)?;
/// assert_ne!(pid, std::process::id());
/// # std::io::Result::Ok(())
/// ```
///
/// # Errors
///
/// Among others `EINVAL` for the first process of a pid namespace, and before Linux 5.2.
pub fn spawn_sibling(spawn: &Spawn<'_>) -> Result<(u32, OwnedFd), SpawnFailure> {
    let (pid, pidfd) = start(spawn, Parent::Same)?;
    pidfd
        .map(|pidfd| (pid, pidfd))
        .ok_or(SpawnFailure { stage: SpawnStage::Fork, source: io::ErrorKind::Unsupported.into() })
}

/// Whose child a new process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parent {
    This,
    /// The parent of this one.
    Same,
}

fn start(spawn: &Spawn<'_>, parent: Parent) -> Result<(u32, Option<OwnedFd>), SpawnFailure> {
    let failure = |stage| move |source| SpawnFailure { stage, source };
    let spare = match spawn.descriptors.len() as i32 {
        0 => None,
        passed => Some(reserve_above(FIRST_PASSED + passed).map_err(failure(SpawnStage::Fork))?),
    };
    let spare = spare.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    let moves = Moves::plan(spawn.descriptors, spare);

    let mut pid_strings: Vec<Vec<u8>> =
        spawn.pid_variables.iter().map(|name| [name.to_bytes(), b"=", &[0; PID_ROOM]].concat()).collect();
    let pid_places: Vec<*mut u8> = pid_strings
        .iter_mut()
        .map(|string| {
            let start = string.len() - PID_ROOM;
            string[start..].as_mut_ptr()
        })
        .collect();
    let arguments = pointers(spawn.arguments.iter().map(|string| string.as_ptr()));
    let environment = pointers(
        spawn
            .environment
            .iter()
            .map(|string| string.as_ptr())
            .chain(pid_strings.iter().map(|string| string.as_ptr().cast())),
    );
    let limit = spawn
        .open_files
        .map(|(soft, hard)| libc::rlimit { rlim_cur: soft as libc::rlim_t, rlim_max: hard as libc::rlim_t });
    let mut prepared = Prepared {
        program: spawn.program,
        arguments: &arguments,
        environment: &environment,
        pid_places: &pid_places,
        moves: &moves,
        spare,
        leave_from: spawn.descriptors.is_empty().then(first_not_inherited),
        mask: to_set(spawn.signal_mask),
        limit,
        failed: None,
    };
    let (pid, pidfd) = clone(&mut prepared, parent).map_err(failure(SpawnStage::Fork))?;
    match prepared.failed {
        None => Ok((pid as u32, pidfd)),
        Some((stage, errno)) => {
            // The parent waits for it.
            if parent == Parent::This {
                // SAFETY: waits for the child that was just made and exits by itself; no status is wanted.
                while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } == -1
                    && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
                {}
            }
            Err(failure(stage)(io::Error::from_raw_os_error(errno)))
        }
    }
}

/// The child, which has become the program or has failed when this returns, and a pidfd of a sibling.
fn clone(prepared: &mut Prepared<'_>, parent: Parent) -> io::Result<(libc::pid_t, Option<OwnedFd>)> {
    // Not clone3(2), which systemd's RestrictNamespaces= denies: no filter can look into its arguments.
    let mut flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    if parent == Parent::Same {
        flags |= libc::CLONE_PARENT | libc::CLONE_PIDFD;
    }
    if prepared.leave_from.is_some() {
        flags |= libc::CLONE_FILES;
    }
    let mut stack = vec![0_u128; STACK / mem::size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end.cast();
    let mut pidfd: libc::c_int = -1;
    // No handler of this process is to run in the child, which would do so in this process's memory.
    let before = SignalMask::block_all()?;
    // SAFETY: the child shares this memory, but this thread does not go on before it has become a program or has exited: what it
    // is given lives so long, and nobody else touches it. Its stack is large enough for what it calls, grows down from an aligned
    // end, and is its own. What it does is said at `become_program`. The kernel writes the pidfd's number to where the pointer points.
    let pid = unsafe {
        libc::clone(become_program, top, flags, ptr::from_mut(prepared).cast(), ptr::from_mut(&mut pidfd))
    };
    let cloned = if pid == -1 { Err(io::Error::last_os_error()) } else { Ok(pid) };
    // It was the mask a moment ago, and is one that can be set.
    let _ = before.set();
    // SAFETY: the kernel has written the number of a new descriptor there, which nobody else owns.
    let pidfd = (pidfd != -1).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
    Ok((cloned?, pidfd))
}

fn pointers(strings: impl Iterator<Item = *const libc::c_char>) -> Vec<*const libc::c_char> {
    strings.chain([ptr::null()]).collect()
}

/// A descriptor of nothing, close-on-exec, whose number is at least `least`.
fn reserve_above(least: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes integers and touches no memory.
    let nothing = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if nothing == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else owns it.
    let nothing = unsafe { OwnedFd::from_raw_fd(nothing) };
    // SAFETY: duplicates a descriptor that is owned here; no memory is touched.
    let above = unsafe { libc::fcntl(nothing.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    if above == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the duplicate is new, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(above) })
}

/// The number from which on a child that is passed nothing has no descriptors.
fn first_not_inherited() -> libc::c_uint {
    let is_inherited = |number: &i32| {
        // SAFETY: F_GETFD takes no further argument and touches no memory; any number may be asked about.
        let flags = unsafe { libc::fcntl(*number, libc::F_GETFD) };
        flags != -1 && flags & libc::FD_CLOEXEC == 0
    };
    let last = (FIRST_PASSED..INHERITED_BELOW).rev().find(is_inherited);
    last.map_or(FIRST_PASSED, |last| last + 1) as libc::c_uint
}

/// The dup2(2) calls that put every descriptor where it belongs, in an order in which none overwrites what is still
/// needed.
#[derive(Debug, Default)]
struct Moves {
    /// From, to.
    steps: Vec<(i32, i32)>,
    /// Those that are where they belong, and only lose close-on-exec.
    stay: Vec<i32>,
}

impl Moves {
    /// `spare` is a number above all targets that nobody needs, used to break cycles.
    fn plan(descriptors: &[BorrowedFd<'_>], spare: i32) -> Moves {
        let sources: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        Moves::of(&sources, spare)
    }

    fn of(sources: &[i32], spare: i32) -> Moves {
        let targets = FIRST_PASSED..FIRST_PASSED + sources.len() as i32;
        let index = |number: i32| (number - FIRST_PASSED) as usize;
        // How many moves still read each target's present descriptor.
        let mut readers = vec![0u32; sources.len()];
        let mut moves = Moves::default();
        let mut pending: Vec<Option<i32>> = Vec::with_capacity(sources.len());
        for (target, &source) in targets.clone().zip(sources) {
            if source == target {
                moves.stay.push(target);
                pending.push(None);
                continue;
            }
            if targets.contains(&source) {
                readers[index(source)] += 1;
            }
            pending.push(Some(source));
        }
        // A target that nobody reads any more can be written; that may free the one that it is written from.
        let mut free: Vec<i32> = targets.clone().filter(|&target| readers[index(target)] == 0).collect();
        let settle =
            |free: &mut Vec<i32>, pending: &mut [Option<i32>], readers: &mut [u32], moves: &mut Moves| {
                while let Some(target) = free.pop() {
                    let Some(source) = pending[index(target)].take() else { continue };
                    moves.steps.push((source, target));
                    if targets.contains(&source) {
                        readers[index(source)] -= 1;
                        if readers[index(source)] == 0 {
                            free.push(source);
                        }
                    }
                }
            };
        settle(&mut free, &mut pending, &mut readers, &mut moves);
        // What is left is cycles: one of each is put aside.
        for target in targets.clone() {
            if pending[index(target)].is_none() {
                continue;
            }
            moves.steps.push((target, spare));
            for source in pending.iter_mut().flatten() {
                if *source == target {
                    *source = spare;
                }
            }
            readers[index(target)] = 0;
            free.push(target);
            settle(&mut free, &mut pending, &mut readers, &mut moves);
        }
        moves
    }
}

/// Everything that the child needs, made before there is one.
struct Prepared<'a> {
    program: &'a CStr,
    arguments: &'a [*const libc::c_char],
    environment: &'a [*const libc::c_char],
    pid_places: &'a [*mut u8],
    moves: &'a Moves,
    spare: i32,
    /// The table of descriptors is shared, and to be left, without those from this number on.
    leave_from: Option<libc::c_uint>,
    mask: libc::sigset_t,
    limit: Option<libc::rlimit>,
    /// What the child writes if it does not become the program.
    failed: Option<(SpawnStage, i32)>,
}

/// Becomes the program, or writes down why not and exits.
///
/// Only for the child of a [`clone`], with all signals blocked. `prepared` is a [`Prepared`] that nobody else touches meanwhile: every
/// pointer in it is valid, the arrays of pointers end with null, and each of `pid_places` has room for [`PID_ROOM`] bytes.
extern "C" fn become_program(prepared: *mut libc::c_void) -> libc::c_int {
    // SAFETY: as the caller promises.
    let prepared = unsafe { &mut *prepared.cast::<Prepared<'_>>() };
    // SAFETY: as the caller promises.
    prepared.failed = Some(unsafe { try_to_become_program(prepared) });
    // SAFETY: ends the child without a destructor of what is not its own.
    unsafe { libc::_exit(127) }
}

/// Returns only if that fails.
///
/// # Safety
///
/// See [`become_program`].
unsafe fn try_to_become_program(prepared: &Prepared<'_>) -> (SpawnStage, i32) {
    // SAFETY: system calls that are allowed in the child of a vfork, with arguments as the caller promises. They touch what the child
    // does not share: its table of descriptors, unless it is shared and then is only left; its signals; its limits.
    unsafe {
        let failed = |stage| (stage, *libc::__errno_location());
        if let Some(first) = prepared.leave_from {
            // Where the kernel cannot do that (before Linux 5.9), the execve leaves it.
            libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE);
        }
        for &(from, to) in &prepared.moves.steps {
            if libc::dup2(from, to) == -1 {
                return failed(SpawnStage::Prepare);
            }
        }
        // The spare number is left behind by a cycle, and would be inherited.
        if prepared.moves.steps.iter().any(|&(_, to)| to == prepared.spare) {
            libc::close(prepared.spare);
        }
        for &number in &prepared.moves.stay {
            if libc::fcntl(number, libc::F_SETFD, 0) == -1 {
                return failed(SpawnStage::Prepare);
            }
        }
        if let Some(limit) = &prepared.limit
            && libc::setrlimit(libc::RLIMIT_NOFILE, limit) == -1
        {
            return failed(SpawnStage::Prepare);
        }
        let pid = libc::getpid() as u32;
        for &place in prepared.pid_places {
            write_decimal(place, pid);
        }
        let mut action: libc::sigaction = mem::zeroed();
        for signal in 1..=libc::SIGRTMAX() {
            // What has a handler would run it from here on, before the execve takes it away.
            let known = libc::sigaction(signal, ptr::null(), &mut action) == 0;
            if known && action.sa_sigaction == libc::SIG_IGN && signal != libc::SIGPIPE {
                continue;
            }
            action = mem::zeroed();
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        if libc::sigprocmask(libc::SIG_SETMASK, &prepared.mask, ptr::null_mut()) == -1 {
            return failed(SpawnStage::Prepare);
        }
        libc::execve(prepared.program.as_ptr(), prepared.arguments.as_ptr(), prepared.environment.as_ptr());
        failed(SpawnStage::Exec)
    }
}

/// Writes a number and a null byte.
///
/// # Safety
///
/// There is room for [`PID_ROOM`] bytes.
unsafe fn write_decimal(place: *mut u8, mut number: u32) {
    let mut digits = [0u8; PID_ROOM];
    let mut start = PID_ROOM - 1;
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    // SAFETY: at most PID_ROOM bytes, null byte included, to where the caller says that there is room for them.
    unsafe { ptr::copy_nonoverlapping(digits[start..].as_ptr(), place, PID_ROOM - start) };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Plays the steps on a table of descriptors, and looks whether each target has what it was to get.
    fn check(sources: &[i32]) {
        const SPARE: i32 = 1000;
        let moves = Moves::of(sources, SPARE);
        let mut table: BTreeMap<i32, i32> = (0..500).map(|number| (number, number)).collect();
        for &(from, to) in &moves.steps {
            let moved = table[&from];
            table.insert(to, moved);
        }
        for (target, source) in (FIRST_PASSED..).zip(sources) {
            assert_eq!(table[&target], *source, "{sources:?}: {moves:?}");
        }
    }

    #[test]
    fn every_descriptor_gets_to_its_place() {
        check(&[]);
        check(&[3, 4, 5]);
        check(&[4, 5, 6]);
        check(&[5, 4, 3]);
        check(&[4, 3, 6, 5, 9]);
        check(&[4, 5, 3, 4, 4]);
        check(&[7, 7, 3, 3, 0]);
        // Every way to arrange five numbers on five places.
        for code in 0..5u32.pow(5) {
            let sources: Vec<i32> = (0..5).map(|place| (code / 5u32.pow(place) % 5) as i32 + 3).collect();
            check(&sources);
        }
        // A long cycle.
        let around: Vec<i32> = (4..300).chain([3]).collect();
        check(&around);
    }

    #[test]
    fn a_number_is_written_in_decimal() {
        for number in [0, 1, 9, 10, 4_294_967_295] {
            let mut place = [b'x'; PID_ROOM];
            // SAFETY: the array is as long as it has to be.
            unsafe { write_decimal(place.as_mut_ptr(), number) };
            let written = CStr::from_bytes_until_nul(&place).unwrap();
            assert_eq!(written.to_str().unwrap(), number.to_string());
        }
    }
}
