//! The agent's picture of the driver with and without single sensors.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{Agent, Binaries, Simulator, SimulatorOptions, Workload, WorkloadOptions, wait_until};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_mins(1);

/// Probes on the simulator's file see every simulator that runs from it, and their VA spaces have the same addresses; so the
/// tests here take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A simulated host, an agent with further configuration that records, and programs.
struct Watched {
    agent: Agent,
    simulator: Simulator,
    binaries: Binaries,
    dir: tempfile::TempDir,
}

impl Watched {
    fn open(driver: &str, tables: &str) -> Result<Self> {
        let binaries = Binaries::of_this_test()?;
        let dir = tempfile::Builder::new().prefix("nvshare-test-").tempdir()?;
        let options = SimulatorOptions {
            extra: ["--driver-version", driver].map(str::to_owned).to_vec(),
            ..SimulatorOptions::default()
        };
        let simulator = Simulator::start(&binaries, &dir.path().join("sim"), &options)?;
        let config = simulator.agent_config_with("watched", tables)?;
        let recording = Self::recording_in(dir.path());
        let record = ["--record", recording.to_str().context("a path of UTF-8")?];
        let agent = Agent::start_with(&binaries, &config, &dir.path().join("run"), &record)?;
        Ok(Self { agent, simulator, binaries, dir })
    }

    fn recording_in(dir: &Path) -> PathBuf {
        dir.join("recording")
    }

    fn sweep(&self, name: &str, memory: &str, gpu_work: &str) -> Result<Workload> {
        let options = WorkloadOptions {
            name: name.to_owned(),
            memory: memory.to_owned(),
            gpu_work: gpu_work.to_owned(),
            sweep_time: "10ms".to_owned(),
            extra: Vec::new(),
        };
        let run_dir = Some(self.agent.run_dir());
        Workload::start(&self.binaries, &self.simulator, run_dir, self.dir.path(), &options)
    }

    /// What doctor says of a sensor.
    fn sensor(&self, name: &str) -> Result<Value> {
        let doctor = self.agent.ctl_json(&["doctor", "--json"])?;
        let sensors = doctor["sensors"].as_array().context("doctor lists no sensors")?;
        sensors.iter().find(|sensor| sensor["sensor"] == name).cloned().context("no such sensor")
    }

    /// The clients of the only GPU.
    fn clients(&self) -> Result<Vec<Value>> {
        let status = self.agent.ctl_json(&["status", "--json"])?;
        Ok(status["gpus"][0]["clients"].as_array().cloned().unwrap_or_default())
    }

    /// Ends the agent and replays what it recorded; what the replay says.
    fn replay(&mut self) -> Result<String> {
        self.agent.process().stop(PATIENCE)?;
        let replayed = Command::new(self.binaries.agent())
            .arg("replay")
            .arg(Self::recording_in(self.dir.path()))
            .output()?;
        let said = String::from_utf8_lossy(&replayed.stdout).into_owned();
        ensure!(replayed.status.success(), "{said}{}", String::from_utf8_lossy(&replayed.stderr));
        Ok(said)
    }
}

#[test]
fn sampled_events_tell_what_was_evicted_where_there_are_no_probes() -> Result<()> {
    let _turn = turn();
    // Both layouts of the queue.
    for driver in ["580.126.20", "535.288.01"] {
        let tables = "[sensors]\nuvm-kprobe = false\n[sampling]\nduty = 0.9\n";
        let mut watched = Watched::open(driver, tables)?;
        let mut calm = watched.sweep("calm", "128MiB", "500ms")?;
        calm.finish(PATIENCE)?;
        let resting = watched.sensor("uvm-events")?;
        assert_eq!(resting["run_count"], 0, "{driver}: nothing was suspected: {resting}");

        let programs = [watched.sweep("a", "700MiB", "30s")?, watched.sweep("b", "700MiB", "30s")?];
        let told = wait_until("the events to tell what was evicted", PATIENCE, || {
            let clients = watched.clients()?;
            Ok(clients.into_iter().find(|client| {
                client["figures"]["evicted"]["source"] == "uvm-events"
                    && client["seen"]["evicted"].as_u64().is_some_and(|evicted| evicted > 0)
            }))
        })?;
        let evicted = told["seen"]["evicted"].as_u64().context("evicted bytes")?;
        let out = told["seen"]["bytes_out"].as_u64().context("bytes out")?;
        assert!(evicted <= out, "{driver}: no more than went out: {told}");
        let bytes_in = &told["figures"]["bytes_in"];
        assert_eq!(bytes_in["source"], "uvm-counters", "{driver}");
        assert_eq!(bytes_in["low"], bytes_in["high"], "{driver}: counters are exact");
        let sampling = watched.sensor("uvm-events")?;
        assert!(sampling["run_count"].as_u64().is_some_and(|runs| runs > 0), "{driver}: {sampling}");
        let doctor = watched.agent.ctl_json(&["doctor", "--json"])?;
        assert_eq!(doctor["disagreements"], Value::Array(Vec::new()), "{driver}");
        drop(programs);
        let said = watched.replay()?;
        assert!(!said.contains(": 0 bins"), "{driver}: {said}");
        assert!(said.contains("(0 windows of disagreement)"), "{driver}: {said}");
    }
    Ok(())
}

