//! The messages of the control socket: requests and replies, each one line of JSON.
//!
//! They are serde's externally tagged enums: a message without contents is a string, `"Ping"`, and one
//! with contents is an object with one key, `{"Takeover":{…}}`. Unknown fields are ignored and later
//! additions have defaults, so that programs of different versions understand each other.

use std::fmt;

use serde::de::{self, DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::status::Status;
use crate::upgrade::{Checked, Upgrade};

/// What a client asks.
///
/// An application adds requests with an enum of its own. Its names must differ from those here, which
/// are tried first.
///
/// ```
/// use heirloom::control::{Request, RequestError};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize)]
/// enum Mine {
///     Flush,
///     Rotate { path: String },
/// }
///
/// let request = Request::<Mine>::parse(br#"{"Rotate": {"path": "/var/log/chat"}}"#)?;
/// assert_eq!(request, Request::Application(Mine::Rotate { path: "/var/log/chat".to_owned() }));
/// assert_eq!(Request::<Mine>::parse(br#""Ping""#)?, Request::Ping);
/// assert_eq!(Request::Application(Mine::Flush).to_line()?, b"\"Flush\"\n");
/// assert!(matches!(Request::<Mine>::parse(b"\"Dance\""), Err(RequestError::Unknown(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request<A = NoRequests> {
    /// Is anybody there? Answered by [`Reply::Pong`].
    Ping,
    /// Answered by [`Reply::Status`].
    Status,
    /// Stop serving and exit, once [`Reply::Bye`] is sent.
    Quit,
    /// Hand everything over to me: answered by [`Reply::Takeover`] and one end of a channel, or by an
    /// error.
    Takeover(Hello),
    /// Start a new program and hand over to it. On success the incumbent ends without an answer, and the next generation
    /// answers; a dry run is answered by [`Reply::Checked`].
    Upgrade(Upgrade),
    /// What would a takeover carry? Answered by [`Reply::Manifest`], with the base manifest as it would be sent, in a
    /// sealed memfd, beside it.
    Inspect,
    /// A request of the application's own.
    Application(A),
}

/// The requests of an application that adds none.
///
/// ```
/// use heirloom::control::{NoRequests, Request};
///
/// let request: Request<NoRequests> = Request::parse(b"\"Quit\"")?;
/// assert_eq!(request, Request::Quit);
/// # Ok::<(), heirloom::control::RequestError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoRequests {}

/// A line that is no request, or no reply.
///
/// ```
/// use heirloom::control::{FailureCode, NoRequests, Request};
///
/// let error = Request::<NoRequests>::parse(b"{").unwrap_err();
/// assert_eq!(error.failure().code, FailureCode::Malformed);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is of the right form, but nobody here knows its name.
    #[error("unknown request {0:?}: no request of this program, or of a newer version")]
    Unknown(String),
    /// It is no JSON, not of the form of a message, or its contents are wrong.
    #[error("malformed message: {0}")]
    Malformed(String),
}

/// What an incumbent answers.
///
/// ```
/// use heirloom::control::{Failure, FailureCode, Reply};
///
/// let busy = Failure::new(FailureCode::Busy, "a takeover is going on");
/// let line = Reply::Error(busy).to_line();
/// assert_eq!(line, b"{\"Error\":{\"code\":\"busy\",\"message\":\"a takeover is going on\"}}\n");
/// assert_eq!(Reply::parse(b"\"Pong\"")?, Reply::Pong);
/// # Ok::<(), heirloom::control::RequestError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// To a Ping.
    Pong,
    /// To a Quit.
    Bye,
    /// To a Status.
    Status(Status),
    /// To a Takeover: it starts. One end of the channel comes along.
    Takeover(Welcome),
    /// To an Upgrade that is a dry run.
    Checked(Checked),
    /// To an Upgrade of a supervisor: what it supervises has been upgraded. The status is as of then.
    Upgraded(Status),
    /// To an Inspect. The manifest comes along.
    Manifest(ManifestSummary),
    /// The request was not granted.
    Error(Failure),
    /// To a request of the application: any JSON that is none of the above, written as it is.
    Application(Value),
}

