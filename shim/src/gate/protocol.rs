//! The agreement between threads that enter and a revoker that closes, in memory operations only. The argument for it is in
//! `docs/gate.md`, whose steps are named here; a test explores it with this very file in a model of the memory.

use super::sync::{AtomicU32, AtomicUsize, Ordering, compiler_fence, fence};

/// The gate is closed.
pub(crate) const CLOSED: u32 = 1;

/// Whether a thread is inside: the frame of its innermost call under way, 0 for none. Only its thread writes it.
#[derive(Debug, Default)]
pub(crate) struct Mark(AtomicUsize);

impl Mark {
    /// What this thread has set.
    #[inline]
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the mark.
    #[inline]
    pub(crate) fn set(&self, frame: usize) {
        self.0.store(frame, Ordering::Relaxed);
    }

    /// L4: the call has ended, or was not made.
    #[inline]
    pub(crate) fn set_back(&self, before: usize) {
        self.0.store(before, Ordering::Release);
    }

    /// R3: whether a call is under way, for another thread.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }
}

/// The word of a gate: [`CLOSED`] and bits that send entries to the slow path.
#[derive(Debug)]
pub(crate) struct Word(pub(crate) AtomicU32);

impl Word {
    /// L1 and L2 without a fence: whether the thread is inside. What it had set before comes back in the other case.
    #[inline]
    pub(crate) fn pass(&self, mark: &Mark, frame: usize) -> Result<(), usize> {
        let before = mark.get();
        mark.set(frame);
        // The revoker's barrier orders the store before the load for the processor; this does it for the compiler.
        compiler_fence(Ordering::SeqCst);
        if self.0.load(Ordering::Acquire) == 0 && before == 0 {
            return Ok(());
        }
        mark.set_back(before);
        Err(before)
    }

    /// L1 and L2 with a fence: whether the thread is inside, as it is anyway where it was `before`.
    pub(crate) fn pass_fenced(&self, mark: &Mark, frame: usize, before: usize) -> bool {
        mark.set(frame);
        fence(Ordering::SeqCst);
        let passed = before != 0 || !self.is_closed();
        if !passed {
            mark.set_back(before);
        }
        passed
    }

    /// Whether the gate is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    /// R1 and R2: from here on a mark that is not set stays so. `barrier` makes every thread pass a full barrier, or does
    /// nothing where all entries are fenced; whether it did.
    pub(crate) fn close(&self, barrier: impl FnOnce() -> bool) -> bool {
        self.0.fetch_or(CLOSED, Ordering::SeqCst);
        let passed = barrier();
        fence(Ordering::SeqCst);
        passed
    }

    /// Opens the gate; whether it was closed.
    pub(crate) fn open(&self) -> bool {
        self.0.fetch_and(!CLOSED, Ordering::SeqCst) & CLOSED != 0
    }
}
