//! What nvidia-uvm does: one body per function, entered from a kprobe (the module) or a uprobe (a simulation).
//!
//! Everything is read with `bpf_probe_read`, which takes kernel and user addresses alike, and at offsets that the
//! agent put into `CONFIG` for the driver version it found. With an unknown layout only ownership is kept.
//!
//! The notification of a GPU fault runs in the one thread that serves all faults of a GPU. Its cost is bounded:
//! three reads, one lookup of the thread's last space, one per-CPU counter update.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_probe_read, generated::bpf_ktime_get_ns},
    macros::{kprobe, uprobe},
    programs::ProbeContext,
};
use aya_log_ebpf::info;
use nvshare_abi::{
    maps::{Config, CounterKey, Counters, EvictionKey, Evictor, SpaceId},
    uvm::{BLOCK_BYTES, EventLayout, MakeResidentCause, PAGE_BYTES, PROCESSORS},
};

use crate::{
    health,
    maps::{CONFIG, COUNTERS, EVICTIONS, EVICTORS},
    shadow, space,
};

macro_rules! entry_points {
    ($body:ident: $kprobe:ident, $uprobe:ident) => {
        #[kprobe]
        pub(crate) fn $kprobe(ctx: ProbeContext) -> u32 {
            let _ignored = $body(&ctx);
            0
        }
        #[uprobe]
        pub(crate) fn $uprobe(ctx: ProbeContext) -> u32 {
            let _ignored = $body(&ctx);
            0
        }
    };
}

entry_points!(notify: uvm_notify_k, uvm_notify_u);
entry_points!(init: uvm_init_k, uvm_init_u);
entry_points!(destroy: uvm_destroy_k, uvm_destroy_u);
entry_points!(service: uvm_service_k, uvm_service_u);

/// `uvm_perf_init_va_space_events(va_space*, events*)`
#[inline(always)]
fn init(ctx: &ProbeContext) -> Option<()> {
    let (va_space, events) = (ctx.arg::<u64>(0)?, ctx.arg::<u64>(1)?);
    space::begin(events, va_space)?;
    info!(ctx, "process {} has a UVM address space", space::current_process());
    Some(())
}

/// `uvm_perf_destroy_va_space_events(events*)`
#[inline(always)]
fn destroy(ctx: &ProbeContext) -> Option<()> {
    space::end(ctx.arg::<u64>(0)?)?;
    Some(())
}

/// `uvm_parent_gpu_service_replayable_faults(parent_gpu*)`, and the access counters' turn in the same thread: whatever
/// it does until its next fault notification is on nobody's behalf.
#[expect(clippy::unnecessary_wraps, reason = "all bodies have one form")]
#[inline(always)]
fn service(_: &ProbeContext) -> Option<()> {
    let thread = space::current_thread();
    if let Some(slot) = EVICTORS.get_ptr_mut(thread) {
        // SAFETY: a map value that only this thread writes.
        unsafe { *slot = Evictor::default() };
    } else if EVICTORS.insert(thread, Evictor::default(), u64::from(BPF_ANY)).is_err() {
        health::lost();
    }
    Some(())
}

/// `uvm_perf_event_notify(events*, event id, data*)`
#[inline(always)]
fn notify(ctx: &ProbeContext) -> Option<()> {
    let Config { layout_known, reserved: _, layout } = CONFIG.get(0)?;
    if *layout_known == 0 {
        return None;
    }
    let (events, id, data) = (ctx.arg::<u64>(0)?, ctx.arg::<u64>(1)? as u32, ctx.arg::<u64>(2)?);
    if id == layout.fault_id {
        health::notified();
        fault(layout, events, data)
    } else if id == layout.migration_id {
        health::notified();
        migration(layout, events, data)
    } else if id >= layout.event_count {
        health::notified();
        health::insane();
        None
    } else {
        None
    }
}

#[inline(always)]
fn fault(layout: &EventLayout, events: u64, data: u64) -> Option<()> {
    let processor: u32 = read(data, layout.fault_proc_id)?;
    if processor >= PROCESSORS {
        health::insane();
        return None;
    }
    if processor == 0 {
        // In the thread that faulted: a debugger could touch another's memory, the owner usually does.
        let id = space::of(events)?;
        space::suspect_owner(id);
        let counters = counters(id, 0)?;
        // SAFETY: the field lies in a map value.
        unsafe { health::add(&raw mut (*counters).cpu_faults, 1) };
        return Some(());
    }
    let entry: u64 = read(data, layout.fault_gpu_entry)?;
    let instances: u16 = read(entry, layout.entry_num_instances)?;
    if instances == 0 {
        health::insane();
        return None;
    }
    let id = faulting_space(events)?;
    let counters = counters(id, processor)?;
    // SAFETY: the fields lie in a map value.
    unsafe {
        health::add(&raw mut (*counters).gpu_faults, 1);
        health::add(&raw mut (*counters).gpu_fault_instances, u64::from(instances));
    }
    Some(())
}

/// The space of a GPU fault, remembered as the one for which this thread works.
#[inline(always)]
fn faulting_space(events: u64) -> Option<SpaceId> {
    let thread = space::current_thread();
    let generation = space::generation();
    if let Some(slot) = EVICTORS.get_ptr_mut(thread) {
        // SAFETY: a map value that only this thread writes.
        let slot = unsafe { &mut *slot };
        // An address may be reused, by another process, while this thread looks elsewhere.
        if slot.events == events && slot.generation == generation {
            return Some(SpaceId(slot.space));
        }
        let id = space::of(events)?;
        *slot = Evictor { events, space: id.0, generation };
        return Some(id);
    }
    let id = space::of(events)?;
    if EVICTORS.insert(thread, Evictor { events, space: id.0, generation }, u64::from(BPF_ANY)).is_err() {
        health::lost();
    }
    Some(id)
}

