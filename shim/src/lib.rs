//! `libnvshare.so`: preloaded into CUDA programs, it makes their device memory pageable and gates their work.
//!
//! **Problem.** A program must run as on its own GPU, at its own speed, while an agent decides when it may submit work;
//! and it must run on, unharmed, whenever anything of ours is missing or fails.
//!
//! **Approach.** [`loader`] and [`table`] bring wrappers between the program and the driver. [`hooks`] are these
//! wrappers: C ABI only. What they do is in [`gate`] (launches), [`memory`] (allocations), [`devices`] and
//! [`captures`] (what there is to drain). [`session`] talks to the agent in a thread of its own.
//!
//! **Invariants.** The exported names are `dlsym`, `dlvsym` and the hooked driver functions. An open gate costs one atomic load
//! and two writes to the thread's own memory. Programs without CUDA, and look-ups alone, start nothing. No panic leaves an
//! export. Any failure of ours means the driver's own function, called as the program called it.
#![deny(missing_docs)]

mod abi;
mod captures;
mod config;
mod devices;
mod driver;
mod gate;
mod hooks;
mod loader;
mod log;
mod memory;
#[cfg(feature = "portable")]
mod portable;
mod session;
mod state;
mod sys;
mod table;
