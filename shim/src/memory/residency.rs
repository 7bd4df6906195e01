//! Where the program's device memory lies, as far as it is known: what a hand-over may move.
//!
//! **Problem.** Nobody can be asked where managed memory is. To move what was never touched is to make it, and to move
//! what is elsewhere is to do less than one says.
//!
//! **Approach.** A ledger of the blocks that were made managed for the program's `cuMemAlloc`, and of no others: neither
//! the program's own managed memory nor pools, whose memory its processor may touch. Each 2 MiB is *in*, *out* or *unknown*.
//! What makes it known is what is certain: populating at allocation, a write of the whole piece through the driver's
//! interface, our own moves. What the driver moves by itself makes it unknown again; whether it holds data at all is kept
//! ([`Place::Somewhere`]), because bringing back what holds data makes nothing.
//!
//! A hand-over takes *windows* out of the ledger, moves them and settles them. While a window is under way its blocks cannot
//! be freed: whoever frees one waits for the window. Write protection is kept here as well, because whoever opens a gate,
//! or frees a block, lifts it, if the thread that set it is gone.
//!
//! **Invariants.** Launches do not come here; writes of less than a piece neither. Memory is bounded by the blocks and
//! their pieces. A window that is settled after the ledger was upset makes nothing known. No wait is endless.

mod extent;

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering, fence},
    },
    time::Duration,
};

use nvshare_wire::{Direction, page::SLOTS};

use extent::Extent;
pub(crate) use extent::{PIECE, Place};

use crate::{
    abi::{CUresult, SUCCESS},
    state, sys,
};

/// How long a free waits for a window that its block is in. The longest window takes tens of milliseconds; a driver that takes
/// longer than this has other troubles.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pieces of one block in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First byte to move.
    pub(crate) address: u64,
    /// Bytes to move, whole pages.
    pub(crate) bytes: u64,
    /// The block.
    base: u64,
    pieces: Range<u32>,
    /// Whether it is known that these bytes have to move.
    certain: bool,
}

/// What is moved at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// In the order in which to move them.
    pub(crate) runs: Vec<Run>,
    direction: Direction,
    era: u64,
}

impl Window {
    /// Bytes that will have been moved.
    pub(crate) fn bytes(&self) -> u64 {
        self.runs.iter().filter(|run| run.certain).map(|run| run.bytes).sum()
    }

    fn holds(&self, base: u64) -> bool {
        self.runs.iter().any(|run| run.base == base)
    }
}

/// The part of one GPU.
#[derive(Debug, Default)]
struct Part {
    /// On its way.
    window: Option<Window>,
    /// What may not be written to: block, first byte, length.
    protected: Vec<(u64, u64, u64)>,
    /// The gate is closed for memory to leave, and nobody has opened it since.
    may_protect: bool,
    /// Change with what makes unknown what was known of memory that is out, and in.
    brought: u64,
    pushed: u64,
}

impl Part {
    /// What must not have changed for a window to make anything known.
    fn era(&self, direction: Direction) -> u64 {
        match direction {
            Direction::In => self.pushed,
            Direction::Out => self.brought,
        }
    }
}

#[derive(Debug, Default)]
struct Ledger {
    extents: BTreeMap<u64, Extent>,
    parts: [Part; SLOTS],
    touches: u64,
}

/// The ledger of this process.
#[derive(Debug, Default)]
pub(crate) struct Residency {
    ledger: Mutex<Ledger>,
    /// A window was settled.
    settled: Condvar,
    /// Something is protected, or may be soon.
    is_protecting: AtomicBool,
}

/// What is known, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// On the GPU.
    pub(crate) inside: u64,
    /// In host memory.
    pub(crate) outside: u64,
    /// With data, somewhere.
    pub(crate) somewhere: u64,
}

impl Ledger {
    fn touch(&mut self) -> u64 {
        self.touches += 1;
        self.touches
    }

    fn of(&mut self, slot: usize) -> impl Iterator<Item = &mut Extent> {
        self.extents.values_mut().filter(move |extent| extent.slot == slot)
    }

    fn is_moving(&self, base: u64) -> bool {
        self.parts.iter().filter_map(|part| part.window.as_ref()).any(|window| window.holds(base))
    }

    /// Lifts the protection of one block, or of all of a GPU's.
    fn lift(&mut self, slot: usize, base: Option<u64>) {
        let part = &mut self.parts[slot];
        part.protected.retain(|&(of, address, bytes)| {
            let goes = base.is_none_or(|base| base == of);
            if goes {
                // What is not there any more needs no lifting.
                sys::protect(address, bytes, true);
            }
            !goes
        });
    }

    fn remove(&mut self, base: u64) -> Option<Extent> {
        let extent = self.extents.remove(&base)?;
        self.lift(extent.slot, Some(base));
        Some(extent)
    }

