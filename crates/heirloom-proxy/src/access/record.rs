//! What is said of a connection that has ended, for people and as JSON.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

use crate::config::AccessFormat;

/// The last moment that has a year of four digits, in milliseconds.
const LAST_MOMENT: u64 = 253_402_300_799_999;

/// A connection that has ended.
///
/// ```
/// use std::time::Duration;
/// use heirloom_proxy::access::{AccessRecord, End};
/// use heirloom_proxy::config::AccessFormat;
///
/// let record = AccessRecord {
///     unix_ms: 1_764_332_416_123,
///     client: "127.0.0.1:40000".into(),
///     listener: "web".into(),
///     backend: Some("127.0.0.1:9001".into()),
///     end: End::Closed,
///     from_client: 120,
///     from_backend: 5_000,
///     connect: Some(Duration::from_micros(312)),
///     duration: Duration::from_millis(1_500),
/// };
/// assert_eq!(
///     record.line(AccessFormat::Text),
///     "2025-11-28T12:20:16.123Z 127.0.0.1:40000 web 127.0.0.1:9001 closed \
///      from_client=120 from_backend=5000 connect_ms=0.312 duration_ms=1500.000\n"
/// );
/// assert!(record.line(AccessFormat::Json).contains(r#""end":"closed","from_client":120,"#));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRecord {
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The client's address; `-` where it has none, as those of UNIX sockets.
    pub client: String,
    /// The name of the listener that accepted it.
    pub listener: Arc<str>,
    /// The name of the backend that it was passed on to; `None`: of none.
    pub backend: Option<Arc<str>>,
    /// How it ended.
    pub end: End,
    /// How many bytes came from the client.
    pub from_client: u64,
    /// How many bytes came from the backend.
    pub from_backend: u64,
    /// How long it took until the backend had accepted; `None`: none did.
    pub connect: Option<Duration>,
    /// How long it was there.
    pub duration: Duration,
}

/// How a connection ended.
///
/// ```
/// assert_eq!(heirloom_proxy::access::End::BackendReset.to_string(), "backend-reset");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// Both sides were done.
    Closed,
    /// The client reset it, or could not be reached any more.
    ClientReset,
    /// The backend reset it, or could not be reached any more.
    BackendReset,
    /// Nobody sent anything for the idle timeout.
    Idle,
    /// Its backend had left the configuration, and the drain time was over.
    Drained,
    /// No backend accepted it.
    Refused,
    /// The proxy was stopped.
    Stopped,
}

impl End {
    /// The word for it in the log.
    pub fn word(self) -> &'static str {
        match self {
            End::Closed => "closed",
            End::ClientReset => "client-reset",
            End::BackendReset => "backend-reset",
            End::Idle => "idle",
            End::Drained => "drained",
            End::Refused => "refused",
            End::Stopped => "stopped",
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl AccessRecord {
    /// Its line in the log, with the newline.
    pub fn line(&self, format: AccessFormat) -> String {
        let mut line = Vec::new();
        self.append_line(format, &mut line);
        String::from_utf8_lossy(&line).into_owned()
    }

    /// Appends its line.
    pub(super) fn append_line(&self, format: AccessFormat, to: &mut Vec<u8>) {
        // Neither fails: there is always room in memory.
        let _ = match format {
            AccessFormat::Text => writeln!(to, "{}", Text(self)),
            AccessFormat::Json => serde_json::to_writer(&mut *to, &Json::from(self))
                .map(|()| to.push(b'\n'))
                .map_err(Into::into),
        };
    }

    fn time(&self) -> humantime::Rfc3339Timestamp {
        let time: SystemTime = UNIX_EPOCH + Duration::from_millis(self.unix_ms.min(LAST_MOMENT));
        humantime::format_rfc3339_millis(time)
    }
}

/// As a line of text: five words, then numbers with their names.
struct Text<'a>(&'a AccessRecord);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = self.0;
        let backend = record.backend.as_deref().unwrap_or("-");
        write!(f, "{} {} {}", record.time(), Word(&record.client), Word(&record.listener))?;
        write!(f, " {} {}", Word(backend), record.end)?;
        write!(f, " from_client={} from_backend={}", record.from_client, record.from_backend)?;
        match record.connect {
            Some(time) => write!(f, " connect_ms={:.3}", milliseconds(time))?,
            None => write!(f, " connect_ms=-")?,
        }
        write!(f, " duration_ms={:.3}", milliseconds(record.duration))
    }
}

