//! The demonstration's result: what was received, compared with what was sent.

use std::fmt::Write as _;

use super::server;

/// How a stream of numbered lines has arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Whole lines received.
    pub(super) received: u64,
    /// Numbers that never came.
    pub(super) lost: u64,
    /// Numbers that came again.
    pub(super) repeated: u64,
    /// Numbers that came late, and lines that are no numbers, or incomplete.
    pub(super) wrong: u64,
}

impl Tally {
    /// Compares a stream with the numbers from 1 to `sent`.
    pub(super) fn of(stream: &[u8], sent: u64) -> Tally {
        let mut tally = Tally::default();
        let mut seen = vec![false; sent as usize];
        let mut highest = 0;
        for line in stream.split_inclusive(|&byte| byte == b'\n') {
            let number = std::str::from_utf8(line).ok().and_then(|line| line.strip_suffix('\n'));
            let number = number.and_then(|line| line.parse::<u64>().ok()).filter(|n| (1..=sent).contains(n));
            let Some(number) = number else {
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

/// Everything that the demonstration has found out.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    pub(super) server: server::Report,
    pub(super) client: Tally,
    pub(super) witness: Tally,
    /// Whether client and witness got the same bytes.
    pub(super) same_bytes: bool,
    pub(super) typed: u64,
    pub(super) killed: u64,
    /// The pause of each replacement, in microseconds.
    pub(super) pauses_us: Vec<u64>,
}

impl Report {
    /// Whether nothing at all was lost, repeated, reordered or dropped.
    pub(super) fn is_good(&self) -> bool {
        let typed_right = self.server.typed == self.typed && self.server.typed_wrong == 0;
        self.client.is_exact()
            && self.witness.is_exact()
            && self.same_bytes
            && typed_right
            && self.server.dropped == 0
    }

    pub(super) fn to_text(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<24} {value}");
        };
        row("lines sent", self.server.sent.to_string());
        row(
            "lines received",
            format!(
                "{} by the replaced client, {} by the witness",
                self.client.received, self.witness.received
            ),
        );
        row("lines lost", (self.client.lost + self.witness.lost).to_string());
        row("lines repeated", (self.client.repeated + self.witness.repeated).to_string());
        row("lines torn or misplaced", (self.client.wrong + self.witness.wrong).to_string());
        row("same bytes as witness", if self.same_bytes { "yes".into() } else { "NO".into() });
        let wrong = match self.server.typed_wrong {
            0 => String::new(),
            wrong => format!(", {wrong} wrong"),
        };
        row("lines typed", format!("{}, {} arrived in order{wrong}", self.typed, self.server.typed));
        row("connections dropped", self.server.dropped.to_string());
        row(
            "replacements",
            format!("{}, and {} successor killed in the middle of one", self.pauses_us.len(), self.killed),
        );
        let pauses: Vec<String> = self.pauses_us.iter().map(u64::to_string).collect();
        let mut sorted = self.pauses_us.clone();
        sorted.sort_unstable();
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
        row("pauses in µs", format!("{} (median {median})", pauses.join(" ")));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_damage_is_seen() {
        let exact = Tally { received: 3, ..Tally::default() };
        assert_eq!(Tally::of(b"1\n2\n3\n", 3), exact);
        assert_eq!(Tally::of(b"1\n3\n", 3), Tally { received: 2, lost: 1, ..Tally::default() });
        assert_eq!(Tally::of(b"1\n2\n2\n3\n", 3), Tally { received: 4, repeated: 1, ..Tally::default() });
        assert_eq!(Tally::of(b"1\n3\n2\n", 3), Tally { received: 3, wrong: 1, ..Tally::default() });
        assert_eq!(Tally::of(b"1\n2\n3", 3), Tally { received: 2, lost: 1, wrong: 1, ..Tally::default() });
        assert_eq!(Tally::of(b"1\n\n2\n3\n", 3), Tally { received: 3, wrong: 1, ..Tally::default() });
    }

    #[test]
    fn one_lost_line_makes_the_whole_report_bad() {
        let tally = Tally { received: 3, ..Tally::default() };
        let server = server::Report { sent: 3, ..server::Report::default() };
        let good = Report { server, client: tally, witness: tally, same_bytes: true, ..Report::default() };
        assert!(good.is_good());
        assert!(!Report { client: Tally { lost: 1, ..tally }, ..good.clone() }.is_good());
        assert!(!Report { typed: 1, ..good.clone() }.is_good());
        assert!(!Report { same_bytes: false, ..good }.is_good());
    }
}
