//! Physical memory of `cuMemCreate`. It stays device memory (the driver has no other kind that can be mapped), so it
//! is counted, and refused where the limit is reached.
//!
//! A handle may be released while its memory is mapped: the memory goes with the last of handle and mappings, and so
//! does its entry here.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// One piece of physical memory.
#[derive(Debug)]
struct Piece {
    slot: usize,
    bytes: u64,
    /// Handles and mappings that hold it.
    holders: u32,
}

#[derive(Debug, Default)]
struct Inner {
    pieces: HashMap<u64, Piece>,
    /// Address of a mapping → its length and whose it is.
    mappings: BTreeMap<u64, (u64, u64)>,
}

/// Memory that has gone: slot and bytes.
pub(crate) type Gone = (usize, u64);

/// The physical memory of this process, by handle.
#[derive(Debug, Default)]
pub(crate) struct Physical {
    inner: Mutex<Inner>,
}

impl Physical {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver made a piece; one that was known by this handle has gone unseen.
    pub(super) fn made(&self, handle: u64, slot: usize, bytes: u64) -> Option<Gone> {
        let stale = self.lock().pieces.insert(handle, Piece { slot, bytes, holders: 1 });
        stale.map(|piece| (piece.slot, piece.bytes))
    }

    /// The program got a further handle of a piece, by the address of a mapping.
    pub(crate) fn retained(&self, handle: u64) {
        if let Some(piece) = self.lock().pieces.get_mut(&handle) {
            piece.holders = piece.holders.saturating_add(1);
        }
    }

    /// A handle was released.
    pub(super) fn released(&self, handle: u64) -> Option<Gone> {
        self.lock().drop_holder(handle)
    }

    /// A piece was mapped.
    pub(crate) fn mapped(&self, address: u64, len: u64, handle: u64) {
        let mut inner = self.lock();
        if let Some(piece) = inner.pieces.get_mut(&handle) {
            piece.holders = piece.holders.saturating_add(1);
            inner.mappings.insert(address, (len, handle));
        }
    }

    /// What lay in this range was unmapped. The driver unmaps whole mappings only.
    pub(super) fn unmapped(&self, address: u64, len: u64) -> Vec<Gone> {
        let mut inner = self.lock();
        let end = address.saturating_add(len);
        let gone: Vec<u64> = inner.mappings.range(address..end).map(|(&at, _)| at).collect();
        gone.into_iter()
            .filter_map(|at| {
                let (_, handle) = inner.mappings.remove(&at)?;
                inner.drop_holder(handle)
            })
            .collect()
    }
}

impl Inner {
    fn drop_holder(&mut self, handle: u64) -> Option<Gone> {
        let piece = self.pieces.get_mut(&handle)?;
        piece.holders = piece.holders.saturating_sub(1);
        if piece.holders > 0 {
            return None;
        }
        let piece = self.pieces.remove(&handle)?;
        Some((piece.slot, piece.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_with_the_last_of_its_handle_and_its_mappings() {
        let physical = Physical::default();
        physical.made(7, 0, 100);
        physical.mapped(0x1000, 100, 7);
        assert_eq!(physical.released(7), None, "still mapped");
        assert_eq!(physical.unmapped(0x1000, 100), [(0, 100)]);
        assert_eq!(physical.unmapped(0x1000, 100), []);

        physical.made(8, 1, 50);
        physical.mapped(0x2000, 50, 8);
        physical.retained(8);
        assert_eq!(physical.unmapped(0x2000, 50), []);
        assert_eq!(physical.released(8), None, "retained once more");
        assert_eq!(physical.released(8), Some((1, 50)));
        assert_eq!(physical.released(8), None, "unknown by now");
    }

    #[test]
    fn one_unmapping_may_end_several_mappings() {
        let physical = Physical::default();
        for (at, handle) in [(0x1000, 1), (0x2000, 2), (0x3000, 3)] {
            physical.made(handle, 0, handle * 10);
            physical.mapped(at, 0x1000, handle);
            assert_eq!(physical.released(handle), None);
        }
        assert_eq!(physical.unmapped(0x1000, 0x2000), [(0, 10), (0, 20)]);
        assert_eq!(physical.unmapped(0x3000, 0x1000), [(0, 30)]);
    }
}
