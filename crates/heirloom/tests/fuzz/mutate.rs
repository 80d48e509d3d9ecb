//! Inputs made of others, as a fuzzer makes them, in the same order each time.

/// Numbers at which lengths and counts go wrong.
const EDGES: [u64; 12] =
    [0, 1, 23, 24, 0xff, 0x100, 0xffff, 0x1_0000, 0xffff_ffff, 0x1_0000_0000, u64::MAX >> 1, u64::MAX];
/// No input is longer, in bytes.
const LONGEST: usize = 4096;

/// Mutations without end.
pub(crate) struct Mutations<'s> {
    seeds: &'s [Vec<u8>],
    random: u64,
}

impl<'s> Mutations<'s> {
    pub(crate) fn new(seeds: &'s [Vec<u8>]) -> Self {
        Mutations { seeds, random: 0x4845_4952_4c4f_4f4d }
    }

    /// A number below `end`, 0 if there is none: xorshift64*, by Vigna.
    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % end.max(1)
    }

    fn seed(&mut self) -> &'s [u8] {
        let seeds = self.seeds;
        &seeds[self.below(seeds.len())]
    }

    fn mutate(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len());
        let count = self.below(9).min(input.len() - at);
        match self.below(7) {
            0 if !input.is_empty() => input[at] ^= 1 << self.below(8),
            1 if !input.is_empty() => input[at] = self.below(256) as u8,
            2 => input.truncate(at),
            3 => drop(input.drain(at..at + count)),
            4 => {
                let part = input[at..at + count].to_vec();
                input.splice(at..at, part);
            }
            5 => {
                let number = EDGES[self.below(EDGES.len())].to_be_bytes();
                let bytes = 1 << self.below(4);
                input.splice(at..at + count, number[8 - bytes..].iter().copied());
            }
            _ => {
                let other = self.seed();
                let from = self.below(other.len());
                input.splice(at.., other[from..].iter().copied());
            }
        }
        input.truncate(LONGEST);
    }
}

impl Iterator for Mutations<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut input = self.seed().to_vec();
        for _ in 0..=self.below(6) {
            self.mutate(&mut input);
        }
        Some(input)
    }
}
