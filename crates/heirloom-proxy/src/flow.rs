//! One direction of a connection: bytes from a source to a sink, by splice(2) through a pipe.
//!
//! At each instant every byte is in a socket or in the pipe. A pipe is filled only when it is empty, so that an EAGAIN has one
//! meaning: of a filling, that the source has nothing; of an emptying, that the sink takes no more. A flow without bytes has
//! no pipe.
//!
//! A filling takes all that a TCP socket has, unless the pipe is full: if it cannot be, neither the EAGAIN is asked for nor the end
//! of which the poller has told. (A UNIX socket may stop earlier, at a message that had descriptors; any at an
//! [urgent byte](crate::urgent).)

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use crate::pipes::{Pipe, Pipes};
use crate::socket::Socket;
use crate::urgent;

/// How much is asked for at once; a pipe takes less.
const MOST: usize = 1 << 20;
/// How often a pipe is filled in one turn, so that one connection cannot hold up the others.
const ROUNDS: usize = 16;

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Flow {
    /// While it holds bytes.
    pub(crate) pipe: Option<Pipe>,
    /// How many.
    pub(crate) held: usize,
    /// The source may have something.
    pub(crate) readable: bool,
    /// There may be an urgent byte in what it has.
    pub(crate) urgent: bool,
    /// It has ended behind what it has.
    pub(crate) ends: bool,
    /// It may have failed behind what it has.
    pub(crate) may_fail: bool,
    /// The sink may take something.
    pub(crate) writable: bool,
    /// The source has ended.
    pub(crate) ended: bool,
    /// All was moved, and the end is passed on, or the sink takes nothing any more: nothing is moved from now on.
    pub(crate) done: bool,
    /// The sink has gone before it had everything.
    pub(crate) lost: bool,
    /// How many bytes the sink has taken.
    pub(crate) moved: u64,
}

/// How a turn of a flow has ended.
#[derive(Debug)]
pub(crate) enum Turned {
    /// There is nothing to do before source or sink tell of something.
    Waits,
    /// The sink has everything, and is to hear the end now.
    Ended,
    /// There may be more to do; others have their turn first.
    More,
    /// No pipe was to be had.
    NoPipe,
    /// The source has failed, after all that came before was passed on.
    SourceFailed,
}

impl Flow {
    /// Moves what can be moved.
    pub(crate) fn turn(&mut self, source: &Socket, sink: &Socket, pipes: &mut Pipes) -> Turned {
        for _ in 0..ROUNDS {
            if self.done || self.waits_for_sink() {
                return Turned::Waits;
            }
            if let Some(pipe) = &self.pipe {
                // With the last bytes the end is sent, in one segment: they wait for it.
                let more = if self.ended { SpliceFlags::MORE } else { SpliceFlags::empty() };
                match splice_some(pipe.reader(), sink, self.held, more) {
                    Ok(count) if count > 0 => {
                        self.moved += count as u64;
                        self.held = self.held.saturating_sub(count);
                        if self.held == 0 {
                            self.pipe.take().into_iter().for_each(|pipe| pipes.give(pipe));
                        }
                    }
                    Err(Errno::AGAIN) => {
                        self.writable = false;
                        return Turned::Waits;
                    }
                    Err(Errno::INTR) => {}
                    Ok(_) | Err(_) => self.lose(pipes),
                }
                continue;
            }
            if self.ended {
                self.done = true;
                return Turned::Ended;
            }
            if !self.readable {
                return Turned::Waits;
            }
            let Some(pipe) = pipes.take() else { return Turned::NoPipe };
            match splice_some(source, pipe.writer(), MOST, SpliceFlags::empty()) {
                Ok(count) if count > 0 => {
                    // What comes from now on is told: no need to ask whether there is more.
                    let may_stop_earlier = !source.is_tcp() || self.urgent || self.may_fail;
                    if pipe.has_room_beside(count) && !may_stop_earlier {
                        (self.readable, self.ended) = (false, self.ends);
                    }
                    (self.pipe, self.held) = (Some(pipe), count);
                }
                Ok(_) => {
                    pipes.give(pipe);
                    if source.is_tcp() && self.pass_on_urgent(source, sink, pipes) {
                        continue;
                    }
                    (self.readable, self.ended) = (false, true);
                }
                Err(Errno::AGAIN) => {
                    pipes.give(pipe);
                    if self.urgent && self.pass_on_urgent(source, sink, pipes) {
                        continue;
                    }
                    (self.readable, self.urgent, self.may_fail) = (false, false, false);
                    return Turned::Waits;
                }
                Err(error) => {
                    pipes.give(pipe);
                    if error != Errno::INTR {
                        (self.readable, self.ended) = (false, true);
                        return Turned::SourceFailed;
                    }
                }
            }
        }
        Turned::More
    }

    /// Whether there is something for the sink, which takes no more for now.
    pub(crate) fn waits_for_sink(&self) -> bool {
        !self.writable && (self.pipe.is_some() || self.urgent)
    }

    /// Passes on the next byte by itself if it is urgent. Whether it is, and has to be before all others.
    fn pass_on_urgent(&mut self, source: &Socket, sink: &Socket, pipes: &mut Pipes) -> bool {
        match urgent::pass_on(source, sink) {
            Ok(passed) => {
                self.moved += u64::from(passed);
                return passed;
            }
            Err(Errno::AGAIN) => (self.urgent, self.writable) = (true, false),
            Err(Errno::INTR) => {}
            Err(_) => self.lose(pipes),
        }
        true
    }

    /// The sink takes nothing any more.
    fn lose(&mut self, pipes: &mut Pipes) {
        (self.done, self.lost) = (true, true);
        self.drop_pipe(pipes);
    }

    /// Lets go of the pipe, with what is in it.
    pub(crate) fn drop_pipe(&mut self, pipes: &mut Pipes) {
        self.held = 0;
        self.pipe.take().into_iter().for_each(|pipe| pipes.discard(pipe));
    }
}

fn splice_some(from: impl AsFd, to: impl AsFd, most: usize, flags: SpliceFlags) -> Result<usize, Errno> {
    splice(from, None, to, None, most, flags | SpliceFlags::MOVE | SpliceFlags::NONBLOCK)
}
