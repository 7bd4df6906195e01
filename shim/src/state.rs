//! Everything the shim knows about this process, in one place that a forked child can replace.
//!
//! A child of `fork` has one thread, and locks that its parent's other threads held stay held. So it does not
//! unlock or repair anything: it leaves the parent's state alone (leaked, once per fork) and begins a new one.

use std::{
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use crate::{
    captures::Captures,
    devices::Devices,
    gate,
    memory::Memory,
    session::{Best, Session},
};

/// The state of one process.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// GPUs in use and their contexts.
    pub(crate) devices: Devices,
    /// Memory held.
    pub(crate) memory: Memory,
    /// Stream captures that are open.
    pub(crate) captures: Captures,
    /// How memory is moved best.
    pub(crate) best: Best,
    /// The way to the agent.
    pub(crate) session: Session,
}

static STATE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

/// This process's state.
pub(crate) fn get() -> &'static State {
    let state = STATE.load(Ordering::Acquire);
    // SAFETY: a stored state is never freed.
    unsafe { state.as_ref() }.unwrap_or_else(begin)
}

#[cold]
fn begin() -> &'static State {
    let new = Box::into_raw(Box::default());
    match STATE.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: just made, never freed.
        Ok(_) => unsafe { &*new },
        Err(other) => {
            // SAFETY: nobody else has seen `new`; `other` is the state that won.
            unsafe {
                drop(Box::from_raw(new));
                &*other
            }
        }
    }
}

/// Makes a forked child a client of its own. Runs in the child, before `fork` returns there.
pub(crate) extern "C" fn after_fork_in_child() {
    let parent = STATE.swap(ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: a stored state is never freed.
    if let Some(parent) = unsafe { parent.as_ref() } {
        parent.session.close_in_child();
    }
    gate::reset_after_fork();
}
