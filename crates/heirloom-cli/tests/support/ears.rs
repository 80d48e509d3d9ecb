//! What a guest hears, checked line by line: nothing lost, repeated, in disorder or torn.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

/// What every line says, behind its number.
pub(crate) const WORDS: &str = "and so they talked, until the end of the night";
/// What the last line of a guest says, behind its number.
pub(crate) const END: &str = "that is all";

/// The next line of a guest that has said so many.
pub(crate) fn numbered(number: u64) -> String {
    format!("{number} {WORDS}\n")
}

/// The last line of a guest that has said so many.
pub(crate) fn last(number: u64) -> String {
    format!("{number} {END}\n")
}

/// A guest's ear. It panics when it hears what cannot be.
#[derive(Default)]
pub(crate) struct Ear {
    /// The number of the next line of each that was heard, or heard to come.
    next: HashMap<String, u64>,
    /// Who is not to be heard any more.
    ended: HashSet<String>,
    /// Who came and who left, in this order.
    pub(crate) came: Vec<String>,
    pub(crate) left: Vec<String>,
}

/// Who has said which line.
pub(crate) struct Heard {
    pub(crate) who: String,
    pub(crate) number: u64,
    pub(crate) is_last: bool,
}

impl Ear {
    /// An ear that has to hear these from their first line on.
    pub(crate) fn from_the_start<'n>(names: impl IntoIterator<Item = &'n String>) -> Ear {
        Ear { next: names.into_iter().map(|name| (name.clone(), 0)).collect(), ..Ear::default() }
    }

    /// Hears a line; returns what somebody has said.
    #[track_caller]
    pub(crate) fn hear(&mut self, line: &str) -> Option<Heard> {
        if let Some(announcement) = line.strip_prefix("<announce> ") {
            self.announced(announcement);
            return None;
        }
        let said = line.strip_prefix('<').and_then(|rest| rest.split_once("> "));
        let (who, said) = said.unwrap_or_else(|| panic!("torn: {line:?}"));
        let (number, words) = said.split_once(' ').unwrap_or_else(|| panic!("torn: {line:?}"));
        assert!(words == WORDS || words == END, "torn: {line:?}");
        let number: u64 = number.parse().unwrap_or_else(|_| panic!("torn: {line:?}"));
        assert!(!self.ended.contains(who), "after the end: {line:?}");
        match self.next.get_mut(who) {
            Some(next) => {
                assert_eq!(number, *next, "lost, repeated or in disorder: {line:?}");
                *next += 1;
            }
            // Somebody who was there before.
            None => drop(self.next.insert(who.to_owned(), number + 1)),
        }
        let is_last = words == END;
        if is_last {
            self.ended.insert(who.to_owned());
        }
        Some(Heard { who: who.to_owned(), number, is_last })
    }

    #[track_caller]
    fn announced(&mut self, announcement: &str) {
        let came = announcement
            .split_once(" is connected as <")
            .and_then(|(address, name)| address.parse::<IpAddr>().ok().and(name.strip_suffix(">.")));
        let left = announcement.strip_prefix('<').and_then(|a| a.strip_suffix("> is disconnected."));
        match (came, left) {
            (Some(name), None) => {
                assert!(self.next.insert(name.to_owned(), 0).is_none(), "{name} came twice");
                self.came.push(name.to_owned());
            }
            (None, Some(name)) => {
                assert!(!self.left.contains(&name.to_owned()), "{name} left twice");
                self.left.push(name.to_owned());
                self.ended.insert(name.to_owned());
            }
            _ => panic!("torn: {announcement:?}"),
        }
    }

    /// How many lines of a guest were heard, or had been said before this one came.
    pub(crate) fn count(&self, who: &str) -> u64 {
        self.next.get(who).copied().unwrap_or(0)
    }
}
