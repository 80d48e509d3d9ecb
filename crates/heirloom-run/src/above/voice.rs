//! Speaking to the supervisor above: in order, and never waiting.
//!
//! What its queue does not take waits here, with duplicates of the descriptors that go along. A supervisor that is gone is said
//! once in the log; what was to be said to it is dropped.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use heirloom::notify::{Message, Notifier, NotifyError};

/// The voice.
#[derive(Debug)]
pub(crate) struct Voice {
    notifier: Notifier,
    waiting: VecDeque<(u64, Message, Vec<OwnedFd>)>,
    next: u64,
    lost: Vec<u64>,
    full_said: bool,
    gone_said: bool,
}

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is the supervisor's, whatever becomes of this process.
    Said,
    Waits,
    Lost,
}

impl Voice {
    /// The way to the supervisor of this process, if it has one that can be reached.
    pub(crate) fn from_environment() -> Option<Voice> {
        match Notifier::from_environment() {
            Ok(notifier) => notifier.map(Voice::new),
            Err(error) => {
                tracing::warn!("goes on without its supervisor: {error}");
                None
            }
        }
    }

    pub(crate) fn new(notifier: Notifier) -> Voice {
        Voice {
            notifier,
            waiting: VecDeque::new(),
            next: 0,
            lost: Vec::new(),
            full_said: false,
            gone_said: false,
        }
    }

    /// Says something, now or when it can be; gives a number by which to ask for its fate.
    pub(crate) fn say(&mut self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> u64 {
        let number = self.next;
        self.next += 1;
        self.flush();
        if self.waiting.is_empty() {
            match self.send(message, descriptors) {
                Ok(()) => return number,
                Err(NotifyError::Full) => {
                    if !std::mem::replace(&mut self.full_said, true) {
                        tracing::warn!(
                            "the supervisor does not read what it is told: it is told when it does"
                        );
                    }
                }
                Err(error) => {
                    self.lose(number, !descriptors.is_empty(), &error);
                    return number;
                }
            }
        }
        match descriptors.iter().map(|descriptor| descriptor.try_clone_to_owned()).collect() {
            Ok(duplicates) => self.waiting.push_back((number, message.clone(), duplicates)),
            Err(error) => self.lose(number, true, &error.into()),
        }
        number
    }

    /// Sends once more over a new way if the old one leads nowhere: a supervisor may have begun anew.
    fn send(&mut self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<(), NotifyError> {
        match self.notifier.send_with(message, descriptors) {
            Err(NotifyError::Io(_)) => {
                let address = self.notifier.address().to_owned();
                let notifier = Notifier::to(&address)?;
                notifier.send_with(message, descriptors)?;
                // The descriptor that is waited for stays what it was: nothing waits while the new one is used.
                Ok(())
            }
            sent => sent,
        }
    }

    fn lose(&mut self, number: u64, asked_for: bool, error: &NotifyError) {
        if asked_for {
            self.lost.push(number);
        }
        if !std::mem::replace(&mut self.gone_said, true) {
            tracing::warn!("{error}; goes on without");
        }
    }

    /// Says what waits, as far as it can be.
    pub(crate) fn flush(&mut self) {
        while let Some((number, message, descriptors)) = self.waiting.pop_front() {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match self.send(&message, &borrowed) {
                Ok(()) => {}
                Err(NotifyError::Full) => {
                    self.waiting.push_front((number, message, descriptors));
                    return;
                }
                Err(error) => self.lose(number, !descriptors.is_empty(), &error),
            }
        }
    }

    /// Whether nothing waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What has become of a message with descriptors.
    pub(crate) fn fate(&self, number: u64) -> Fate {
        if self.lost.contains(&number) {
            Fate::Lost
        } else if self.waiting.iter().any(|(waits, ..)| *waits == number) {
            Fate::Waits
        } else {
            Fate::Said
        }
    }
}

impl AsFd for Voice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}
