//! The blocking front end: threads that wait for one descriptor at a time, and can all be stopped for a freeze.
//!
//! A thread blocked in read(2) would swallow bytes after a freeze. So a thread waits in poll(2), for its descriptor
//! and for the gate, and reads with MSG_DONTWAIT (or after poll has said that there is something). [`Gate::freeze`]
//! returns when every thread stands at the gate: then nothing is touched any more.
//!
//! The invariant: between the return of [`Gate::freeze`] and [`Gate::thaw`], no [`Worker`] has a [`Pass`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::incumbent::Incumbent;

/// Waits until one of these descriptors is ready, as poll(2) does, or the incumbent wants its turn.
///
/// For a program with one thread: true means that [`Incumbent::turn`] is due. `fds` have their `revents` set.
///
/// # Errors
///
/// Those of poll(2), except EINTR, which ends the wait early.
///
/// ```no_run
/// # fn f(incumbent: &heirloom::Incumbent, socket: &std::net::TcpStream) -> std::io::Result<()> {
/// use rustix::event::{PollFd, PollFlags};
///
/// let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
/// if heirloom::runtime::blocking::wait(incumbent, &mut fds, None)? {
///     // incumbent.turn(…) until it is idle
/// }
/// # Ok(()) }
/// ```
pub fn wait<'f, A>(
    incumbent: &'f Incumbent<A>,
    fds: &mut Vec<PollFd<'f>>,
    deadline: Option<Instant>,
) -> io::Result<bool> {
    let at = [deadline, incumbent.deadline()].into_iter().flatten().min();
    fds.push(PollFd::new(incumbent, PollFlags::IN));
    let waited = wait_until(fds, at);
    let due = fds.pop().is_some_and(|fd| !fd.revents().is_empty());
    waited?;
    Ok(due || incumbent.deadline().is_some_and(|at| at <= Instant::now()))
}

/// Stops all the threads of a program for a freeze.
///
/// ```
/// use heirloom::runtime::blocking::Gate;
/// use std::io::Read;
/// use std::time::{Duration, Instant};
///
/// # fn main() -> std::io::Result<()> {
/// let (mut reader, writer) = std::io::pipe()?;
/// let gate = Gate::new()?;
/// let worker = gate.worker();
/// let thread = std::thread::spawn(move || -> std::io::Result<()> {
///     while let Some(pass) = worker.wait_readable(&reader)? {
///         let n = reader.read(&mut [0; 64])?;
///         drop(pass); // before the next wait, at the latest
///         if n == 0 {
///             break;
///         }
///     }
///     Ok(())
/// });
/// assert!(gate.freeze(Instant::now() + Duration::from_secs(5))?);
/// // Nothing is read now. Hand over, or:
/// gate.thaw()?;
/// drop(writer);
/// thread.join().expect("the worker ends")?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Readable while the gate is shut; every worker polls it.
    shut: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    shut: bool,
    ended: bool,
    /// How many workers have a pass, or are on their way to one.
    inside: usize,
}

