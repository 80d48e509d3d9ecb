//! What is known of an entry of the vault, written down: it travels in the bytes of the message that has the descriptor.

use std::borrow::Cow;
use std::os::fd::BorrowedFd;

use heirloom::{Cbor, Codec, CodecError};
use serde::{Deserialize, Serialize};

/// The form that this version writes. Fields may be added without another.
const FORM: u32 = 1;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    #[serde(other)]
    Unknown,
}

/// What is known of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record<'a> {
    #[serde(rename = "n")]
    pub(crate) number: u64,
    #[serde(rename = "r")]
    pub(crate) role: Role,
    #[serde(rename = "name", default)]
    pub(crate) name: Cow<'a, str>,
    /// The process that has put it, or that it is.
    #[serde(rename = "by", default)]
    pub(crate) put_by: u32,
    /// It goes when its other end hangs up.
    #[serde(rename = "poll", default)]
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

/// A message's bytes.
#[derive(Serialize, Deserialize)]
struct Packet<'a> {
    form: u32,
    records: Cow<'a, [Record<'a>]>,
}

/// The bytes that travel with the descriptors of these.
pub(crate) fn encode(records: &[Record<'_>]) -> Result<Vec<u8>, CodecError> {
    Cbor::encode(&Packet { form: FORM, records: records.into() })
}

/// The records of a message. None: it is of a form that this version does not know.
pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Vec<Record<'static>>>, CodecError> {
    let packet: Packet<'static> = Cbor::decode(bytes)?;
    Ok((packet.form == FORM).then(|| packet.records.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were() {
        let stored = Record { put_by: 7, polled: true, ..Record::new(u64::MAX, Role::Stored, "a b") };
        let records = [Record::new(0, Role::Pen, ""), stored];
        assert_eq!(decode(&encode(&records).unwrap()).unwrap().unwrap(), records);
        assert!(decode(b"garbage").is_err());
    }

    #[test]
    fn what_a_newer_version_adds_is_no_error() {
        #[derive(Serialize)]
        enum Newer {
            Spaceship,
        }
        #[derive(Serialize)]
        struct More {
            n: u64,
            r: Newer,
            more: u8,
        }
        #[derive(Serialize)]
        struct Packet {
            form: u32,
            records: Vec<More>,
        }
        let packet = |form| {
            Cbor::encode(&Packet { form, records: vec![More { n: 3, r: Newer::Spaceship, more: 1 }] })
                .unwrap()
        };
        let read = decode(&packet(FORM)).unwrap().unwrap();
        assert_eq!((read[0].number, read[0].role), (3, Role::Unknown));
        assert!(decode(&packet(FORM + 1)).unwrap().is_none());
    }
}
