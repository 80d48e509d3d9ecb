//! Saying a thing at most once a second, however often it happens.

use std::time::Duration;

use crate::clock::Moment;

const PAUSE: Duration = Duration::from_secs(1);

/// When something was said last, and how often it was not said since.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    next: Option<Moment>,
    unsaid: u64,
}

impl Seldom {
    /// Whether to say it now; then, how often it has happened unsaid before.
    pub(crate) fn now(&mut self, now: Moment) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.unsaid += 1;
            return None;
        }
        self.next = Some(now.after(PAUSE));
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_said_once_a_second_with_its_count() {
        let (mut seldom, start) = (Seldom::default(), Moment::now());
        assert_eq!(seldom.now(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(seldom.now(start), None);
        }
        assert_eq!(seldom.now(start.after(PAUSE)), Some(1000));
        assert_eq!(seldom.now(start.after(PAUSE * 3)), Some(0));
    }
}
