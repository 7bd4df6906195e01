//! Children that never outlive their handle, and waiting for events with a deadline.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// A child process with its output in a log file; dropped, it is asked to end, then killed.
#[derive(Debug)]
pub struct Guarded {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Guarded {
    /// Starts `command`, its standard error going to `log` (and its standard output too unless the caller
    /// piped it).
    pub fn spawn(name: &str, command: &mut Command, log: &Path, capture_stdout: bool) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let stdout = if capture_stdout { Stdio::piped() } else { file.try_clone()?.into() };
        Self::start(name, command.stdin(Stdio::null()).stdout(stdout).stderr(file), log)
    }

    /// Starts `command` to be talked to: its standard input and output are pipes, its standard error goes to `log`.
    pub fn spawn_to_talk(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        Self::start(name, command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file), log)
    }

    fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("starting {name}: {}", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// What the child has written to its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The exit status, if the child has ended.
    pub fn finished(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.name))
    }

    /// Waits for the end; an error names the child and shows the end of its log.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait_until(&format!("{name} to end"), within, || self.finished())
            .with_context(|| format!("log of {}:\n{}", self.name, tail(&self.log())))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill has no memory preconditions; the child is not reaped while the handle lives.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// Asks the child to end and waits; kills it if it does not.
    pub fn stop(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM);
        let ended = self.wait(within);
        if ended.is_err() {
            self.signal(libc::SIGKILL);
            self.child.wait().with_context(|| format!("reaping {}", self.name))?;
        }
        ended
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _stopped = self.stop(Duration::from_secs(5));
        }
    }
}

/// The last lines of a log.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// Asks `probe` until it has an answer, at most `within`.
pub fn wait_until<T>(
    what: &str,
    within: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if start.elapsed() > within {
            bail!("waited {within:?} in vain for {what}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// CLOCK_MONOTONIC in milliseconds: the clock of the agent's events and the programs' progress stamps.
pub fn monotonic_ms() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}
