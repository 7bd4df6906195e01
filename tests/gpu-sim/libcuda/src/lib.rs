//! `libcuda.so.1` of the simulated GPU.
//!
//! # Problem
//! The shim, the agent and real CUDA runtimes have to be exercised end to end on machines without a GPU, with
//! results that can be checked.
//!
//! # Approach
//! A driver library with the real one's names, lookup contract, error codes, stream order and capture rules. Memory is
//! real: every allocation is a piece of one memory file, mapped twice (`arena`): where the program sees it and where the
//! "GPU" sees it, so that the program may write-protect its view while the GPU uses its own, as on the hardware. Work runs
//! on one thread per stream (`stream`) and really moves and computes bytes; *when* it does, and what page faults it costs,
//! comes from the model that all processes share (`nvshare-gpu-sim-model`). Kernels are built in (`kernels`) and named
//! by a small text format in place of machine code (`module`).
//!
//! # Invariants
//! * One VA space per process, registered with the model at the first context.
//! * An operation starts only after everything that stream order, events and the legacy default stream put before it.
//! * A forked child sees `CUDA_ERROR_NOT_INITIALIZED`, never its parent's threads, memory or locks.
//! * Names without an implementation answer `CUDA_ERROR_NOT_SUPPORTED` and say so once under `NVSHARE_SIM_LOG=1`.

#![expect(
    clippy::cast_ptr_alignment,
    reason = "the GPU's memory is bytes; each access states how it knows or avoids the alignment"
)]
#![expect(
    clippy::needless_pass_by_value,
    clippy::too_many_arguments,
    reason = "signatures are given by the C interface"
)]

mod abi;
mod arena;
mod array;
mod attributes;
mod context;
mod copy;
mod device;
mod entry;
mod errors;
mod event;
mod export_table;
mod graph;
mod ipc;
mod kernels;
mod launch;
mod lookup;
mod memory;
mod module;
mod physical;
mod pool;
mod process;
mod registry;
mod stream;
mod stream_calls;
