//! What every process of a chain does, in whichever way it hands over: it begins with as many connections or takes them over, says
//! when, and lingers when it was replaced, so that the closing of its descriptors is no part of any figure, neither of
//! the library's nor of the floor's.

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process::say;

/// How long a process that was replaced lives on.
const LINGER: Duration = Duration::from_millis(50);

/// What an incumbent says when it has been replaced.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Left {
    /// When its last turn began: the one in which it learned that the successor is ready, and stopped.
    pub(crate) frozen: u64,
}

/// What a successor says when it serves.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Came {
    /// When it was about to connect to the control socket.
    pub(crate) began: u64,
    /// When it had every descriptor, registered with its poller.
    pub(crate) registered: u64,
    /// When it had checked that they are what they should be, and could serve.
    pub(crate) checked: u64,
    /// When it had everything, the incumbent frozen.
    pub(crate) complete: u64,
    /// When it had committed.
    pub(crate) taken: u64,
    /// When its first poll returned, with a connection that has something to read.
    pub(crate) polled: u64,
}

/// How many connections go to one address: with very many the kernel takes long to find a free port.
pub(crate) const SHARE: usize = 1000;

/// The first incumbent's connections.
pub(crate) fn connections(count: usize) -> anyhow::Result<Vec<TcpStream>> {
    let listeners: Vec<TcpListener> =
        (0..count.div_ceil(SHARE)).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    say(&listeners.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>()?)?;
    let accept = |number: usize| {
        let (connection, _) = listeners[number / SHARE].accept()?;
        connection.set_nodelay(true)?;
        Ok(connection)
    };
    (0..count).map(accept).collect()
}

/// Says that this process was replaced, and lets some time pass before it ends.
pub(crate) fn leave(frozen: u64) -> anyhow::Result<()> {
    say(&Left { frozen })?;
    std::thread::sleep(LINGER);
    Ok(())
}
