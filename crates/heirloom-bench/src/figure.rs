//! A figure beside its floor, and the table of them.

use std::fmt;

use serde::Serialize;

/// All values of one quantity, and those of its floor.
pub(crate) struct Measured {
    suite: &'static str,
    case: String,
    unit: Unit,
    /// In nanoseconds or bytes, ascending.
    values: Vec<u64>,
    floors: Vec<u64>,
}

/// One figure of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    suite: &'static str,
    pub(crate) case: String,
    /// How many times it was measured.
    n: u64,
    pub(crate) value: f64,
    unit: &'static str,
    /// The same of a minimal loop of the same system calls, or without a proxy. Some things cannot be had without one.
    pub(crate) floor: Option<f64>,
    /// `value` / `floor`.
    ratio: Option<f64>,
}

impl Figure {
    pub(crate) fn new(
        suite: &'static str,
        case: String,
        n: u64,
        value: f64,
        unit: &'static str,
        floor: Option<f64>,
    ) -> Self {
        Figure { suite, case, n, value, unit, floor, ratio: floor.map(|floor| value / floor) }
    }
}

/// In what a figure is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Nanoseconds,
    Microseconds,
    Bytes,
}

impl Unit {
    /// Its sign, and how many nanoseconds, or bytes, it is.
    fn sign(self) -> (&'static str, f64) {
        match self {
            Unit::Nanoseconds => ("ns", 1.0),
            Unit::Microseconds => ("µs", 1000.0),
            Unit::Bytes => ("B", 1.0),
        }
    }
}

/// What is told of the distribution of the values: their percentiles.
const PERCENTILES: [(&str, usize); 4] = [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)];

impl Measured {
    /// Values and floors in nanoseconds or bytes, in any order.
    pub(crate) fn new(
        suite: &'static str,
        case: String,
        unit: Unit,
        (mut values, mut floors): (Vec<u64>, Vec<u64>),
    ) -> Self {
        values.sort_unstable();
        floors.sort_unstable();
        Measured { suite, case, unit, values, floors }
    }

    /// Its figures, one for each percentile.
    pub(crate) fn figures(&self) -> [Figure; 4] {
        let (unit, ns) = self.unit.sign();
        PERCENTILES.map(|(name, percent)| {
            let value = percentile(&self.values, percent) as f64 / ns;
            let floor = percentile(&self.floors, percent) as f64 / ns;
            let case = format!("{}, {name}", self.case);
            // Memory that was there already, for instance.
            let floor = Some(floor).filter(|floor| *floor > 0.0);
            Figure::new(self.suite, case, self.values.len() as u64, value, unit, floor)
        })
    }
}

/// The value below which `percent` per cent of the sorted values are; 0 if there are none.
pub(crate) fn percentile<T: Copy + Default>(sorted: &[T], percent: usize) -> T {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or_default()
}

/// What stands above the lines of a table.
pub(crate) fn head() -> String {
    format!(
        "{:<9} {:<45} {:>5}    {:>8} {:>8} {:>8} {:>8} {:>9} {:>6}",
        "suite", "case", "n", "p50", "p90", "p99", "max", "floor p50", "ratio"
    )
}

impl fmt::Display for Measured {
    /// Its line in the table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p90, p99, max] = self.figures();
        let Figure { suite, n, unit, .. } = &p50;
        let (floor, ratio) = (p50.floor.unwrap_or_default(), p50.ratio.unwrap_or_default());
        write!(f, "{suite:<9} {:<45} {n:>5} {unit:<2}", self.case)?;
        for figure in [&p50, &p90, &p99, &max] {
            write!(f, " {:>8.0}", figure.value)?;
        }
        write!(f, " {floor:>9.0} {ratio:>6.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: Vec<u64> = (1..=100).collect();
        assert_eq!(percentile(&values, 50), 51);
        assert_eq!(percentile(&values, 99), 100);
        assert_eq!(percentile(&values, 100), 100);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile::<u64>(&[], 50), 0);
    }
}
