//! Cutting a stream of bytes into lines, however it was split or merged on the way.

use std::mem;

/// The longest request line in bytes that an incumbent reads.
pub const MAX_REQUEST: usize = 64 * 1024;

/// The longest reply line in bytes that a client reads: the status of some hundred thousand items.
pub const MAX_REPLY: usize = 16 * 1024 * 1024;

/// Takes bytes in as they come and gives lines out.
///
/// A line ends with `\n`, before which one `\r` is dropped. Memory is bounded by the longest line and
/// what is fed at a time: take all lines out before feeding more.
///
/// ```
/// use heirloom::control::LineReader;
///
/// let mut lines = LineReader::new(100);
/// lines.feed(b"\"Ping\"\r\n\"Sta");
/// assert_eq!(lines.next_line().unwrap(), Some(b"\"Ping\"".to_vec()));
/// assert_eq!(lines.next_line().unwrap(), None);
/// lines.feed(b"tus\"\n");
/// assert_eq!(lines.next_line().unwrap(), Some(b"\"Status\"".to_vec()));
/// ```
#[derive(Debug)]
pub struct LineReader {
    limit: usize,
    bytes: Vec<u8>,
    /// Where the next line starts: what is before it has been given out.
    start: usize,
    /// Up to here there is no newline after `start`, so that no byte is looked at twice.
    searched: usize,
}

/// A line is longer than allowed. Cut the peer off: where its next line starts is unknown.
///
/// ```
/// use heirloom::control::LineReader;
///
/// let mut lines = LineReader::new(4);
/// lines.feed(b"too much");
/// assert_eq!(lines.next_line().unwrap_err().limit, 4);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a line is longer than {limit} bytes, which is the limit; send shorter ones")]
pub struct TooLong {
    /// The longest line in bytes that would have been taken.
    pub limit: usize,
}

impl LineReader {
    /// A reader of lines of at most `limit` bytes, without the newline.
    pub fn new(limit: usize) -> LineReader {
        LineReader { limit, bytes: Vec::new(), start: 0, searched: 0 }
    }

    /// Adds bytes to what has come.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete line, without its end; `None` until more is fed.
    ///
    /// # Errors
    ///
    /// [`TooLong`] as soon as the line, complete or not, exceeds the limit; and again when asked again.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let newline = self.bytes[self.searched..].iter().position(|&byte| byte == b'\n');
        let end = newline.map_or(self.bytes.len(), |at| self.searched + at);
        if end - self.start > self.limit {
            return Err(TooLong { limit: self.limit });
        }
        self.searched = end;
        if newline.is_none() {
            return Ok(None);
        }
        let line = &self.bytes[self.start..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
        self.start = end + 1;
        self.searched = self.start;
        Ok(Some(line))
    }

    /// Everything that has not been given out, and starts afresh: for the end of the stream, or for a
    /// peer that does not speak in lines.
    pub fn take_rest(&mut self) -> Vec<u8> {
        let mut rest = mem::take(&mut self.bytes);
        rest.drain(..self.start);
        self.start = 0;
        self.searched = 0;
        rest
    }
}
