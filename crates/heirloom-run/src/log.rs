//! The log of the small binary: one line on stderr for each event, and nothing that could hold up the program.

use std::fmt::{self, Write};
use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The environment variable that sets the level.
const LEVEL: &str = "HEIRLOOM_LOG";

/// Starts logging.
pub(crate) fn start() {
    let level = std::env::var(LEVEL).ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO);
    // An error means that there is a log already, which does as well.
    let _ = tracing::subscriber::set_global_default(Lines { level });
}

struct Lines {
    level: LevelFilter,
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line { text: format!("{:>5} ", event.metadata().level()), fields: String::new() };
        event.record(&mut line);
        say(&format!("{}{}\n", line.text, line.fields));
    }

    // There are no spans here.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Line {
    text: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.text, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Writes to stderr what it takes within a tenth of a second; whatever becomes of the rest.
pub(crate) fn say(text: &str) {
    const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    // A pipe that is writable takes so much without blocking (pipe(7)).
    for chunk in text.as_bytes().chunks(4096) {
        let stderr = io::stderr();
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        if !matches!(poll(&mut fds, Some(&PATIENCE)), Ok(1)) || rustix::io::write(&stderr, chunk).is_err() {
            return;
        }
    }
}
