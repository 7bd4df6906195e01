//! A machine with GPUs that page, over simulated time, to try decisions on.
//!
//! **Problem.** Eviction under real pressure may hang a card, takes hours, and never happens twice the same
//! way. Decisions must be tried thousands of times, and compared with those of others.
//!
//! **Approach.** Discrete events over blocks of 2 MiB: the driver evicts first in, first out over all clients
//! of a GPU, serves faults one round after the other, and computes for everybody else meanwhile. The engine
//! that ships is told what its sensors would say, and its decisions are carried out with what they cost.
//!
//! **Invariants.** Pure: no clock, IO or threads, and all chance comes from a seed. The same scenario, options
//! and seed give the same report.

mod access;
mod blocks;
pub mod calibrate;
mod card;
mod fault;
mod mover;
mod policy;
mod preset;
mod process;
mod report;
mod rng;
mod run;
mod scenario;
mod sensors;
pub mod shadow;
mod vary;
mod watch;
mod work;
mod world;

pub use policy::PolicyKind;
pub use preset::GpuModel;
pub use report::{ClientReport, ModeSwitch, Report, jain};
pub use run::{Options, run};
pub use scenario::{Access, Act, ClientSpec, Event, Pause, Phase, Scenario, ScenarioError};
pub use sensors::Sensors;
pub use watch::{Bin, ClientBin, GpuBin, Watched, watch};
pub use world::Engine as HandoverEngine;
