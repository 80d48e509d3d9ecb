//! What a supervisor is told, who is the test.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::wait_for;

/// Everything that a supervisor is told. It keeps no descriptors.
pub(crate) struct Supervisor {
    messages: Arc<Mutex<Vec<String>>>,
}

impl Supervisor {
    pub(crate) fn at(path: &Path) -> Supervisor {
        let socket = UnixDatagram::bind(path).expect("bind");
        let messages = Arc::<Mutex<Vec<String>>>::default();
        let told = messages.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 1000];
            // Without room for descriptors: those that come along are closed.
            while let Ok(count) = socket.recv(&mut buffer) {
                let message = String::from_utf8_lossy(&buffer[..count]).into_owned();
                told.lock().expect("no panic").push(message);
            }
        });
        Supervisor { messages }
    }

    /// How often it was told exactly this.
    pub(crate) fn count(&self, message: &str) -> usize {
        self.messages.lock().expect("no panic").iter().filter(|told| *told == message).count()
    }

    /// All that it was told, one after the other.
    pub(crate) fn all(&self) -> String {
        self.messages.lock().expect("no panic").concat()
    }

    fn but_for_the_watchdog(&self) -> String {
        self.all().replace("WATCHDOG=1\n", "")
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, message: &str, count: usize) {
        let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_for(message, || self.count(message) >= count);
        }));
        assert!(waited.is_ok(), "no {message:?} in\n{}", self.but_for_the_watchdog());
    }

    /// Waits until it was told something with this in it.
    #[track_caller]
    pub(crate) fn wait_for_part(&self, part: &str) {
        let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_for(part, || self.all().contains(part));
        }));
        assert!(waited.is_ok(), "no {part:?} in\n{}", self.but_for_the_watchdog());
    }
}
