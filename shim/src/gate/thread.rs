//! Each thread's own record, which a launch writes without sharing a cache line with anyone.
//!
//! Records are linked into a list that only grows and are taken over from threads that have ended, so there
//! are as many as there were ever threads at once. A record's `calls` keep counting through its owners.
//!
//! **Calls that never return.** A thread may be cancelled in the driver, or leave it by `longjmp` from a signal handler,
//! and a count that is only ever taken back by a return would be wrong for good: the thread would pass closed gates, and
//! no drain would end. So a call under way is not counted but marked with the [`Frame`] that makes it. A frame that lies
//! below a later one of the same stack has been left, however that was done.

use std::{
    cell::Cell,
    ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering},
};

use nvshare_wire::page::SLOTS;

use super::protocol::Mark;
use crate::sys;

/// One thread's part in one GPU.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Work-submitting calls, ever.
    pub(crate) calls: AtomicU64,
    /// A work-submitting call is under way.
    pub(crate) inside: Mark,
    /// A call that waits for the GPU is under way.
    pub(crate) syncing: Mark,
    /// The closing of the gate at which this thread waits, by number; an older one is of no meaning.
    pub(crate) waiting: AtomicU32,
}

/// Where on the stack a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame(usize);

impl Frame {
    /// The frame of the function that this is inlined into.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "the address must lie in the caller's own frame")]
    pub(crate) fn here() -> Self {
        let place = 0u8;
        Self(ptr::from_ref(&place).addr())
    }

    /// The address.
    #[inline]
    pub(super) fn address(self) -> usize {
        self.0
    }

    /// What a mark means to a call in this frame: the enclosing call that is still under way, or 0. Stacks grow
    /// downwards, so that one lies above; one below was left without a return. A signal handler may run on a stack of its
    /// own, from which nothing can be told.
    pub(super) fn enclosing(self, marked: usize) -> usize {
        if marked == 0 || (marked <= self.0 && !sys::on_signal_stack()) { 0 } else { marked }
    }
}

/// One thread's part in every GPU.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Record {
    pub(crate) slots: [Counters; SLOTS],
    owned: AtomicBool,
    next: AtomicPtr<Record>,
}

static RECORDS: AtomicPtr<Record> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    static MINE: Cell<Option<&'static Record>> = const { Cell::new(None) };
    static AT_EXIT: GiveBack = const { GiveBack };
}

/// Gives the thread's record back when the thread ends.
struct GiveBack;

impl Drop for GiveBack {
    fn drop(&mut self) {
        if let Some(record) = MINE.replace(None) {
            // The thread may have ended within a call.
            for slot in &record.slots {
                slot.inside.set_back(0);
                slot.syncing.set_back(0);
                slot.waiting.store(0, Ordering::Relaxed);
            }
            record.owned.store(false, Ordering::Release);
        }
    }
}

/// The calling thread's record; `None` only if there is no memory for one.
#[inline]
pub(crate) fn record() -> Option<&'static Record> {
    match MINE.get() {
        Some(record) => Some(record),
        None => take(),
    }
}

#[cold]
fn take() -> Option<&'static Record> {
    // Only one that looks free is written to: others are in use on other processors.
    let free = |record: &&Record| {
        !record.owned.load(Ordering::Relaxed) && !record.owned.swap(true, Ordering::Acquire)
    };
    let record = records().find(free).or_else(new_record)?;
    MINE.set(Some(record));
    // A call from a destructor of another thread-local may come after ours ran; its record stays owned.
    let _ = AT_EXIT.try_with(|_| ());
    Some(record)
}

