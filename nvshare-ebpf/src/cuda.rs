//! The rare calls of libcuda: which processes use it, shim or not. One program; the probe's cookie says which call.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_NOEXIST,
    helpers::{
        bpf_get_current_comm,
        generated::{bpf_get_attach_cookie, bpf_ktime_get_ns},
    },
    macros::uprobe,
    programs::ProbeContext,
};
use aya_log_ebpf::info;
use nvshare_abi::maps::{CudaCall, CudaCalls};

use crate::{health, maps::CUDA_CALLS, space};

#[uprobe]
pub(crate) fn cuda_call(ctx: ProbeContext) -> u32 {
    let _ignored = count(&ctx);
    0
}

#[inline(always)]
fn count(ctx: &ProbeContext) -> Option<()> {
    // SAFETY: the context is the one the program was entered with.
    let call = CudaCall::from_cookie(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) })?;
    let process = space::current_process();
    let calls = of(process)?;
    // SAFETY: a helper without arguments; the fields lie in a map value.
    unsafe {
        (*calls).last_ns = bpf_ktime_get_ns();
        match call {
            CudaCall::Init => {
                health::add(&raw mut (*calls).inits, 1);
                info!(ctx, "process {} initialises CUDA", process);
            }
            CudaCall::ContextBegin => health::add(&raw mut (*calls).contexts, 1),
            CudaCall::ContextEnd => health::add(&raw mut (*calls).contexts_ended, 1),
            CudaCall::AllocateManaged => {
                health::add(&raw mut (*calls).managed_allocations, 1);
                health::add(&raw mut (*calls).managed_bytes, ctx.arg::<u64>(1)?);
            }
            CudaCall::AllocateDevice => {
                health::add(&raw mut (*calls).device_allocations, 1);
                health::add(&raw mut (*calls).device_bytes, ctx.arg::<u64>(1)?);
            }
            CudaCall::Free => health::add(&raw mut (*calls).frees, 1),
        }
    }
    Some(())
}

#[inline(always)]
fn of(process: u32) -> Option<*mut CudaCalls> {
    if let Some(calls) = CUDA_CALLS.get_ptr_mut(process) {
        return Some(calls);
    }
    // SAFETY: a helper without arguments.
    let first_ns = unsafe { bpf_ktime_get_ns() };
    let new =
        CudaCalls { first_ns, comm: bpf_get_current_comm().unwrap_or_default(), ..CudaCalls::default() };
    let refused = CUDA_CALLS.insert(process, new, u64::from(BPF_NOEXIST)).is_err();
    let calls = CUDA_CALLS.get_ptr_mut(process);
    if refused && calls.is_none() {
        health::lost();
    }
    calls
}
