//! The request for an upgrade, and the answer to a dry run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What an operator asks for. The default: this program's own file as it is now on disk, with the same arguments.
///
/// A request for a program or arguments is granted to the incumbent's own user and to root alone, whoever else may ask
/// other things: it runs what it names with the incumbent's rights.
///
/// ```
/// use heirloom::upgrade::Upgrade;
///
/// let request = Upgrade { dry_run: true, ..Upgrade::default() };
/// let json = serde_json::to_string(&request)?;
/// assert_eq!(serde_json::from_str::<Upgrade>("{\"dry_run\": true}")?, request);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Upgrade {
    /// The file to run, as an absolute path.
    pub program: Option<PathBuf>,
    /// Its arguments, without its own name.
    pub arguments: Option<Vec<String>>,
    /// Become the new program in place, even where a takeover would do.
    pub in_place: bool,
    /// Only find out whether the new program could take over.
    pub dry_run: bool,
    /// Asked of a supervisor: upgrade the supervisor itself, and not what it supervises.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub itself: bool,
    /// The generation that is to be replaced: if another one serves by now, the request is refused.
    pub generation: Option<u64>,
}

/// What a dry run has found: the new program could take over.
///
/// ```
/// let checked: heirloom::upgrade::Checked =
///     serde_json::from_str(r#"{"program": "echod", "version": "2.0", "in_place": true}"#)?;
/// assert!(checked.in_place);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checked {
    /// The new program's name, as it says.
    pub program: String,
    /// Its version, as it says.
    pub version: String,
    /// Whether the upgrade would be in place.
    pub in_place: bool,
    /// How many items would be handed over, the control socket included.
    pub items: u64,
    /// Length of the manifest in bytes.
    pub bytes: u64,
}
