//! Layouts that several programs must agree on: nvidia-uvm's own structures, and the BPF maps.
//!
//! Problem: the agent, the eBPF programs and the simulated driver all read or write bytes whose layout the
//! compiler does not check for them, and the driver's layouts change between versions.
//!
//! Approach: every such layout is a constant, a table or a `repr(C)` type here, with the driver versions it was
//! checked against. [`uvm`] holds what nvidia-uvm defines, [`tools`] its tools ioctls, [`maps`] what is shared
//! between the eBPF programs and the agent.
//!
//! Invariants: no allocation, no standard library, no I/O; an unknown driver version gives `None`, never a guess.
#![no_std]
#![deny(missing_docs)]

pub mod maps;
pub mod tools;
pub mod uvm;
