//! The launch gate of each GPU: who may submit work, and how a revoker learns that nobody is submitting.
//!
//! **Problem.** A kernel launch takes about two microseconds, so asking for permission has to cost
//! nanoseconds; yet when the agent takes the GPU away, "no launch is under way" must be a fact.
//!
//! **Approach.** Asymmetric: a launching thread writes only its own counter and loads one word. The revoker
//! closes the word, makes every thread of the process pass a barrier (`membarrier`), and sums the counters.
//! Where the kernel has no `membarrier`, the word keeps [`FENCED`] and each entry pays for a fence. The proof is
//! in `docs/gate.md`.
//!
//! The word of the first GPU speaks for the whole process: programs with one GPU (nearly all) never look a
//! device up. As soon as a second GPU is in use the word keeps [`MANY`], and each entry asks the driver for
//! the device of the current context.
//!
//! **Invariants.** After `close` and a sum of zero, no thread is between `enter` and `leave` on that GPU, except
//! work for an open capture, which is no GPU work. A thread inside may enter again: the driver may call our
//! exports itself. No wait is endless: what nobody answers opens by itself ([`silence`]).

pub(crate) mod silence;
pub(crate) mod thread;

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering, compiler_fence, fence},
    time::Duration,
};

use nvshare_wire::page::SLOTS;

use crate::{
    abi::{CUdeviceptr, Flavour, Ptr},
    driver, state, sys,
};
use thread::Record;

/// The gate is closed.
const CLOSED: u32 = 1;
/// Entering takes a fence, because this process cannot use `membarrier`.
const FENCED: u32 = 2;
/// The process uses several GPUs; only in the first word.
const MANY: u32 = 4;

/// The gate of one GPU.
#[derive(Debug)]
struct Gate {
    word: AtomicU32,
    waiting: AtomicU32,
}

static GATES: [Gate; SLOTS] =
    [const { Gate { word: AtomicU32::new(FENCED), waiting: AtomicU32::new(0) } }; SLOTS];

/// What a thread is about to submit, as far as a closed gate has to know.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// Work in the null stream, or in a stream that does not show.
    Plain,
    /// Work in a stream, with the flavour of the call.
    Stream(Ptr, Flavour),
    /// A launch whose stream is in its configuration (`CUlaunchConfig`).
    Config(*const crate::abi::CUlaunchConfig, Flavour),
    /// A copy between two addresses that may both be host memory.
    Copy(CUdeviceptr, CUdeviceptr),
    /// The same in a stream.
    CopyIn(CUdeviceptr, CUdeviceptr, Ptr, Flavour),
    /// The beginning of a stream capture; it waits like work, so that no capture opens during a drain.
    Capture,
}

impl Work {
    /// Whether this is no work for the GPU, so that it may pass a closed gate.
    fn passes(self) -> bool {
        match self {
            Self::Plain => state::get().captures.mine(),
            Self::Stream(stream, flavour) => driver::is_capturing(stream, flavour),
            Self::Config(config, flavour) => {
                // SAFETY: null or the caller's configuration, valid for the call that is waiting.
                let stream = unsafe { config.as_ref() }.map(|config| config.stream);
                stream.is_none_or(|stream| driver::is_capturing(stream, flavour))
            }
            Self::Copy(to, from) => driver::is_host_memory(to) && driver::is_host_memory(from),
            Self::CopyIn(to, from, stream, flavour) => {
                driver::is_capturing(stream, flavour) || Self::Copy(to, from).passes()
            }
            Self::Capture => false,
        }
    }
}

