//! Single blocks: which were evicted, and whether their owner would have kept them alone.
//!
//! Problem: that a block came back says little; what counts is how much of its *owner's* memory was evicted in between.
//!
//! Approach: a shadow for each block that leaves, in one array that is indexed by a hash of space and block, remembers the
//! owner's evicted bytes so far. When a fault brings the block back, the difference is the owner's own distance. The agent
//! says how much room there is beside what the owner allocated ([`nvshare_abi::maps::Room`]); with it the condition for
//! *curable* is that distance, what the owner holds and the block fit into the GPU together.
//!
//! Invariants: arrays only, a constant number of accesses for each event. A shadow that another one overwrites hides a
//! refault; nothing counts one twice. Two owners that hash to one entry of figures are not mixed: the second has none.

use nvshare_abi::{
    maps::{BlockFigures, Shadow, SpaceId, figures_index, shadow_index},
    uvm::{BLOCK_BYTES, PAGE_BYTES},
};

use crate::{
    health,
    maps::{BLOCKS, ROOM, SHADOWS},
};

/// Memory of a block was evicted.
#[inline(always)]
pub(crate) fn evicted(space: SpaceId, processor: u32, address: u64, bytes: u64) {
    let Some((at, figures)) = figures(space, processor) else { return };
    // SAFETY: the field lies in a map value.
    unsafe { health::add(&raw mut (*figures).evicted, bytes) };
    // SAFETY: as above; a neighbour's addition may be included, which lengthens the distance by less than a block.
    let evicted = unsafe { (*figures).evicted };
    let (index, tag) = shadow_index(space, address / BLOCK_BYTES);
    let Some(shadow) = SHADOWS.get_ptr_mut(index) else { return };
    // SAFETY: a map value; the driver moves one block on one CPU at a time, and a race with another block of the same entry
    // loses one of the two.
    let shadow = unsafe { &mut *shadow };
    if shadow.tag == tag {
        // The rest of a block that leaves in pieces, or a return that was not seen: the older distance is longer.
        let more = bytes.min(BLOCK_BYTES.saturating_sub(out(shadow)));
        shadow.pages += (more / PAGE_BYTES) as u16;
        // SAFETY: the field lies in a map value.
        unsafe { health::add(&raw mut (*figures).returned, bytes - more) };
        return;
    }
    if shadow.pages != 0
        && let Some(figures) = BLOCKS.get_ptr_mut(shadow.figures.into())
    {
        // SAFETY: the field lies in a map value. A space that took the place of the owner meanwhile has little by little
        // less out, which makes it look larger.
        unsafe { health::add(&raw mut (*figures).returned, out(shadow)) };
    }
    *shadow = Shadow { evicted, tag, pages: (bytes / PAGE_BYTES) as u16, figures: at as u16 };
}

/// The bytes of a shadow.
#[inline(always)]
fn out(shadow: &Shadow) -> u64 {
    u64::from(shadow.pages) * PAGE_BYTES
}

/// Memory of a block came to the GPU, because of a fault or not.
#[inline(always)]
pub(crate) fn arrived(space: SpaceId, processor: u32, address: u64, bytes: u64, by_fault: bool) {
    let Some((at, figures)) = figures(space, processor) else { return };
    let (index, tag) = shadow_index(space, address / BLOCK_BYTES);
    let Some(shadow) = SHADOWS.get_ptr_mut(index) else { return };
    // SAFETY: as above.
    let shadow = unsafe { &mut *shadow };
    if shadow.tag != tag || shadow.pages == 0 {
        return;
    }
    let back = bytes.min(out(shadow));
    shadow.pages -= (back / PAGE_BYTES) as u16;
    if shadow.pages == 0 {
        // What leaves next begins a new distance.
        shadow.tag = 0;
    }
    // SAFETY: the fields lie in a map value; only additions of others may come between.
    let (evicted, returned) = unsafe { ((*figures).evicted, (*figures).returned) };
    let distance = evicted.wrapping_sub(shadow.evicted);
    // SAFETY: the field lies in a map value.
    unsafe { health::add(&raw mut (*figures).returned, back) };
    if !by_fault {
        return;
    }
    // What the owner holds is what it allocated less what is out.
    let out = evicted.wrapping_sub(returned);
    let room = ROOM.get(at).copied().unwrap_or_default();
    // SAFETY: the fields lie in a map value.
    unsafe {
        let field = if room.known == 0 || room.space != space.0 {
            &raw mut (*figures).unjudged
        } else if (distance as i64).wrapping_sub(out as i64).wrapping_add(back as i64) <= room.bytes {
            &raw mut (*figures).curable
        } else {
            &raw mut (*figures).own
        };
        health::add(field, back);
    }
}

/// The figures of a space on a GPU, and where they are; `None` if another one's are there.
#[inline(always)]
fn figures(space: SpaceId, processor: u32) -> Option<(u32, *mut BlockFigures)> {
    let index = figures_index(space, processor);
    let figures = BLOCKS.get_ptr_mut(index)?;
    // SAFETY: a map value; of two that begin at once, the second takes the place and the first has none.
    unsafe {
        if (*figures).space == 0 {
            (*figures).processor = processor;
            (*figures).space = space.0;
        }
        ((*figures).space == space.0 && (*figures).processor == processor).then_some((index, figures))
    }
}
