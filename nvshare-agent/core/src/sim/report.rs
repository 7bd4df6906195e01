//! What came of a run: the contract of `cargo xtask simulate --json`.

use serde::Serialize;

use crate::{
    output::Mode,
    sim::{
        policy::Change,
        process::State,
        run::{Options, Run},
    },
    units::Nanos,
};

/// The figures of one run. Absent values are null.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Who decided.
    pub policy: String,
    /// The seed.
    pub seed: u64,
    /// Last finish less first start; killed clients do not count.
    pub makespan_s: Option<f64>,
    /// Changes of mode.
    pub mode_switches: Vec<ModeSwitch>,
    /// From the first curable refault of the episode to the first switch away from shared.
    pub detection_delay_s: Option<f64>,
    /// Confirmed switches that the oracle would not have made.
    pub false_detections: u64,
    /// Bytes moved, in both directions, while clients took turns.
    pub handover_bytes: u64,
    /// Sum of GPU time ÷ (GPUs × makespan). Of killed clients, what they had within that time.
    pub useful_fraction: Option<f64>,
    /// Jain's index of GPU time ÷ weight.
    pub jain: Option<f64>,
    /// The clients, in the order of the file.
    pub clients: Vec<ClientReport>,
}

/// A change of mode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeSwitch {
    /// When.
    pub t_s: f64,
    /// Before.
    pub from: Mode,
    /// After.
    pub to: Mode,
    /// Why.
    pub reason: String,
}

/// A client's figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClientReport {
    /// Its name.
    pub name: String,
    /// When it finished, from the start of the scenario; null if it was killed.
    pub finish_s: Option<f64>,
    /// GPU time it had, on all of its GPUs together.
    pub gpu_s: f64,
    /// Time its work waited for memory.
    pub stall_s: f64,
    /// Time it had work and its gate was closed.
    pub wait_s: f64,
}

/// A change of plan and what was known of it.
#[derive(Clone, Debug)]
pub(crate) struct Switch {
    pub(crate) at: Nanos,
    pub(crate) change: Change,
    /// When the curable refaults of that time began.
    onset: Option<Nanos>,
}

impl Switch {
    pub(crate) fn new(at: Nanos, change: Change, onset: Option<Nanos>) -> Self {
        Self { at, change, onset }
    }
}

impl Report {
    pub(crate) fn of(run: &Run<'_>, options: &Options) -> Self {
        let world = &run.world;
        let survivors = world.processes.iter().filter(|process| process.state != State::Killed);
        let first_started = survivors.min_by_key(|process| process.spec.start);
        let first = first_started.map(|process| process.spec.start);
        let before = first_started.map_or(0.0, |process| process.work_before);
        let unfinished = world.processes.iter().any(|p| !matches!(p.state, State::Done | State::Killed));
        let makespan =
            first.zip(world.last_finish).filter(|_| !unfinished).map(|(first, last)| last.since(first));
        let spanned = makespan.filter(|span| *span > Nanos::ZERO);
        let away = |switch: &&Switch| switch.change.from == Mode::Shared && switch.change.to != Mode::Shared;
        let detected = run.switches.iter().find(away);
        let delay = detected.and_then(|switch| Some(switch.at.since(switch.onset?).as_secs_f64()));
        let shares: Vec<f64> =
            world.processes.iter().map(|p| p.gpu_time() / f64::from(p.weight_milli)).collect();
        Self {
            policy: options.policy.to_string(),
            seed: options.seed,
            makespan_s: makespan.map(Nanos::as_secs_f64),
            mode_switches: run.switches.iter().filter(|s| s.change.from != s.change.to).map(shown).collect(),
            detection_delay_s: delay,
            false_detections: run.false_detections,
            handover_bytes: run.handover_bytes().0,
            useful_fraction: spanned.map(|span| {
                (world.work_at_last_finish - before) / (world.cards.len() as f64 * span.0 as f64)
            }),
            jain: jain(&shares),
            clients: world
                .processes
                .iter()
                .map(|process| ClientReport {
                    name: process.spec.name.clone(),
                    finish_s: process.finish.map(Nanos::as_secs_f64),
                    gpu_s: process.gpu_time() / 1e9,
                    stall_s: process.stalled.as_secs_f64(),
                    wait_s: process.waited.as_secs_f64(),
                })
                .collect(),
        }
    }
}

fn shown(switch: &Switch) -> ModeSwitch {
    let Change { from, to, reason, .. } = &switch.change;
    ModeSwitch { t_s: switch.at.as_secs_f64(), from: *from, to: *to, reason: reason.clone() }
}

/// Jain's index of fairness, (Σx)² ÷ (n·Σx²); `None` of nothing.
pub fn jain(shares: &[f64]) -> Option<f64> {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    (squares > 0.0).then(|| sum * sum / (shares.len() as f64 * squares))
}