impl Gate {
    /// An open gate.
    ///
    /// # Errors
    ///
    /// No descriptor is left for the eventfd(2).
    pub fn new() -> io::Result<Gate> {
        let shut = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Gate { shared: Arc::new(Shared { shut, state: Mutex::default(), changed: Condvar::new() }) })
    }

    /// The way through this gate for one thread.
    pub fn worker(&self) -> Worker {
        Worker { shared: self.shared.clone() }
    }

    /// Shuts the gate, and waits until no thread has a pass. False: some thread has not come back by the deadline; the
    /// gate is open again.
    ///
    /// # Errors
    ///
    /// Those of write(2) to an eventfd.
    pub fn freeze(&self, deadline: Instant) -> io::Result<bool> {
        let mut state = self.shared.lock();
        if !state.shut {
            state.shut = true;
            rustix::io::write(&self.shared.shut, &1u64.to_ne_bytes())?;
        }
        while state.inside > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                drop(state);
                self.thaw()?;
                return Ok(false);
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
        Ok(true)
    }

    /// Opens the gate again: the takeover did not happen.
    ///
    /// # Errors
    ///
    /// Those of read(2) from an eventfd.
    pub fn thaw(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        if state.shut && !state.ended {
            rustix::io::read(&self.shared.shut, &mut [0u8; 8])?;
            state.shut = false;
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Sends all threads home: each [`Worker::wait_readable`] returns `None`. For after a takeover.
    pub fn end(&self) {
        let mut state = self.shared.lock();
        if !state.shut {
            state.shut = true;
            // An eventfd's counter that is already above zero is as readable as it gets.
            let _ = rustix::io::write(&self.shared.shut, &1u64.to_ne_bytes());
        }
        state.ended = true;
        self.shared.changed.notify_all();
    }
}

/// One thread's way through a [`Gate`].
///
/// ```
/// use heirloom::runtime::blocking::Gate;
///
/// let gate = Gate::new()?;
/// let worker = gate.worker();
/// let (reader, _writer) = std::io::pipe()?;
/// gate.end();
/// assert!(worker.wait_readable(&reader)?.is_none(), "it is sent home");
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

impl Worker {
    /// Waits until the descriptor is readable (or has ended, or failed) and the gate is open. `None`: the gate has
    /// ended. While the pass is held, no freeze succeeds: read what is there without blocking, and drop it.
    ///
    /// # Errors
    ///
    /// Those of poll(2).
    pub fn wait_readable(&self, descriptor: impl AsFd) -> io::Result<Option<Pass<'_>>> {
        self.wait(descriptor.as_fd(), PollFlags::IN)
    }

    /// Like [`Worker::wait_readable`], until the descriptor is writable.
    ///
    /// # Errors
    ///
    /// Those of poll(2).
    pub fn wait_writable(&self, descriptor: impl AsFd) -> io::Result<Option<Pass<'_>>> {
        self.wait(descriptor.as_fd(), PollFlags::OUT)
    }

    fn wait(&self, descriptor: BorrowedFd<'_>, flags: PollFlags) -> io::Result<Option<Pass<'_>>> {
        loop {
            let mut fds =
                [PollFd::from_borrowed_fd(descriptor, flags), PollFd::new(&self.shared.shut, PollFlags::IN)];
            wait_until(&mut fds, None)?;
            let mut state = self.shared.lock();
            while state.shut && !state.ended {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.ended {
                return Ok(None);
            }
            state.inside += 1;
            let pass = Pass { shared: &self.shared };
            drop(state);
            // What was readable before a freeze may have been read by a successor that then gave up: look again.
            let mut fds = [PollFd::from_borrowed_fd(descriptor, flags)];
            wait_until(&mut fds, Some(Instant::now()))?;
            if !fds[0].revents().is_empty() {
                return Ok(Some(pass));
            }
        }
    }
}

/// The right to touch a descriptor; while a thread holds one, no freeze succeeds. See [`Gate`].
///
/// ```
/// use heirloom::runtime::blocking::Gate;
/// use std::time::Instant;
///
/// let gate = Gate::new()?;
/// let (worker, null) = (gate.worker(), std::fs::File::open("/dev/null")?);
/// let pass = worker.wait_readable(&null)?;
/// assert!(!gate.freeze(Instant::now())?, "a thread is still reading");
/// drop(pass);
/// assert!(gate.freeze(Instant::now())?);
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct Pass<'w> {
    shared: &'w Shared,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.shared.lock().inside -= 1;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; were it to, the counters would still be true.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<()> {
    let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
    let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Threads read one stream of numbers each while it is frozen and thawed: none reads in a freeze, none is lost.
    #[test]
    fn nothing_is_read_in_a_freeze() -> io::Result<()> {
        let gate = Gate::new()?;
        let read = Arc::new(AtomicU64::new(0));
        let mut writers = Vec::new();
        let mut threads = Vec::new();
        for _ in 0..4 {
            let (mut reader, writer) = io::pipe()?;
            let (worker, read) = (gate.worker(), read.clone());
            writers.push(writer);
            threads.push(std::thread::spawn(move || -> io::Result<()> {
                while let Some(pass) = worker.wait_readable(&reader)? {
                    let n = reader.read(&mut [0; 7])?;
                    if n == 0 {
                        break;
                    }
                    read.fetch_add(n as u64, Ordering::SeqCst);
                    drop(pass);
                }
                Ok(())
            }));
        }
        let far = Duration::from_secs(30);
        for round in 0..200 {
            for writer in &mut writers {
                writer.write_all(&[1; 20])?;
            }
            assert!(gate.freeze(Instant::now() + far)?);
            let frozen = read.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(read.load(Ordering::SeqCst), frozen, "somebody read in freeze {round}");
            gate.thaw()?;
        }
        drop(writers);
        for thread in threads {
            thread.join().expect("a worker panicked")?;
        }
        assert_eq!(read.load(Ordering::SeqCst), 200 * 4 * 20);
        Ok(())
    }

    #[test]
    fn a_thread_that_does_not_come_back_fails_the_freeze_and_the_gate_reopens() -> io::Result<()> {
        let gate = Gate::new()?;
        let worker = gate.worker();
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(b"x")?;
        let pass = worker.wait_readable(&reader)?;
        assert!(!gate.freeze(Instant::now() + Duration::from_millis(10))?);
        drop(pass);
        assert!(worker.wait_readable(&reader)?.is_some());
        Ok(())
    }

    #[test]
    fn the_end_sends_every_thread_home() -> io::Result<()> {
        let gate = Gate::new()?;
        let (reader, _writer) = io::pipe()?;
        let worker = gate.worker();
        let thread = std::thread::spawn(move || worker.wait_readable(&reader).map(|pass| pass.is_none()));
        gate.end();
        assert!(thread.join().expect("no panic")?);
        Ok(())
    }
}
