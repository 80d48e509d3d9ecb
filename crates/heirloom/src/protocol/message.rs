//! The messages on the channel, one a packet, and their encoding.
//!
//! A packet is the CBOR of one of the two enums. Descriptors travel beside the packet: one with `Offer` (the base
//! manifest), as many as ids with `Batch`, one with `Freeze` (the delta), none otherwise.

use minicbor::{Decode, Encode};

use super::BATCH;
use crate::item::ItemId;

/// The longest text of a reason in an `Abort`, in bytes; longer ones are cut.
const MAX_REASON: usize = 1024;

/// What the incumbent says.
///
/// ```
/// use heirloom::protocol::ToSuccessor;
///
/// assert!(ToSuccessor::abort("not now").to_packet().len() < 32);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum ToSuccessor {
    /// The base manifest, in the sealed memfd beside it.
    #[n(0)]
    Offer,
    /// Some of the items' descriptors, in the order of the ids.
    #[n(1)]
    Batch {
        /// Whose descriptors these are.
        #[n(0)]
        ids: Vec<ItemId>,
    },
    /// Every descriptor of the base manifest that still exists has been sent.
    #[n(2)]
    Offered,
    /// The incumbent touches nothing any more; the delta is in the sealed memfd beside it.
    #[n(3)]
    Freeze,
    /// The service lock is free for the successor.
    #[n(4)]
    Released,
    /// The incumbent goes on serving; this takeover is over.
    #[n(5)]
    Abort {
        /// Why, for people.
        #[n(0)]
        reason: String,
    },
}

/// What the successor says.
///
/// ```
/// use heirloom::protocol::ToIncumbent;
///
/// assert_eq!(ToIncumbent::from_packet(&ToIncumbent::Ready.to_packet(), 0), Ok(ToIncumbent::Ready));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum ToIncumbent {
    /// One more batch has been read.
    #[n(0)]
    Credit,
    /// It could serve at once.
    #[n(1)]
    Ready,
    /// It has decoded everything and holds every descriptor.
    #[n(2)]
    Accept,
    /// It holds the lock and serves from now on. The commit point.
    #[n(3)]
    Taken,
    /// It gives up.
    #[n(4)]
    Abort {
        /// Why, for people.
        #[n(0)]
        reason: String,
    },
}

/// A packet that is not a message of this protocol.
///
/// ```
/// use heirloom::protocol::ToIncumbent;
///
/// let error = ToIncumbent::from_packet(b"hello?", 0).unwrap_err();
/// assert_eq!(error.bytes, 6);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a packet of {bytes} bytes is not a message: {why}")]
pub struct MessageError {
    /// The packet's length.
    pub bytes: usize,
    /// What is wrong with it.
    pub why: String,
}

