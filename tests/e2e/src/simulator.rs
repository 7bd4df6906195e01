//! The simulated GPU as a running process.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    binaries::Binaries,
    process::{Guarded, tail, wait_until},
};

/// How the simulated host looks.
#[derive(Clone, Debug)]
pub struct SimulatorOptions {
    /// Cards.
    pub gpus: u32,
    /// Memory of each card, as the simulator's command line takes it.
    pub memory: String,
    /// Further arguments of `nvshare-gpu-sim run`.
    pub extra: Vec<String>,
}

impl Default for SimulatorOptions {
    fn default() -> Self {
        Self { gpus: 1, memory: "1GiB".to_owned(), extra: Vec::new() }
    }
}

/// A simulated host; its files go when it is dropped.
#[derive(Debug)]
pub struct Simulator {
    process: Guarded,
    dir: PathBuf,
}

impl Simulator {
    /// Starts a simulator whose files live in `dir`, and waits until it is ready.
    pub fn start(binaries: &Binaries, dir: &Path, options: &SimulatorOptions) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let log = dir.with_extension("log");
        let mut command = Command::new(binaries.simulator());
        command
            .arg("run")
            .arg("--dir")
            .arg(dir)
            .arg("--lib-dir")
            .arg(binaries.dir())
            .args(["--gpus", &options.gpus.to_string(), "--memory", &options.memory])
            .args(&options.extra);
        let mut process = Guarded::spawn("the simulated GPU", &mut command, &log, false)?;
        let ready = dir.join("ready");
        wait_until("the simulated GPU to be ready", Duration::from_secs(20), || {
            if let Some(status) = process.finished()? {
                bail!("the simulated GPU ended with {status}:\n{}", tail(&process.log()));
            }
            Ok(ready.exists().then_some(()))
        })?;
        Ok(Self { process, dir: dir.to_owned() })
    }

    /// The simulated host's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The agent configuration that names this host's driver files.
    pub fn agent_config(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    /// The same with further tables, in a file of its own beside this host's files.
    pub fn agent_config_with(&self, name: &str, tables: &str) -> Result<PathBuf> {
        let text = std::fs::read_to_string(self.agent_config())?;
        let path = self.dir.with_extension(format!("{name}.toml"));
        std::fs::write(&path, format!("{text}\n{tables}"))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// The simulator's process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Lets something happen to a card, as `nvshare-gpu-sim fault` takes it: `lost`, `back`, `link 0.5`.
    pub fn fault(&self, binaries: &Binaries, gpu: usize, what: &str) -> Result<()> {
        let mut command = Command::new(binaries.simulator());
        command.arg("fault").arg("--dir").arg(&self.dir).args(["--gpu", &gpu.to_string()]);
        let output = command.args(what.split_whitespace()).output().context("running the simulator")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// What the simulator has counted.
    pub fn stats(&self, binaries: &Binaries) -> Result<serde_json::Value> {
        let mut command = Command::new(binaries.simulator());
        let output = command.args(["stats", "--json", "--dir"]).arg(&self.dir).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What the simulator said.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The variables under which a program finds this GPU.
    pub fn environment(&self) -> [(&'static str, PathBuf); 2] {
        [("NVSHARE_SIM_DIR", self.dir.clone()), ("LD_LIBRARY_PATH", self.dir.join("lib"))]
    }
}
