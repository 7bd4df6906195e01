//! A library whose only function panics and recovers, linked as the portable shim is.
#![allow(
    dead_code,
    non_snake_case,
    reason = "shares files with the shim; the linker exports names of the driver only"
)]

#[path = "../../../src/loader/elf.rs"]
mod elf;
mod loader {
    pub(crate) use crate::elf;
}
#[path = "../../../src/portable.rs"]
mod portable;

use std::{
    ffi::c_int,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::atomic::{AtomicI32, Ordering::SeqCst},
};

static DROPPED: AtomicI32 = AtomicI32::new(0);

struct Counted;

impl Drop for Counted {
    fn drop(&mut self) {
        DROPPED.fetch_add(1, SeqCst);
    }
}

#[inline(never)]
fn descend(frames: c_int) {
    let _counted = Counted;
    assert!(std::hint::black_box(frames) > 0, "the deepest frame");
    descend(frames - 1);
}

/// Panics below `frames` frames, and again with what was caught; how many frames were cleaned up, or -1 if something
/// was not caught as it was thrown.
#[unsafe(no_mangle)]
pub extern "C" fn cuPanics(frames: c_int) -> c_int {
    let thrown = Some(&"the deepest frame");
    let caught = catch_unwind(|| descend(frames)).is_err_and(|what| {
        what.downcast_ref() == thrown
            && catch_unwind(AssertUnwindSafe(|| resume_unwind(what)))
                .is_err_and(|again| again.downcast_ref() == thrown)
    });
    if caught { DROPPED.load(SeqCst) } else { -1 }
}
