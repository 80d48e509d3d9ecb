//! The systemd journal as a log: each line with its fields, in the journal's own protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL>).
//!
//! What a line on stderr would say is the entry's `MESSAGE`; what it says in fields is there once more, to be searched for:
//! `generation` as `GENERATION`. A journal that does not read stalls the program as little as a stderr that nobody reads: a
//! tenth of a second a line at most, and then the line is lost.

use std::fmt::{self, Write};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::PATIENCE;

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// What lines are called there.
const IDENTIFIER: &str = "heirloom";
/// The variable that says which file is a stream to the journal (systemd.exec(5)).
pub(super) const STREAM_VARIABLE: &str = "JOURNAL_STREAM";

/// Fields that mean something to the journal (systemd.journal-fields(7)), or that this log sets itself. One of ours that is
/// called so gets another name.
const TAKEN: [&str; 15] = [
    "MESSAGE",
    "MESSAGE_ID",
    "PRIORITY",
    "CODE_FILE",
    "CODE_LINE",
    "CODE_FUNC",
    "ERRNO",
    "INVOCATION_ID",
    "USER_INVOCATION_ID",
    "DOCUMENTATION",
    "TID",
    "UNIT",
    "USER_UNIT",
    "OBJECT_PID",
    "TARGET",
];

/// Whether this file is a stream to the journal, by the variable's value: it is `DEVICE:INODE`.
pub(super) fn is_stream(variable: Option<&str>, file: impl AsFd) -> bool {
    let named = || {
        let (device, inode) = variable?.split_once(':')?;
        Some((device.parse::<u64>().ok()?, inode.parse::<u64>().ok()?))
    };
    let is = || fstat(file).ok().map(|file| (file.st_dev, file.st_ino));
    named().is_some_and(|named| is() == Some(named))
}

/// See the [module](self).
pub(super) struct Journal {
    socket: UnixDatagram,
}

impl Journal {
    /// The journal of this system.
    pub(super) fn connect() -> io::Result<Journal> {
        Journal::at(SOCKET.as_ref())
    }

    fn at(path: &Path) -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        Ok(Journal { socket })
    }

    /// Sends an entry, or loses it, as on a stderr that is closed.
    fn write(&self, entry: &[u8]) {
        if let Err(Errno::MSGSIZE | Errno::NOBUFS) = self.send(entry, None)
            // What is too long for a datagram travels in a file that cannot change any more.
            && let Ok(file) = sealed(entry)
        {
            let _ = self.send(&[], Some(file.as_fd()));
        }
    }

    fn send(&self, entry: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if file.is_some() {
                control.push(SendAncillaryMessage::ScmRights(file.as_slice()));
            }
            // A file goes without any bytes: that is how the journal knows it.
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            sendmsg(&self.socket, &[IoSlice::new(entry)], &mut control, flags).map(drop)
        };
        match send() {
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&PATIENCE));
                send()
            }
            sent => sent,
        }
    }
}

fn sealed(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create("heirloom-log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    io::Write::write_all(&mut &file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(file)
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut entry = Entry::new(event.metadata());
        event.record(&mut entry);
        self.write(&entry.finish());
    }
}

/// A line as it becomes an entry.
struct Entry {
    bytes: Vec<u8>,
    message: String,
    /// The fields, as a line on stderr has them.
    fields: String,
}

impl Entry {
    fn new(metadata: &Metadata<'_>) -> Entry {
        let mut entry = Entry { bytes: Vec::new(), message: String::new(), fields: String::new() };
        entry.put("PRIORITY", priority(*metadata.level()));
        entry.put("SYSLOG_IDENTIFIER", IDENTIFIER);
        entry.put("TARGET", metadata.target());
        entry
    }

    fn put(&mut self, name: &str, value: &str) {
        self.bytes.extend_from_slice(name.as_bytes());
        if value.contains('\n') {
            self.bytes.push(b'\n');
            self.bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            self.bytes.push(b'=');
        }
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(b'\n');
    }

    /// A field whose value is shown in one way, and stored in another.
    fn record(&mut self, field: &Field, shown: fmt::Arguments<'_>, stored: &str) {
        if field.name() == "message" {
            self.message = stored.into();
            return;
        }
        // Writing to a string does not fail.
        let _ = write!(self.fields, " {}={shown}", field.name());
        self.put(&name(field.name()), stored);
    }

    fn finish(mut self) -> Vec<u8> {
        let message = mem::take(&mut self.message) + &self.fields;
        self.put("MESSAGE", &message);
        self.bytes
    }
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        self.record(field, format_args!("{value}"), &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record(field, format_args!("{value:?}"), value);
    }
}

