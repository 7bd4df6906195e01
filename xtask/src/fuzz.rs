//! `cargo xtask fuzz`: damaged input for every parser, for as long as there is time.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::cargo::{cargo, run as run_command};

/// Packages that have targets: tests whose names begin with `fuzz_`.
const PACKAGES: [&str; 2] = ["nvshare-wire", "nvshare-agent"];

/// Feed damaged input to every parser and to the engine; each target has its share of the time.
///
/// The same targets run for a second each among the other tests. A failure keeps its input beside the committed
/// examples, in tests/corpus/TARGET of the crate.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target.
    #[arg(long, default_value_t = 30.0)]
    seconds: f64,
    /// Where chance begins [default: the time].
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!((0.1..=86_400.0).contains(&args.seconds), "--seconds must be between 0.1 and 86400");
    let dir = tempfile::tempdir()?;
    let report = dir.path().join("report");
    let mut command = cargo();
    command.args(["test", "--release"]);
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    command.args(["--lib", "--tests", "fuzz_"]);
    command.env("NVSHARE_FUZZ_SECONDS", args.seconds.to_string()).env("NVSHARE_FUZZ_REPORT", &report);
    // A debug assertion or an overflow is a finding too.
    command.env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
    command.env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true");
    // Objects with other settings must not replace the product's.
    command.env("CARGO_TARGET_DIR", crate::cargo::target_dir()?.join("fuzz"));
    if let Some(seed) = args.seed {
        command.env("NVSHARE_FUZZ_SEED", seed.to_string());
    }
    run_command(&mut command)?;
    let text = std::fs::read_to_string(&report).context("no target ran")?;
    let targets: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    eprintln!("\n  executions   outcomes  target");
    for target in &targets {
        let figure = |name: &str| target[name].as_u64().unwrap_or_default();
        eprintln!(
            "{:>12} {:>10}  {}",
            figure("executions"),
            figure("outcomes"),
            target["target"].as_str().unwrap_or_default()
        );
    }
    if args.json {
        println!("{}", serde_json::json!({"seconds_each": args.seconds, "targets": targets}));
    }
    Ok(())
}