/// A successor's introduction.
///
/// ```
/// use heirloom::control::{Hello, VersionRange};
///
/// let hello: Hello = serde_json::from_str(
///     r#"{"protocol": {"min": 1, "max": 2}, "service": "chat", "schema": {"min": 4, "max": 4},
///         "pid": 12, "room": 1000, "from the future": true}"#,
/// )?;
/// assert_eq!(hello.protocol.meet(VersionRange::new(1, 1)), Some(1));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions of the takeover protocol that it speaks.
    pub protocol: VersionRange,
    /// Which service it wants to be, with its target, so that nobody takes another one's.
    pub service: String,
    /// The program's name.
    #[serde(default)]
    pub program: String,
    /// The program's version.
    #[serde(default)]
    pub version: String,
    /// Its process id as it sees it itself: for messages only.
    pub pid: u32,
    /// The versions of the application's state that it can read.
    pub schema: VersionRange,
    /// How many more descriptors it can hold.
    pub room: u64,
    /// The generation that it expects to follow, if it knows.
    #[serde(default)]
    pub generation: Option<u64>,
    /// Whether it is to take over though it is no part of the incumbent's unit; see
    /// [`FailureCode::Outsider`].
    #[serde(default)]
    pub force: bool,
}

/// An incumbent's answer to a [`Hello`].
///
/// ```
/// let welcome: heirloom::control::Welcome = serde_json::from_str(
///     r#"{"protocol": 1, "generation": 7, "pid": 12, "schema": 4, "items": 3}"#,
/// )?;
/// assert_eq!(welcome.generation, 7);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version of the takeover protocol in which they go on.
    pub protocol: u32,
    /// The incumbent's generation; the successor's is one more.
    pub generation: u64,
    /// Its process id as it sees it itself: for messages only.
    pub pid: u32,
    /// The program's name.
    #[serde(default)]
    pub program: String,
    /// The program's version.
    #[serde(default)]
    pub version: String,
    /// The version of the application's state that it will write.
    pub schema: u32,
    /// How many items there are at the moment.
    pub items: u64,
    /// Whether the successor is no part of the incumbent's unit: the store of the incumbent's supervisor is not the successor's.
    #[serde(default)]
    pub outsider: bool,
}

/// What a base manifest holds; see [`Request::Inspect`].
///
/// ```
/// let summary: heirloom::control::ManifestSummary = serde_json::from_str(r#"{"items": 3, "bytes": 320}"#)?;
/// assert_eq!(summary.state_bytes, 0);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ManifestSummary {
    /// Its length in bytes, header included.
    pub bytes: u64,
    /// How many items it lists, the control socket included.
    pub items: u64,
    /// Bytes of the application's state.
    pub state_bytes: u64,
}

/// A range of versions, both ends included.
///
/// ```
/// use heirloom::control::VersionRange;
///
/// let (ours, theirs) = (VersionRange::new(1, 3), VersionRange::new(2, 9));
/// assert_eq!(ours.meet(theirs), Some(3));
/// assert_eq!(ours.to_string(), "1..=3");
/// assert!(!ours.contains(4));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub min: u32,
    /// The newest. Less than `min` makes the range empty.
    pub max: u32,
}

/// Why a request was not granted.
///
/// ```
/// use heirloom::control::{Failure, FailureCode};
///
/// let failure = Failure::new(FailureCode::Room, "room for 10 descriptors, 17 are needed");
/// assert_eq!(failure.to_string(), "room for 10 descriptors, 17 are needed");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: FailureCode,
    /// For people: what happened, why, and what to do.
    #[serde(default)]
    pub message: String,
}