#[test]
fn probes_judge_single_blocks_and_agree_with_the_counters() -> Result<()> {
    let _turn = turn();
    let mut watched = Watched::open("580.126.20", "")?;
    if watched.sensor("uvm-kprobe")?["state"].get("attached").is_none() {
        let why = "the probes are not attached (root is needed)";
        ensure!(!nvshare_tests::everything_required(), "{why}");
        eprintln!("SKIPPED: {why}");
        return Ok(());
    }
    let programs = [watched.sweep("a", "700MiB", "30s")?, watched.sweep("b", "700MiB", "30s")?];
    wait_until("the probes to find curable refaults", PATIENCE, || {
        let clients = watched.clients()?;
        let curable = |client: &Value| {
            let figure = &client["figures"]["curable"];
            figure["source"] == "uvm-kprobe" && figure["value"].as_u64().is_some_and(|bytes| bytes > 0)
        };
        Ok(clients.iter().any(curable).then_some(()))
    })?;
    assert_eq!(watched.sensor("uvm-events")?["run_count"], 0, "no queue is opened where better is known");
    // In a long turn memory comes to rest: the one that runs has all of its memory, the other one less.
    for order in [["set", "quantum", "30s"], ["set", "mode", "exclusive"]] {
        let output = watched.agent.ctl(&order)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    wait_until("what is resident by the probes to be what it is", PATIENCE, || {
        let truth = watched.simulator.stats(&watched.binaries)?;
        let truth = truth["gpus"][0]["clients"].as_array().cloned().unwrap_or_default();
        let mut rests = 0;
        for client in watched.clients()? {
            let figure = &client["figures"]["resident"];
            let true_bytes = truth.iter().find(|other| other["pid"] == client["pid"]);
            let true_bytes = true_bytes.and_then(|client| client["resident_bytes"].as_u64());
            if figure["source"] != "uvm-kprobe" || figure["value"].as_u64() != true_bytes {
                return Ok(None);
            }
            rests += u32::from(true_bytes < client["managed_bytes"].as_u64());
        }
        Ok((rests == 1).then_some(()))
    })?;
    drop(programs);
    let said = watched.replay()?;
    assert!(said.contains("(0 windows of disagreement)"), "{said}");
    // Each fits alone, so what comes back is curable. The rule bounds from above what came in meanwhile, so it may be stricter
    // for blocks that come back in another order than they left.
    let (mut curable, mut own, mut told) = (0, 0, 0);
    let recording = std::fs::read_to_string(Watched::recording_in(watched.dir.path()))?;
    for line in recording.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let gpus = line["bin"]["gpus"].as_array().cloned().unwrap_or_default();
        for client in gpus.iter().flat_map(|gpu| gpu["clients"].as_array().into_iter().flatten()) {
            let blocks = &client["raw"]["blocks"];
            curable += blocks["curable"].as_u64().unwrap_or(0);
            own += blocks["own"].as_u64().unwrap_or(0);
        }
        let samples = line["step"]["input"]["Sample"]["sample"]["clients"].as_array().cloned();
        for sample in samples.unwrap_or_default() {
            told += sample[1]["curable"].as_u64().unwrap_or(0);
            let by_block = ["curable", "self_refaulted", "resident"];
            assert!(by_block.iter().all(|figure| sample[1][figure].is_u64()), "{sample}");
        }
    }
    assert!(curable > 2 * own, "curable {curable}, own {own}");
    assert_eq!(told, curable, "what the engine is told");
    Ok(())
}
