//! Half a minute in which everything goes wrong at once; `cargo xtask chaos` runs the same for longer.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Result, ensure};
use nvshare_tests::{
    Binaries,
    chaos::{self, Options},
};

/// Names the seed of a run that is to be repeated.
const SEED: &str = "NVSHARE_CHAOS_SEED";

#[test]
fn fifty_programs_keep_their_results_while_everything_goes_wrong() -> Result<()> {
    let given = std::env::var(SEED).ok().map(|seed| seed.parse()).transpose()?;
    let seed = given.unwrap_or_else(|| UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs()));
    eprintln!("{SEED}={seed}");
    let mut dir = tempfile::Builder::new().prefix("nvshare-chaos-").tempdir()?;
    let options = Options { seed, lasting: Duration::from_secs(20), programs: 50, verbose: true };
    let report = chaos::run(&Binaries::of_this_test()?, dir.path(), &options);
    if !report.as_ref().is_ok_and(|report| report.violations.is_empty()) {
        dir.disable_cleanup(true);
        eprintln!("logs are in {}", dir.path().display());
    }
    let report = report?;
    eprintln!("{}", serde_json::to_string(&report)?);
    ensure!(report.violations.is_empty(), "with {SEED}={seed}: {:#?}", report.violations);
    // What was survived did happen.
    ensure!(report.programs.right > 0 && report.programs.killed > 0, "{report:?}");
    ensure!(report.agents > 2 && report.faults.len() > 5, "{report:?}");
    Ok(())
}