/// The sort of a [`Failure`]; in kebab-case on the wire.
///
/// A code that this version does not know reads as [`FailureCode::Failed`].
///
/// ```
/// use heirloom::control::FailureCode;
///
/// assert_eq!(serde_json::to_string(&FailureCode::WrongService)?, "\"wrong-service\"");
/// assert_eq!(serde_json::from_str::<FailureCode>("\"moonstruck\"")?, FailureCode::Failed);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// A takeover is going on; it may be asked again later.
    Busy,
    /// The successor wants to be another service.
    WrongService,
    /// No version of the takeover protocol in common.
    Protocol,
    /// The successor cannot read the state that would be handed over.
    Schema,
    /// The successor cannot hold that many descriptors.
    Room,
    /// The peer may not ask.
    Permission,
    /// The successor is no part of the unit in which the incumbent's supervisor runs it, and is not forced
    /// ([`Config::force`](crate::Config::force)).
    Outsider,
    /// There is no such request.
    Unknown,
    /// The line is no request.
    Malformed,
    /// The line is too long, and the connection ends.
    TooLong,
    /// An upgrade failed, and the incumbent serves on.
    RolledBack,
    /// Anything else.
    #[serde(other)]
    Failed,
}

/// The names of [`Request`]'s own variants, and of [`Reply`]'s.
const REQUESTS: &[&str] = &["Ping", "Status", "Quit", "Takeover", "Upgrade", "Inspect"];
const REPLIES: &[&str] = &["Pong", "Bye", "Status", "Takeover", "Checked", "Upgraded", "Manifest", "Error"];

impl<A: DeserializeOwned> Request<A> {
    /// Reads one line, without its newline: our own requests first, then the application's.
    ///
    /// # Errors
    ///
    /// [`RequestError::Unknown`] when the form is right and the name isn't known;
    /// [`RequestError::Malformed`] otherwise.
    pub fn parse(line: &[u8]) -> Result<Request<A>, RequestError> {
        #[derive(Deserialize)]
        enum Own {
            Ping,
            Status,
            Quit,
            Takeover(Hello),
            Upgrade(Upgrade),
            Inspect,
        }

        let (tag, message) = tagged(line)?;
        if REQUESTS.contains(&tag.as_str()) {
            return Ok(match Own::deserialize(message).map_err(malformed)? {
                Own::Ping => Request::Ping,
                Own::Status => Request::Status,
                Own::Quit => Request::Quit,
                Own::Takeover(hello) => Request::Takeover(hello),
                Own::Upgrade(upgrade) => Request::Upgrade(upgrade),
                Own::Inspect => Request::Inspect,
            });
        }
        match A::deserialize(message) {
            Ok(request) => Ok(Request::Application(request)),
            Err(error) if variants_of::<A>().contains(&tag.as_str()) => Err(malformed(error)),
            Err(_) => Err(RequestError::Unknown(shortened(&tag))),
        }
    }
}

impl<A: Serialize> Request<A> {
    /// The request as one line, newline included.
    ///
    /// # Errors
    ///
    /// Only for an application's request that JSON cannot express, such as a map with keys that are no
    /// strings.
    pub fn to_line(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// As in a derived implementation, but for the application's requests, which stand for themselves.
impl<A: Serialize> Serialize for Request<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Request::Ping => serializer.serialize_unit_variant("Request", 0, "Ping"),
            Request::Status => serializer.serialize_unit_variant("Request", 1, "Status"),
            Request::Quit => serializer.serialize_unit_variant("Request", 2, "Quit"),
            Request::Takeover(hello) => serializer.serialize_newtype_variant("Request", 3, "Takeover", hello),
            Request::Upgrade(upgrade) => {
                serializer.serialize_newtype_variant("Request", 4, "Upgrade", upgrade)
            }
            Request::Inspect => serializer.serialize_unit_variant("Request", 5, "Inspect"),
            Request::Application(request) => request.serialize(serializer),
        }
    }
}

impl RequestError {
    /// The answer to whoever sent the line.
    pub fn failure(&self) -> Failure {
        let code = match self {
            RequestError::Unknown(_) => FailureCode::Unknown,
            RequestError::Malformed(_) => FailureCode::Malformed,
        };
        Failure::new(code, self.to_string())
    }
}

