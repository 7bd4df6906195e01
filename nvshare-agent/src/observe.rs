//! What the agent sees of the driver. One file per source; each source may be absent.

pub mod blocks;
pub mod bpf;
pub mod btf;
pub mod fusion;
pub mod gaps;
pub mod gpus;
pub mod hazards;
pub mod nvml;
pub mod raw;
pub mod room;
pub mod sampler;
pub mod sensors;
pub mod source;
pub mod uvm_counters;
pub mod uvm_events;
pub mod uvm_tools;
