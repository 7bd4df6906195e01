//! A simulated GPU that every process of the machine shares.
//!
//! Problem: the whole product (shim, agent, eBPF programs) must run and be tested where there is no GPU, against something
//! that pages managed memory as nvidia-uvm does.
//!
//! Approach: one simulator process owns the model of the memory ([`memory`], [`fault`]): pure logic with no clock. It serves
//! faults in real time and publishes what is resident in a file that every process maps at one fixed address. Programs
//! reach it through [`client`], from the simulated `libcuda`.
//!
//! Invariants: a program that is killed at any instant leaves the others running; nothing a program writes into the shared
//! file can corrupt the model, which lives in the simulator's private memory.

pub mod client;
pub mod cost;
pub mod engine;
pub mod fault;
pub mod ids;
pub mod memory;
pub mod shared;
pub mod sync;
pub mod wire;
