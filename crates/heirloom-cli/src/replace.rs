//! The option `--replace`: what to do about a process that serves already.

use clap::ValueEnum;
use heirloom::Replace;

/// What the option may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReplaceArg {
    #[value(alias = "nope")]
    Never,
    Try,
    Must,
}

impl From<ReplaceArg> for Replace {
    fn from(replace: ReplaceArg) -> Self {
        match replace {
            ReplaceArg::Never => Replace::Never,
            ReplaceArg::Try => Replace::Try,
            ReplaceArg::Must => Replace::Must,
        }
    }
}
