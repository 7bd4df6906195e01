//! The eBPF programs. They count what nvidia-uvm and its users do; they decide nothing.
//!
//! Problem: the agent must know, per process and GPU, what the driver moves and for whom, without slowing the one
//! thread that serves a GPU's faults.
//!
//! Approach: counters in maps that the agent reads; no message per event except for the rarest. The functions of
//! nvidia-uvm are entered by kprobes on the module or by uprobes on a simulation, with the same bodies ([`uvm`]).
//!
//! Invariants: constant work per event; every map is bounded and every refused update is counted; names of
//! threads are never trusted; nothing depends on the kernel's configuration, because no kernel structure is read.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(
    clippy::inline_always,
    reason = "one program per entry point: no calls, one stack frame, exact bounds"
)]
#![expect(clippy::needless_pass_by_value, reason = "the entry point macros hand the context over by value")]
#![expect(internal_features, reason = "atomic addition; the compiler that builds this object is pinned")]

mod cuda;
mod fault_thread;
mod health;
mod maps;
mod shadow;
mod space;
mod uvm;
mod xid;

/// Lets the agent refuse an object that was built for other maps.
#[used]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".nvshare.abi")]
static NVSHARE_ABI: u32 = nvshare_abi::maps::ABI_VERSION;

/// Some helpers are given only to programs under a compatible licence.
#[used]
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