#[inline(always)]
fn migration(layout: &EventLayout, events: u64, data: u64) -> Option<()> {
    let block: u64 = read(data, layout.migration_block)?;
    let dst: u32 = read(data, layout.migration_dst)?;
    let src: u32 = read(data, layout.migration_src)?;
    let bytes: u64 = read(data, layout.migration_bytes)?;
    let cause: u32 = read(data, layout.migration_cause)?;
    let address: u64 = read(data, layout.migration_address)?;
    // Without a block it may be pageable memory, which moves in larger pieces.
    let fits = bytes <= BLOCK_BYTES || block == 0;
    if dst >= PROCESSORS
        || src >= PROCESSORS
        || bytes == 0
        || !bytes.is_multiple_of(PAGE_BYTES)
        || !fits
        || cause as usize >= MakeResidentCause::COUNT
    {
        health::insane();
        return None;
    }
    let id = space::of(events)?;
    if cause == MakeResidentCause::ApiMigrate.value() || cause == MakeResidentCause::ApiHint.value() {
        space::suspect_owner(id);
    }
    if dst != 0
        && let Some(counters) = counters(id, dst)
        && let Some(cause) = index(cause)
    {
        // SAFETY: `cause` is below the length of the array, which lies in a map value.
        unsafe { health::add((&raw mut (*counters).bytes_in).cast::<u64>().add(cause), bytes) };
    }
    if src != 0
        && let Some(counters) = counters(id, src)
        && let Some(at) = index(cause)
    {
        // SAFETY: `at` is below the length of the array, which lies in a map value.
        unsafe { health::add((&raw mut (*counters).bytes_out).cast::<u64>().add(at), bytes) };
        if cause == MakeResidentCause::Eviction.value() && evicted_by_another(id, src, bytes) {
            // SAFETY: the field lies in a map value.
            unsafe { health::add(&raw mut (*counters).evicted_by_others, bytes) };
        }
    }
    if bytes <= BLOCK_BYTES {
        if src != 0 && cause == MakeResidentCause::Eviction.value() {
            shadow::evicted(id, src, address, bytes);
        }
        if dst != 0 {
            let by_fault = cause == MakeResidentCause::ReplayableFault.value()
                || cause == MakeResidentCause::NonReplayableFault.value()
                || cause == MakeResidentCause::Prefetch.value();
            shadow::arrived(id, dst, address, bytes, by_fault);
        }
    }
    Some(())
}

/// A cause as an index. That it is in bounds is known to the compiler, but not to an older verifier once the number was
/// put aside, so it is looked at again where it is used.
#[inline(always)]
fn index(cause: u32) -> Option<usize> {
    // SAFETY: a variable of this function.
    let cause = unsafe { core::ptr::read_volatile(&raw const cause) } as usize;
    (cause < MakeResidentCause::COUNT).then_some(cause)
}

/// Notes on whose behalf bytes of `victim` are evicted here, and whether that is somebody else.
#[inline(always)]
fn evicted_by_another(victim: SpaceId, processor: u32, bytes: u64) -> bool {
    let (evictor, evictor_is_process, another) = if let Some(slot) = EVICTORS.get_ptr(space::current_thread())
    {
        // SAFETY: a map value that only this thread writes.
        match unsafe { (*slot).space } {
            // Between a fault batch's beginning and its first fault nobody is known.
            0 => return false,
            evictor => (evictor, 0, evictor != victim.0),
        }
    } else {
        // Not a fault-service thread: the process asks the driver for memory.
        let process = space::current_process();
        (u64::from(process), 1, space::owner(victim) != process)
    };
    let key = EvictionKey { victim, evictor, processor, evictor_is_process };
    if let Some(total) = EVICTIONS.get_ptr_mut(key) {
        // SAFETY: a map value.
        unsafe { health::add(total, bytes) };
    } else if EVICTIONS.insert(key, bytes, u64::from(BPF_NOEXIST)).is_err() {
        match EVICTIONS.get_ptr_mut(key) {
            // SAFETY: a map value.
            Some(total) => unsafe { health::add(total, bytes) },
            None => health::lost(),
        }
    }
    another
}

/// The counters of a space on a processor, with the time of this event noted.
#[inline(always)]
fn counters(space: SpaceId, processor: u32) -> Option<*mut Counters> {
    let key = CounterKey { space, processor, reserved: 0 };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let counters = if let Some(counters) = COUNTERS.get_ptr_mut(key) {
        counters
    } else {
        let refused = COUNTERS.insert(key, Counters::default(), u64::from(BPF_NOEXIST)).is_err();
        let Some(counters) = COUNTERS.get_ptr_mut(key) else {
            if refused {
                health::lost();
            }
            return None;
        };
        counters
    };
    // SAFETY: a map value; the times are approximate by nature.
    unsafe {
        if (*counters).first_ns == 0 {
            (*counters).first_ns = now;
        }
        (*counters).last_ns = now;
    }
    Some(counters)
}

/// Reads a field at an offset of a kernel or user address.
#[inline(always)]
fn read<T>(base: u64, offset: u32) -> Option<T> {
    let address = base.wrapping_add(u64::from(offset)) as *const T;
    // SAFETY: the helper checks the address; every `T` used is valid for any bytes.
    match unsafe { bpf_probe_read(address) } {
        Ok(value) => Some(value),
        Err(_unreadable) => {
            health::unreadable();
            None
        }
    }
}