/// A text that is one word of its line, in quotes if it has to be.
struct Word<'a>(&'a str);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |letter: char| !letter.is_whitespace() && !letter.is_control() && letter != '"';
        if !self.0.is_empty() && self.0.chars().all(plain) {
            f.write_str(self.0)
        } else {
            write!(f, "{:?}", self.0)
        }
    }
}

/// As a JSON object.
#[derive(Serialize)]
struct Json<'a> {
    #[serde(serialize_with = "as_text")]
    time: humantime::Rfc3339Timestamp,
    client: &'a str,
    listener: &'a str,
    backend: Option<&'a str>,
    end: End,
    from_client: u64,
    from_backend: u64,
    connect_ms: Option<f64>,
    duration_ms: f64,
}

impl<'a> From<&'a AccessRecord> for Json<'a> {
    fn from(record: &'a AccessRecord) -> Json<'a> {
        Json {
            time: record.time(),
            client: &record.client,
            listener: &record.listener,
            backend: record.backend.as_deref(),
            end: record.end,
            from_client: record.from_client,
            from_backend: record.from_backend,
            connect_ms: record.connect.map(milliseconds),
            duration_ms: milliseconds(record.duration),
        }
    }
}

fn as_text<S: Serializer>(time: &humantime::Rfc3339Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [End; 7] = {
        use End::*;
        [Closed, ClientReset, BackendReset, Idle, Drained, Refused, Stopped]
    };

    fn record() -> AccessRecord {
        AccessRecord {
            unix_ms: 0,
            client: "[::1]:1".into(),
            listener: "the \"web\"".into(),
            backend: None,
            end: End::Refused,
            from_client: 0,
            from_backend: u64::MAX,
            connect: None,
            duration: Duration::from_nanos(1_234_567),
        }
    }

    #[test]
    fn a_line_of_text_has_five_words_and_four_numbers() {
        assert_eq!(
            record().line(AccessFormat::Text),
            "1970-01-01T00:00:00.000Z [::1]:1 \"the \\\"web\\\"\" - refused \
             from_client=0 from_backend=18446744073709551615 connect_ms=- duration_ms=1.234\n"
        );
        let odd = AccessRecord { client: String::new(), listener: "a\nb".into(), ..record() };
        assert!(odd.line(AccessFormat::Text).contains("Z \"\" \"a\\nb\" - refused "));
    }

    #[test]
    fn a_line_of_json_says_the_same() {
        assert_eq!(
            record().line(AccessFormat::Json),
            "{\"time\":\"1970-01-01T00:00:00.000Z\",\"client\":\"[::1]:1\",\"listener\":\"the \\\"web\\\"\",\"backend\":null,\
             \"end\":\"refused\",\"from_client\":0,\"from_backend\":18446744073709551615,\"connect_ms\":null,\"duration_ms\":1.234}\n"
        );
        let passed_on =
            AccessRecord { backend: Some("b".into()), connect: Some(Duration::from_millis(2)), ..record() };
        let line = passed_on.line(AccessFormat::Json);
        assert!(line.contains("\"backend\":\"b\"") && line.contains("\"connect_ms\":2.0"), "{line}");
    }

    #[test]
    fn every_end_has_one_word_in_both_formats() {
        for end in ALL {
            assert_eq!(serde_json::to_string(&end).unwrap(), format!("\"{end}\""));
        }
    }

    #[test]
    fn the_documentation_shows_these_lines_and_words() {
        let page = include_str!("../../../../docs/proxy.md");
        let shown = AccessRecord {
            unix_ms: 1_795_868_416_123,
            client: "127.0.0.1:40000".into(),
            listener: "web".into(),
            backend: Some("small".into()),
            end: End::Closed,
            from_client: 120,
            from_backend: 5_000,
            connect: Some(Duration::from_micros(312)),
            duration: Duration::from_millis(1_500),
        };
        for format in [AccessFormat::Text, AccessFormat::Json] {
            assert!(page.contains(&shown.line(format)), "{}", shown.line(format));
        }
        let (_, ends) = page.split_once("| `end` | meaning |\n|---|---|\n").unwrap();
        let ends: String = ends.lines().take_while(|line| line.starts_with('|')).collect();
        for end in ALL {
            assert!(ends.contains(&format!("`{end}`")), "{end}");
        }
    }

    #[test]
    fn no_moment_is_too_far() {
        let far = AccessRecord { unix_ms: u64::MAX, duration: Duration::MAX, ..record() };
        assert!(far.line(AccessFormat::Text).starts_with("9999-12-31T23:59:59.999Z "));
        assert!(far.line(AccessFormat::Json).starts_with("{\"time\":\"9999-12-31T23:59:59.999Z\","));
    }
}
