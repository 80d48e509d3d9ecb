//! A quantity of each proxy beside the others: a line of a table, and figures.

use std::fmt;

use crate::figure::{Figure, percentile};

/// The name of the column without a proxy between.
pub(crate) const DIRECT: &str = "direct";

/// All values of one quantity, of every proxy.
pub(crate) struct Comparison {
    pub(crate) suite: &'static str,
    pub(crate) case: String,
    pub(crate) unit: &'static str,
    /// Whose they are, and the values, ascending.
    pub(crate) columns: Vec<(&'static str, Vec<f64>)>,
}

impl Comparison {
    /// Values in any order.
    pub(crate) fn new(
        suite: &'static str,
        case: impl Into<String>,
        unit: &'static str,
        mut columns: Vec<(&'static str, Vec<f64>)>,
    ) -> Self {
        for (_, values) in &mut columns {
            values.sort_unstable_by(f64::total_cmp);
        }
        Comparison { suite, case: case.into(), unit, columns }
    }

    /// The median of each column that has values.
    pub(crate) fn medians(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let has_values = self.columns.iter().filter(|(_, values)| !values.is_empty());
        has_values.map(|(name, values)| (*name, percentile(values, 50)))
    }

    /// Its figures: of each column the least, the median and the most. The floor is what it is without a proxy.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        let direct = self.columns.iter().find(|(name, values)| *name == DIRECT && !values.is_empty());
        let mut figures = Vec::new();
        for (name, values) in self.columns.iter().filter(|(_, values)| !values.is_empty()) {
            for (what, percent) in [("least", 0), ("p50", 50), ("most", 100)] {
                figures.push(Figure::new(
                    self.suite,
                    format!("{}, {name}, {what}", self.case),
                    values.len() as u64,
                    percentile(values, percent),
                    self.unit,
                    direct.map(|(_, values)| percentile(values, percent)),
                ));
            }
        }
        figures
    }

    /// What stands above the lines of a table of such columns.
    pub(crate) fn head(&self) -> String {
        let names = self.columns.iter().map(|(name, _)| format!(" {name:>14}"));
        format!("{:<7} {:<44} {:<7}{}", "suite", "case", "", names.collect::<String>())
    }
}

impl fmt::Display for Comparison {
    /// Its line in the table: the medians.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<7} {:<44} {:<7}", self.suite, self.case, self.unit)?;
        for (_, values) in &self.columns {
            match values.is_empty() {
                true => write!(f, " {:>14}", "–")?,
                false => write!(f, " {:>14}", brief(percentile(values, 50)))?,
            }
        }
        Ok(())
    }
}

/// A number with three digits that tell something, or all that it has before the point. One without a fraction is a count.
pub(crate) fn brief(number: f64) -> String {
    let digits = match number.abs() {
        whole if whole.fract() == 0.0 => 0,
        small if small < 1.0 => 3,
        small if small < 10.0 => 2,
        small if small < 100.0 => 1,
        _ => 0,
    };
    format!("{number:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_brief() {
        let numbers = [0.0, 2.0, 0.1234, 1.234, -12.34, 123.4, 12345.6].map(brief);
        assert_eq!(numbers, ["0", "2", "0.123", "1.23", "-12.3", "123", "12346"]);
    }

    #[test]
    fn a_figure_has_a_floor_where_something_was_measured_without_a_proxy() {
        let columns = vec![(DIRECT, vec![4.0, 2.0, 3.0]), ("one", vec![1.0, 2.0, 9.0]), ("none", vec![])];
        let figures = Comparison::new("relay", "streams", "GB/s", columns).figures();
        let cases: Vec<&str> = figures.iter().map(|figure| figure.case.as_str()).collect();
        assert_eq!(cases[..3], ["streams, direct, least", "streams, direct, p50", "streams, direct, most"]);
        assert_eq!(cases[3..], ["streams, one, least", "streams, one, p50", "streams, one, most"]);
        assert_eq!((figures[4].value, figures[4].floor), (2.0, Some(3.0)));
        let figures = Comparison::new("relay", "memory", "B", vec![("one", vec![1.0])]).figures();
        assert_eq!((figures[1].value, figures[1].floor), (1.0, None));
    }
}