/// A thread inside the gate; dropping it leaves.
#[derive(Debug)]
#[must_use = "dropping this leaves the gate"]
pub(crate) struct Inside {
    counted: Option<(&'static Record, usize)>,
    /// Counters belong to the thread that entered.
    not_send: PhantomData<*const ()>,
}

impl Inside {
    fn counted(record: &'static Record, slot: usize) -> Self {
        let calls = &record.slots[slot].calls;
        calls.store(calls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        Self::uncounted_call(record, slot)
    }

    /// Inside, with a call that is not the program's own.
    fn uncounted_call(record: &'static Record, slot: usize) -> Self {
        Self { counted: Some((record, slot)), not_send: PhantomData }
    }

    /// Not known to any gate: the call goes on as if the shim were not there.
    const UNCOUNTED: Self = Self { counted: None, not_send: PhantomData };
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        if let Some((record, slot)) = self.counted {
            let inside = &record.slots[slot].inside;
            inside.store(inside.load(Ordering::Relaxed).saturating_sub(1), Ordering::Release);
        }
    }
}

/// Passes the gate of the calling thread's current GPU, waiting while it is closed.
#[inline]
pub(crate) fn enter(work: Work) -> Inside {
    let Some(record) = thread::record() else { return Inside::UNCOUNTED };
    let inside = &record.slots[0].inside;
    let before = inside.load(Ordering::Relaxed);
    inside.store(before + 1, Ordering::Relaxed);
    // The revoker's membarrier orders the store before the load for the processor; this does it for the compiler.
    compiler_fence(Ordering::SeqCst);
    if GATES[0].word.load(Ordering::Acquire) == 0 {
        return Inside::counted(record, 0);
    }
    inside.store(before, Ordering::Release);
    enter_slowly(record, work)
}

/// Passes the gate of a GPU if it is open; for work of our own, which can as well not be done.
pub(crate) fn enter_if_open(slot: usize) -> Option<Inside> {
    let record = thread::record()?;
    let inside = &record.slots[slot].inside;
    let before = inside.load(Ordering::Relaxed);
    inside.store(before + 1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    if before > 0 || !is_closed(slot) {
        return Some(Inside::uncounted_call(record, slot));
    }
    inside.store(before, Ordering::Release);
    None
}

#[cold]
fn enter_slowly(record: &'static Record, work: Work) -> Inside {
    let Some(slot) = current_slot() else { return Inside::UNCOUNTED };
    let inside = &record.slots[slot].inside;
    let before = inside.load(Ordering::Relaxed);
    loop {
        inside.store(before + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if before > 0 || !is_closed(slot) {
            return Inside::counted(record, slot);
        }
        inside.store(before, Ordering::Release);
        if work.passes() {
            return Inside::UNCOUNTED;
        }
        wait(slot);
    }
}

/// The slot of the GPU that the calling thread's context is on; `None` if it has no context, or the GPU
/// does not fit into the page.
pub(crate) fn current_slot() -> Option<usize> {
    if GATES[0].word.load(Ordering::Relaxed) & MANY == 0 {
        return Some(0);
    }
    state::get().devices.slot_of(driver::current_device().ok()?)
}

/// How long a waiting thread sleeps before it looks whether the agent still speaks.
const LOOK_UP: Duration = Duration::from_millis(250);

fn wait(slot: usize) {
    let gate = &GATES[slot];
    gate.waiting.fetch_add(1, Ordering::SeqCst);
    state::get().session.kick();
    loop {
        let word = gate.word.load(Ordering::Acquire);
        if word & CLOSED == 0 {
            break;
        }
        sys::futex_wait(&gate.word, word, LOOK_UP);
        if silence::is_broken() {
            open(slot);
        }
    }
    gate.waiting.fetch_sub(1, Ordering::SeqCst);
}

/// Whether the gate is closed.
pub(crate) fn is_closed(slot: usize) -> bool {
    GATES[slot].word.load(Ordering::Acquire) & CLOSED != 0
}

/// Opens the gate and wakes who waits there.
pub(crate) fn open(slot: usize) {
    let gate = &GATES[slot];
    if gate.word.fetch_and(!CLOSED, Ordering::SeqCst) & CLOSED != 0 {
        sys::futex_wake_all(&gate.word);
    }
}

/// Opens every gate; whether any was closed.
pub(crate) fn open_all() -> bool {
    let mut any = false;
    for slot in 0..SLOTS {
        any |= is_closed(slot);
        open(slot);
    }
    any
}

/// Closes the gate: from here on a count of zero stays zero.
pub(crate) fn close(slot: usize) {
    GATES[slot].word.fetch_or(CLOSED, Ordering::SeqCst);
    // Entries that fence for themselves need no barrier of ours; entries that do not are why this call cannot
    // fail: `use_membarrier` has tried it.
    if GATES[0].word.load(Ordering::Relaxed) & FENCED == 0 {
        sys::membarrier();
    }
    fence(Ordering::SeqCst);
}

/// Takes the fence out of every entry, if the kernel can do it for them.
pub(crate) fn use_membarrier() {
    if sys::register_membarrier() && sys::membarrier() {
        for gate in &GATES {
            gate.word.fetch_and(!FENCED, Ordering::SeqCst);
        }
    }
}

/// From now on the process uses several GPUs.
pub(crate) fn many_devices() {
    GATES[0].word.fetch_or(MANY, Ordering::SeqCst);
}

/// Threads waiting at the gate.
pub(crate) fn waiting(slot: usize) -> u32 {
    GATES[slot].waiting.load(Ordering::SeqCst)
}

/// Forgets everything: the calling thread is the only one of a forked child.
pub(crate) fn reset_after_fork() {
    for gate in &GATES {
        gate.word.store(FENCED, Ordering::SeqCst);
        gate.waiting.store(0, Ordering::SeqCst);
    }
    thread::reset_after_fork();
}

#[cfg(test)]
mod tests;
