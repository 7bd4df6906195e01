//! `cargo xtask gpu-bench thrash`: eviction under pressure on a real card, which no test and no simulator shows.
//!
//! Two programs that fit alone and not together sweep over their memory, once with nvshare's decisions and once with
//! sharing forced. Only on demand of whoever owns the card: an error in the driver's eviction can hang it.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{
    Agent, Simulator, SimulatorOptions, monotonic_ms,
    process::{Guarded, tail},
    wait_until,
};
use serde::Serialize;

use super::{Args, binaries, said};

/// Of the free memory, what each program takes, in thousandths.
const EACH_MILLI: u64 = 750;
/// GPU time that each needs, and of one sweep.
const REAL: (&str, &str) = ("60s", "300ms");
const SIMULATED: (&str, &str) = ("1500ms", "20ms");
/// Memory of the simulated card.
const SIMULATED_MIB: u64 = 1024;
/// Programs that take turns may take this long; sharing is stopped after as many times that.
const PATIENCE: Duration = Duration::from_mins(10);
const HOPELESS: f64 = 4.0;

/// What one mode came to.
#[derive(Debug, Serialize)]
struct Outcome {
    mode: &'static str,
    /// A lower bound if it was stopped.
    makespan_s: f64,
    stopped: bool,
    /// Announced changes of plan, confirmations included.
    decisions: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    ensure!(args.names.len() == 1, "thrash is measured alone, without other names");
    ensure!(
        args.simulate || args.allow_oversubscription,
        "thrash fills the GPU beyond its memory, and an error in the driver's eviction can hang the card until the machine is \
         started anew. If the card is yours to lose, pass --allow-oversubscription; --simulate tries it on the simulated one"
    );
    let binaries = binaries(args)?;
    let private = tempfile::Builder::new().prefix("nvshare-thrash-").tempdir()?;
    let simulator = if args.simulate {
        let options =
            SimulatorOptions { memory: format!("{SIMULATED_MIB}MiB"), ..SimulatorOptions::default() };
        Some(Simulator::start(&binaries, &private.path().join("sim"), &options)?)
    } else {
        None
    };
    // Without a file of its own the agent would read the machine's.
    let empty = private.path().join("agent.toml");
    std::fs::write(&empty, "").context("writing the agent's configuration")?;
    let config = simulator.as_ref().map_or(empty, Simulator::agent_config);
    let free = if args.simulate { SIMULATED_MIB } else { free_mib()? };
    let each = free * EACH_MILLI / 1000;
    eprintln!("two programs of {each} MiB each; {free} MiB are free");
    let mut outcomes: Vec<Outcome> = Vec::new();
    for mode in ["auto", "shared"] {
        let limit =
            outcomes.first().map_or(PATIENCE, |auto| Duration::from_secs_f64(auto.makespan_s * HOPELESS));
        let dir = private.path().join(mode);
        std::fs::create_dir_all(&dir)?;
        let agent = Agent::start(&binaries, &config, &dir.join("run"))?;
        let program = |name: &str| {
            let (work, sweep) = if args.simulate { SIMULATED } else { REAL };
            let mut command = Command::new(binaries.workload());
            command
                .args(["sweep", "--allow-oversubscription", "--name", name])
                .args(["--memory", &format!("{each}MiB"), "--gpu-work", work, "--sweep-time", sweep])
                .env("LD_PRELOAD", binaries.shim())
                .env("NVSHARE_RUN_DIR", agent.run_dir());
            if let Some(simulator) = &simulator {
                command.envs(simulator.environment());
            }
            command
        };
        let outcome = one(mode, &agent, &dir, limit, program)?;
        let at_least = if outcome.stopped { "not done after" } else { "both done after" };
        eprintln!("{mode}: {at_least} {:.1} s", outcome.makespan_s);
        for decision in &outcome.decisions {
            eprintln!("  {decision}");
        }
        outcomes.push(outcome);
    }
    if args.json {
        println!("{}", serde_json::to_string(&outcomes)?);
    }
    ensure!(
        !outcomes[0].stopped,
        "the programs did not end within {PATIENCE:?} although they could take turns"
    );
    Ok(())
}

fn one(
    mode: &'static str,
    agent: &Agent,
    dir: &Path,
    limit: Duration,
    program: impl Fn(&str) -> Command,
) -> Result<Outcome> {
    let order = agent.ctl(&["set", "mode", mode])?;
    ensure!(order.status.success(), "nvsharectl set mode {mode}: {}", String::from_utf8_lossy(&order.stderr));
    let events = agent.events()?;
    let start = monotonic_ms();
    let deadline = start + limit.as_secs_f64() * 1e3;
    let mut programs = Vec::new();
    for name in ["a", "b"] {
        programs.push(Guarded::spawn(name, &mut program(name), &dir.join(format!("{name}.log")), false)?);
    }
    let mut decisions = Vec::new();
    let done = wait_until("the programs to end", limit * 2, || {
        while let Some(event) = events.next() {
            let said = |field: &str| event[field].as_str().unwrap_or("?").to_owned();
            decisions.push(format!("{} -> {}: {}", said("from"), said("to"), said("reason")));
        }
        let mut all = true;
        for program in &mut programs {
            match program.finished()? {
                Some(status) => {
                    ensure!(status.success(), "a program ended with {status}: {}", tail(&program.log()));
                }
                None => all = false,
            }
        }
        Ok(if all { Some(true) } else { (monotonic_ms() > deadline).then_some(false) })
    })?;
    Ok(Outcome { mode, makespan_s: (monotonic_ms() - start) / 1e3, stopped: !done, decisions })
}

/// Free memory of the first GPU.
fn free_mib() -> Result<u64> {
    let text = said("nvidia-smi", &["--id=0", "--query-gpu=memory.free", "--format=csv,noheader,nounits"])
        .context("nvidia-smi does not say how much memory is free; is there an NVIDIA GPU?")?;
    text.parse().with_context(|| format!("nvidia-smi says `{text}` MiB are free"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn line(words: &str) -> Args {
        Line::try_parse_from(std::iter::once("gpu-bench").chain(words.split_whitespace())).unwrap().args
    }

    #[test]
    fn a_card_is_not_filled_beyond_its_memory_unless_its_owner_says_so() {
        // A folder without programs: whatever is not refused fails for want of them.
        let empty = tempfile::tempdir().unwrap();
        let with = |words: &str| {
            let args = line(&format!("{words} --binaries {}", empty.path().display()));
            super::super::run(&args).unwrap_err().to_string()
        };
        let refused = with("thrash");
        assert!(refused.contains("--allow-oversubscription") && refused.contains("hang"), "{refused}");
        assert!(with("thrash launch --allow-oversubscription").contains("alone"));
        for allowed in ["thrash --allow-oversubscription", "thrash --simulate"] {
            let error = with(allowed);
            assert!(!error.contains("--allow-oversubscription"), "{allowed}: {error}");
        }
    }
}