    fn overlapping(&self, base: u64, bytes: u64) -> Vec<u64> {
        let before = self.extents.range(..base).next_back().filter(|(_, extent)| extent.end() > base);
        let inside = self.extents.range(base..base.saturating_add(bytes));
        before.into_iter().chain(inside).map(|(&base, _)| base).collect()
    }

    /// Spans that could move this way: whether that is certain, last touch, block, pieces.
    fn candidates(&self, slot: usize, direction: Direction) -> Vec<(bool, u64, u64, Range<u32>)> {
        let mut found = Vec::new();
        for (&base, extent) in self.extents.iter().filter(|(_, extent)| extent.slot == slot) {
            for (place, touched, pieces) in extent.spans() {
                let certain = match (direction, place) {
                    (Direction::Out, Place::In) | (Direction::In, Place::Out) => true,
                    (Direction::In, Place::Somewhere) => false,
                    _ => continue,
                };
                found.push((certain, touched, base, pieces));
            }
        }
        match direction {
            // What was touched last is wanted soonest.
            Direction::Out => found.sort_unstable_by_key(|&(_, touched, base, _)| (touched, base)),
            Direction::In => {
                found.sort_unstable_by_key(|&(certain, touched, base, _)| {
                    (!certain, u64::MAX - touched, base)
                });
            }
        }
        found
    }
}

impl Residency {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block was made, and all of it is on the GPU if it was populated. The driver gives no address away twice, so whatever
    /// is known there has gone.
    pub(crate) fn adopt(&self, base: u64, bytes: u64, slot: usize, context: usize, populated: bool) {
        let mut ledger = self.lock();
        for stale in ledger.overlapping(base, bytes) {
            ledger.remove(stale);
        }
        let touched = ledger.touch();
        let place = if populated { Place::In } else { Place::Unknown };
        ledger.extents.insert(base, Extent::new(base, bytes, slot, context, place, touched));
    }

    /// Waits until no window holds a block for which `which` holds.
    fn no_window_with(&self, which: impl Fn(&Ledger) -> bool) -> MutexGuard<'_, Ledger> {
        let ledger = self.lock();
        let waited = self.settled.wait_timeout_while(ledger, PATIENCE, |ledger| which(ledger));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// A block is about to be freed. It is writable and on its way no more when this returns.
    pub(crate) fn release(&self, base: u64) -> Option<Extent> {
        self.no_window_with(|ledger| ledger.is_moving(base)).remove(base)
    }

    /// The driver would not free it after all.
    pub(crate) fn keep(&self, extent: Extent) {
        let mut extent = extent;
        extent.paint_all(unsure);
        let mut ledger = self.lock();
        if ledger.overlapping(extent.base, extent.bytes).is_empty() {
            ledger.extents.insert(extent.base, extent);
        }
    }

    /// A context is about to go, and the blocks that were made in it.
    pub(crate) fn context_going(&self, context: usize) {
        let of_it = |ledger: &Ledger| -> Vec<u64> {
            let of_it = ledger.extents.iter().filter(|(_, extent)| extent.context == context);
            of_it.map(|(&base, _)| base).collect()
        };
        let mut ledger =
            self.no_window_with(|ledger| of_it(ledger).into_iter().any(|base| ledger.is_moving(base)));
        for base in of_it(&ledger) {
            ledger.remove(base);
        }
    }

    /// The program has the driver write so many bytes; before the write leaves the gate, so that a drain covers it.
    fn written(&self, address: u64, bytes: u64) {
        let mut ledger = self.lock();
        let touched = ledger.touch();
        let Some((_, extent)) = ledger.extents.range_mut(..=address).next_back() else { return };
        if address < extent.end() {
            let pieces = extent.within(address, bytes);
            extent.paint(&pieces, |_, _| (Place::In, touched));
        }
    }

    /// The driver moved memory by itself: it brought some back, or pushed some out.
    pub(crate) fn displaced(&self, slot: usize, brought: bool, pushed: bool) {
        let mut ledger = self.lock();
        ledger.parts[slot].brought += u64::from(brought);
        ledger.parts[slot].pushed += u64::from(pushed);
        for extent in ledger.of(slot) {
            extent.paint_all(|place, touched| match place {
                Place::Out if brought => (Place::Somewhere, touched),
                Place::In if pushed => (Place::Somewhere, touched),
                Place::Unknown | Place::Somewhere | Place::In | Place::Out | Place::Moving => {
                    (place, touched)
                }
            });
        }
    }

