//! The fixed header in front of each part of a manifest.
//!
//! It says what follows and whether it is whole, before a byte of it is parsed. Little endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | `HEIRLOOM` |
//! | 8..10 | format version |
//! | 10..12 | part: 1 base, 2 delta |
//! | 12..16 | CRC-32 (IEEE) of the body |
//! | 16..24 | length of the body in bytes |

use std::fmt;

use super::ManifestError;

const MAGIC: &[u8; 8] = b"HEIRLOOM";

/// The format version that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u16 = 1;
/// The oldest format version that this program reads.
pub const OLDEST_FORMAT_VERSION: u16 = 1;
/// Bytes in a header.
pub const HEADER_BYTES: usize = 24;

/// Which part of a manifest this is.
///
/// ```
/// assert_eq!(heirloom::manifest::Part::Delta.to_string(), "delta");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// A [`Base`](super::Base).
    Base = 1,
    /// A [`Delta`](super::Delta).
    Delta = 2,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Base => "base manifest",
            Part::Delta => "delta",
        })
    }
}

/// One part of a manifest, ready to be put in a memfd.
///
/// ```
/// use heirloom::{Limits, manifest::{Base, Header}};
///
/// let encoded = Base::default().encode(&Limits::default()).unwrap();
/// assert_eq!(Header::read(&encoded.bytes).unwrap().crc, encoded.crc);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Header and body.
    pub bytes: Vec<u8>,
    /// CRC-32 of the body. A base's is what its delta refers to.
    pub crc: u32,
}

/// What the header of a part says.
///
/// ```
/// use heirloom::{Limits, manifest::{Base, Header, Part}};
///
/// let encoded = Base::default().encode(&Limits::default()).unwrap();
/// let header = Header::read(&encoded.bytes).unwrap();
/// assert_eq!((header.part, header.length as usize + 24), (1, encoded.bytes.len()));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Format version, one that this program reads.
    pub version: u16,
    /// The number of the [`Part`].
    pub part: u16,
    /// CRC-32 of the body.
    pub crc: u32,
    /// Bytes in the body.
    pub length: u64,
}

impl Header {
    /// Reads the header at the front of `bytes`, without looking at the body.
    ///
    /// # Errors
    /// [`ManifestError::TooShort`], [`ManifestError::NotAManifest`] or [`ManifestError::Version`].
    pub fn read(bytes: &[u8]) -> Result<Header, ManifestError> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(ManifestError::TooShort { found: bytes.len() });
        };
        let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, p0, p1, c0, c1, c2, c3, length @ ..] = *header;
        if [m0, m1, m2, m3, m4, m5, m6, m7] != *MAGIC {
            return Err(ManifestError::NotAManifest);
        }
        let version = u16::from_le_bytes([v0, v1]);
        if !(OLDEST_FORMAT_VERSION..=FORMAT_VERSION).contains(&version) {
            return Err(ManifestError::Version {
                found: version,
                oldest: OLDEST_FORMAT_VERSION,
                newest: FORMAT_VERSION,
            });
        }
        Ok(Header {
            version,
            part: u16::from_le_bytes([p0, p1]),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
            length: u64::from_le_bytes(length),
        })
    }
}

/// Puts a header in front of the body that `write` appends, for which there is room if it has about so many bytes.
pub(super) fn frame<E>(
    part: Part,
    about: usize,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<Encoded, E> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + about);
    bytes.resize(HEADER_BYTES, 0);
    write(&mut bytes)?;
    let body = &bytes[HEADER_BYTES..];
    let crc = crc32fast::hash(body);
    let length = body.len() as u64;
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes[10..12].copy_from_slice(&(part as u16).to_le_bytes());
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    Ok(Encoded { bytes, crc })
}

/// Checks the header of `part` and the checksum, and returns the body.
pub(super) fn unframe(part: Part, bytes: &[u8]) -> Result<&[u8], ManifestError> {
    let header = Header::read(bytes)?;
    let body = &bytes[HEADER_BYTES..];
    if header.part != part as u16 {
        return Err(ManifestError::WrongPart { expected: part, found: header.part });
    }
    if header.length != body.len() as u64 {
        return Err(ManifestError::Length { announced: header.length, found: body.len() as u64 });
    }
    match crc32fast::hash(body) {
        crc if crc == header.crc => Ok(body),
        found => Err(ManifestError::Checksum { announced: header.crc, found }),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn framed() -> Encoded {
        frame(Part::Delta, 0, |out| {
            out.extend(b"body");
            Ok::<_, Infallible>(())
        })
        .unwrap()
    }

    #[test]
    fn the_layout_is_fixed() {
        let Encoded { bytes, crc } = framed();
        // crc32("body") as zlib and gzip compute it.
        assert_eq!(crc, 0xdba8_0bb2);
        let mut expected = b"HEIRLOOM\x01\x00\x02\x00".to_vec();
        expected.extend(crc.to_le_bytes());
        expected.extend(b"\x04\0\0\0\0\0\0\0body");
        assert_eq!(bytes, expected);
        assert_eq!(unframe(Part::Delta, &bytes).unwrap(), b"body");
    }

    #[test]
    fn each_field_is_checked() {
        let spoiled = |at: usize| {
            let mut bytes = framed().bytes;
            bytes[at] ^= 0x80;
            unframe(Part::Delta, &bytes).unwrap_err()
        };
        assert!(matches!(spoiled(0), ManifestError::NotAManifest));
        assert!(matches!(spoiled(8), ManifestError::Version { found: 0x81, oldest: 1, newest: 1 }));
        assert!(matches!(spoiled(10), ManifestError::WrongPart { expected: Part::Delta, found: 0x82 }));
        assert!(matches!(spoiled(12), ManifestError::Checksum { .. }));
        assert!(matches!(spoiled(16), ManifestError::Length { announced: 0x84, found: 4 }));
        assert!(matches!(spoiled(24), ManifestError::Checksum { .. }));
        assert!(matches!(
            unframe(Part::Base, &framed().bytes),
            Err(ManifestError::WrongPart { found: 2, .. })
        ));
        assert!(matches!(
            unframe(Part::Base, &framed().bytes[..23]),
            Err(ManifestError::TooShort { found: 23 })
        ));
    }
}
