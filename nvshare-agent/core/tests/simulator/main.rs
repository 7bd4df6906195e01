//! The paging simulator: what holds in every run, what tiny cases must come to, and what was measured.
#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

mod calibration;
mod closed_forms;
mod invariants;
mod scenario_files;

use nvshare_core::sim::{self, Options, PolicyKind, Report, Scenario};

fn scenario(text: &str) -> Scenario {
    Scenario::parse("test", text).unwrap()
}

fn run(text: &str, policy: &str) -> Report {
    run_seeded(text, policy, 1)
}

fn run_seeded(text: &str, policy: &str, seed: u64) -> Report {
    let policy: PolicyKind = policy.parse().unwrap();
    sim::run(&scenario(text), &Options { seed, ..Options::new(policy) }, &mut |_| {})
}
