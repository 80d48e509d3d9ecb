//! The numbers of things: every connection has one, and so has every listener.
//!
//! Items have ids that are never given out twice, also not by the next process. They are given out in pairs, so that one number
//! stands for both sockets of a connection, or both ends of a pipe, and an event tells by its token alone whose it is.

use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use heirloom::ItemId;
use mio::Token;

/// The number of a pair of ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key(u64);

/// One of a pair: the end of a connection that somebody speaks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Backend,
}

impl Key {
    pub(crate) fn of(id: ItemId) -> Key {
        Key(id.0 >> 1)
    }

    pub(crate) fn of_token(token: Token) -> (Key, Side) {
        let side = if token.0 & 1 == 0 { Side::Client } else { Side::Backend };
        (Key(token.0 as u64 >> 1), side)
    }

    /// The first of the pair: a client's socket, a listener, the reading end of a pipe.
    pub(crate) fn first(self) -> ItemId {
        ItemId(self.0 << 1)
    }

    /// The second: a backend's socket, the writing end of a pipe.
    pub(crate) fn second(self) -> ItemId {
        ItemId(self.0 << 1 | 1)
    }

    pub(crate) fn id(self, side: Side) -> ItemId {
        match side {
            Side::Client => self.first(),
            Side::Backend => self.second(),
        }
    }
}

pub(crate) fn token(id: ItemId) -> Token {
    Token(id.0 as usize)
}

impl Side {
    pub(crate) fn other(self) -> Side {
        match self {
            Side::Client => Side::Backend,
            Side::Backend => Side::Client,
        }
    }
}

/// Gives out keys.
#[derive(Debug)]
pub(crate) struct Keys(AtomicU64);

impl Keys {
    /// From the first one on whose ids are at least `next`.
    pub(crate) fn from(next: ItemId) -> Keys {
        Keys(AtomicU64::new(next.0.max(ItemId::FIRST.0).div_ceil(2)))
    }

    pub(crate) fn take(&self) -> Key {
        Key(self.0.fetch_add(1, Ordering::Relaxed))
    }

    /// Never goes back.
    pub(crate) fn at_least(&self, next: ItemId) {
        self.0.fetch_max(next.0.div_ceil(2), Ordering::Relaxed);
    }

    /// The first id that was not given out.
    pub(crate) fn next(&self) -> ItemId {
        Key(self.0.load(Ordering::Relaxed)).first()
    }
}

/// A map by [`Key`]. The keys are our own and come in sequence: nobody can choose them badly.
pub(crate) type KeyMap<T> = std::collections::HashMap<Key, T, BuildHasherDefault<Spread>>;

/// Spreads sequential numbers over all bits.
#[derive(Default)]
pub(crate) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(26);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_stands_for_two_ids_and_none_is_given_out_twice() {
        let keys = Keys::from(ItemId(8));
        let (one, other) = (keys.take(), keys.take());
        assert_eq!((one.first(), one.second(), other.first()), (ItemId(8), ItemId(9), ItemId(10)));
        assert_eq!((Key::of(one.first()), Key::of(one.second())), (one, one));
        assert_eq!(Key::of_token(token(one.id(Side::Backend))), (one, Side::Backend));
        assert_eq!(Key::of_token(token(one.id(Side::Client))), (one, Side::Client));
        assert_eq!(keys.next(), ItemId(12));
        keys.at_least(ItemId(11));
        assert_eq!(keys.next(), ItemId(12));
        keys.at_least(ItemId(13));
        assert_eq!(keys.take().first(), ItemId(14));
        // The first of all is not the control listener.
        assert!(Keys::from(ItemId(0)).take().first() > ItemId::CONTROL);
    }
}