    /// Takes the next pieces to move this way, up to `limit` bytes. Must be settled.
    pub(crate) fn take(&self, slot: usize, direction: Direction, limit: u64) -> Option<Window> {
        let mut ledger = self.lock();
        let mut left = (limit / PIECE) as u32;
        let mut runs = Vec::new();
        for (certain, _, base, pieces) in ledger.candidates(slot, direction) {
            let Some(extent) = ledger.extents.get_mut(&base).filter(|_| left > 0) else { break };
            let taken = pieces.start..pieces.end.min(pieces.start + left);
            let (address, bytes) = extent.pages(&taken);
            left -= taken.end - taken.start;
            if bytes > 0 {
                extent.paint(&taken, |_, touched| (Place::Moving, touched));
                runs.push(Run { address, bytes, base, pieces: taken, certain });
            }
        }
        if runs.is_empty() {
            return None;
        }
        let window = Window { runs, direction, era: ledger.parts[slot].era(direction) };
        ledger.parts[slot].window = Some(window.clone());
        Some(window)
    }

    /// From here on windows may be protected, until somebody lifts it all; `false` if the gate, as `is_closed` says of it, is not
    /// closed. Whoever opens the gate lifts afterwards as well, so one of the two sees the other.
    pub(crate) fn may_protect_while(&self, slot: usize, is_closed: impl FnOnce() -> bool) -> bool {
        self.lock().parts[slot].may_protect = true;
        self.is_protecting.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let may = is_closed();
        if !may {
            self.lift(slot);
        }
        may
    }

    /// Protects the blocks of the window under way against being written to by the processor: whole, so that their mappings stay
    /// whole. `false` if one cannot be, or somebody has let the program run.
    pub(crate) fn protect(&self, slot: usize) -> bool {
        let mut ledger = self.lock();
        let ledger = &mut *ledger;
        let part = &ledger.parts[slot];
        let Some(window) = part.window.as_ref().filter(|_| part.may_protect) else { return false };
        let mut bases: Vec<u64> = window.runs.iter().map(|run| run.base).collect();
        bases.dedup();
        for base in bases {
            let part = &mut ledger.parts[slot];
            if part.protected.iter().any(|&(of, _, _)| of == base) {
                continue;
            }
            let Some((address, bytes)) = ledger.extents.get(&base).map(Extent::all_pages) else { continue };
            // Before it is, so that nobody misses it.
            part.protected.push((base, address, bytes));
            if !sys::protect(address, bytes, false) {
                return false;
            }
        }
        true
    }

    /// Lifts every protection on a GPU, and allows no more; by whoever lets the program run.
    pub(crate) fn lift(&self, slot: usize) {
        if self.is_protecting.load(Ordering::SeqCst) {
            let mut ledger = self.lock();
            ledger.parts[slot].may_protect = false;
            ledger.lift(slot, None);
            let any = ledger.parts.iter().any(|part| part.may_protect);
            self.is_protecting.store(any, Ordering::SeqCst);
        }
    }

    /// The window under way has been moved, or nobody knows how far. Bytes that were moved for certain.
    pub(crate) fn settle(&self, slot: usize, done: bool) -> u64 {
        let mut ledger = self.lock();
        let Some(window) = ledger.parts[slot].window.take() else { return 0 };
        let place = match window.direction {
            Direction::In => Place::In,
            Direction::Out => Place::Out,
        };
        let is_known = done && ledger.parts[slot].era(window.direction) == window.era;
        let place = if is_known { place } else { Place::Somewhere };
        for run in &window.runs {
            if let Some(extent) = ledger.extents.get_mut(&run.base) {
                extent.paint(&run.pieces, |was, touched| match was {
                    Place::Moving => (place, touched),
                    Place::Unknown | Place::Somewhere | Place::In | Place::Out => (was, touched),
                });
            }
        }
        self.settled.notify_all();
        if done { window.bytes() } else { 0 }
    }

    /// What is known of a GPU's memory.
    pub(crate) fn known(&self, slot: usize) -> Known {
        let mut known = Known::default();
        for extent in self.lock().of(slot) {
            for (place, _, pieces) in extent.spans() {
                let (_, bytes) = extent.pages(&pieces);
                match place {
                    Place::In => known.inside += bytes,
                    Place::Out => known.outside += bytes,
                    Place::Somewhere | Place::Moving => known.somewhere += bytes,
                    Place::Unknown => {}
                }
            }
        }
        known
    }
}

/// What remains of knowledge when anything may have moved.
fn unsure(place: Place, touched: u64) -> (Place, u64) {
    match place {
        Place::Unknown => (Place::Unknown, touched),
        Place::Somewhere | Place::In | Place::Out | Place::Moving => (Place::Somewhere, touched),
    }
}

/// The driver took a call that writes `bytes` at `address` as a whole.
#[inline]
pub(crate) fn note_write(code: CUresult, address: u64, bytes: u64) {
    if bytes >= PIECE && code == SUCCESS {
        note_long_write(address, bytes);
    }
}

#[cold]
fn note_long_write(address: u64, bytes: u64) {
    let state = state::get();
    // In a capture the call becomes a part of a graph and writes nothing now.
    if !state.captures.any() {
        state.memory.residency.written(address, bytes);
    }
}

#[cfg(test)]
mod tests;
