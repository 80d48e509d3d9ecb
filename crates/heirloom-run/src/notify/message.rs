//! One datagram of sd_notify(3): assignments, one a line. Unknown ones are ignored, and of one that is repeated the first
//! counts.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

/// The longest text of a status that is kept, in bytes.
const LONGEST_TEXT: usize = 1024;

/// What a program says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    /// Hold the descriptors that come along.
    pub(crate) store: bool,
    /// Hold what has this name no longer.
    pub(crate) remove: bool,
    /// The name, whatever its bytes.
    pub(crate) name: Option<String>,
    /// Keep the descriptors even if they hang up.
    pub(crate) unpolled: bool,
    /// Close the descriptor that comes along when all before is done.
    pub(crate) barrier: bool,
    pub(crate) ready: bool,
    pub(crate) reloading: bool,
    pub(crate) stopping: bool,
    pub(crate) main_pid: Option<u32>,
    /// What it says of itself, for people.
    pub(crate) status: Option<String>,
    pub(crate) watchdog: Option<Watchdog>,
    /// How often it wants to be asked for a sign of life from now on.
    pub(crate) watchdog_every: Option<Duration>,
    /// Why it fails, as an errno.
    pub(crate) errno: Option<i32>,
    /// It asks for what is stored over the control socket, so that it is not passed to it.
    pub(crate) fetches: bool,
    /// A new one of it, started beside it, takes over at this control socket.
    pub(crate) control: Option<PathBuf>,
}

/// A sign of life, or of the opposite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watchdog {
    Alive,
    Trigger,
}

impl Message {
    pub(crate) fn parse(datagram: &[u8]) -> Message {
        let mut message = Message::default();
        let mut seen: Vec<&[u8]> = Vec::new();
        for line in datagram.split(|&byte| byte == b'\n') {
            let Some(equals) = line.iter().position(|&byte| byte == b'=') else { continue };
            let (key, value) = (&line[..equals], &line[equals + 1..]);
            if known(key) && !seen.contains(&key) {
                seen.push(key);
                message.assign(key, value);
            }
        }
        message
    }

    fn assign(&mut self, key: &[u8], value: &[u8]) {
        let yes = value == b"1";
        match key {
            b"FDSTORE" => self.store = yes,
            b"FDSTOREREMOVE" => self.remove = yes,
            b"FDNAME" => self.name = Some(text(value)),
            b"FDPOLL" => self.unpolled = value == b"0",
            b"BARRIER" => self.barrier = yes,
            b"READY" => self.ready = yes,
            b"RELOADING" => self.reloading = yes,
            b"STOPPING" => self.stopping = yes,
            b"MAINPID" => self.main_pid = number(value),
            b"STATUS" => {
                let end = value.len().min(LONGEST_TEXT);
                self.status = Some(text(&value[..end]));
            }
            b"WATCHDOG" if yes => self.watchdog = Some(Watchdog::Alive),
            b"WATCHDOG" if value == b"trigger" => self.watchdog = Some(Watchdog::Trigger),
            b"WATCHDOG_USEC" => self.watchdog_every = number(value).map(Duration::from_micros),
            b"ERRNO" => self.errno = number(value),
            b"X_HEIRLOOM_FETCH" => self.fetches = yes,
            b"X_HEIRLOOM_CONTROL" if !value.is_empty() => {
                self.control = Some(OsStr::from_bytes(value).into());
            }
            _ => {}
        }
    }
}

fn known(key: &[u8]) -> bool {
    const KEYS: [&[u8]; 15] = [
        b"FDSTORE",
        b"FDSTOREREMOVE",
        b"FDNAME",
        b"FDPOLL",
        b"BARRIER",
        b"READY",
        b"RELOADING",
        b"STOPPING",
        b"MAINPID",
        b"STATUS",
        b"WATCHDOG",
        b"WATCHDOG_USEC",
        b"ERRNO",
        b"X_HEIRLOOM_FETCH",
        b"X_HEIRLOOM_CONTROL",
    ];
    KEYS.contains(&key)
}

/// Text to be shown: what is no UTF-8, or would move a terminal's cursor, is replaced.
fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn number<T: std::str::FromStr>(value: &[u8]) -> Option<T> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn assignments_are_read() {
        let put = Message::parse(b"FDSTORE=1\nFDNAME=client 7\nFDPOLL=0\n");
        let expected =
            Message { store: true, name: Some("client 7".into()), unpolled: true, ..Message::default() };
        assert_eq!(put, expected);
        let said =
            Message::parse(b"READY=1\nSTATUS=a=b\nMAINPID=12\nWATCHDOG_USEC=2000000\nX_FOO=1\nERRNO=-5");
        assert!(said.ready && !said.store);
        assert_eq!((said.status.as_deref(), said.main_pid), (Some("a=b"), Some(12)));
        assert_eq!((said.watchdog_every, said.errno), (Some(Duration::from_secs(2)), Some(-5)));
        assert_eq!(Message::parse(b"WATCHDOG=trigger").watchdog, Some(Watchdog::Trigger));
        let ours = Message::parse(b"X_HEIRLOOM_FETCH=1\nX_HEIRLOOM_CONTROL=/run/\xff");
        assert!(ours.fetches && ours.control.is_some());
    }

    #[test]
    fn what_makes_no_sense_is_ignored() {
        for nothing in
            ["", "\n", "READY", "READY=", "READY=2", "ready=1", "MAINPID=x", "MAINPID=-1", "=1", "BARRIER=0"]
        {
            assert_eq!(Message::parse(nothing.as_bytes()), Message::default(), "{nothing:?}");
        }
        assert_eq!(Message::parse(b"READY=1\nREADY=0"), Message { ready: true, ..Message::default() });
        assert_eq!(Message::parse(b"STATUS=\x1b[2J\xff").status.unwrap(), "\u{fffd}[2J\u{fffd}");
        assert!(
            Message::parse(&[b"STATUS=".to_vec(), vec![b'x'; 9000]].concat()).status.unwrap().len()
                <= LONGEST_TEXT
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let message = Message::parse(&bytes);
            if let Some(status) = message.status {
                prop_assert!(!status.chars().any(char::is_control));
            }
        }

        #[test]
        fn lines_are_found_among_others(
            before in "[A-Z_]{0,9}=[^\n]{0,20}\n", after in "\n[^\n]{0,40}",
        ) {
            prop_assume!(!before.starts_with("FDNAME=") && !before.starts_with("FDSTORE="));
            let message = Message::parse(format!("{before}FDSTORE=1\nFDNAME=n{after}").as_bytes());
            prop_assert!(message.store);
            prop_assert_eq!(message.name.as_deref(), Some("n"));
        }
    }
}
