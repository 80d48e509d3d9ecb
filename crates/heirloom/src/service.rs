//! What a program says of itself: the service it runs, and which states it writes and reads.

use crate::control::request::VersionRange;

/// The service that a process runs or wants to take over.
///
/// A takeover needs the same `name` on both sides: it says what is served (a role and an address), so that a
/// successor which was started for something else is refused. It also needs the incumbent's schema to be one that
/// the successor reads.
///
/// ```
/// use heirloom::Service;
///
/// let service = Service::new("echo 127.0.0.1:7").program("echod", "1.4.0").schema(3, 2..=3);
/// assert!(service.reads.contains(2));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// What is served, for instance `chat 127.0.0.1:31337`.
    pub name: String,
    /// The program's name.
    pub program: String,
    /// The program's version.
    pub version: String,
    /// The schema version of the state that this program writes.
    pub writes: u32,
    /// The schema versions that this program reads.
    pub reads: VersionRange,
}

impl Service {
    /// A service of this name, with schema version 1.
    pub fn new(name: impl Into<String>) -> Self {
        Service {
            name: name.into(),
            program: String::new(),
            version: String::new(),
            writes: 1,
            reads: VersionRange { min: 1, max: 1 },
        }
    }

    /// Names the program that runs it.
    pub fn program(mut self, program: impl Into<String>, version: impl Into<String>) -> Self {
        self.program = program.into();
        self.version = version.into();
        self
    }

    /// Declares the schema version that the program writes and those that it reads.
    pub fn schema(mut self, writes: u32, reads: std::ops::RangeInclusive<u32>) -> Self {
        self.writes = writes;
        self.reads = VersionRange { min: *reads.start(), max: *reads.end() };
        self
    }
}

/// A process in a message: its part, and the program's name and version if they are known.
pub(crate) fn named(role: &str, program: &str, version: &str) -> String {
    match format!("{program} {version}").trim() {
        "" => role.into(),
        program => format!("{role} ({program})"),
    }
}
