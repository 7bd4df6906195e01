//! The launch gate of each GPU: who may submit work, and how a revoker learns that nobody is submitting.
//!
//! **Problem.** A kernel launch takes about two microseconds, so asking for permission has to cost
//! nanoseconds; yet when the agent takes the GPU away, "no launch is under way" must be a fact.
//!
//! **Approach.** Asymmetric ([`protocol`]): a launching thread writes only its own mark and loads one word. The revoker
//! closes the word, makes every thread of the process pass a barrier (`membarrier`), and looks at the marks.
//! Where the kernel has no `membarrier`, the word keeps [`FENCED`] and each entry pays for a fence. The proof is
//! in `docs/gate.md`.
//!
//! The word of the first GPU speaks for the whole process: programs with one GPU (nearly all) never look a
//! device up. As soon as a second GPU is in use the word keeps [`MANY`], and each entry asks the driver for
//! the device of the current context.
//!
//! **Invariants.** After `close` and no mark set, no thread is between entering and leaving on that GPU, except
//! with work for an open capture, which is no GPU work. A thread inside may enter again: the driver may call our
//! exports itself. No wait is endless: what nobody answers opens by itself ([`silence`]).

mod protocol;
pub(crate) mod silence;
pub(crate) mod thread;

/// What [`protocol`] is made of.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering, compiler_fence, fence};
}

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nvshare_wire::page::SLOTS;

use crate::{
    abi::{CUdeviceptr, Flavour, Ptr},
    driver, state, sys,
};
use protocol::{CLOSED, Mark, Word};
use thread::{Counters, Frame, Record};

/// Entering takes a fence, because this process cannot use `membarrier`.
const FENCED: u32 = 2;
/// The process uses several GPUs; only in the first word.
const MANY: u32 = 4;

/// The gate of one GPU.
#[derive(Debug)]
struct Gate {
    word: Word,
    /// How often it was closed, counted from 1.
    closings: AtomicU32,
}

static GATES: [Gate; SLOTS] =
    [const { Gate { word: Word(AtomicU32::new(FENCED)), closings: AtomicU32::new(0) } }; SLOTS];

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
        }
    }
}

/// A thread inside the gate; dropping it leaves.
#[derive(Debug)]
#[must_use = "dropping this leaves the gate"]
pub(crate) struct Inside {
    /// The thread's mark, and what it is set back to.
    marked: Option<&'static Mark>,
    before: usize,
    /// Marks belong to the thread that entered.
    not_send: PhantomData<*const ()>,
}

impl Inside {
    #[inline]
    fn counted(counters: &'static Counters, before: usize) -> Self {
        let calls = &counters.calls;
        calls.store(calls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        Self::uncounted(counters, before)
    }

    /// Inside, with a call that is not the program's own work.
    #[inline]
    fn uncounted(counters: &'static Counters, before: usize) -> Self {
        Self { marked: Some(&counters.inside), before, not_send: PhantomData }
    }

    /// Not known to any gate: the call goes on as if the shim were not there.
    const UNMARKED: Self = Self { marked: None, before: 0, not_send: PhantomData };
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        if let Some(mark) = self.marked {
            mark.set_back(self.before);
        }
    }
}

/// Passes the gate of the calling thread's current GPU, waiting while it is closed.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the frame is the caller's")]
pub(crate) fn enter(work: Work) -> Inside {
    enter_from(Frame::here(), work)
}

#[inline]
fn enter_from(frame: Frame, work: Work) -> Inside {
    let Some(record) = thread::record() else { return Inside::UNMARKED };
    match GATES[0].word.pass(&record.slots[0].inside, frame.address()) {
        Ok(()) => Inside::counted(&record.slots[0], 0),
        Err(_) => enter_slowly(record, frame, work),
    }
}

/// Passes the gate of a GPU if it is open; for work of our own, which can as well not be done.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the frame is the caller's")]
pub(crate) fn enter_if_open(slot: usize) -> Option<Inside> {
    let record = thread::record()?;
    let before = try_slot(record, slot, Frame::here()).ok()?;
    Some(Inside::uncounted(&record.slots[slot], before))
}

/// Passes the gate of one GPU if it is open or the thread is inside already; what its mark is set back to.
fn try_slot(record: &'static Record, slot: usize, frame: Frame) -> Result<usize, ()> {
    let mark = &record.slots[slot].inside;
    let before = frame.enclosing(mark.get());
    if GATES[slot].word.pass_fenced(mark, frame.address(), before) { Ok(before) } else { Err(()) }
}

#[cold]
fn enter_slowly(record: &'static Record, frame: Frame, work: Work) -> Inside {
    let Some(slot) = current_slot() else { return Inside::UNMARKED };
    loop {
        if let Ok(before) = try_slot(record, slot, frame) {
            return Inside::counted(&record.slots[slot], before);
        }
        if work.passes() {
            return Inside::UNMARKED;
        }
        wait(record, slot);
    }
}

