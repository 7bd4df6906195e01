//! A running agent in a directory of its own.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nothing takes longer than this on the slowest machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A configuration that needs neither a GPU nor root.
pub(crate) const CONFIG: &str = "
[gpu]
usable_memory = \"1 GiB\"
[sensors]
uvm-kprobe = false
fault-thread = false
xid = false
cuda-uprobe = false
nvml = false
";

pub(crate) struct Agent {
    child: Child,
    dir: TempDir,
}

/// Looks until there is something to see.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let mut left = PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(!left.is_zero(), "waited {PATIENCE:?} for {what}");
        thread::sleep(LOOK_EVERY);
        left = left.saturating_sub(LOOK_EVERY);
    }
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_with("", &[])
    }

    /// With more configuration, and a log of errors only.
    #[allow(dead_code, reason = "for the benchmark only")]
    pub(crate) fn start_quietly(config: &str) -> Self {
        Self::start_with(config, &["--log", "error"])
    }

    /// Its process id.
    #[allow(dead_code, reason = "for the benchmark only")]
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// With more configuration and arguments.
    pub(crate) fn start_with(config: &str, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("nvshare.toml"), format!("{CONFIG}{config}")).unwrap();
        let child = spawn(dir.path(), arguments);
        let agent = Self { child, dir };
        agent.wait_until_up();
        agent
    }

    fn wait_until_up(&self) {
        wait_for("the agent to answer", || {
            let mut stream = UnixStream::connect(self.run_dir().join("control.sock")).ok()?;
            stream.write_all(b"{\"request\":\"status\"}\n").ok()?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).ok()?;
            line.starts_with("{\"ok\"").then_some(())
        });
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Kills the agent and starts another one in its place.
    pub(crate) fn replace(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path(), &[]);
        self.wait_until_up();
    }

    /// Asks the agent to end; returns whether it ended with success.
    pub(crate) fn terminate(&mut self) -> bool {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        wait_for("the agent to end", || self.child.try_wait().unwrap()).success()
    }

    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        ctl(&self.run_dir(), arguments)
    }

    /// One request on the control socket, as it stands.
    pub(crate) fn control(&self, line: &str) -> Value {
        let mut stream = UnixStream::connect(self.run_dir().join("control.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream.write_all(b"\n").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{answer:?}: {error}"))
    }

    pub(crate) fn status(&self) -> Value {
        self.control(&json!({"request": "status"}).to_string())["ok"].clone()
    }

    pub(crate) fn clients(&self) -> Vec<Value> {
        let clients = self.control(&json!({"request": "clients"}).to_string());
        clients["ok"]["clients"].as_array().unwrap().clone()
    }

    /// A path of the HTTP server: status line and body.
    pub(crate) fn http(&self, path: &str) -> (String, String) {
        let address = self.status()["metrics"].as_str().unwrap().to_owned();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    /// The value of one series of `/metrics`.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let (_, metrics) = self.http("/metrics");
        metrics
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no series {series} in\n{metrics}"))
            .parse()
            .unwrap()
    }

    pub(crate) fn refused(&self, code: &str) -> f64 {
        self.metric(&format!("nvshare_sessions_refused_total{{code=\"{code}\"}}"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn spawn(dir: &Path, arguments: &[&str]) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_nvshare-agent"))
        .arg("run")
        .arg("--config")
        .arg(dir.join("nvshare.toml"))
        .arg("--run-dir")
        .arg(dir.join("run"))
        .args(["--metrics-listen", "127.0.0.1:0"])
        // Arguments may say otherwise.
        .env("NVSHARE_LOG", "info,nvshare_agent=debug")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

pub(crate) fn ctl(run_dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nvsharectl"))
        .arg("--run-dir")
        .arg(run_dir)
        .args(arguments)
        .output()
        .unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
