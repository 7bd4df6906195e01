//! Programs that stand for a user's, run under the real shim.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    binaries::Binaries,
    process::{Guarded, tail},
    simulator::Simulator,
};

/// What a sweeping program does.
#[derive(Clone, Debug)]
pub struct WorkloadOptions {
    /// Its name.
    pub name: String,
    /// Memory it sweeps, as its command line takes it.
    pub memory: String,
    /// GPU time it needs when alone and resident, as its command line takes it.
    pub gpu_work: String,
    /// GPU time of one sweep.
    pub sweep_time: String,
    /// Further arguments.
    pub extra: Vec<String>,
}

/// One sweep done, as the program itself saw it.
#[derive(Clone, Debug, Deserialize)]
pub struct Stamp {
    /// CLOCK_MONOTONIC milliseconds at the end of the sweep.
    pub t_ms: f64,
    /// Which sweep.
    pub sweep: u64,
}

/// A running program.
#[derive(Debug)]
pub struct Workload {
    name: String,
    process: Guarded,
    progress: PathBuf,
}

impl Workload {
    /// Starts a program on the simulated GPU; with `run_dir`, under the shim and that agent.
    pub fn start(
        binaries: &Binaries,
        simulator: &Simulator,
        run_dir: Option<&Path>,
        dir: &Path,
        options: &WorkloadOptions,
    ) -> Result<Self> {
        let progress = dir.join(format!("{}.progress", options.name));
        let mut command = Command::new(binaries.workload());
        command
            .args(["sweep", "--verify", "--name", &options.name])
            .args(["--memory", &options.memory])
            .args(["--gpu-work", &options.gpu_work])
            .args(["--sweep-time", &options.sweep_time])
            .arg("--progress-file")
            .arg(&progress)
            .args(&options.extra)
            .envs(simulator.environment());
        if let Some(run_dir) = run_dir {
            command.env("LD_PRELOAD", binaries.shim()).env("NVSHARE_RUN_DIR", run_dir);
        }
        let log = dir.join(format!("{}.log", options.name));
        let process = Guarded::spawn(&options.name, &mut command, &log, true)?;
        Ok(Self { name: options.name.clone(), process, progress })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Guarded {
        &mut self.process
    }

    /// Waits for the end; succeeds only if the program verified its own result. Gives what it printed.
    pub fn finish(&mut self, within: Duration) -> Result<Value> {
        let status = self.process.wait(within)?;
        let mut printed = String::new();
        if let Some(mut stdout) = self.process.child().stdout.take() {
            stdout.read_to_string(&mut printed)?;
        }
        ensure!(
            status.success(),
            "{} ended with {status}: {printed}\n{}",
            self.name,
            tail(&self.process.log())
        );
        let last = printed.lines().last().with_context(|| format!("{} printed no result", self.name))?;
        serde_json::from_str(last).with_context(|| format!("{} printed {last}", self.name))
    }

    /// Where it says what sweeps it has done. The file grows with each.
    pub fn progress_file(&self) -> &Path {
        &self.progress
    }

    /// The sweeps done so far.
    pub fn stamps(&self) -> Result<Vec<Stamp>> {
        let text = match std::fs::read_to_string(&self.progress) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => bail!("reading {}: {error}", self.progress.display()),
        };
        // The last line may be half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }
}
