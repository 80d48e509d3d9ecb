//! The section of the manifest that says under which numbers the descriptors stay open.

use minicbor::{Decode, Encode};

use crate::manifest::{ManifestError, Section};

/// The section's name. It is critical: without it nothing can be had.
pub(super) const SECTION: &str = "heirloom.in-place";

/// What the new program needs beside the bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Record {
    /// Each item's id and descriptor.
    #[n(0)]
    pub(super) descriptors: Vec<(u64, i32)>,
    /// The lock file, locked.
    #[n(1)]
    pub(super) lock: i32,
    /// The signal mask of before the freeze; bit `n - 1` stands for signal `n`.
    #[n(2)]
    pub(super) signal_mask: u64,
    /// CLOCK_MONOTONIC at the freeze, and when the upgrade began, in nanoseconds.
    #[n(3)]
    pub(super) frozen_at_ns: u64,
    #[n(4)]
    pub(super) began_at_ns: u64,
}

impl Record {
    pub(super) fn to_section(&self) -> Result<Section, ManifestError> {
        let bytes = minicbor::to_vec(self).map_err(ManifestError::Encode)?;
        Ok(Section { name: SECTION.into(), critical: true, bytes })
    }

    pub(super) fn from_section(section: &Section) -> Result<Record, ManifestError> {
        minicbor::decode(&section.bytes).map_err(ManifestError::Malformed)
    }
}
