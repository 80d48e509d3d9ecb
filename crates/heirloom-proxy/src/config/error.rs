//! Why something is no configuration, and where in its file.

use std::io;
use std::path::{Path, PathBuf};

/// Why there is no [`Config`](super::Config).
///
/// ```
/// use heirloom_proxy::config::{Config, ConfigError};
///
/// let error = Config::parse("[[listener]]\nlisen = ':80'\n", "web.toml").unwrap_err();
/// assert_eq!(error.to_string(), "web.toml:2:1: unknown key `lisen`: is it `listen`?");
/// assert!(matches!(error, ConfigError::Wrong { line: 2, column: 1, .. }));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file has something wrong in it.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// In which line, from 1.
        line: usize,
        /// At which character of it, from 1.
        column: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// What is asked for without a file makes no sense.
    #[error("{0}")]
    Simple(String),
}

/// What is wrong at a byte of the text.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) at: usize,
    pub(super) message: String,
}

impl Wrong {
    pub(super) fn new(at: usize, message: impl Into<String>) -> Wrong {
        Wrong { at, message: message.into() }
    }

    /// As people count. A text that is no UTF-8 is read up to there.
    pub(super) fn locate(self, text: &[u8], path: &Path) -> ConfigError {
        let before = &text[..self.at.min(text.len())];
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
        ConfigError::Wrong { path: path.to_owned(), line, column, message: self.message }
    }
}
