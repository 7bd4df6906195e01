//! nvidia-uvm's functions that probes attach to, under the driver's names and with its arguments.
//!
//! They do nothing themselves, except the service function, whose duration is what a probe on its entry and return
//! measures. Never inlined, exported dynamically, called on the occasions on which the driver calls them.

use std::ffi::c_void;

use nvshare_abi::uvm::{Event, EventLayout, FaultEntry, Processor};

use crate::service::Service;

/// A fault, a migration.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn uvm_perf_event_notify(events: *const c_void, event_id: u32, data: *const c_void) {
    std::hint::black_box((events, event_id, data));
}

/// A VA space ends.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn uvm_perf_destroy_va_space_events(events: *const c_void) {
    std::hint::black_box(events);
}

/// One run of fault service, from branch 560 on.
///
/// # Safety
/// `parent_gpu` points at the [`Service`] of the calling thread, borrowed by nobody else.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) unsafe extern "C" fn uvm_parent_gpu_service_replayable_faults(parent_gpu: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { run(parent_gpu) };
}

/// The same up to branch 555.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) unsafe extern "C" fn uvm_gpu_service_replayable_faults(gpu: *mut c_void) {
    // Distinct from the other name's body, or the linker may give both one address.
    std::hint::black_box(gpu);
    // SAFETY: the caller's promise.
    unsafe { run(gpu) };
}

/// # Safety
/// `service` points at a [`Service`] borrowed by nobody else.
unsafe fn run(service: *mut c_void) {
    // SAFETY: the caller's promise.
    let service = unsafe { &mut *service.cast::<Service>() };
    service.run();
}

/// Announces an event of a VA space.
pub(crate) fn notify(events: *const c_void, event: &Event, layout: &EventLayout) {
    let data = event.data(layout);
    uvm_perf_event_notify(events, event.id(layout), (&raw const data).cast());
}

/// Announces one GPU fault entry.
pub(crate) fn notify_gpu_fault(
    events: *const c_void,
    entry: &FaultEntry,
    processor: Processor,
    batch: u32,
    layout: &EventLayout,
) {
    let entry = entry.data(layout);
    let event = Event::GpuFault { processor, entry: (&raw const entry) as u64, batch, duplicate: false };
    notify(events, &event, layout);
}
