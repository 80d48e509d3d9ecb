//! The demonstration's result: what was heard, compared with what was said.

use std::fmt::Write as _;

/// How the numbered lines of one speaker have arrived at one listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Whole lines received.
    pub(super) received: u64,
    /// Numbers that never came.
    pub(super) lost: u64,
    /// Numbers that came again.
    pub(super) repeated: u64,
    /// Numbers that came late, and lines that are no numbers, incomplete, or nobody's.
    pub(super) wrong: u64,
}

impl Tally {
    /// Compares what `speaker` has said in an output with the numbers from 1 to `said`.
    pub(super) fn of(output: &[u8], speaker: &str, said: u64) -> Tally {
        let mut tally = Tally::default();
        let mut seen = vec![false; said as usize];
        let mut highest = 0;
        for line in output.split_inclusive(|&byte| byte == b'\n') {
            let Some((who, text)) = spoken(line) else {
                tally.wrong += 1;
                continue;
            };
            if who != speaker {
                continue;
            }
            let Some(number) = text.parse::<u64>().ok().filter(|number| (1..=said).contains(number)) else {
                tally.wrong += 1;
                continue;
            };
            tally.received += 1;
            if std::mem::replace(&mut seen[number as usize - 1], true) {
                tally.repeated += 1;
            } else if number < highest {
                tally.wrong += 1;
            }
            highest = highest.max(number);
        }
        tally.lost = seen.iter().filter(|&&seen| !seen).count() as u64;
        tally
    }

    fn is_exact(&self) -> bool {
        (self.lost, self.repeated, self.wrong) == (0, 0, 0)
    }
}

/// Who has said what in a line of the chat, which is whole.
fn spoken(line: &[u8]) -> Option<(&str, &str)> {
    std::str::from_utf8(line).ok()?.strip_suffix('\n')?.strip_prefix('<')?.split_once("> ")
}

/// How many have left the chat, as the server announced it.
pub(super) fn departures(output: &[u8]) -> u64 {
    let lines = output.split_inclusive(|&byte| byte == b'\n').filter_map(spoken);
    lines.filter(|(who, text)| *who == "announce" && text.ends_with("is disconnected.")).count() as u64
}

/// Everything that the demonstration has found out.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    /// Lines that the talker has said, and those that the listener has.
    pub(super) said: u64,
    pub(super) typed: u64,
    pub(super) listener: Tally,
    pub(super) witness: Tally,
    pub(super) typed_at_witness: Tally,
    pub(super) typed_at_talker: Tally,
    /// Connections that ended before the end.
    pub(super) dropped: u64,
    pub(super) killed: u64,
    pub(super) refused: u64,
    /// Whether there was another build to go to.
    pub(super) other_build: bool,
    /// The pause of each replacement, in microseconds.
    pub(super) pauses_us: Vec<u64>,
}

impl Report {
    fn tallies(&self) -> [Tally; 4] {
        [self.listener, self.witness, self.typed_at_witness, self.typed_at_talker]
    }

    /// Whether nothing at all was lost, repeated, reordered or dropped.
    pub(super) fn is_good(&self) -> bool {
        self.tallies().iter().all(Tally::is_exact) && self.dropped == 0
    }

    pub(super) fn to_text(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<24} {value}");
        };
        let sum = |of: fn(&Tally) -> u64| self.tallies().iter().map(of).sum::<u64>().to_string();
        row("lines said", format!("{} by the talker, {} by the listener", self.said, self.typed));
        row(
            "lines heard",
            format!(
                "{} by the listener, {} + {} by the witness, {} by the talker",
                self.listener.received,
                self.witness.received,
                self.typed_at_witness.received,
                self.typed_at_talker.received
            ),
        );
        row("lines lost", sum(|tally| tally.lost));
        row("lines repeated", sum(|tally| tally.repeated));
        row("lines torn or misplaced", sum(|tally| tally.wrong));
        row("connections dropped", self.dropped.to_string());
        let builds = if self.other_build { "" } else { "; no other build was there (--other FILE)" };
        row("replacements", format!("{}{builds}", self.pauses_us.len()));
        row("successors killed", format!("{} in the middle of a takeover", self.killed));
        row("upgrades refused", format!("{} by a dry run", self.refused));
        let pauses: Vec<String> = self.pauses_us.iter().map(u64::to_string).collect();
        row("pauses in µs", pauses.join(" "));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(output: &str) -> Tally {
        Tally::of(output.as_bytes(), "a", 3)
    }

    #[test]
    fn every_kind_of_damage_is_seen() {
        let exact = Tally { received: 3, ..Tally::default() };
        assert_eq!(tally("<a> 1\n<b> 7\n<a> 2\n<announce> hello\n<a> 3\n"), exact);
        assert_eq!(tally("<a> 1\n<a> 3\n"), Tally { received: 2, lost: 1, ..Tally::default() });
        assert_eq!(
            tally("<a> 1\n<a> 2\n<a> 2\n<a> 3\n"),
            Tally { received: 4, repeated: 1, ..Tally::default() }
        );
        assert_eq!(tally("<a> 1\n<a> 3\n<a> 2\n"), Tally { received: 3, wrong: 1, ..Tally::default() });
        assert_eq!(
            tally("<a> 1\n<a> 2\n<a> 3"),
            Tally { received: 2, lost: 1, wrong: 1, ..Tally::default() }
        );
        assert_eq!(tally("<a> 1\n\n<a> 2\n<a> 3\n"), Tally { received: 3, wrong: 1, ..Tally::default() });
        assert_eq!(
            tally("<a> 1\n<a> <a> 2\n<a> 3\n"),
            Tally { received: 2, lost: 1, wrong: 1, ..Tally::default() }
        );
    }

    #[test]
    fn who_leaves_is_counted_and_who_speaks_of_it_is_not() {
        let output = b"<announce> <user2> is disconnected.\n<user3> <user2> is disconnected.\n";
        assert_eq!(departures(output), 1);
    }

    #[test]
    fn one_lost_line_makes_the_whole_report_bad() {
        let good = Report { said: 3, typed: 3, ..Report::default() };
        assert!(good.is_good());
        let lost = Tally { lost: 1, ..Tally::default() };
        assert!(!Report { listener: lost, ..good.clone() }.is_good());
        assert!(!Report { typed_at_talker: lost, ..good.clone() }.is_good());
        assert!(!Report { dropped: 1, ..good }.is_good());
    }
}
