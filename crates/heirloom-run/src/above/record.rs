//! What is known of an entry of the vault, written down: it travels in the bytes of the message that has the descriptor.
//!
//! A message is a byte for its form, and its records. A record is its length (two bytes, without themselves), the number (8), the
//! process (4), the role (1), flags (1), the length of the name (2), and the name; what follows that is of a newer version, and
//! is passed over. All numbers are little-endian. It is that simple because a page is written anew for a removal.

use std::borrow::Cow;
use std::os::fd::BorrowedFd;

/// The form that this version writes. What is added at a record's end is no other form.
const FORM: u8 = 1;

/// What a record has in bytes beside its name.
pub(super) const RECORD: usize = 2 + 8 + 4 + 1 + 1 + 2;

/// The flag of what goes when its other end hangs up.
const POLLED: u8 = 1;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The sending end of the page that it is in.
    Pen,
    /// What the command has stored.
    Stored,
    /// A socket of `--listen`, named as the option has it.
    Listening,
    /// The socket at which the command speaks: what is in its queue is not lost either.
    Notify,
    /// A process of the command, as a pidfd: it must have ended before the next one starts.
    Process,
    /// A memfd with what has been learned of the command.
    Memory,
    /// Of another version.
    Unknown,
}

/// The roles, each at its number.
const ROLES: [Role; 6] =
    [Role::Pen, Role::Stored, Role::Listening, Role::Notify, Role::Process, Role::Memory];

/// What is known of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    pub(crate) number: u64,
    pub(crate) role: Role,
    pub(crate) name: Cow<'a, str>,
    /// The process that has put it, or that it is.
    pub(crate) put_by: u32,
    /// It goes when its other end hangs up.
    pub(crate) polled: bool,
}

impl<'a> Record<'a> {
    pub(crate) fn new(number: u64, role: Role, name: &'a str) -> Record<'a> {
        Record { number, role, name: name.into(), put_by: 0, polled: false }
    }
}

/// An entry, lent to be put.
#[derive(Clone, Debug)]
pub(crate) struct Lent<'a> {
    pub(crate) record: Record<'a>,
    pub(crate) descriptor: BorrowedFd<'a>,
}

/// The bytes that travel with the descriptors of these.
pub(crate) fn encode<'a>(records: impl Iterator<Item = &'a Record<'a>>) -> Vec<u8> {
    let mut bytes = vec![FORM];
    for record in records {
        // Longer ones do not come here: names are those of sd_notify(3), and addresses have a port or are paths of sockets.
        let name = &record.name.as_bytes()[..record.name.len().min(usize::from(u16::MAX) - RECORD)];
        let role = ROLES.iter().position(|role| *role == record.role).unwrap_or(ROLES.len());
        bytes.extend_from_slice(&((RECORD - 2 + name.len()) as u16).to_le_bytes());
        bytes.extend_from_slice(&record.number.to_le_bytes());
        bytes.extend_from_slice(&record.put_by.to_le_bytes());
        bytes.extend_from_slice(&[role as u8, if record.polled { POLLED } else { 0 }]);
        bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
        bytes.extend_from_slice(name);
    }
    bytes
}

/// The records of a message; or what is wrong with it.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Record<'static>>, &'static str> {
    let (&[form], mut rest) = bytes.split_first_chunk().ok_or("a message is empty")?;
    if form != FORM {
        return Err("a message has another form");
    }
    let mut records = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk().ok_or(SHORT)?;
        let (record, behind) = behind.split_at_checked(u16::from_le_bytes(*length).into()).ok_or(SHORT)?;
        records.push(decode_one(record).ok_or(SHORT)?);
        rest = behind;
    }
    Ok(records)
}

const SHORT: &str = "a record is too short";

fn decode_one(bytes: &[u8]) -> Option<Record<'static>> {
    let (number, bytes) = bytes.split_first_chunk()?;
    let (put_by, bytes) = bytes.split_first_chunk()?;
    let (&[role, flags], bytes) = bytes.split_first_chunk()?;
    let (length, bytes) = bytes.split_first_chunk()?;
    let name = bytes.get(..u16::from_le_bytes(*length).into())?;
    Some(Record {
        number: u64::from_le_bytes(*number),
        role: ROLES.get(usize::from(role)).copied().unwrap_or(Role::Unknown),
        name: String::from_utf8_lossy(name).into_owned().into(),
        put_by: u32::from_le_bytes(*put_by),
        polled: flags & POLLED != 0,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn records_come_back_as_they_were(
            entries in prop::collection::vec((any::<u64>(), 0..ROLES.len(), ".{0,300}", any::<u32>(), any::<bool>()), 0..9),
        ) {
            let record = |(number, role, name, put_by, polled): (u64, usize, String, u32, bool)| Record {
                number, role: ROLES[role], name: name.into(), put_by, polled,
            };
            let records: Vec<Record<'_>> = entries.into_iter().map(record).collect();
            let bytes = encode(records.iter());
            prop_assert_eq!(decode(&bytes).unwrap(), records.clone());
            // A part of a message is an error, or has fewer records.
            for end in 0..bytes.len() {
                prop_assert!(!decode(&bytes[..end]).is_ok_and(|some| some.len() >= records.len().max(1)));
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn what_a_newer_version_adds_is_no_error() {
        let mut bytes = encode([Record::new(3, Role::Stored, "x")].iter());
        // A role that is not known, and one more byte at the record's end.
        bytes[1] += 1;
        bytes[15] = 200;
        bytes.push(7);
        let read = decode(&bytes).unwrap();
        assert_eq!(read, [Record::new(3, Role::Unknown, "x")]);
        bytes[0] += 1;
        assert!(decode(&bytes).is_err());
    }
}
