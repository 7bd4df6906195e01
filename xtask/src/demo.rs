//! `cargo xtask demo`: what nvshare is for, in under a minute.
//!
//! Two real programs under the real shim share a simulated card and fit. A third makes them evict each
//! other. The agent sees that in the simulated driver's signals and lets them take turns; when the third has
//! ended, it lets the others share again. The same three programs then run with sharing forced, for
//! comparison.

mod arm;
mod observed;
mod subset;

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::cargo;
use arm::{Arm, Finish, Policy, Switch};
use observed::Watch;

/// Watch thrash appear, be detected and be cured, on the simulated GPU.
///
/// Ends with an error if the story did not come true.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    pub(crate) json: bool,
    /// Let the agent use these sensors only (names of its `[sensors]` table), without the comparison.
    #[arg(long, value_delimiter = ',', value_name = "NAME,…", conflicts_with = "prometheus")]
    pub(crate) sensors: Option<Vec<String>>,
    /// Let a real Prometheus watch both runs, and hold the dashboards and rules against what happens.
    #[arg(long)]
    pub(crate) prometheus: bool,
    /// Save what the dashboards' panels show in this file, for `dashboards/plot.py`.
    #[arg(long, value_name = "FILE", requires = "prometheus")]
    pub(crate) panels: Option<PathBuf>,
}

/// The comparison may stop once it has taken this many times as long.
const COMPARISON_LIMIT: f64 = 2.5;
/// From the first refault to the switch, in milliseconds.
const DETECTION_LIMIT_MS: f64 = 500.0;

/// The contract of `--json`.
#[derive(Serialize)]
struct Report {
    /// First cross-client refault to first switch.
    detected_ms: Option<f64>,
    switches: Vec<Switch>,
    final_mode: String,
    makespan_s: f64,
    /// A lower bound if `always_shared_stopped`.
    always_shared_makespan_s: f64,
    always_shared_stopped: bool,
    clients: Vec<Finish>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let binaries = cargo::build_simulated()?;
    let dir = tempfile::Builder::new().prefix("nvshare-demo-").tempdir()?;

    if let Some(sensors) = &args.sensors {
        return subset::run(&binaries, dir.path(), sensors, args.json);
    }
    let mut watch = args.prometheus.then(|| Watch::start(&dir.path().join("prometheus"))).transpose()?;

    eprintln!("\n1. nvshare decides (a 1 GiB card; a and b use 400 MiB each, c joins them with 400 MiB)");
    let auto = Arm::run(&binaries, &dir.path().join("auto"), Policy::Auto, "", None, watch.as_mut())?;
    eprintln!("   all three done after {:.1} s", auto.makespan_s);

    eprintln!("\n2. The same three, always shared");
    let limit = Duration::from_secs_f64(auto.makespan_s * COMPARISON_LIMIT);
    let place = dir.path().join("shared");
    let shared = Arm::run(&binaries, &place, Policy::AlwaysShared, "", Some(limit), watch.as_mut())?;
    if shared.stopped {
        eprintln!("   not done after {:.1} s, stopped", shared.makespan_s);
    } else {
        eprintln!("   all three done after {:.1} s", shared.makespan_s);
    }

    let report = Report {
        detected_ms: auto.detected_ms,
        switches: auto.switches,
        final_mode: auto.final_mode,
        makespan_s: auto.makespan_s,
        always_shared_makespan_s: shared.makespan_s,
        always_shared_stopped: shared.stopped,
        clients: auto.clients,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    report.verdict()?;
    watch.map_or(Ok(()), |watch| watch.verdict(&auto.moments, &shared.moments, args.panels.as_ref()))
}

impl Report {
    /// Whether the story came true.
    fn verdict(&self) -> Result<()> {
        for client in &self.clients {
            ensure!(client.finished, "{} did not finish with the right result", client.name);
        }
        let detected = self.detected_ms.unwrap_or(f64::INFINITY);
        ensure!(
            detected <= DETECTION_LIMIT_MS,
            "thrash was to be detected within {DETECTION_LIMIT_MS} ms of the first refault; it took {detected:.0} ms"
        );
        ensure!(self.final_mode == "shared", "the plan ended as {}, not shared", self.final_mode);
        let ratio = self.always_shared_makespan_s / self.makespan_s;
        ensure!(ratio >= 2.0, "always shared took only {ratio:.2} times as long; at least 2 was promised");
        let at_least = if self.always_shared_stopped { "at least " } else { "" };
        eprintln!(
            "\nThrash detected {detected:.0} ms after the first refault; sharing regardless takes {at_least}{ratio:.1} times as long."
        );
        Ok(())
    }
}
