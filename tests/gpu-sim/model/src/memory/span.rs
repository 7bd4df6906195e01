//! Which block numbers are taken: contiguous spans, first fit.

use std::collections::BTreeMap;

use crate::ids::BlockId;

/// Consecutive block numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSpan {
    /// The first.
    pub first: BlockId,
    /// How many.
    pub count: u32,
}

impl BlockSpan {
    /// The numbers in it.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = BlockId> {
        (self.first.0..self.first.0 + self.count).map(BlockId)
    }
}

/// The numbers that are not taken: start to count, never adjacent.
#[derive(Debug)]
pub(super) struct FreeSpans(BTreeMap<u32, u32>);

impl FreeSpans {
    pub(super) fn new(count: u32) -> Self {
        Self(BTreeMap::from([(0, count)]))
    }

    pub(super) fn take(&mut self, count: u32) -> Option<BlockSpan> {
        let (&start, &length) = self.0.iter().find(|&(_, &length)| length >= count)?;
        self.0.remove(&start);
        if length > count {
            self.0.insert(start + count, length - count);
        }
        Some(BlockSpan { first: BlockId(start), count })
    }

    pub(super) fn give_back(&mut self, span: BlockSpan) {
        let (mut start, mut count) = (span.first.0, span.count);
        if let Some((&before, &length)) = self.0.range(..start).next_back()
            && before + length == start
        {
            self.0.remove(&before);
            start = before;
            count += length;
        }
        if let Some(length) = self.0.remove(&(start + count)) {
            count += length;
        }
        self.0.insert(start, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_given_back_in_any_order_join_again() {
        let mut free = FreeSpans::new(30);
        let spans: Vec<_> = (0..3).map(|_| free.take(10).unwrap()).collect();
        assert_eq!(free.take(1), None);
        for index in [0, 2, 1] {
            free.give_back(spans[index]);
        }
        assert_eq!(free.take(30), Some(BlockSpan { first: BlockId(0), count: 30 }));
    }
}
