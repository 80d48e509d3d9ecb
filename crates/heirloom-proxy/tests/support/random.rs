//! Random choices that can be made again, from a seed that is printed.

use std::time::{SystemTime, UNIX_EPOCH};

/// Where a seed is taken from, to repeat a run.
const SEED: &str = "HEIRLOOM_SEED";

/// A generator of random numbers (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    /// Seeds it anew, or with the seed in the environment, and prints that.
    pub(crate) fn seeded() -> Random {
        let given = std::env::var(SEED).ok().map(|seed| seed.parse().expect("a number"));
        let seed = given.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
            u64::from(now.subsec_nanos()) ^ now.as_secs()
        });
        println!("{SEED}={seed}");
        Random(seed)
    }

    /// The one of this seed.
    pub(crate) fn from(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
