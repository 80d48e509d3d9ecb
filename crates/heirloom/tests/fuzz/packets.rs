//! Packets of the channel. The first byte is how many descriptors come along.

use heirloom::channel::MAX_PACKET;
use heirloom::protocol::{BATCH, ToIncumbent, ToSuccessor};

pub(crate) fn run(input: &[u8]) {
    let Some((&descriptors, packet)) = input.split_first() else { return };
    let descriptors = usize::from(descriptors);
    match ToSuccessor::from_packet(packet, descriptors) {
        Ok(message) => {
            if let ToSuccessor::Batch { ids } = &message {
                assert!(ids.len() <= BATCH && ids.len() == descriptors);
            }
            let again = message.to_packet();
            assert!(again.len() <= MAX_PACKET);
            assert!(ToSuccessor::from_packet(&again, descriptors + 1).is_err());
            assert_eq!(ToSuccessor::from_packet(&again, descriptors), Ok(message));
        }
        Err(error) => assert_eq!(error.bytes, packet.len()),
    }
    match ToIncumbent::from_packet(packet, descriptors) {
        Ok(message) => {
            let again = message.to_packet();
            assert!(again.len() <= MAX_PACKET && descriptors == 0);
            assert_eq!(ToIncumbent::from_packet(&again, 0), Ok(message));
        }
        Err(error) => assert_eq!(error.bytes, packet.len()),
    }
}
