//! Each thread's own counters, which a launch writes without sharing a cache line with anyone.
//!
//! Records are linked into a list that only grows and are taken over from threads that have ended, so there
//! are as many as there were ever threads at once. A record's `calls` keep counting through its owners.

use std::{
    cell::Cell,
    ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering},
};

use nvshare_wire::page::SLOTS;

/// One thread's counters for one GPU.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Work-submitting calls, ever.
    pub(crate) calls: AtomicU64,
    /// Depth of work-submitting calls under way.
    pub(crate) inside: AtomicU32,
    /// Calls under way that wait for the GPU.
    pub(crate) syncing: AtomicU32,
}

/// One thread's counters.
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
    let record = records().find(|record| !record.owned.swap(true, Ordering::Acquire)).or_else(new_record)?;
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

/// Sums over all threads.
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
        inside: sum.inside.saturating_add(u32::from(counters.inside.load(Ordering::Acquire) > 0)),
        syncing: sum.syncing.saturating_add(u32::from(counters.syncing.load(Ordering::Relaxed) > 0)),
    })
}

/// Marks the calling thread as waiting for the GPU of its current context while it lives.
#[derive(Debug)]
pub(crate) struct Syncing(Option<&'static AtomicU32>);

impl Syncing {
    /// Begins to wait.
    #[inline]
    pub(crate) fn begin() -> Self {
        let counter = record().and_then(|record| Some(&record.slots.get(super::current_slot()?)?.syncing));
        if let Some(counter) = counter {
            counter.store(counter.load(Ordering::Relaxed).saturating_add(1), Ordering::Relaxed);
        }
        Self(counter)
    }
}

impl Drop for Syncing {
    #[inline]
    fn drop(&mut self) {
        if let Some(counter) = self.0 {
            counter.store(counter.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        }
    }
}

/// Forgets the threads that a forked child does not have.
pub(super) fn reset_after_fork() {
    RECORDS.store(ptr::null_mut(), Ordering::SeqCst);
    let _ = MINE.try_with(|mine| mine.set(None));
}