/// As syslog counts: the smaller, the graver.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// What a field is called in the journal: capital letters, digits and underscores, the first of which is a letter.
fn name(field: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let name: String =
        field.chars().map(|c| if is_plain(c) { c.to_ascii_uppercase() } else { '_' }).collect();
    let is_taken = TAKEN.contains(&name.as_str()) || name.starts_with("SYSLOG_");
    if is_taken || !name.starts_with(|c: char| c.is_ascii_uppercase()) {
        format!("HEIRLOOM_{name}")
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};

    use heirloom::descriptors::{Wait, receive_with};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// A journal of the test's own, and what was logged.
    struct Daemon {
        socket: UnixDatagram,
        directory: tempfile::TempDir,
    }

    impl Daemon {
        fn start() -> Daemon {
            let directory = tempfile::tempdir().unwrap();
            let socket = UnixDatagram::bind(directory.path().join("socket")).unwrap();
            Daemon { socket, directory }
        }

        fn log(&self, lines: impl FnOnce()) {
            let journal = Journal::at(&self.directory.path().join("socket")).unwrap();
            tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), lines);
        }

        fn entry(&self) -> BTreeMap<String, String> {
            let mut buffer = vec![0; 256 * 1024];
            let received = receive_with(&self.socket, &mut buffer, Wait::DontWait).unwrap();
            match received.descriptors.into_iter().next() {
                Some(file) => {
                    let mut bytes =
                        vec![0; File::from(file.try_clone().unwrap()).metadata().unwrap().len() as usize];
                    rustix::io::pread(&file, &mut bytes, 0).unwrap();
                    parse(&bytes)
                }
                None => parse(&buffer[..received.bytes]),
            }
        }
    }

    /// As the protocol says.
    fn parse(mut bytes: &[u8]) -> BTreeMap<String, String> {
        let mut entry = BTreeMap::new();
        while !bytes.is_empty() {
            let end = bytes.iter().position(|byte| [b'=', b'\n'].contains(byte)).unwrap();
            let (name, is_long) = (&bytes[..end], bytes[end] == b'\n');
            bytes = &bytes[end + 1..];
            let length = if is_long {
                let (length, rest) = bytes.split_first_chunk().unwrap();
                bytes = rest;
                u64::from_le_bytes(*length) as usize
            } else {
                bytes.iter().position(|byte| *byte == b'\n').unwrap()
            };
            let text = |bytes: &[u8]| String::from_utf8(bytes.into()).unwrap();
            assert_eq!(entry.insert(text(name), text(&bytes[..length])), None, "twice");
            assert_eq!(bytes[length], b'\n');
            bytes = &bytes[length + 1..];
        }
        entry
    }

    #[test]
    fn a_line_is_an_entry_with_its_fields() {
        let daemon = Daemon::start();
        daemon.log(|| {
            let nobody: Option<u32> = None;
            tracing::warn!(successor = %"pid 7 (uid 0)", peer_pid = 7, nobody, reason = "a \"b\"", "takeover {}", "ended");
            tracing::info!("two\nlines");
        });
        let entry = daemon.entry();
        let expected = [
            ("MESSAGE", r#"takeover ended successor=pid 7 (uid 0) peer_pid=7 reason="a \"b\"""#),
            ("PEER_PID", "7"),
            ("PRIORITY", "4"),
            ("REASON", r#"a "b""#),
            ("SUCCESSOR", "pid 7 (uid 0)"),
            ("SYSLOG_IDENTIFIER", "heirloom"),
            ("TARGET", module_path!()),
        ];
        assert_eq!(entry, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        let entry = daemon.entry();
        assert_eq!((entry["MESSAGE"].as_str(), entry["PRIORITY"].as_str()), ("two\nlines", "6"));
    }

    #[test]
    fn fields_do_not_pass_for_the_journals_own() {
        for (field, expected) in [
            ("generation", "GENERATION"),
            ("priority", "HEIRLOOM_PRIORITY"),
            ("syslog_pid", "HEIRLOOM_SYSLOG_PID"),
            ("_pid", "HEIRLOOM__PID"),
            ("a.b-c", "A_B_C"),
            ("7", "HEIRLOOM_7"),
            ("ü", "HEIRLOOM__"),
        ] {
            assert_eq!(name(field), expected);
        }
    }

    #[test]
    fn what_is_too_long_for_a_datagram_arrives() {
        let daemon = Daemon::start();
        let long = "x".repeat(3 << 20);
        daemon.log(|| tracing::error!("{long}"));
        let entry = daemon.entry();
        assert!(entry["MESSAGE"] == long);
        assert_eq!(entry["PRIORITY"], "3");
    }

    #[test]
    fn a_journal_that_does_not_read_costs_lines_and_little_time() {
        let daemon = Daemon::start();
        let journal = Journal::at(&daemon.directory.path().join("socket")).unwrap();
        while journal.send(b"MESSAGE=full\n", None).is_ok() {}
        let started = Instant::now();
        journal.write(b"MESSAGE=lost\n");
        drop(daemon);
        journal.write(b"MESSAGE=nobody reads this\n");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_stream_is_known_by_its_device_and_inode() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let (device, inode) = (metadata.dev(), metadata.ino());
        assert!(is_stream(Some(&format!("{device}:{inode}")), &file));
        let other = format!("{device}:{}", inode + 1);
        let wrong = [format!("{inode}:{device}"), format!("{device}:{inode}:"), format!(" {device}:{inode}")];
        for value in wrong.iter().map(String::as_str).chain([other.as_str(), "", ":", "8", "-1:2"]) {
            assert!(!is_stream(Some(value), &file), "{value:?}");
        }
        assert!(!is_stream(None, &file));
    }
}
