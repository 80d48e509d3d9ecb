//! A bounded queue of bytes, between one side that reads and one that writes.

use std::collections::VecDeque;

/// Bytes on their way, at most `limit` of them: who fills it asks for [`space`](Buffer::space) first.
pub(super) struct Buffer {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Buffer {
    /// A buffer that holds `bytes`. They may be more than `limit`, as another version may have had a higher one:
    /// then there is no space until enough of them have left.
    pub(super) fn from_vec(bytes: Vec<u8>, limit: usize) -> Self {
        Self { bytes: bytes.into(), limit }
    }

    /// A copy of all bytes, in order.
    pub(super) fn to_vec(&self) -> Vec<u8> {
        let (front, back) = self.bytes.as_slices();
        [front, back].concat()
    }

    /// How many bytes are queued.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// How many bytes can be pushed.
    pub(super) fn space(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    /// Appends `bytes`.
    ///
    /// # Panics
    /// If they are more than [`space`](Buffer::space): they would be lost otherwise.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.space(), "a buffer was given more than it has space for");
        self.bytes.extend(bytes);
    }

    /// The next bytes to leave: some of those that are queued, at least one if there are any.
    pub(super) fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Drops the first `count` bytes, which have left.
    ///
    /// # Panics
    /// If there are fewer.
    pub(super) fn consume(&mut self, count: usize) {
        self.bytes.drain(..count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_in_which_they_came() {
        let mut buffer = Buffer::from_vec(Vec::new(), 10);
        let (mut came, mut left) = (Vec::<u8>::new(), Vec::<u8>::new());
        for round in 0..100_u8 {
            let chunk: Vec<u8> = (0..(round as usize % 7).min(buffer.space()))
                .map(|index| round.wrapping_add(index as u8))
                .collect();
            buffer.push(&chunk);
            came.extend(&chunk);
            let count = buffer.front().len().min(round as usize % 5);
            left.extend(&buffer.front()[..count]);
            buffer.consume(count);
            assert_eq!([left.clone(), buffer.to_vec()].concat(), came);
        }
        assert!(left.len() > 100);
    }

    #[test]
    fn space_ends_at_the_limit() {
        let mut buffer = Buffer::from_vec(Vec::new(), 4);
        assert_eq!((buffer.space(), buffer.len()), (4, 0));
        buffer.push(b"abcd");
        assert_eq!((buffer.space(), buffer.len()), (0, 4));
        assert!(std::panic::catch_unwind(move || buffer.push(b"e")).is_err());
    }

    #[test]
    fn more_than_the_limit_is_taken_over_but_not_added_to() {
        let mut buffer = Buffer::from_vec(b"abcdef".to_vec(), 4);
        assert_eq!((buffer.len(), buffer.space()), (6, 0));
        buffer.consume(3);
        assert_eq!((buffer.front(), buffer.space()), (&b"def"[..], 1));
    }
}
