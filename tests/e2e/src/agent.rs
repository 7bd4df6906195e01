//! The real agent as a running process, and its operator's tool.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    binaries::Binaries,
    process::{Guarded, tail, wait_until},
};

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Guarded,
    ctl: PathBuf,
    run_dir: PathBuf,
}

/// Plan changes as `nvsharectl events --json` prints them, in order.
#[derive(Debug)]
pub struct Events {
    _process: Guarded,
    lines: mpsc::Receiver<Value>,
}

impl Agent {
    /// Starts an agent with `config` (a simulator's or a test's own) and waits until it answers.
    pub fn start(binaries: &Binaries, config: &Path, run_dir: &Path) -> Result<Self> {
        Self::start_with(binaries, config, run_dir, &[])
    }

    /// The same with further arguments.
    pub fn start_with(binaries: &Binaries, config: &Path, run_dir: &Path, extra: &[&str]) -> Result<Self> {
        Self::start_within(binaries, config, run_dir, extra, None)
    }

    /// The same for an agent that may have only so many descriptors open.
    pub fn start_within(
        binaries: &Binaries,
        config: &Path,
        run_dir: &Path,
        extra: &[&str],
        descriptors: Option<u64>,
    ) -> Result<Self> {
        std::fs::create_dir_all(run_dir).with_context(|| format!("creating {}", run_dir.display()))?;
        let mut command = Command::new(binaries.agent());
        command
            .arg("run")
            .arg("--config")
            .arg(config)
            .arg("--run-dir")
            .arg(run_dir)
            .args(["--metrics-listen", "127.0.0.1:0"])
            .args(extra)
            .env_remove("NVSHARE_RUN_DIR");
        if let Some(descriptors) = descriptors {
            limit_descriptors(&mut command, descriptors);
        }
        let log = run_dir.with_extension("agent.log");
        let mut process = Guarded::spawn("the agent", &mut command, &log, false)?;
        let ctl = binaries.ctl();
        wait_until("the agent to answer", Duration::from_secs(20), || {
            if let Some(status) = process.finished()? {
                bail!("the agent ended with {status}:\n{}", tail(&process.log()));
            }
            let answers =
                Command::new(&ctl).arg("--run-dir").arg(run_dir).args(["status", "--json"]).output()?;
            Ok(answers.status.success().then_some(()))
        })?;
        Ok(Self { process, ctl, run_dir: run_dir.to_owned() })
    }

    /// Where clients and operators reach this agent.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The agent's process.
    pub fn process(&mut self) -> &mut Guarded {
        &mut self.process
    }

    /// Runs `nvsharectl` with these arguments.
    pub fn ctl(&self, args: &[&str]) -> Result<Output> {
        Command::new(&self.ctl)
            .arg("--run-dir")
            .arg(&self.run_dir)
            .args(args)
            .output()
            .context("running nvsharectl")
    }

    /// Runs `nvsharectl` and reads the JSON object it prints.
    pub fn ctl_json(&self, args: &[&str]) -> Result<Value> {
        let output = self.ctl(args)?;
        ensure!(
            output.status.success(),
            "nvsharectl {args:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout)?;
        let last = text.lines().last().context("nvsharectl printed nothing")?;
        serde_json::from_str(last).with_context(|| format!("nvsharectl printed {last}"))
    }

    /// The mode of the only GPU.
    pub fn mode(&self) -> Result<String> {
        let status = self.ctl_json(&["status", "--json"])?;
        let mode = status["gpus"][0]["mode"].as_str().context("status names no GPU")?;
        Ok(mode.to_owned())
    }

    /// Where it serves its metrics.
    pub fn metrics_address(&self) -> Result<String> {
        let status = self.ctl_json(&["status", "--json"])?;
        Ok(status["metrics"].as_str().context("the agent serves no metrics")?.to_owned())
    }

    /// Waits until the only GPU runs in `mode`.
    pub fn wait_for_mode(&self, mode: &str, within: Duration) -> Result<()> {
        wait_until(&format!("the plan to be {mode}"), within, || Ok((self.mode()? == mode).then_some(())))
    }

    /// Follows the plan changes from here on.
    pub fn events(&self) -> Result<Events> {
        let mut command = Command::new(&self.ctl);
        command.arg("--run-dir").arg(&self.run_dir).args(["events", "--json"]);
        let log = self.run_dir.with_extension("events.log");
        let mut process = Guarded::spawn("nvsharectl events", &mut command, &log, true)?;
        let stdout = process.child().stdout.take().context("nvsharectl events has no output")?;
        let (event_tx, event_rx) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str(&line) else { continue };
                if event_tx.send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Events { _process: process, lines: event_rx })
    }
}

/// Lets the child open only so many descriptors, and not raise the limit.
fn limit_descriptors(command: &mut Command, descriptors: u64) {
    let limit = libc::rlimit { rlim_cur: descriptors, rlim_max: descriptors };
    // SAFETY: only a system call that is safe after a fork.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

impl Events {
    /// The next change, if one has come.
    pub fn next(&self) -> Option<Value> {
        self.lines.try_recv().ok()
    }

    /// The next change away from `shared`: to turns of single jobs or of sets.
    pub fn wait_for_turns(&self, within: Duration) -> Result<Value> {
        wait_until("clients to take turns", within, || {
            Ok(std::iter::from_fn(|| self.next()).find(|event| event["to"] != "shared"))
        })
    }
}
