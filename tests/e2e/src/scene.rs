//! The usual scene of a test: a simulated host, an agent on it, programs under the shim.

use std::path::Path;

use anyhow::Result;
use tempfile::TempDir;

use crate::{
    agent::Agent,
    binaries::Binaries,
    simulator::{Simulator, SimulatorOptions},
    workload::{Workload, WorkloadOptions},
};

/// Everything a test needs; dropped, all of it ends.
#[derive(Debug)]
pub struct Scene {
    /// The agent. First, so that it lets go of the device files before the simulator ends.
    pub agent: Agent,
    /// The simulated host.
    pub simulator: Simulator,
    binaries: Binaries,
    dir: TempDir,
}

impl Scene {
    /// A simulated host with these cards, and an agent.
    pub fn open(options: &SimulatorOptions) -> Result<Self> {
        let binaries = Binaries::of_this_test()?;
        let dir = tempfile::Builder::new().prefix("nvshare-test-").tempdir()?;
        let simulator = Simulator::start(&binaries, &dir.path().join("sim"), options)?;
        let agent = Agent::start(&binaries, &simulator.agent_config(), &dir.path().join("run"))?;
        Ok(Self { agent, simulator, binaries, dir })
    }

    /// Where the programs' logs and stamps are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The built programs.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// Starts a program under the shim that sweeps `memory` for `gpu_work`, in sweeps of 10 ms.
    pub fn sweep(&self, name: &str, memory: &str, gpu_work: &str, extra: &[&str]) -> Result<Workload> {
        let options = WorkloadOptions {
            name: name.to_owned(),
            memory: memory.to_owned(),
            gpu_work: gpu_work.to_owned(),
            sweep_time: "10ms".to_owned(),
            extra: extra.iter().map(|&arg| arg.to_owned()).collect(),
        };
        Workload::start(
            &self.binaries,
            &self.simulator,
            Some(self.agent.run_dir()),
            self.dir.path(),
            &options,
        )
    }

    /// Starts another agent on the same run directory, after the first has ended.
    pub fn replace_agent(&mut self) -> Result<()> {
        self.agent =
            Agent::start(&self.binaries, &self.simulator.agent_config(), &self.dir.path().join("run"))?;
        Ok(())
    }
}