/// A thread inside every gate; dropping it leaves them.
#[derive(Debug)]
#[must_use = "dropping this leaves the gates"]
pub(crate) struct InsideAll {
    _each: [Option<Inside>; SLOTS],
}

/// Passes the gates of all GPUs in use together, for what concerns them all: the beginning of a capture, during which none
/// may be drained. Nothing says which GPUs its streams will be of.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the frame is the caller's")]
pub(crate) fn enter_all() -> InsideAll {
    enter_all_from(Frame::here())
}

fn enter_all_from(frame: Frame) -> InsideAll {
    let mut each = [const { None }; SLOTS];
    let Some(record) = thread::record() else { return InsideAll { _each: each } };
    loop {
        let used = state::get().devices.iter().count();
        let closed = (0..used).find(|&slot| {
            each[slot] = try_slot(record, slot, frame)
                .ok()
                .map(|before| Inside::uncounted(&record.slots[slot], before));
            each[slot].is_none()
        });
        let Some(closed) = closed else { return InsideAll { _each: each } };
        // Whoever waits here must not hold up a drain there.
        each = [const { None }; SLOTS];
        wait(record, closed);
    }
}

/// The slot of the GPU that the calling thread's context is on; `None` if it has no context, or the GPU
/// does not fit into the page.
pub(crate) fn current_slot() -> Option<usize> {
    if GATES[0].word.0.load(Ordering::Relaxed) & MANY == 0 {
        return Some(0);
    }
    state::get().devices.slot_of(driver::current_device().ok()?)
}

/// How long a waiting thread sleeps before it looks whether the agent still speaks.
const LOOK_UP: Duration = Duration::from_millis(250);

fn wait(record: &'static Record, slot: usize) {
    let gate = &GATES[slot];
    let waiting = &record.slots[slot].waiting;
    waiting.store(gate.closings.load(Ordering::SeqCst), Ordering::SeqCst);
    state::get().session.kick();
    loop {
        let word = gate.word.0.load(Ordering::Acquire);
        if word & CLOSED == 0 {
            break;
        }
        // It may have been opened and closed again meanwhile.
        waiting.store(gate.closings.load(Ordering::SeqCst), Ordering::SeqCst);
        sys::futex_wait(&gate.word.0, word, LOOK_UP);
        if silence::is_broken() {
            open(slot);
        }
    }
    waiting.store(0, Ordering::SeqCst);
}

/// Whether the gate is closed.
pub(crate) fn is_closed(slot: usize) -> bool {
    GATES[slot].word.is_closed()
}

/// Opens the gate and wakes who waits there. Whoever opens it makes the program's memory writable first.
pub(crate) fn open(slot: usize) {
    let residency = &state::get().memory.residency;
    residency.lift(slot);
    let gate = &GATES[slot];
    if gate.word.open() {
        sys::futex_wake_all(&gate.word.0);
    }
    // A thread that waits may open it just when the session allows protection: whoever is later finds the other.
    residency.lift(slot);
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

/// Closes the gate: from here on a mark that is not set stays so. `false` if that cannot be had now (it can the next time):
/// the gate is open.
pub(crate) fn close(slot: usize) -> bool {
    let gate = &GATES[slot];
    gate.closings.fetch_add(1, Ordering::SeqCst);
    let is_fenced = GATES[0].word.0.load(Ordering::SeqCst) & FENCED != 0;
    // Entries that fence for themselves need no barrier of ours.
    let closed = gate.word.close(|| is_fenced || sys::membarrier());
    if !closed {
        // It worked when the session began, so the program has forbidden it to itself since (seccomp). From now on entries
        // fence, and those under way without a fence will have become visible long before the next revocation.
        fence_entries();
        open(slot);
    }
    closed
}

/// Takes the fence out of every entry, if the kernel can do it for them.
pub(crate) fn use_membarrier() {
    if sys::register_membarrier() && sys::membarrier() {
        for gate in &GATES {
            gate.word.0.fetch_and(!FENCED, Ordering::SeqCst);
        }
    }
}

/// Puts the fence into every entry.
fn fence_entries() {
    for gate in &GATES {
        gate.word.0.fetch_or(FENCED, Ordering::SeqCst);
    }
}

/// From now on the process uses several GPUs.
pub(crate) fn many_devices() {
    GATES[0].word.0.fetch_or(MANY, Ordering::SeqCst);
}

/// Threads waiting at the gate, which is closed.
pub(crate) fn waiting(slot: usize) -> u32 {
    // A thread that left its wait by `longjmp` counts until the gate opens, and no longer.
    if is_closed(slot) { thread::waiting(slot, GATES[slot].closings.load(Ordering::SeqCst)) } else { 0 }
}

/// Forgets everything: the calling thread is the only one of a forked child.
pub(crate) fn reset_after_fork() {
    for gate in &GATES {
        gate.word.0.store(FENCED, Ordering::SeqCst);
    }
    thread::reset_after_fork();
}

#[cfg(test)]
mod tests;
