//! The new program's side of a preflight: it looks at the manifest on stdin and answers on stdout.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::{retry_on_intr, write};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::role::{Role, parent};
use crate::bundle::BundleError;
use crate::codec::{Cbor, Codec};
use crate::config::Config;
use crate::crash::{self, Point};
use crate::item::Entry;
use crate::manifest::{Base, Header, ManifestError, Section, read_sealed};
use crate::service::Service;

/// The section of a preflight's manifest that says where the control socket is.
const PATH_SECTION: &str = "heirloom.control-path";

/// What a preflight answers: one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    /// It could take over. The manifest's checksum shows that it has really read it.
    Ready { program: String, version: String, crc: u32 },
    /// It could not, or does not want to.
    Refused { reason: String },
}

/// The incumbent asks whether this program could take its place: decode what it would hand over, then
/// [`pass`](Preflight::pass) or [`refuse`](Preflight::refuse), and exit.
///
/// It holds no descriptors, and the incumbent serves all the while. Whatever can go wrong in a start, such as an invalid
/// configuration, is to be found before [`start`](crate::start()) or here. Ending without an answer counts as a refusal.
///
/// ```
/// use heirloom::upgrade::Preflight;
///
/// fn look(preflight: Preflight) -> std::io::Result<()> {
///     match preflight.state::<String>() {
///         Ok(_topic) => preflight.pass(),
///         Err(error) => preflight.refuse(error),
///     }
/// }
/// ```
#[derive(Debug)]
#[must_use = "the incumbent waits for an answer"]
pub struct Preflight {
    base: Base,
    crc: u32,
    service: Service,
}

impl Preflight {
    /// The preflight that this process was started for, if it was; one that cannot succeed is answered here.
    pub(crate) fn of_this_process(
        path: &Path,
        service: &Service,
        config: &Config,
    ) -> Result<Option<Preflight>, PreflightError> {
        let Some(Role::Preflight { incumbent, .. }) = Role::of_this_process() else { return Ok(None) };
        if parent() != Some(incumbent) {
            // Whoever reads the answer, if anybody does, is to hear it.
            let error = PreflightError::NoChild { incumbent };
            let _ = answer(&Verdict::Refused { reason: error.to_string() });
            return Err(error);
        }
        let preflight = Preflight::read(path, service, config);
        if let Err(error) = &preflight {
            answer(&Verdict::Refused { reason: error.to_string() }).map_err(PreflightError::Answer)?;
        }
        preflight.map(Some)
    }

    fn read(path: &Path, service: &Service, config: &Config) -> Result<Preflight, PreflightError> {
        let bytes = read_sealed(rustix::stdio::stdin(), config.limits.manifest_bytes)?;
        let base = Base::decode(&bytes, &config.limits)?;
        base.check_sections(&[PATH_SECTION])?;
        let theirs = base.sections.iter().find(|section| section.name == PATH_SECTION);
        let theirs = theirs.map(|section| PathBuf::from(OsStr::from_bytes(&section.bytes)));
        if let Some(theirs) = theirs.filter(|theirs| !same_file(theirs, path)) {
            return Err(PreflightError::AnotherPath { ours: path.into(), theirs });
        }
        if base.service.name != service.name {
            return Err(PreflightError::AnotherService {
                ours: service.name.clone(),
                theirs: base.service.name,
            });
        }
        if !service.reads.contains(base.service.schema) {
            return Err(PreflightError::Schema {
                reads: service.reads.to_string(),
                schema: base.service.schema,
            });
        }
        crash::reach(Point::PreflightRead);
        Ok(Preflight { base, crc: Header::read(&bytes)?.crc, service: service.clone() })
    }

    /// The manifest: what would be handed over, as it was a moment ago.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The items, the control socket among them.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.base.items.iter()
    }

    /// The application's state, `None` when there is none.
    ///
    /// # Errors
    ///
    /// [`BundleError::State`] when it is not a `T`.
    pub fn state<T: DeserializeOwned>(&self) -> Result<Option<T>, BundleError> {
        let state = self.base.state.as_deref().map(Cbor::decode).transpose();
        state.map_err(|source| BundleError::State { of: "the application state".into(), source })
    }

    /// Says that this program could take over.
    ///
    /// # Errors
    ///
    /// Those of write(2): nobody waits for the answer any more.
    pub fn pass(self) -> io::Result<()> {
        let Service { program, version, .. } = self.service;
        crash::reach(Point::PreflightAnswering);
        answer(&Verdict::Ready { program, version, crc: self.crc })
    }

    /// Says that it could not, and why.
    ///
    /// # Errors
    ///
    /// As [`Preflight::pass`].
    pub fn refuse(self, why: impl ToString) -> io::Result<()> {
        answer(&Verdict::Refused { reason: why.to_string() })
    }
}

/// Why a preflight could not succeed. The incumbent was told.
///
/// ```
/// use heirloom::upgrade::PreflightError;
///
/// let error = PreflightError::Schema { reads: "1..=2".into(), schema: 3 };
/// assert!(error.to_string().contains("schema 3"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreflightError {
    /// The parent of this process is not the incumbent that asks.
    #[error(
        "it is no child of the incumbent that asks (pid {incumbent}), which has ended; or a script is between them: let it start the program with exec"
    )]
    NoChild {
        /// The incumbent.
        incumbent: u32,
    },
    /// The manifest cannot be read.
    #[error("cannot read the incumbent's manifest: {0}")]
    Manifest(#[from] ManifestError),
    /// It would serve at another control socket.
    #[error(
        "the new program's control socket would be {}, the incumbent's is {}; give it the same",
        ours.display(),
        theirs.display()
    )]
    AnotherPath {
        /// The new program's.
        ours: PathBuf,
        /// The incumbent's.
        theirs: PathBuf,
    },
    /// It would be another service.
    #[error(
        "the incumbent serves `{theirs}`, the new program would serve `{ours}`; give it the same address or name"
    )]
    AnotherService {
        /// The new program's.
        ours: String,
        /// The incumbent's.
        theirs: String,
    },
    /// It cannot read the state.
    #[error(
        "the incumbent writes state of schema {schema}, the new program reads {reads}; go by a version that reads it"
    )]
    Schema {
        /// The range that the new program reads.
        reads: String,
        /// What the incumbent writes.
        schema: u32,
    },
    /// The answer could not be given.
    #[error("cannot answer the incumbent: {0}")]
    Answer(#[source] io::Error),
}

/// Writes to stdout, which is the incumbent's.
fn answer(verdict: &Verdict) -> io::Result<()> {
    let mut line = serde_json::to_vec(verdict)?;
    line.push(b'\n');
    let mut rest = &line[..];
    while !rest.is_empty() {
        rest = &rest[retry_on_intr(|| write(rustix::stdio::stdout(), rest))?..];
    }
    Ok(())
}

/// Whether both paths lead to the same socket, however they are written.
fn same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
    one == other || matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

/// The section that says where the control socket is.
pub(crate) fn path_section(path: &Path) -> Section {
    let bytes = path.as_os_str().as_bytes().to_vec();
    Section { name: PATH_SECTION.into(), critical: false, bytes }
}
