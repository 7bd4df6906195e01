//! A set of blocks of one client on one GPU.

/// A bitmap that counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Blocks {
    words: Vec<u64>,
    count: u32,
}

impl Blocks {
    pub(crate) fn new(blocks: u32) -> Self {
        Self { words: vec![0; blocks.div_ceil(64) as usize], count: 0 }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn contains(&self, block: u32) -> bool {
        self.words.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// True if it was not there.
    pub(crate) fn insert(&mut self, block: u32) -> bool {
        let Some(word) = self.words.get_mut(block as usize / 64) else { return false };
        let bit = 1 << (block % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u32::from(new);
        new
    }

    /// True if it was there.
    pub(crate) fn remove(&mut self, block: u32) -> bool {
        let Some(word) = self.words.get_mut(block as usize / 64) else { return false };
        let bit = 1 << (block % 64);
        let old = *word & bit != 0;
        *word &= !bit;
        self.count -= u32::from(old);
        old
    }

    /// The first block in `from..limit` that is not there.
    pub(crate) fn next_missing(&self, from: u32, limit: u32) -> Option<u32> {
        let mut block = from;
        while block < limit {
            let word = !self.words.get(block as usize / 64)? >> (block % 64);
            if word != 0 {
                let found = block + word.trailing_zeros();
                return (found < limit).then_some(found);
            }
            block = (block / 64 + 1) * 64;
        }
        None
    }

    /// How many of the first `limit` are there.
    pub(crate) fn count_below(&self, limit: u32) -> u32 {
        let whole = limit as usize / 64;
        let full: u32 = self.words.iter().take(whole).map(|word| word.count_ones()).sum();
        let rest = self.words.get(whole).map_or(0, |word| (word & ((1 << (limit % 64)) - 1)).count_ones());
        full + rest
    }

    /// The `nth` of the first `limit` that are not there, from 0.
    pub(crate) fn nth_missing(&self, mut nth: u32, limit: u32) -> Option<u32> {
        for (index, &word) in self.words.iter().enumerate() {
            let mut missing = !word;
            let count = missing.count_ones();
            if nth < count {
                for _ in 0..nth {
                    missing &= missing - 1;
                }
                let found = index as u32 * 64 + missing.trailing_zeros();
                return (found < limit).then_some(found);
            }
            nth -= count;
        }
        None
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(index as u32 * 64 + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_blocks_are_found_across_words_and_never_past_the_limit() {
        let mut blocks = Blocks::new(200);
        for block in 0..200 {
            assert!(blocks.insert(block));
        }
        assert!(!blocks.insert(7));
        assert_eq!(blocks.next_missing(0, 200), None);
        for block in [3, 64, 130, 199] {
            assert!(blocks.remove(block));
        }
        assert!(!blocks.remove(3));
        assert_eq!(blocks.count(), 196);
        assert_eq!(blocks.next_missing(4, 200), Some(64));
        assert_eq!(blocks.next_missing(65, 130), None);
        assert_eq!(blocks.nth_missing(2, 200), Some(130));
        assert_eq!(blocks.nth_missing(3, 199), None);
        assert_eq!(blocks.count_below(131), 128);
        assert_eq!(blocks.iter().filter(|b| *b < 66).count(), 64);
    }
}