/// Makes a record and links it in. It is never freed: a revoker may be reading it.
fn new_record() -> Option<&'static Record> {
    let layout = std::alloc::Layout::new::<Record>();
    #[expect(clippy::cast_ptr_alignment, reason = "the layout asks for the alignment")]
    // SAFETY: the layout is not empty; all-zero bytes are a valid `Record`.
    let record = unsafe { std::alloc::alloc_zeroed(layout).cast::<Record>().as_ref()? };
    record.owned.store(true, Ordering::Relaxed);
    let mut head = RECORDS.load(Ordering::Relaxed);
    loop {
        record.next.store(head, Ordering::Relaxed);
        let new = ptr::from_ref(record).cast_mut();
        // SeqCst: a revoker that closed its gate before this point is seen by the load that follows in `enter`.
        match RECORDS.compare_exchange_weak(head, new, Ordering::SeqCst, Ordering::Relaxed) {
            Ok(_) => return Some(record),
            Err(seen) => head = seen,
        }
    }
}

fn records() -> impl Iterator<Item = &'static Record> {
    let at = |pointer: *mut Record| {
        // SAFETY: linked records are never freed.
        unsafe { pointer.as_ref() }
    };
    std::iter::successors(at(RECORDS.load(Ordering::SeqCst)), move |record: &&'static Record| {
        at(record.next.load(Ordering::Relaxed))
    })
}

/// Sums over all threads: calls ever, and threads by what they are doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) calls: u64,
    pub(crate) inside: u32,
    pub(crate) syncing: u32,
}

/// Counters of a GPU over all threads.
pub(crate) fn sum(slot: usize) -> Sum {
    records().map(|record| &record.slots[slot]).fold(Sum::default(), |sum, counters| Sum {
        calls: sum.calls.wrapping_add(counters.calls.load(Ordering::Relaxed)),
        inside: sum.inside.saturating_add(u32::from(counters.inside.is_set())),
        syncing: sum.syncing.saturating_add(u32::from(counters.syncing.is_set())),
    })
}

/// Threads that wait at this closing of the gate.
pub(super) fn waiting(slot: usize, closing: u32) -> u32 {
    let waits = |record: &&Record| record.slots[slot].waiting.load(Ordering::Relaxed) == closing;
    records().filter(waits).count() as u32
}

/// Marks the calling thread as waiting for the GPU of its current context while it lives.
#[derive(Debug)]
pub(crate) struct Syncing(Option<(&'static Mark, usize)>);

impl Syncing {
    /// Begins to wait.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "the frame is the caller's")]
    pub(crate) fn begin() -> Self {
        let frame = Frame::here();
        let mark = record().and_then(|record| Some(&record.slots.get(super::current_slot()?)?.syncing));
        Self(mark.map(|mark| {
            let before = frame.enclosing(mark.get());
            mark.set(frame.address());
            (mark, before)
        }))
    }
}

impl Drop for Syncing {
    #[inline]
    fn drop(&mut self) {
        if let Some((mark, before)) = self.0 {
            mark.set_back(before);
        }
    }
}

/// Forgets the threads that a forked child does not have.
pub(super) fn reset_after_fork() {
    RECORDS.store(ptr::null_mut(), Ordering::SeqCst);
    let _ = MINE.try_with(|mine| mine.set(None));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_call_made_further_up_the_stack_encloses_this_one() {
        let here = Frame(100);
        assert_eq!([0, 50, 100, 200].map(|marked| here.enclosing(marked)), [0, 0, 0, 200]);
    }

    #[test]
    fn frames_of_nested_calls_lie_below_each_other_and_those_of_repeated_ones_do_not() {
        #[inline(never)]
        fn nested(depth: u32, above: Frame) {
            let here = Frame::here();
            assert!(here.0 < above.0);
            if depth > 0 {
                nested(depth - 1, here);
            }
        }
        #[inline(never)]
        fn repeated() -> Frame {
            Frame::here()
        }
        nested(3, Frame::here());
        let frames = [(); 2].map(|()| repeated());
        assert_eq!(frames[0], frames[1]);
    }

    #[test]
    fn threads_one_after_another_share_a_record() {
        let before = records().count();
        for _ in 0..500 {
            std::thread::spawn(|| assert!(record().is_some())).join().unwrap();
        }
        // Other tests have threads meanwhile.
        assert!(records().count() < before + 50, "{before} records have become {}", records().count());
    }
}
