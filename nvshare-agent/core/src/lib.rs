//! The decision: when clients may share a GPU, and who runs when they may not.
//!
//! **Problem.** Many processes share one GPU through managed memory. While their working sets fit they
//! should run side by side; when they do not, the driver's paging collapses and they must take turns.
//!
//! **Approach.** One state machine, [`Engine`]: facts go in as [`Input`]s with their time, decisions come
//! out as [`Output`]s. Per GPU, a detector looks for curable refaults in the driver's figures, a planner
//! chooses co-run sets, a scheduler rotates them with a quantum derived from what a hand-over costs.
//!
//! **Invariants.** No clock, IO, threads, randomness or unsafe code: time is an input, and the same inputs
//! give the same outputs, bit for bit. After every [`Engine::handle`] the caller drains [`Engine::poll`]
//! until it answers [`Poll::Wait`].
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod account;
mod benefit;
mod detector;
pub mod engine;
mod gpu;
pub mod id;
pub mod input;
pub mod inventory;
mod lease;
mod member;
pub mod output;
mod packing;
mod plan;
pub mod quantity;
mod quantum;
mod reason;
mod rhythm;
mod rotation;
mod schedule;
pub mod sim;
pub mod toml_text;
mod turn;
pub mod units;
mod working_set;

pub use engine::{Config, Engine, Handover};
pub use id::{ClientId, Epoch, GpuId, JobId};
pub use input::{Activity, ClientSample, Drain, GpuSample, Input, ModeOrder, Order};
pub use inventory::{Inventory, InventoryGpu};
pub use output::{
    AccountView, ClientView, EffectView, GpuView, Mode, Outlook, Output, PlanChange, Poll, PressureView,
    Reason, StallView, View,
};
pub use units::{Bytes, Nanos};