impl ToSuccessor {
    /// The packet of this message.
    pub fn to_packet(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a packet. `descriptors` is how many arrived beside it; another number than the message has is an error.
    ///
    /// ```
    /// use heirloom::protocol::ToSuccessor;
    ///
    /// let packet = ToSuccessor::Released.to_packet();
    /// assert_eq!(ToSuccessor::from_packet(&packet, 0)?, ToSuccessor::Released);
    /// assert!(ToSuccessor::from_packet(&packet, 1).is_err());
    /// # Ok::<(), heirloom::protocol::MessageError>(())
    /// ```
    pub fn from_packet(packet: &[u8], descriptors: usize) -> Result<Self, MessageError> {
        let message: ToSuccessor = decode(packet)?;
        let expected = match &message {
            ToSuccessor::Offer | ToSuccessor::Freeze => 1,
            ToSuccessor::Batch { ids } if ids.len() > BATCH => {
                return Err(error(packet, format!("{} ids in a batch of at most {BATCH}", ids.len())));
            }
            ToSuccessor::Batch { ids } => ids.len(),
            ToSuccessor::Offered | ToSuccessor::Released | ToSuccessor::Abort { .. } => 0,
        };
        check_count(packet, descriptors, expected)?;
        Ok(message)
    }

    /// An `Abort` with this reason, cut to what a packet may carry.
    pub fn abort(reason: impl ToString) -> Self {
        ToSuccessor::Abort { reason: cut(reason.to_string()) }
    }
}

impl ToIncumbent {
    /// The packet of this message.
    pub fn to_packet(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a packet; none of these messages comes with descriptors.
    ///
    /// ```
    /// use heirloom::protocol::ToIncumbent;
    ///
    /// let packet = ToIncumbent::Taken.to_packet();
    /// assert_eq!(ToIncumbent::from_packet(&packet, 0)?, ToIncumbent::Taken);
    /// assert!(ToIncumbent::from_packet(b"garbage", 0).is_err());
    /// # Ok::<(), heirloom::protocol::MessageError>(())
    /// ```
    pub fn from_packet(packet: &[u8], descriptors: usize) -> Result<Self, MessageError> {
        let message = decode(packet)?;
        check_count(packet, descriptors, 0)?;
        Ok(message)
    }

    /// An `Abort` with this reason, cut to what a packet may carry.
    pub fn abort(reason: impl ToString) -> Self {
        ToIncumbent::Abort { reason: cut(reason.to_string()) }
    }
}

fn encode<M: Encode<()>>(message: &M) -> Vec<u8> {
    match minicbor::to_vec(message) {
        Ok(packet) => packet,
        Err(impossible) => unreachable!("a Vec takes every byte: {impossible}"),
    }
}

fn decode<'b, M: Decode<'b, ()>>(packet: &'b [u8]) -> Result<M, MessageError> {
    let mut decoder = minicbor::Decoder::new(packet);
    let message = decoder.decode().map_err(|e| error(packet, e.to_string()))?;
    if decoder.position() != packet.len() {
        return Err(error(packet, format!("{} bytes follow the message", packet.len() - decoder.position())));
    }
    Ok(message)
}

fn check_count(packet: &[u8], found: usize, expected: usize) -> Result<(), MessageError> {
    if found == expected {
        return Ok(());
    }
    Err(error(packet, format!("{found} descriptors came with it, {expected} belong to it")))
}

fn error(packet: &[u8], why: String) -> MessageError {
    MessageError { bytes: packet.len(), why }
}

fn cut(mut reason: String) -> String {
    let end = (0..=MAX_REASON.min(reason.len())).rev().find(|&i| reason.is_char_boundary(i)).unwrap_or(0);
    reason.truncate(end);
    reason
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let ToSuccessor::Abort { reason } = ToSuccessor::abort("ü".repeat(2000)) else { unreachable!() };
        assert!(reason.len() <= MAX_REASON && reason.len() > MAX_REASON - 2);
    }

    #[test]
    fn a_full_batch_fits_a_packet() {
        let ids = (0..BATCH as u64).map(|i| ItemId(u64::MAX - i)).collect();
        assert!(ToSuccessor::Batch { ids }.to_packet().len() < 4096);
    }

    proptest! {
        #[test]
        fn batches_round_trip(ids in prop::collection::vec(any::<u64>(), 0..BATCH)) {
            let message = ToSuccessor::Batch { ids: ids.into_iter().map(ItemId).collect() };
            let ToSuccessor::Batch { ids } = &message else { unreachable!() };
            prop_assert_eq!(ToSuccessor::from_packet(&message.to_packet(), ids.len()), Ok(message.clone()));
        }

        #[test]
        fn garbage_is_an_error_or_a_message_but_never_a_panic(
            packet in prop::collection::vec(any::<u8>(), 0..64), descriptors in 0usize..4,
        ) {
            let _ = ToSuccessor::from_packet(&packet, descriptors);
            let _ = ToIncumbent::from_packet(&packet, descriptors);
        }
    }
}
