//! What waits to be sent to one client.
//!
//! The text is shared with the outboxes of all others who are to get it, so that it is in memory once, however many of
//! them are slow.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;

/// How many texts are sent with one system call.
const AT_ONCE: usize = 64;
/// The longest text that an outbox is resumed with.
const PIECE: usize = 1 << 20;

/// A queue of texts, the first of which may have been sent in part.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    texts: VecDeque<Arc<[u8]>>,
    /// How much of the first has been sent: less than all of it.
    sent: usize,
    /// How many bytes are unsent.
    len: usize,
}

impl Outbox {
    /// An outbox that holds these bytes.
    pub(super) fn resume(unsent: &[u8]) -> Outbox {
        Outbox::of(unsent.chunks(PIECE).map(Arc::from), 0)
    }

    /// An outbox that holds these texts, of the first of which so much has been sent.
    pub(super) fn of(texts: impl IntoIterator<Item = Arc<[u8]>>, sent: usize) -> Outbox {
        let mut outbox = Outbox::default();
        texts.into_iter().for_each(|text| outbox.push(&text));
        outbox.consume(sent);
        outbox
    }

    /// The texts that are not sent as a whole, and how much of the first has been.
    pub(super) fn texts(&self) -> (impl Iterator<Item = &Arc<[u8]>>, usize) {
        (self.texts.iter(), self.sent)
    }

    /// Appends a text.
    pub(super) fn push(&mut self, text: &Arc<[u8]>) {
        if !text.is_empty() {
            self.len += text.len();
            self.texts.push_back(text.clone());
        }
    }

    /// How many bytes are unsent.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether everything has been sent.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The next bytes to send, for one vectored write: at least one if there are any.
    pub(super) fn front(&self) -> Vec<IoSlice<'_>> {
        let starts = std::iter::once(self.sent).chain(std::iter::repeat(0));
        self.texts
            .iter()
            .zip(starts)
            .take(AT_ONCE)
            .map(|(text, start)| IoSlice::new(&text[start..]))
            .collect()
    }

    /// Forgets the first `count` bytes, which have been sent; all if there are fewer.
    pub(super) fn consume(&mut self, count: usize) {
        self.len = self.len.saturating_sub(count);
        self.sent += count;
        while let Some(text) = self.texts.front() {
            if self.sent < text.len() {
                return;
            }
            self.sent -= text.len();
            self.texts.pop_front();
        }
        self.sent = 0;
    }

    /// A copy of all that is unsent.
    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len);
        let starts = std::iter::once(self.sent).chain(std::iter::repeat(0));
        self.texts.iter().zip(starts).for_each(|(text, start)| all.extend_from_slice(&text[start..]));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_are_shared_until_they_are_sent() {
        let text: Arc<[u8]> = b"hello\n"[..].into();
        let (mut one, mut other) = (Outbox::default(), Outbox::default());
        one.push(&text);
        other.push(&text);
        assert_eq!(Arc::strong_count(&text), 3);
        one.consume(2);
        assert_eq!((one.to_vec(), other.to_vec()), (b"llo\n".to_vec(), b"hello\n".to_vec()));
        one.consume(4);
        assert!(one.is_empty() && one.front().is_empty());
        assert_eq!(Arc::strong_count(&text), 2);
    }

    #[test]
    fn one_write_takes_some_of_many() {
        let mut outbox = Outbox::default();
        (0..3 * AT_ONCE).for_each(|_| outbox.push(&b"x"[..].into()));
        assert_eq!(outbox.front().len(), AT_ONCE);
        outbox.consume(AT_ONCE);
        assert_eq!(outbox.len(), 2 * AT_ONCE);
    }

    proptest! {
        /// As the bytes of all texts in a row would, whatever a write takes, and when it goes on elsewhere.
        #[test]
        fn it_is_a_queue_of_bytes(
            steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..8), 0usize..12, any::<bool>()), 0..40)
        ) {
            let (mut outbox, mut bytes) = (Outbox::default(), VecDeque::new());
            for (text, take, resumed) in steps {
                outbox.push(&text[..].into());
                bytes.extend(text);
                let front: Vec<u8> = outbox.front().iter().flat_map(|slice| slice.to_vec()).collect();
                let take = take.min(front.len());
                prop_assert!(bytes.iter().take(take).eq(&front[..take]));
                prop_assert_eq!(front.is_empty(), bytes.is_empty());
                outbox.consume(take);
                bytes.drain(..take);
                if resumed {
                    outbox = Outbox::resume(&outbox.to_vec());
                }
                prop_assert_eq!(outbox.len(), bytes.len());
                prop_assert!(bytes.iter().eq(&outbox.to_vec()));
            }
        }
    }
}
