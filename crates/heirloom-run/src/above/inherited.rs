//! What this process was started with: pages of its vault, and sockets that are for the command.

use std::os::fd::OwnedFd;

use heirloom::store::{Activated, activated};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use super::vault::{PAGE, PROBE, page_name};

/// What was inherited.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    pub(crate) pages: Vec<StoredPage>,
    /// Sockets that somebody else holds for the command, such as systemd by a `.socket` unit.
    pub(crate) sockets: Vec<Activated>,
    /// Names of what is above by mistake.
    pub(crate) stale: Vec<String>,
}

/// A page's receiving end, as the store above had it.
#[derive(Debug)]
pub(crate) struct StoredPage {
    pub(crate) id: u64,
    pub(crate) inbox: OwnedFd,
}

impl StoredPage {
    pub(crate) fn name(&self) -> String {
        page_name(self.id)
    }
}

impl Inherited {
    pub(crate) fn take() -> std::io::Result<Inherited> {
        let mut inherited = Inherited::default();
        for activated in activated()? {
            let Activated { name, descriptor } = activated;
            let id = name.strip_prefix(PAGE).and_then(|id| id.parse().ok());
            match id {
                Some(id) if may_be_page(&descriptor) => {
                    inherited.pages.push(StoredPage { id, inbox: descriptor });
                }
                None if name.starts_with(PROBE) => inherited.stale.push(name),
                _ => inherited.sockets.push(Activated { name, descriptor }),
            }
        }
        Ok(inherited)
    }
}

fn may_be_page(descriptor: &OwnedFd) -> bool {
    socket_domain(descriptor) == Ok(AddressFamily::UNIX)
        && socket_type(descriptor) == Ok(SocketType::SEQPACKET)
}
