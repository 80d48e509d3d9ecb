//! What an incumbent does about an aborted successor that does not let go of the service lock.

/// What an incumbent does when it wants to resume, and the successor of the aborted takeover may hold the service lock.
///
/// That successor cannot serve any more: its `Taken` is refused. But while it lives and holds the lock, nobody may serve. It lets
/// go as soon as it runs; it may be stopped (SIGSTOP, a debugger) or hang. All policies leave it
/// [`Times::fence`](super::Times::fence) to let go, try the lock all the while, and resume as soon as they have it, or the successor has
/// exited and nobody else has it.
///
/// ```
/// use heirloom::Config;
/// use heirloom::protocol::Fencing;
///
/// // Under a debugger, for instance.
/// let config = Config { fencing: Fencing::Wait, ..Config::default() };
/// assert_eq!(Config::default().fencing, Fencing::Kill);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fencing {
    /// Kill it, by its pidfd. Where that cannot be (the kernel has no pidfd of it; it is another user's, or in a pid namespace that
    /// the incumbent cannot see into: `pidfd_send_signal(2)`), wait.
    #[default]
    Kill,
    /// Wait, however long it takes, for somebody to continue it or to end it. Clients wait too.
    Wait,
    /// Give up: the incumbent ends as if a third process had the lock, for a supervisor to sort it out. Its connections end.
    GiveUp,
}
