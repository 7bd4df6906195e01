//! The program's own map from addresses to block numbers.

use std::collections::BTreeMap;

use super::{Access, BLOCK_BYTES};

/// Managed ranges by their first byte: length and first block number.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, (u64, u32)>);

/// A block that a kernel touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Touch {
    /// Its number.
    pub(super) block: u32,
    /// The first byte touched.
    pub(super) address: u64,
    /// A write.
    pub(super) write: bool,
}

impl Ranges {
    pub(super) fn insert(&mut self, base: u64, len: u64, first: u32) {
        self.0.insert(base, (len, first));
    }

    pub(super) fn remove(&mut self, base: u64) {
        self.0.remove(&base);
    }

    /// The managed blocks of an access, in address order; memory that is not managed is left out.
    pub(super) fn touches(&self, access: &Access) -> Vec<Touch> {
        let end = access.base.saturating_add(access.len);
        let from = self.0.range(..=access.base).next_back().map_or(access.base, |(&base, _)| base);
        let mut touches = Vec::new();
        if access.len == 0 {
            return touches;
        }
        for (&base, &(len, first)) in self.0.range(from..end) {
            let (start, stop) = (base.max(access.base), end.min(base + len));
            if start >= stop {
                continue;
            }
            for index in start / BLOCK_BYTES..=(stop - 1) / BLOCK_BYTES {
                let block = first + (index - base / BLOCK_BYTES) as u32;
                let address = start.max(index * BLOCK_BYTES);
                touches.push(Touch { block, address, write: access.write });
            }
        }
        touches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_touches_each_block_of_each_range_once_in_order() {
        let mut ranges = Ranges::default();
        ranges.insert(BLOCK_BYTES + 0x1000, 2 * BLOCK_BYTES, 10);
        ranges.insert(4 * BLOCK_BYTES, BLOCK_BYTES, 40);
        let all = Access { base: 0, len: 8 * BLOCK_BYTES, write: false };
        let blocks: Vec<_> = ranges.touches(&all).iter().map(|touch| touch.block).collect();
        assert_eq!(blocks, [10, 11, 12, 40]);
        let part = Access { base: 2 * BLOCK_BYTES + 5, len: 1, write: true };
        assert_eq!(ranges.touches(&part), [Touch { block: 11, address: 2 * BLOCK_BYTES + 5, write: true }]);
        let beside = Access { base: 5 * BLOCK_BYTES, len: BLOCK_BYTES, write: false };
        assert_eq!(ranges.touches(&beside), []);
        assert_eq!(ranges.touches(&Access { len: 0, ..all }), []);
    }
}
