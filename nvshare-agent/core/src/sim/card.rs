//! What one GPU holds: blocks of all its clients in one list, first in first out by fault or move.
//!
//! **Invariants.** What is resident, what is about to arrive and what is plain never exceed the memory.

use crate::{
    sim::{preset::GpuModel, shadow::ShadowTable},
    units::Bytes,
};

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
    owner: u32,
    listed: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Card {
    pub(crate) model: GpuModel,
    /// Blocks of plain memory: they cannot be evicted.
    pub(crate) plain: u32,
    /// Clients that compute right now, and share the GPU's time.
    pub(crate) running: u32,
    /// Blocks moved over the link so far, in both directions.
    pub(crate) moved: u64,
    /// The block-level sensor; absent where nobody looks.
    pub(crate) shadow: Option<ShadowTable>,
    total: u32,
    resident: u32,
    /// Room promised to blocks on their way in.
    reserved: u32,
    /// One entry for each block that a client has ever allocated.
    links: Vec<Link>,
    head: u32,
    tail: u32,
}

impl Card {
    pub(crate) fn new(model: GpuModel) -> Self {
        let total = u32::try_from(model.memory.0 / Bytes::BLOCK.0).unwrap_or(u32::MAX / 2);
        Self {
            model,
            plain: 0,
            running: 0,
            moved: 0,
            shadow: Some(ShadowTable::default()),
            total,
            resident: 0,
            reserved: 0,
            links: Vec::new(),
            head: NONE,
            tail: NONE,
        }
    }

    /// Address space for a client's blocks; the number of the first.
    pub(crate) fn add_space(&mut self, owner: u32, blocks: u32) -> u32 {
        let base = self.links.len() as u32;
        let link = Link { previous: NONE, next: NONE, owner, listed: false };
        self.links.extend(std::iter::repeat_n(link, blocks as usize));
        base
    }

    /// Blocks that managed memory can use.
    pub(crate) fn capacity(&self) -> u32 {
        self.total - self.plain
    }

    /// Blocks that are neither used nor promised; below zero while plain memory has taken what others hold.
    pub(crate) fn room(&self) -> i64 {
        i64::from(self.capacity()) - i64::from(self.resident) - i64::from(self.reserved)
    }

    pub(crate) fn reserve(&mut self, blocks: u32) {
        self.reserved += blocks;
    }

    pub(crate) fn release(&mut self, blocks: u32) {
        self.reserved -= blocks;
    }

    pub(crate) fn owner(&self, index: u32) -> u32 {
        self.links[index as usize].owner
    }

    /// The block is resident from now on, and the last to go.
    pub(crate) fn push(&mut self, index: u32) {
        let tail = self.tail;
        let link = &mut self.links[index as usize];
        debug_assert!(!link.listed, "a block is resident once");
        *link = Link { previous: tail, next: NONE, listed: true, ..*link };
        if tail == NONE {
            self.head = index;
        } else {
            self.links[tail as usize].next = index;
        }
        self.tail = index;
        self.resident += 1;
        debug_assert!(self.resident + self.reserved <= self.capacity(), "more resident than the GPU holds");
    }

    pub(crate) fn remove(&mut self, index: u32) {
        let link = self.links[index as usize];
        if !link.listed {
            return;
        }
        self.links[index as usize].listed = false;
        if link.previous == NONE {
            self.head = link.next;
        } else {
            self.links[link.previous as usize].next = link.next;
        }
        if link.next == NONE {
            self.tail = link.previous;
        } else {
            self.links[link.next as usize].previous = link.previous;
        }
        self.resident -= 1;
    }

    /// The block that the driver evicts next.
    pub(crate) fn oldest(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    /// Resident blocks of one owner, oldest first.
    pub(crate) fn blocks_of(&self, owner: u32) -> impl Iterator<Item = u32> {
        let mut at = self.head;
        std::iter::from_fn(move || {
            let index = (at != NONE).then_some(at)?;
            at = self.links[index as usize].next;
            Some(index)
        })
        .filter(move |&index| self.owner(index) == owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_in_the_order_in_which_they_came_and_a_return_makes_them_young() {
        let mut card =
            Card::new(GpuModel { memory: Bytes::mib(10), ..GpuModel::preset("h100-pcie5").unwrap() });
        assert_eq!(card.capacity(), 5);
        let (a, b) = (card.add_space(0, 3), card.add_space(1, 2));
        for index in [a, b, a + 1, a + 2] {
            card.push(index);
        }
        card.remove(a);
        card.push(a);
        assert_eq!(card.oldest(), Some(b));
        assert_eq!(card.blocks_of(0).collect::<Vec<_>>(), [a + 1, a + 2, a]);
        card.reserve(1);
        assert_eq!(card.room(), 0);
    }
}
