//! The whole library under every policy.

use std::ops::ControlFlow;

use nvshare_core::{
    Nanos,
    input::ModeOrder,
    sim::{self, Options, PolicyKind, Scenario, Sensors, Watched},
};

use super::{
    library::{Entry, Library},
    pool,
};

/// Sharing is given up once it has taken this many times as long as stock nvshare's lock.
pub(super) const HOPELESS: f64 = 4.0;
/// The quantum of the lock that auto is compared with.
const STOCK: PolicyKind = PolicyKind::Exclusive(Nanos::seconds(30));

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Makespan {
    Took(f64),
    /// It was stopped after this time.
    Beyond(f64),
}

impl Makespan {
    /// A lower bound, if it was stopped.
    pub(super) fn at_least(self) -> f64 {
        match self {
            Self::Took(time) | Self::Beyond(time) => time,
        }
    }

    pub(super) fn shown(self) -> String {
        match self {
            Self::Took(time) => format!("{time:.0}"),
            Self::Beyond(time) => format!("> {time:.0}"),
        }
    }
}

/// A run of a policy, as far as it is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rival {
    pub(super) makespan: Makespan,
    /// The longest time that anybody's work waited at a closed gate.
    pub(super) longest_wait: f64,
}

impl Rival {
    pub(super) fn of(watched: &Watched) -> Self {
        let longest = watched.waits.iter().flatten().max().copied().unwrap_or_default();
        Self { makespan: makespan(watched), longest_wait: longest.as_secs_f64() }
    }
}

/// One scenario under every policy.
#[derive(Debug)]
pub(super) struct Runs {
    pub(super) blocks: Watched,
    pub(super) counters: Watched,
    pub(super) oracle: Rival,
    pub(super) shared: Rival,
    pub(super) stock: Rival,
    pub(super) sum: Rival,
    pub(super) nixie: Rival,
}

impl Runs {
    pub(super) fn auto(&self, sensors: Sensors) -> &Watched {
        match sensors {
            Sensors::Blocks => &self.blocks,
            Sensors::Counters => &self.counters,
        }
    }

    /// The policies that are no oracle.
    pub(super) fn others(&self) -> [(&'static str, Rival); 4] {
        [
            ("shared", self.shared),
            ("exclusive:30", self.stock),
            ("allocation-sum", self.sum),
            ("nixie", self.nixie),
        ]
    }

    /// The better of what users have without nvshare's decisions.
    pub(super) fn better(&self) -> f64 {
        let shared = if let Makespan::Took(time) = self.shared.makespan { time } else { f64::INFINITY };
        shared.min(self.stock.makespan.at_least())
    }
}

/// The two forms of the detector's test.
pub(super) const FORMS: [(&str, Sensors); 2] = [("blocks", Sensors::Blocks), ("counters", Sensors::Counters)];

/// Runs a scenario to its end or up to a limit.
pub(super) fn run_to(scenario: &Scenario, options: &Options, limit: Option<f64>) -> Watched {
    sim::watch(scenario, options, ModeOrder::Auto, &mut |bin| {
        if limit.is_some_and(|limit| bin.at.as_secs_f64() >= limit) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })
}

/// The makespan, or how long the run went on without one.
pub(super) fn makespan(watched: &Watched) -> Makespan {
    watched.report.makespan_s.map_or(Makespan::Beyond(watched.end.as_secs_f64()), Makespan::Took)
}

/// Runs the whole library.
pub(super) fn run(library: &Library) -> Vec<Runs> {
    let arms: Vec<Options> =
        [PolicyKind::Auto, PolicyKind::Oracle, STOCK, PolicyKind::AllocationSum, PolicyKind::Nixie]
            .into_iter()
            .map(Options::new)
            .chain([Options { sensors: Sensors::Counters, ..Options::new(PolicyKind::Auto) }])
            .collect();
    let mut tasks = Vec::new();
    for entry in &library.entries {
        tasks.extend(arms.iter().map(|options| (entry, options)));
    }
    let mut results =
        pool::all("library", &tasks, |(entry, options)| run_to(&entry.scenario, options, None)).into_iter();
    let mut rows = Vec::new();
    for entry in &library.entries {
        let [Some(auto), Some(oracle), Some(stock), Some(sum), Some(nixie), Some(counters)] =
            std::array::from_fn(|_| results.next())
        else {
            continue;
        };
        rows.push((entry, [auto, oracle, stock, sum, nixie, counters]));
    }
    let options = Options::new(PolicyKind::Shared);
    let shared = pool::all("library, shared", &rows, |(entry, runs)| {
        let limit = makespan(&runs[2]).at_least() * HOPELESS;
        Rival::of(&run_to(&entry.scenario, &options, Some(limit)))
    });
    let merge = |((_, runs), shared): ((&Entry, [Watched; 6]), Rival)| {
        let [blocks, oracle, stock, sum, nixie, counters] = runs;
        Runs {
            oracle: Rival::of(&oracle),
            stock: Rival::of(&stock),
            sum: Rival::of(&sum),
            nixie: Rival::of(&nixie),
            shared,
            blocks,
            counters,
        }
    };
    rows.into_iter().zip(shared).map(merge).collect()
}
