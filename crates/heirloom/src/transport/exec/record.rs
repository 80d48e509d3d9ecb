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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn section(bytes: &[u8]) -> Section {
        Section { name: SECTION.into(), critical: true, bytes: bytes.into() }
    }

    #[test]
    fn what_the_first_version_wrote_is_read() {
        // {0: [[0, 7], [9, -1]], 1: 8, 2: 2^64-1, 3: 1, 4: 2}
        let first =
            b"\xa5\x00\x82\x82\x00\x07\x82\x09\x20\x01\x08\x02\x1b\xff\xff\xff\xff\xff\xff\xff\xff\x03\x01\x04\x02";
        let record = Record {
            descriptors: vec![(0, 7), (9, -1)],
            lock: 8,
            signal_mask: u64::MAX,
            frozen_at_ns: 1,
            began_at_ns: 2,
        };
        assert_eq!(Record::from_section(&section(first)).unwrap(), record);
        assert_eq!(record.to_section().unwrap(), section(first));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(record) = Record::from_section(&section(&bytes)) {
                prop_assert_eq!(Record::from_section(&record.to_section().unwrap()).unwrap(), record);
            }
        }

        #[test]
        fn records_come_back(descriptors: Vec<(u64, i32)>, lock: i32, signal_mask: u64, at: u64) {
            let record = Record { descriptors, lock, signal_mask, frozen_at_ns: at, began_at_ns: at / 2 };
            prop_assert_eq!(Record::from_section(&record.to_section().unwrap()).unwrap(), record);
        }
    }
}
