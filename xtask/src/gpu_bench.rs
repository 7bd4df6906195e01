//! `cargo xtask gpu-bench`: what the shim costs on a real GPU.
//!
//! **Problem.** A cost of one percent is smaller than what two starts of the same program differ by, and clocks drift while one arm
//! after the other is measured.
//!
//! **Approach.** Several processes of every arm live at the same time, on the same core, and are idle unless asked. Short rounds
//! go through all arms in random order; each round of an arm is compared with the bare round beside it. What can only be
//! measured once in a process (allocations on fresh ground, the start itself) is measured in fresh processes, with
//! the agent stopped while it is the turn of the arms without one, since the agent's probes are in everybody's way.
//! `stats` says how bounds are found.
//!
//! **Invariants.** Every wait has a deadline. A process that fails is left out and named, and the others go on. Rows are in the
//! file as soon as they are known. Nothing that is started here outlives this program.

mod crew;
mod measure;
mod plan;
mod report;
pub(crate) mod stats;
mod thrash;

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{Binaries, Simulator, SimulatorOptions};
use serde_json::{Value, json};

use self::{
    crew::Setting,
    measure::{Bench, Random},
    plan::{BENCHES, THRASH},
    report::Rows,
};
use crate::cargo;

/// Measure what the shim costs on this machine's GPU: bare programs against programs under it, interleaved.
///
/// Needs an NVIDIA GPU, python3 with PyTorch, and root for the agent's sensors. Takes about five minutes. Ends with an error if
/// something could not be measured, or if a promise was not kept.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure: launch, kernels, memory, steps, start [default: all of these]; or thrash, alone.
    #[arg(value_name = "NAME", value_parser = BENCHES.into_iter().chain([THRASH]).collect::<Vec<_>>())]
    names: Vec<String>,
    /// With thrash: fill this machine's GPU beyond its memory. An error in the driver's eviction can hang the card
    /// until the machine is started anew: only on a card of your own.
    #[arg(long)]
    allow_oversubscription: bool,
    /// Also measure programs under another preloaded library. Can be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = named_path)]
    baseline: Vec<(String, PathBuf)>,
    /// A command that must run beside the baselines, such as a scheduler of theirs. Can be given several times.
    #[arg(long, value_name = "COMMAND")]
    beside: Vec<String>,
    /// Use the programs in this folder (as cargo's target/release) instead of building them.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Folder of worker.py [default: tests/gpu of this checkout].
    #[arg(long, value_name = "DIR")]
    scripts: Option<PathBuf>,
    /// The Python that has PyTorch.
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Where rows.csv, summary.json, table.txt and logs.txt go [default: a new folder under target].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Pairs of rounds for what was promised to within a percent.
    #[arg(long, default_value_t = 120, value_name = "N", value_parser = clap::value_parser!(u16).range(2..))]
    pairs: u16,
    /// Pairs of fresh processes for allocations; starts are measured twice as often.
    #[arg(long, default_value_t = 6, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    epochs: u16,
    /// Processes of each arm.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(2..))]
    instances: u16,
    /// Stop measuring after this time and report what is there.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    budget: u64,
    /// Repeats an order of rounds.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Core on which everything that is measured runs [default: the last].
    #[arg(long, value_name = "N")]
    core: Option<usize>,
    /// Try all of it on the simulated GPU. The figures say nothing about a real one.
    #[arg(long)]
    simulate: bool,
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    json: bool,
}

fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH")?;
    let usable = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if !usable {
        return Err(format!("`{name}` must consist of letters, digits, `.`, `_` and `-`"));
    }
    let path = std::fs::canonicalize(path).map_err(|error| format!("{path}: {error}"))?;
    Ok((name.to_owned(), path))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.names.iter().any(|name| name == THRASH) {
        return thrash::run(args);
    }
    let binaries = binaries(args)?;
    let out = args.out.clone().unwrap_or_else(|| cargo::root().join("target/gpu-bench"));
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let private = tempfile::Builder::new().prefix("nvshare-bench-").tempdir()?;
    let simulator = if args.simulate {
        let options = SimulatorOptions { memory: "2GiB".to_owned(), ..SimulatorOptions::default() };
        Some(Simulator::start(&binaries, &private.path().join("sim"), &options)?)
    } else {
        None
    };
    // Without a file of its own the agent would read the machine's.
    let config = private.path().join("agent.toml");
    std::fs::write(&config, "").context("writing the agent's configuration")?;
    let setting = Setting {
        binaries,
        scripts: args.scripts.clone().unwrap_or_else(scripts),
        python: args.python.clone(),
        run_dir: private.path().join("run"),
        logs: private.path().to_owned(),
        core: args.core.unwrap_or_else(crew::last_core),
        environment: simulator
            .as_ref()
            .map_or_else(Vec::new, |simulator| simulator.environment().into_iter().collect()),
    };
    let mut bench = Bench {
        arms: crew::arms(&args.baseline),
        rows: Rows::create(&out.join("rows.csv"))?,
        random: Random::new(args.seed.unwrap_or_else(seed)),
        began: Instant::now(),
        failures: Vec::new(),
        complete: true,
        greetings: Value::Null,
        host: host(&setting),
        config: simulator.as_ref().map_or(config, Simulator::agent_config),
        out,
        setting,
        args,
    };
    let outcome = bench.measure();
    bench.keep_logs(private.path())?;
    if let Err(error) = outcome {
        bench.failures.push(format!("{error:#}"));
        bench.complete = false;
    }
    let summary = bench.summary();
    let path = summary.write(&bench.out)?;
    if !summary.results.is_empty() {
        eprintln!("\n{}", summary.table());
    }
    for failure in &summary.failures {
        eprintln!("FAILED: {failure}");
    }
    eprintln!("{} and the files beside it hold everything (seed {})", path.display(), summary.seed);
    if args.json {
        println!("{}", serde_json::to_string(&summary)?);
    }
    ensure!(summary.failures.is_empty(), "{} failures, named above", summary.failures.len());
    ensure!(summary.targets_missed == 0, "{} promises were not kept", summary.targets_missed);
    Ok(())
}

fn binaries(args: &Args) -> Result<Binaries> {
    let dir = match &args.binaries {
        Some(dir) => std::fs::canonicalize(dir).with_context(|| format!("finding {}", dir.display()))?,
        // The measuring programs come with the simulation.
        None => cargo::build_product(true)?,
    };
    if args.simulate { Binaries::in_dir(&dir) } else { Binaries::for_real_gpu(&dir) }
}

/// This program may have been carried to another machine than the one it was built on.
fn scripts() -> PathBuf {
    let here = Path::new("tests/gpu");
    if here.join("worker.py").exists() { here.to_owned() } else { cargo::root().join(here) }
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.as_nanos() as u64)
}

/// What a program prints, or nothing.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn host(setting: &Setting) -> Value {
    let query = "--query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,persistence_mode";
    json!({
        "gpu": said("nvidia-smi", &[query, "--format=csv,noheader"]),
        "kernel": said("uname", &["-r"]),
        "processor": std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            Some(text.lines().find(|line| line.starts_with("model name"))?.split_once(": ")?.1.to_owned())
        }),
        "cores": std::thread::available_parallelism().ok().map(std::num::NonZero::get),
        "agent": said(&setting.binaries.agent().to_string_lossy(), &["--version"]),
    })
}
