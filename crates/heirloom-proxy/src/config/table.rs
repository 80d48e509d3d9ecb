//! A table of a TOML file that is read key by key: it knows where each value stands, and which keys there are.

use std::collections::HashMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::Wrong;

/// What is left of a table. A key that nobody has taken when it is [finished](Table::finish) is unknown.
pub(super) struct Table<'a> {
    /// Where the table begins.
    start: usize,
    left: DeTable<'a>,
    /// The keys that were asked for, in this order.
    known: Vec<&'static str>,
    /// Where the values are that were there.
    places: HashMap<&'static str, usize>,
}

impl<'a> Table<'a> {
    /// The whole of a file.
    pub(super) fn parse(text: &'a str) -> Result<Table<'a>, Wrong> {
        match DeTable::parse(text) {
            Ok(table) => Ok(Table::new(0, table.into_inner())),
            Err(error) => {
                let at = error.span().map_or(text.len(), |span: Range<usize>| span.start);
                Err(Wrong::new(at, error.message()))
            }
        }
    }

    fn new(start: usize, left: DeTable<'a>) -> Table<'a> {
        Table { start, left, known: Vec::new(), places: HashMap::new() }
    }

    /// Takes a value out, if there is one. `read` says what is wrong with it in words that go on after its key.
    pub(super) fn take<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&DeValue<'a>) -> Result<T, String>,
    ) -> Result<Option<T>, Wrong> {
        let Some(value) = self.take_value(key) else {
            return Ok(None);
        };
        match read(value.get_ref()) {
            Ok(value) => Ok(Some(value)),
            Err(why) => Err(Wrong::new(value.span().start, format!("`{key}` {why}"))),
        }
    }

    /// Takes a table out, if there is one.
    pub(super) fn take_table(&mut self, key: &'static str) -> Result<Option<Table<'a>>, Wrong> {
        self.take_value(key).map(|value| table(key, value, &format!("a table, [{key}]"))).transpose()
    }

    /// Takes a list out, if there is one.
    pub(super) fn take_list(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Vec<Spanned<DeValue<'a>>>>, Wrong> {
        let Some(value) = self.take_value(key) else {
            return Ok(None);
        };
        let start = value.span().start;
        match value.into_inner() {
            DeValue::Array(list) if list.is_empty() => {
                Err(Wrong::new(start, format!("`{key}` is empty: write at least one")))
            }
            DeValue::Array(list) => Ok(Some(list.into_iter().collect())),
            other => {
                Err(Wrong::new(start, format!("`{key}` is to be a list in brackets, not {}", kind(&other))))
            }
        }
    }

    /// Takes out all tables `[[key]]`.
    pub(super) fn take_tables(&mut self, key: &'static str) -> Result<Vec<Table<'a>>, Wrong> {
        let Some(value) = self.take_value(key) else {
            return Ok(Vec::new());
        };
        let what = format!("a table with two brackets, [[{key}]]");
        match value.get_ref() {
            DeValue::Array(_) => {}
            other => {
                return Err(Wrong::new(
                    value.span().start,
                    format!("`{key}` is to be {what}, not {}", kind(other)),
                ));
            }
        }
        let DeValue::Array(list) = value.into_inner() else { return Ok(Vec::new()) };
        list.into_iter().map(|value| table(key, value, &what)).collect()
    }

    /// Takes out all tables `[key.NAME]`, in the order in which they are written, with their names.
    pub(super) fn take_named_tables(&mut self, key: &'static str) -> Result<Vec<(String, Table<'a>)>, Wrong> {
        let what = format!("a table with a name, [{key}.NAME]");
        let Some(value) = self.take_value(key) else {
            return Ok(Vec::new());
        };
        let all = table(key, value, &what)?;
        let mut named = Vec::new();
        for (name, value) in all.left {
            // A table may be put together from several places; the first is where its name is.
            let start = name.span().start;
            let table = Table { start, ..table(key, value, &what)? };
            named.push((name.into_inner().into_owned(), table));
        }
        named.sort_by_key(|(_, table)| table.start);
        Ok(named)
    }

    /// Where the value of this key is, or else the table.
    pub(super) fn place(&self, key: &str) -> usize {
        self.places.get(key).copied().unwrap_or(self.start)
    }

    /// Whether there was a value for this key.
    pub(super) fn had(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    /// What is wrong with the value of this key, or with the table for want of it.
    pub(super) fn wrong(&self, key: &str, message: impl Into<String>) -> Wrong {
        Wrong::new(self.place(key), message)
    }

    /// There are to be no other keys than those that were asked for.
    pub(super) fn finish(&self) -> Result<(), Wrong> {
        let Some(unknown) = self.left.keys().min_by_key(|key| key.span().start) else {
            return Ok(());
        };
        let name = unknown.get_ref();
        let shown = name.escape_debug();
        let message = match nearest(name, &self.known) {
            Some(known) => format!("unknown key `{shown}`: is it `{known}`?"),
            None => format!("unknown key `{shown}`: here are {}", list(&self.known)),
        };
        Err(Wrong::new(unknown.span().start, message))
    }

    fn take_value(&mut self, key: &'static str) -> Option<Spanned<DeValue<'a>>> {
        self.known.push(key);
        let value = self.left.remove(key)?;
        self.places.insert(key, value.span().start);
        Some(value)
    }
}

/// A value that is to be a table.
pub(super) fn table<'a>(key: &str, value: Spanned<DeValue<'a>>, what: &str) -> Result<Table<'a>, Wrong> {
    let start = value.span().start;
    match value.into_inner() {
        DeValue::Table(table) => Ok(Table::new(start, table)),
        other => Err(Wrong::new(start, format!("`{key}` is to be {what}, not {}", kind(&other)))),
    }
}

/// What a value is, for people.
pub(super) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// Words in backticks, as one says them.
pub(super) fn list(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => "none".to_owned(),
    }
}

/// The word that somebody probably meant.
pub(super) fn nearest<'w>(word: &str, known: &[&'w str]) -> Option<&'w str> {
    let distances = known.iter().map(|known| (distance(word, known), *known));
    let near = distances.filter(|(distance, known)| *distance <= 1.max(known.len() / 3));
    near.min_by_key(|(distance, _)| *distance).map(|(_, known)| known)
}

/// How many letters are to be put in, left out or changed to make one word of another (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().take(64).collect(), to.chars().collect());
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, letter) in from.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, other) in to.iter().enumerate() {
            let changed = diagonal + usize::from(letter != other);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_the_one_that_was_meant() {
        let known = ["listen", "to", "pool", "connect_timeout", "idle_timeout"];
        for (word, meant) in [
            ("lisen", Some("listen")),
            ("Listen", Some("listen")),
            ("listens", Some("listen")),
            ("connect-timeout", Some("connect_timeout")),
            ("timeout", None),
            ("pol", Some("pool")),
            ("xyz", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, &known), meant, "{word}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
