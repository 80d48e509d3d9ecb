//! A figure beside its floor, and the table of them.

use std::fmt::Write as _;

use serde::Serialize;

/// One measured quantity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) suite: String,
    pub(crate) case: String,
    /// How many times it was measured.
    pub(crate) n: u64,
    pub(crate) value: f64,
    pub(crate) unit: String,
    /// The same of a minimal loop of the same system calls.
    pub(crate) floor: f64,
    /// `value` / `floor`.
    pub(crate) ratio: f64,
}

/// In what a figure is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Nanoseconds,
    Microseconds,
}

impl Unit {
    /// Its sign, and how many nanoseconds it is.
    fn sign(self) -> (&'static str, f64) {
        match self {
            Unit::Nanoseconds => ("ns", 1.0),
            Unit::Microseconds => ("µs", 1000.0),
        }
    }
}

impl Figure {
    /// The figures of one quantity, of its values in nanoseconds and those of the floor: median and 99th percentile.
    pub(crate) fn of(
        suite: &str,
        case: &str,
        unit: Unit,
        (values, floors): (Vec<u64>, Vec<u64>),
    ) -> [Figure; 2] {
        let (sign, ns) = unit.sign();
        [("median", 50), ("p99", 99)].map(|(name, percent)| {
            let value = percentile(&values, percent) as f64 / ns;
            let floor = percentile(&floors, percent) as f64 / ns;
            Figure {
                suite: suite.into(),
                case: format!("{case}, {name}"),
                n: values.len() as u64,
                value,
                unit: sign.into(),
                floor,
                ratio: value / floor,
            }
        })
    }
}

/// The value below which `percent` per cent of the values are; 0 if there are none.
pub(crate) fn percentile(values: &[u64], percent: usize) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(0)
}

/// The figures for people.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut out =
        format!("{:<10} {:<24} {:>5} {:>10} {:>10} {:>6}", "suite", "case", "n", "value", "floor", "ratio");
    for figure in figures {
        let Figure { suite, case, n, value, unit, floor, ratio } = figure;
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "\n{suite:<10} {case:<24} {n:>5} {value:>7.0} {unit} {floor:>7.0} {unit} {ratio:>6.2}"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(percentile(&values, 50), 51);
        assert_eq!(percentile(&values, 99), 100);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile(&[], 50), 0);
    }
}
