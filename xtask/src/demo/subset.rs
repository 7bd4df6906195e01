//! The demonstration with some sensors only: the same story, and what the agent says that it can no longer know.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{Binaries, SimulatorOptions};
use serde::Serialize;

use super::{
    DETECTION_LIMIT_MS,
    arm::{Arm, Finish, Policy, Switch},
};

/// Without a sensor of what is moved for each program nothing is detected; this much of the misery is enough.
const BLIND_LIMIT: Duration = Duration::from_secs(12);

/// Which sensors the agent may use, as the names in its `[sensors]` table.
#[derive(Debug, PartialEq, Eq)]
struct Subset {
    on: Vec<String>,
    off: Vec<String>,
}

/// The contract of `--json` with `--sensors`.
#[derive(Serialize)]
struct Report {
    sensors: Vec<String>,
    /// First cross-client refault to first switch.
    detected_ms: Option<f64>,
    switches: Vec<Switch>,
    final_mode: String,
    makespan_s: f64,
    clients: Vec<Finish>,
    /// What the agent says that it cannot know.
    gaps: Vec<String>,
}

/// Runs the three programs under an agent that has these sensors only.
pub(super) fn run(binaries: &Binaries, dir: &Path, wanted: &[String], json: bool) -> Result<()> {
    let example = Command::new(binaries.agent()).arg("example-config").output()?;
    ensure!(example.status.success(), "`nvshare-agent example-config` ended with {}", example.status);
    let subset = Subset::of(&String::from_utf8(example.stdout)?, wanted)?;
    let sees_bytes = subset.has("uvm-kprobe") || subset.has("uvm-counters");
    eprintln!("\nnvshare decides with {} only (a 1 GiB card; 400 MiB each)", subset.on.join(" and "));
    let limit = (!sees_bytes).then_some(BLIND_LIMIT);
    let arm = Arm::run(binaries, &dir.join("subset"), Policy::Auto, &subset.tables(), limit, None)?;
    eprintln!("\nWith these sensors the agent cannot know");
    for gap in &arm.gaps {
        eprintln!("   {gap}");
    }
    let report = Report {
        sensors: subset.on.clone(),
        detected_ms: arm.detected_ms,
        switches: arm.switches,
        final_mode: arm.final_mode,
        makespan_s: arm.makespan_s,
        clients: arm.clients,
        gaps: arm.gaps,
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    }
    verdict(&subset, sees_bytes, &report, arm.stopped)
}

/// Whether the agent did and said what it can with these sensors.
fn verdict(subset: &Subset, sees_bytes: bool, report: &Report, stopped: bool) -> Result<()> {
    let says = |what: &str| report.gaps.iter().any(|gap| gap.contains(what));
    let silent = subset.off.iter().any(|name| name == "uvm-kprobe") && !says("for whom");
    ensure!(!silent, "the agent did not say that it cannot know for whom memory is evicted");
    if !sees_bytes {
        ensure!(says("thrash is not detected"), "the agent did not say that it cannot detect thrash");
        ensure!(report.switches.is_empty(), "the plan changed although nobody saw a byte move");
        eprintln!("\nNothing was detected, as the agent said.");
        return Ok(());
    }
    ensure!(!stopped, "the programs did not end");
    for client in &report.clients {
        ensure!(client.finished, "{} did not finish with the right result", client.name);
    }
    let detected = report.detected_ms.context("thrash was not detected")?;
    // Without the fault thread the share of the link stands in, which is late by nature.
    ensure!(
        detected <= DETECTION_LIMIT_MS || !subset.has("fault-thread"),
        "thrash was to be detected within {DETECTION_LIMIT_MS} ms of the first refault; it took {detected:.0} ms"
    );
    ensure!(report.final_mode == "shared", "the plan ended as {}, not shared", report.final_mode);
    eprintln!("\nThrash detected {detected:.0} ms after the first refault, with these sensors only.");
    Ok(())
}

impl Subset {
    /// Sorts the sensors that an agent's documented configuration names.
    fn of(example: &str, wanted: &[String]) -> Result<Self> {
        let known: Vec<String> = example
            .lines()
            .skip_while(|line| line.trim() != "[sensors]")
            .skip(1)
            .take_while(|line| !line.starts_with('['))
            .filter_map(|line| line.strip_suffix(" = true"))
            .map(str::to_owned)
            .collect();
        for name in wanted {
            ensure!(known.contains(name), "there is no sensor `{name}`; known: {}", known.join(", "));
        }
        let (on, off) = known.into_iter().partition(|name| wanted.contains(name));
        Ok(Self { on, off })
    }

    fn has(&self, name: &str) -> bool {
        self.on.iter().any(|on| on == name)
    }

    /// What is added to the agent's configuration.
    fn tables(&self) -> String {
        let mut tables = String::from("[sensors]\n");
        for name in &self.off {
            tables.extend([name.as_str(), " = false\n"]);
        }
        if !self.has("nvml") {
            // The administrator says what NVML would have said.
            let memory = SimulatorOptions::default().memory;
            tables.extend(["[gpu]\nusable_memory = \"", &memory, "\"\n"]);
        }
        tables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str =
        "[engine]\nx = true\n# Sources.\n[sensors]\nuvm-kprobe = true\nnvml = true\n\n[gpu]\n";

    #[test]
    fn sensors_that_are_not_wanted_are_switched_off() {
        let subset = Subset::of(EXAMPLE, &["nvml".to_owned()]).unwrap();
        assert_eq!(subset.tables(), "[sensors]\nuvm-kprobe = false\n");
        let blind = Subset::of(EXAMPLE, &[]).unwrap();
        assert!(blind.tables().contains("nvml = false\n[gpu]\nusable_memory = \"1GiB\"\n"));
    }

    #[test]
    fn an_unknown_sensor_is_refused_with_the_known_ones() {
        let error = Subset::of(EXAMPLE, &["x".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("`x`") && error.contains("uvm-kprobe, nvml"), "{error}");
    }
}
