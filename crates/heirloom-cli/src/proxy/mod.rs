//! The command `heirloom proxy`: a relay that can be replaced, or configured anew, with every connection established.

mod args;
mod check;
pub(crate) mod report;
mod serve;
mod server;

use crate::control::{LOCK, RUNTIME_DIRECTORY};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;

pub(crate) use args::Args;

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Accepts connections at the addresses of --listen, and passes each on to one of the backends of --to, byte for byte in both \
directions; or does what a configuration file says, which can have any number of listeners and pools of backends. A proxy that \
is started with the same control socket takes over all listeners and connections, with the bytes that are on their way, and the \
old one ends with status 0. Neither clients nor backends notice.

An ADDR is HOST:PORT, [IPv6]:PORT or unix:/PATH; to listen also :PORT, which is all addresses of this machine. Port 0 is any \
that is free; the log says which. A host name is looked up when the proxy starts or is reloaded.

A new configuration holds for new connections. Those that are established stay with their backend even if it is not in the \
configuration any more, until they end or the time of --drain is over. A configuration with something wrong in it, or \
with an address that cannot be had, changes nothing: the old process serves on, and the log says why.

The file is in TOML. In it are the keys threads, pin_threads, max_connections and drain; [access_log] with path and format; for each listener \
[[listener]] with listen and either to (a list) or pool (a name), and name, idle_timeout, max_connections, keepalive, nodelay, \
backlog and mode; and for each pool [pool.NAME] with backends, a list of addresses or of { address, name, max_connections }, \
and balance, connect_timeout, retries, keepalive and nodelay. A key that is not known is an error. --check says what a file means.

When a limit on connections is reached, no more are accepted: clients wait.",
    exits: Exit::ALL,
    signals: &[
        (
            "SIGHUP, SIGUSR2",
            "Starts the program and the configuration as they are now on disk, which take over, as heirloom-upgrade(1) without options does. If \
             that fails, the log says why, and the proxy goes on.",
        ),
        ("SIGTERM, SIGINT", "Ends the proxy and its connections, with status 0."),
    ],
    files: &[
        (
            "$XDG_RUNTIME_DIR/heirloom/NAME.sock",
            "The control socket. Without --name, NAME is proxy- and the first address of --listen (with - for each / in it), or the name of the \
             configuration file without its ending: proxy-web for /etc/heirloom/web.toml. The process that ends without a successor \
             removes it.",
        ),
        LOCK,
    ],
    environment: &[RUNTIME_DIRECTORY],
    examples: &[
        (
            "heirloom proxy --listen :8080 --to 127.0.0.1:9001,127.0.0.1:9002",
            "Spreads what connects to port 8080 over two backends. Started again with other backends, takes over from itself.",
        ),
        (
            "heirloom proxy --listen 127.0.0.1:5432 --to unix:/run/app.sock --access-log -",
            "Makes a UNIX socket reachable over TCP, and writes to stdout a line for each connection that has ended.",
        ),
        ("heirloom proxy --check /etc/heirloom/web.toml", "Says what a configuration means, or what is wrong with it."),
        ("heirloom proxy --config /etc/heirloom/web.toml", "Does what it says."),
        ("heirloom upgrade --name proxy-web", "Reloads that configuration, with the program as it is now on disk."),
    ],
    see_also: &["heirloom-status(1)", "heirloom-upgrade(1)", "heirloom-quit(1)"],
};

/// `heirloom proxy`.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    if let Some(file) = args.check() {
        return check::run(file);
    }
    serve::serve(&args)
}
