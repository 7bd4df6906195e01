//! What is measured, how often, and what was promised.

/// The groups that can be asked for by name.
pub(super) const BENCHES: [&str; 5] = ["launch", "kernels", "memory", "steps", "start"];

/// Asked for by name only, and alone: two programs that do not fit together.
pub(super) const THRASH: &str = "thrash";

/// Which program measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Program {
    /// `nvshare-workload bench`: the driver's interface and nothing between.
    Driver,
    /// `tests/gpu/worker.py`: PyTorch.
    Torch,
}

/// What was promised of the product's own arms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    /// The upper bound of the mean ratio is at most this.
    Ratio(f64),
    /// The interval of the ratio meets the interval of bare against bare.
    Noise,
    /// The median ratio is at most 1, or the interval meets the interval of bare against bare.
    NotWorse,
    /// The upper bound of the mean difference is at most this.
    Difference(f64),
    /// Shown only.
    None,
}

/// One thing to measure.
#[derive(Clone, Debug)]
pub(super) struct Metric {
    pub(super) bench: &'static str,
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) target: Target,
}

/// A command to a long-lived program, whose answer holds one value.
#[derive(Clone, Debug)]
pub(super) struct Round {
    pub(super) metric: Metric,
    pub(super) program: Program,
    pub(super) command: String,
    pub(super) field: &'static str,
    pub(super) pairs: usize,
}

/// Rounds of programs that live as long as the benchmark.
pub(super) fn rounds(benches: &[&str], pairs: usize, simulated: bool) -> Vec<Round> {
    // A simulated launch is a call to another thread: a few are enough to see that all of it works.
    let launches = if simulated { 500 } else { 4_000 };
    let round = |bench, name: &str, unit, target, program, command: String, field, pairs| Round {
        metric: Metric { bench, name: name.to_owned(), unit, target },
        program,
        command,
        field,
        pairs,
    };
    let half = pairs.div_ceil(2);
    let all = [
        round(
            "launch",
            "launch",
            "ns",
            Target::Ratio(1.01),
            Program::Driver,
            format!("launch {launches}"),
            "ns",
            pairs,
        ),
        round(
            "launch",
            "submit",
            "ns",
            Target::None,
            Program::Driver,
            format!("submit {launches}"),
            "ns",
            pairs,
        ),
        round(
            "launch",
            "torch launch",
            "ns",
            Target::Ratio(1.01),
            Program::Torch,
            format!("launch {launches} 1000"),
            "ns_per_launch",
            pairs,
        ),
        round("kernels", "add", "ms", Target::Noise, Program::Torch, "add 60".to_owned(), "ms", half),
        round("kernels", "matmul", "ms", Target::Noise, Program::Torch, "matmul 12".to_owned(), "ms", half),
        round("steps", "train", "ms", Target::Ratio(1.01), Program::Torch, "train 4".to_owned(), "ms", pairs),
        round("steps", "infer", "ms", Target::Ratio(1.01), Program::Torch, "infer 8".to_owned(), "ms", pairs),
    ];
    all.into_iter()
        .filter(|round| benches.contains(&round.metric.bench))
        .filter(|round| !(simulated && round.program == Program::Torch))
        .collect()
}

/// Pairs of bursts in one process, by the driver's own function and by the one between.
pub(super) const CALL: (&str, u64) = ("call", 400);

/// Sizes of which single allocations are timed, and how often in one process.
pub(super) fn sizes(simulated: bool) -> &'static [(u64, u64, &'static str)] {
    const REAL: [(u64, u64, &str); 8] = [
        (4 << 10, 50, "4 KiB"),
        (64 << 10, 50, "64 KiB"),
        (1 << 20, 50, "1 MiB"),
        (2 << 20, 50, "2 MiB"),
        (20 << 20, 20, "20 MiB"),
        (64 << 20, 10, "64 MiB"),
        (256 << 20, 4, "256 MiB"),
        (1 << 30, 2, "1 GiB"),
    ];
    // The simulated card has 1 GiB in all.
    if simulated { &REAL[..5] } else { &REAL }
}

/// Bytes of the replayed life of a caching allocator.
pub(super) fn pattern_bytes(simulated: bool) -> u64 {
    if simulated { 256 << 20 } else { 4 << 30 }
}
