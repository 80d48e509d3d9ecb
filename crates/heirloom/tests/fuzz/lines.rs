//! The control socket: lines however they are cut, and the requests and replies in them.
//!
//! The first byte is the length of the pieces in which the rest arrives.

use heirloom::NoRequests;
use heirloom::control::{LineReader, Reply, Request};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;

/// The longest line that the reader takes: short, so that there are longer ones.
const LIMIT: usize = 100;

/// Requests of an application.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Mine {
    Flush,
    Rotate { path: String, keep: Option<u8> },
    Weigh(f64),
    Pair(i64, Vec<String>),
}

pub(crate) fn run(input: &[u8]) {
    let Some((&piece, stream)) = input.split_first() else { return };
    cut(stream, usize::from(piece) + 1);
    for line in stream.split(|&byte| byte == b'\n') {
        request::<NoRequests>(line);
        request::<Mine>(line);
        reply(line);
    }
}

/// Whatever the pieces, the lines are those that a split gives.
fn cut(stream: &[u8], piece: usize) {
    let mut expected = stream.split(|&byte| byte == b'\n').peekable();
    let mut reader = LineReader::new(LIMIT);
    for piece in stream.chunks(piece) {
        reader.feed(piece);
        loop {
            match reader.next_line() {
                Ok(Some(line)) => {
                    let whole = expected.next().expect("a line that was sent");
                    assert!(expected.peek().is_some(), "its newline was sent");
                    assert!(whole.len() <= LIMIT);
                    assert_eq!(line, whole.strip_suffix(b"\r").unwrap_or(whole));
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(error.limit, LIMIT);
                    assert!(expected.next().is_some_and(|line| line.len() > LIMIT));
                    assert!(reader.next_line().is_err(), "the peer is to be cut off");
                    return;
                }
            }
        }
    }
    assert_eq!(reader.take_rest(), expected.next().unwrap_or_default());
    assert_eq!(expected.next(), None);
    assert_eq!(reader.next_line(), Ok(None));
}

/// What is understood is understood in the same way when it is written again; what is not is answered in due proportion.
fn request<A: DeserializeOwned + Serialize + PartialEq + Debug>(line: &[u8]) {
    match Request::<A>::parse(line) {
        Ok(request) => {
            let again = request.to_line().expect("what was JSON can be JSON again");
            assert_eq!(Request::parse(content(&again)), Ok(request));
        }
        Err(error) => {
            let answer = Reply::Error(error.failure());
            assert!(answer.to_line().len() <= 1000 + 20 * line.len(), "{error}");
            assert_eq!(Reply::parse(content(&answer.to_line())), Ok(answer));
        }
    }
}

fn reply(line: &[u8]) {
    if let Ok(reply) = Reply::parse(line) {
        assert_eq!(Reply::parse(content(&reply.to_line())), Ok(reply));
    }
}

/// A line without its end, of which there is one.
fn content(line: &[u8]) -> &[u8] {
    let content = line.strip_suffix(b"\n").expect("it ends");
    assert!(!content.contains(&b'\n'));
    content
}
