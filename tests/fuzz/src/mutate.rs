//! How inputs are damaged.

/// Values at which programs turn.
const EDGES: [u64; 9] = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, u32::MAX as u64, u64::MAX];

pub(crate) struct Mutator<'a> {
    state: u64,
    words: &'a [&'a [u8]],
    longest: usize,
}

impl<'a> Mutator<'a> {
    pub(crate) fn new(seed: u64, words: &'a [&'a [u8]], longest: usize) -> Self {
        Self { state: seed, words, longest }
    }

    /// SplitMix64.
    fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound.max(1) as u64) as usize
    }

    /// An input made of examples, damaged one to eight times.
    pub(crate) fn mutate(&mut self, pool: &[Vec<u8>]) -> Vec<u8> {
        let mut input = pool[self.below(pool.len())].clone();
        for _ in 0..=self.below(8) {
            self.damage(&mut input, pool);
        }
        input.truncate(self.longest);
        input
    }

    fn damage(&mut self, input: &mut Vec<u8>, pool: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let (start, end) = (at.min(input.len()), (at + 1 + self.below(32)).min(input.len()));
        match self.below(9) {
            0 if !input.is_empty() => {
                let at = at.min(input.len() - 1);
                input[at] ^= 1 << self.below(8);
            }
            1 if !input.is_empty() => {
                let at = at.min(input.len() - 1);
                input[at] = self.roll() as u8;
            }
            2 => drop(input.drain(start..end)),
            3 => {
                let part = input[start..end].to_vec();
                let times = 1 + self.below(4);
                drop(input.splice(start..start, part.repeat(times)));
            }
            4 => {
                let edge = EDGES[self.below(EDGES.len())];
                let bytes = if self.below(2) == 0 { edge.to_le_bytes() } else { edge.to_be_bytes() };
                let width = [1, 2, 4, 8][self.below(4)];
                for (place, byte) in input.iter_mut().skip(start).zip(&bytes[..width]) {
                    *place = *byte;
                }
            }
            5 if !self.words.is_empty() => {
                let word = self.words[self.below(self.words.len())];
                drop(input.splice(start..start, word.iter().copied()));
            }
            6 => {
                let other = &pool[self.below(pool.len())];
                let (from, count) = (self.below(other.len() + 1), self.below(64));
                let part = other[from..(from + count).min(other.len())].to_vec();
                drop(input.splice(start..end, part));
            }
            7 => input.truncate(start),
            _ => {
                let number = self.roll();
                let text = match self.below(3) {
                    0 => number.to_string(),
                    1 => format!("-{}", number % 1000),
                    _ => format!("{}e{}", number % 10, number >> 55),
                };
                drop(input.splice(start..end, text.into_bytes()));
            }
        }
    }
}