impl Reply {
    /// The reply as one line, newline included.
    pub fn to_line(&self) -> Vec<u8> {
        let message = match self {
            Reply::Pong => Value::from("Pong"),
            Reply::Bye => Value::from("Bye"),
            Reply::Status(status) => serde_json::json!({ "Status": status }),
            Reply::Takeover(welcome) => serde_json::json!({ "Takeover": welcome }),
            Reply::Checked(checked) => serde_json::json!({ "Checked": checked }),
            Reply::Upgraded(status) => serde_json::json!({ "Upgraded": status }),
            Reply::Manifest(summary) => serde_json::json!({ "Manifest": summary }),
            Reply::Error(failure) => serde_json::json!({ "Error": failure }),
            Reply::Application(value) => value.clone(),
        };
        format!("{message}\n").into_bytes()
    }

    /// Reads one line, without its newline.
    ///
    /// # Errors
    ///
    /// [`RequestError::Malformed`] when it is no JSON, or one of our replies with wrong contents.
    pub fn parse(line: &[u8]) -> Result<Reply, RequestError> {
        #[derive(Deserialize)]
        enum Own {
            Pong,
            Bye,
            Status(Status),
            Takeover(Welcome),
            Checked(Checked),
            Upgraded(Status),
            Manifest(ManifestSummary),
            Error(Failure),
        }

        let message: Value = serde_json::from_slice(line).map_err(malformed)?;
        if !tag(&message).is_some_and(|tag| REPLIES.contains(&tag)) {
            return Ok(Reply::Application(message));
        }
        Ok(match Own::deserialize(message).map_err(malformed)? {
            Own::Pong => Reply::Pong,
            Own::Bye => Reply::Bye,
            Own::Status(status) => Reply::Status(status),
            Own::Takeover(welcome) => Reply::Takeover(welcome),
            Own::Checked(checked) => Reply::Checked(checked),
            Own::Upgraded(status) => Reply::Upgraded(status),
            Own::Manifest(summary) => Reply::Manifest(summary),
            Own::Error(failure) => Reply::Error(failure),
        })
    }
}

impl VersionRange {
    /// From the oldest to the newest, both included.
    pub const fn new(min: u32, max: u32) -> VersionRange {
        VersionRange { min, max }
    }

    /// The newest version in both ranges.
    pub fn meet(self, other: VersionRange) -> Option<u32> {
        let newest = self.max.min(other.max);
        (newest >= self.min && newest >= other.min).then_some(newest)
    }

    /// Whether a version is in the range.
    pub fn contains(self, version: u32) -> bool {
        (self.min..=self.max).contains(&version)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.min, self.max)
    }
}

impl Failure {
    /// A failure with its explanation.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }
}

/// A message and its name.
fn tagged(line: &[u8]) -> Result<(String, Value), RequestError> {
    let message: Value = serde_json::from_slice(line).map_err(malformed)?;
    match tag(&message) {
        Some(tag) => Ok((tag.to_owned(), message)),
        None => Err(malformed("expected a name, as in \"Ping\", or an object with one name as its only key")),
    }
}

fn tag(message: &Value) -> Option<&str> {
    match message {
        Value::String(name) => Some(name),
        Value::Object(fields) if fields.len() == 1 => fields.keys().next().map(String::as_str),
        _ => None,
    }
}

fn malformed(why: impl fmt::Display) -> RequestError {
    RequestError::Malformed(why.to_string())
}

/// A name fit for an error message: the peer chose its length.
fn shortened(tag: &str) -> String {
    const LONGEST: usize = 64;
    match tag.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &tag[..end]),
        None => tag.to_owned(),
    }
}

/// The names of an enum's variants, as its derived `Deserialize` announces them; none for other types.
fn variants_of<A: DeserializeOwned>() -> &'static [&'static str] {
    /// A deserializer that only listens for which variants are expected.
    struct Listen<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Listen<'_> {
        type Error = de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("no enum"))
        }

        fn deserialize_enum<V: Visitor<'de>>(
            self,
            _: &'static str,
            variants: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = variants;
            Err(de::Error::custom("nothing to read"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
            unit unit_struct newtype_struct seq tuple tuple_struct map struct identifier ignored_any
        }
    }

    let mut variants: &'static [&'static str] = &[];
    // It cannot succeed, and need not.
    let _ = A::deserialize(Listen(&mut variants));
    variants
}
