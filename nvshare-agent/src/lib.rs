//! The agent: senses the driver, decides, and drives the clients.
//!
//! Problem: nvidia-uvm alone decides which process's memory is on the card, and nobody tells it when processes
//! should take turns instead.
//!
//! Approach: [`observe`] reads the driver, [`clients`] talks to the programs, and [`driver`] owns the engine of
//! `nvshare-core`, which decides. [`operator`] shows what happens and takes orders. [`agent`] puts it together.
//!
//! Invariants: the shell never decides. Any source of observations may be absent. Time is read in [`clock`] only.

pub mod agent;
pub mod clients;
pub mod clock;
pub mod config;
pub mod ctl;
pub mod driver;
pub mod metrics;
pub mod observe;
pub mod operator;
pub mod pods;
pub mod recording;
pub mod run_dir;
mod sys;
pub mod text;
