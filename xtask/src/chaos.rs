//! `cargo xtask chaos`: everything goes wrong at once.

use std::time::Duration;

use anyhow::{Result, ensure};
use nvshare_tests::chaos::{self, Options, Report};

use crate::cargo;

/// Let everything go wrong at once on the simulated GPU, and look whether every promise is kept.
///
/// Many programs under the shim are killed and stopped, the agent is killed, ended and started again every few
/// seconds (in the first half), other users misbehave on its sockets, links have errors and cards are lost. Ends with 1
/// if a promise broke. The seed decides what happens and when.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long things go wrong.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Where chance begins [default: the time].
    #[arg(long)]
    seed: Option<u64>,
    /// Programs at a time, at most 52.
    #[arg(long, default_value_t = 50)]
    clients: usize,
    /// Keep logs and configuration for a look, whatever comes of it.
    #[arg(long)]
    keep: bool,
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!((0.1..=1440.0).contains(&args.minutes), "--minutes must be between 0.1 and 1440");
    let now = || std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs());
    let options = Options {
        seed: args.seed.unwrap_or_else(now),
        lasting: Duration::from_secs_f64(args.minutes * 60.0),
        programs: args.clients,
        verbose: true,
    };
    let binaries = cargo::build_simulated()?;
    let mut dir = tempfile::Builder::new().prefix("nvshare-chaos-").tempdir()?;
    eprintln!("seed {}, {} programs, {:?}", options.seed, options.programs, options.lasting);
    let report = chaos::run(&binaries, dir.path(), &options);
    let good = report.as_ref().is_ok_and(|report| report.violations.is_empty());
    if args.keep || !good {
        dir.disable_cleanup(true);
        eprintln!("logs are in {}", dir.path().display());
    }
    let report = report?;
    tell(&report);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    ensure!(good, "{} promises broke (seed {})", report.violations.len(), report.seed);
    Ok(())
}

fn tell(report: &Report) {
    let Report { programs, .. } = report;
    eprintln!(
        "\n{:.0} s, seed {}: {} programs started, {} ended right, {} were killed, {} lost their card",
        report.seconds,
        report.seed,
        programs.started,
        programs.right,
        programs.killed,
        programs.lost_with_card
    );
    for (sort, count) in &report.faults {
        eprintln!("  {count:6} {sort}");
    }
    eprintln!(
        "longest time without progress {:.1} s (bound {:.0} s); {} agents, slowest answer {:.0} ms",
        programs.longest_gap_s, report.bound_s, report.agents, report.slowest_answer_ms
    );
    let [rest, fresh] = report.descriptors;
    let [first, last] = report.resident_kib;
    let [series, fresh_series] = report.series;
    eprintln!(
        "the last agent at rest: {rest} descriptors (fresh {fresh}), {series} series (fresh {fresh_series}), \
         {first} KiB resident early and {last} KiB late"
    );
    for (name, value) in &report.counted {
        eprintln!("  {value:9} {name}");
    }
    for violation in &report.violations {
        eprintln!("VIOLATION: {violation}");
    }
}
