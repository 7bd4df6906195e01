//! `cargo xtask simulate`: a scenario file, run on the simulated machine in accelerated time.

pub(crate) mod calibrate;
mod show;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use nvshare_core::{
    Nanos,
    sim::{self, HandoverEngine, Options, PolicyKind, Report, Scenario, Sensors},
};

/// Run a scenario through the paging simulator and show what came of it.
///
/// `tests/scenarios` holds scenarios to start from; each says what it is for.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The scenario.
    #[arg(value_name = "SCENARIO.toml", required_unless_present = "calibrate")]
    scenario: Option<PathBuf>,
    /// Compare the model with what was measured instead: the nvshare thesis and the H100's hand-over rates.
    #[arg(long, conflicts_with = "scenario")]
    calibrate: bool,
    /// With --calibrate: also search for the parameters again (minutes).
    #[arg(long, requires = "calibrate")]
    fit: bool,
    /// Who decides: auto, shared, exclusive:SECONDS, allocation-sum, nixie or oracle.
    #[arg(long, default_value = "auto", value_name = "POLICY")]
    policy: PolicyKind,
    /// How memory moves at a hand-over [default: protected for auto, nixie and oracle, demand for the others].
    #[arg(long)]
    handover: Option<Handover>,
    /// What the agent's sensors see.
    #[arg(long, default_value = "blocks")]
    sensors: SensorsArg,
    /// The seed of all chance.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Handover {
    /// By the driver, on demand.
    Demand,
    /// By cuMemPrefetchAsync.
    Prefetch,
    /// By cuMemPrefetchAsync while it is write-protected.
    Protected,
}

#[derive(Clone, Copy, ValueEnum)]
enum SensorsArg {
    /// Single blocks.
    Blocks,
    /// Byte counters of each client.
    Counters,
}

/// Nobody waits longer than this without a sign of life.
const QUIET: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &Args) -> Result<()> {
    let Some(path) = &args.scenario else { return calibrate::run(args.fit) };
    let scenario = load(path)?;
    let options = Options {
        policy: args.policy,
        handover: args.handover.map(|handover| match handover {
            Handover::Demand => HandoverEngine::Demand,
            Handover::Prefetch => HandoverEngine::Prefetch,
            Handover::Protected => HandoverEngine::Protected,
        }),
        sensors: match args.sensors {
            SensorsArg::Blocks => Sensors::Blocks,
            SensorsArg::Counters => Sensors::Counters,
        },
        seed: args.seed,
    };
    let report = with_progress(&scenario, &options);
    show::report(&scenario, &report);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    if report.makespan_s.is_none() && report.clients.iter().any(|client| client.finish_s.is_some()) {
        bail!("the simulation was given up before every client had finished");
    }
    Ok(())
}

pub(crate) fn load(path: &Path) -> Result<Scenario> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(Scenario::parse(&path.display().to_string(), &text)?)
}

fn with_progress(scenario: &Scenario, options: &Options) -> Report {
    let mut shown = Instant::now();
    sim::run(scenario, options, &mut |simulated: Nanos| {
        if shown.elapsed() >= QUIET {
            shown = Instant::now();
            eprintln!("{}: {:.0} s simulated", options.policy, simulated.as_secs_f64());
        }
    })
}
