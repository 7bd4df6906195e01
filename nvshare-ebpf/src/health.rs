//! What the programs say of themselves, and counting that survives preemption.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use nvshare_abi::maps::Health;

use crate::maps::HEALTH;

/// Adds to a counter in a map value.
///
/// Atomic although most maps are per CPU: a probe on user code can be preempted by another thread on its CPU.
///
/// # Safety
/// `counter` points into a map value.
#[inline(always)]
pub(crate) unsafe fn add(counter: *mut u64, amount: u64) {
    // The target has no compare-and-swap in its oldest version, so the library offers no atomic addition for it.
    // SAFETY: aligned and valid by the caller's promise; all writers are atomic.
    let _before = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, amount) };
}

#[inline(always)]
fn count(field: impl FnOnce(*mut Health) -> *mut u64) {
    if let Some(health) = HEALTH.get_ptr_mut(0) {
        // SAFETY: the field lies in the map value.
        unsafe { add(field(health), 1) };
    }
}

/// One more notification was looked into.
#[inline(always)]
pub(crate) fn notified() {
    // SAFETY: only computes an address.
    count(|health| unsafe { &raw mut (*health).notifications });
}

/// One of them made no sense.
#[inline(always)]
pub(crate) fn insane() {
    // SAFETY: only computes an address.
    count(|health| unsafe { &raw mut (*health).insane });
}

/// One of them could not be read.
#[inline(always)]
pub(crate) fn unreadable() {
    // SAFETY: only computes an address.
    count(|health| unsafe { &raw mut (*health).unreadable });
}

/// A full map refused an update.
#[inline(always)]
pub(crate) fn lost() {
    // SAFETY: only computes an address.
    count(|health| unsafe { &raw mut (*health).lost });
}
