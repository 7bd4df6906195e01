//! How long each fault-service thread is busy: from waking to sleeping, with preemption counted as busy, because
//! the GPU waits meanwhile all the same.
//!
//! Threads are known by ids that the agent puts into `FAULT_THREADS`. Never by name: any thread can take one.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, macros::tracepoint, programs::TracePointContext};

use crate::{health, maps::FAULT_THREADS};

/// Offsets in the records of `sched_switch` and `sched_wakeup`; the agent compares them with the kernel's own
/// description before it attaches.
mod offset {
    pub(super) const SWITCH_PREV_PID: usize = 24;
    pub(super) const SWITCH_PREV_STATE: usize = 32;
    pub(super) const SWITCH_NEXT_PID: usize = 56;
    pub(super) const WAKEUP_PID: usize = 24;
}

/// The states in which a thread sleeps or is gone; above them lies the mark of a preempted thread.
const NOT_RUNNABLE: u64 = 0xff;

#[tracepoint]
pub(crate) fn sched_switch(ctx: TracePointContext) -> u32 {
    let _ignored = switch(&ctx);
    0
}

#[tracepoint]
pub(crate) fn sched_wakeup(ctx: TracePointContext) -> u32 {
    let _ignored = wakeup(&ctx);
    0
}

#[inline(always)]
fn switch(ctx: &TracePointContext) -> Result<(), i32> {
    // SAFETY: the offsets lie in the record; the helper checks the read.
    let (prev, next) = unsafe {
        (ctx.read_at::<u32>(offset::SWITCH_PREV_PID)?, ctx.read_at::<u32>(offset::SWITCH_NEXT_PID)?)
    };
    if let Some(thread) = FAULT_THREADS.get_ptr_mut(prev) {
        // SAFETY: as above.
        let state = unsafe { ctx.read_at::<u64>(offset::SWITCH_PREV_STATE)? };
        // SAFETY: a map value; one thread switches out on one CPU at a time.
        let thread = unsafe { &mut *thread };
        if state & NOT_RUNNABLE == 0 {
            begin(prev);
        } else if thread.since_ns != 0 {
            // SAFETY: a helper without arguments.
            let busy = unsafe { bpf_ktime_get_ns() }.wrapping_sub(thread.since_ns);
            thread.since_ns = 0;
            // SAFETY: the fields lie in a map value.
            unsafe {
                health::add(&raw mut thread.busy_ns, busy);
                health::add(&raw mut thread.periods, 1);
            }
        }
    }
    begin(next);
    Ok(())
}

#[inline(always)]
fn wakeup(ctx: &TracePointContext) -> Result<(), i32> {
    // SAFETY: the offset lies in the record; the helper checks the read.
    begin(unsafe { ctx.read_at::<u32>(offset::WAKEUP_PID)? });
    Ok(())
}

/// A thread is runnable; it is busy from the first time this is seen.
#[inline(always)]
fn begin(thread: u32) {
    if let Some(thread) = FAULT_THREADS.get_ptr_mut(thread) {
        // SAFETY: a map value; the kernel orders a thread's waking before its running.
        let thread = unsafe { &mut *thread };
        if thread.since_ns == 0 {
            // SAFETY: a helper without arguments.
            thread.since_ns = unsafe { bpf_ktime_get_ns() };
        }
    }
}
