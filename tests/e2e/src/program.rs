//! A test whose body is a program: it runs in a process of its own, before a simulated GPU of its own, and, if
//! the test wants that, under the shim.
//!
//! The program is the test's own executable, started again with the name of the test and a role. Where there
//! is a role, the body runs; where there is none, the test starts the processes.
#![expect(clippy::expect_used, reason = "what fails here fails the test")]

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio},
    sync::{
        OnceLock,
        mpsc::{self, Receiver},
    },
    thread,
    time::Duration,
};

use crate::{Binaries, Cuda, Simulator, SimulatorOptions, monotonic_ms, wait_until};

/// Set in processes that run a body: its role.
const ROLE: &str = "NVSHARE_TEST_ROLE";

/// The role of this process if it runs a body.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// What programs need, built from the sources as they are now.
///
/// # Panics
/// If it does not build.
pub fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package=nvshare-gpu-sim", "--package=nvshare-gpu-sim-libcuda"])
            .args(["--package=nvshare-gpu-sim-libnvml", "--package=nvshare-shim"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(status.is_ok_and(|status| status.success()), "the simulated GPU or the shim does not build");
        profile_dir()
    })
}

/// A command that runs the body of `test` in `role`, before whatever driver its environment will name.
pub fn body(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap_or_default());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, role);
    command
}

/// A simulated host for one test.
#[derive(Debug)]
pub struct Host {
    simulator: Simulator,
    home: tempfile::TempDir,
}

impl Host {
    /// A host with one GPU of this much memory, as the simulator's command line takes it.
    pub fn new(memory: &str) -> Self {
        Self::with(&SimulatorOptions { memory: memory.to_owned(), ..SimulatorOptions::default() })
    }

    /// A host as described.
    ///
    /// # Panics
    /// If the simulator does not start.
    pub fn with(options: &SimulatorOptions) -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        let simulator = Simulator::start(&Binaries::unchecked(built()), &home.path().join("sim"), options);
        Self { simulator: simulator.expect("a simulated GPU"), home }
    }

    /// The simulated GPU.
    pub fn simulator(&self) -> &Simulator {
        &self.simulator
    }

    /// A directory that goes with the host.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// A command that runs the body of `test` in `role` on this host.
    pub fn program(&self, test: &str, role: &str) -> Command {
        let mut command = body(test, role);
        command.envs(self.simulator.environment());
        command
    }

    /// The same under the shim, with an agent in `run_dir`, or with none if nobody is there.
    pub fn shimmed(&self, test: &str, role: &str, run_dir: &Path) -> Command {
        let mut command = self.program(test, role);
        command.env("LD_PRELOAD", built().join("libnvshare.so")).env("NVSHARE_RUN_DIR", run_dir);
        command
    }
}

/// What the program wrote to its standard error.
///
/// # Panics
/// If it failed, or ran no body.
pub fn passed(output: &Output) -> String {
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{said}{errors}", output.status);
    assert!(said.contains("1 passed"), "the body did not run: {said}");
    errors.into_owned()
}

/// Runs `run` as a program without the shim.
///
/// # Panics
/// If the program fails.
pub fn program(test: &str, run: impl FnOnce(&Cuda)) {
    if role().is_some() {
        return run(&Cuda::open());
    }
    let host = Host::new("256MiB");
    passed(&host.program(test, "main").output().expect("the program starts"));
}

/// Runs `run` as a program under the shim, without an agent and with these variables set; what it wrote to its
/// standard error, or nothing where this is the program itself.
///
/// # Panics
/// If the program fails.
pub fn shimmed_program(test: &str, variables: &[(&str, &str)], run: impl FnOnce(&Cuda)) -> Option<String> {
    if role().is_some() {
        run(&Cuda::open());
        return None;
    }
    let host = Host::new("256MiB");
    let mut command = host.shimmed(test, "main", &host.home().join("nobody"));
    Some(passed(&command.envs(variables.iter().copied()).output().expect("the program starts")))
}

/// What the simulator knows of this process on the first GPU.
fn own_account() -> serde_json::Value {
    let dir = std::env::var_os("NVSHARE_SIM_DIR").expect("a program's own simulator");
    let mut command = Command::new(profile_dir().join("nvshare-gpu-sim"));
    command.args(["stats", "--json", "--dir"]).arg(dir).env_remove("LD_PRELOAD");
    let output = command.output().expect("the simulator answers");
    let stats: serde_json::Value = serde_json::from_slice(&output.stdout).expect("figures in JSON");
    let clients = stats["gpus"][0]["clients"].as_array().expect("a list of clients");
    clients.iter().find(|client| client["pid"] == std::process::id()).expect("this process").clone()
}

fn figure(account: &serde_json::Value, name: &str) -> u64 {
    account[name].as_u64().expect("a number")
}

/// How long a program may take to say something, or to end, before the test has failed.
const PATIENCE: Duration = Duration::from_mins(1);
/// What a body says begins with this; other lines are the test framework's.
const SAID: &str = "> ";

/// A body under way, which is told what to do line by line.
#[derive(Debug)]
pub struct Running {
    child: Child,
    orders: Option<ChildStdin>,
    lines: Receiver<String>,
    others: String,
    log: PathBuf,
}

impl Running {
    /// Starts a body; its standard error goes to a file in `dir`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(command: &mut Command, dir: &Path) -> Self {
        let log = dir.join(format!("program-{}.log", monotonic_ms()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log).expect("a log"));
        let mut child = command.spawn().expect("the program starts");
        let orders = child.stdin.take();
        let said = BufReader::new(child.stdout.take().expect("a pipe"));
        let (line_tx, line_rx) = mpsc::channel();
        thread::spawn(move || said.lines().map_while(Result::ok).try_for_each(|line| line_tx.send(line)));
        Self { child, orders, lines: line_rx, others: String::new(), log }
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order.
    ///
    /// # Panics
    /// If the program has ended.
    pub fn tell(&mut self, order: &str) {
        let orders = self.orders.as_mut().expect("still listening");
        assert!(writeln!(orders, "{order}").is_ok(), "the program has ended: {}", self.log());
    }

    /// What the body says next.
    ///
    /// # Panics
    /// If it says nothing more.
    pub fn hear(&mut self) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("the program says nothing more: {}\n{}", self.others, self.log())
            };
            match line.strip_prefix(SAID) {
                Some(said) => return said.to_owned(),
                None => self.others.push_str(&line),
            }
        }
    }

    /// An order and what is said to it.
    pub fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.hear()
    }

    /// What the program has written to its standard error so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Gives no more orders and waits for the end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn end(&mut self) -> ExitStatus {
        self.orders = None;
        let ended = wait_until("the program to end", PATIENCE, || Ok(self.child.try_wait()?));
        ended.unwrap_or_else(|error| panic!("{error}\n{}", self.log()))
    }

    /// The same; what the program wrote to its standard error.
    ///
    /// # Panics
    /// If it failed, or ran no body.
    pub fn finish(mut self) -> String {
        let status = self.end();
        // What it said last may still be on its way.
        while !self.others.contains("1 passed")
            && let Ok(line) = self.lines.recv_timeout(PATIENCE)
        {
            self.others.push_str(&line);
        }
        assert!(
            status.success() && self.others.contains("1 passed"),
            "{status}: {}\n{}",
            self.others,
            self.log()
        );
        self.log()
    }
}

impl Drop for Running {
    #[expect(clippy::print_stderr, reason = "what a failed test's program said explains the failure")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the program ({:?}): {}\n{}", self.child.try_wait(), self.others, self.log());
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().expect("a child of ours");
            self.child.wait().expect("a child of ours");
        }
    }
}

/// Says something to [`Running::hear`], from a body.
pub fn say(text: impl std::fmt::Display) {
    // The test framework leaves an unfinished line.
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{SAID}{text}").and_then(|()| out.flush()).expect("somebody listens");
}

/// The orders of [`Running::tell`], in a body.
pub fn orders() -> impl Iterator<Item = String> {
    // Without keeping the lock between two lines, so that a body can ask for the next one anywhere.
    std::iter::from_fn(|| std::io::stdin().lines().next()?.ok())
}

/// (in, out): bytes of managed memory that the simulator has moved for this process.
///
/// # Panics
/// If the simulator does not say.
pub fn moved() -> (u64, u64) {
    let account = own_account();
    (figure(&account, "bytes_in"), figure(&account, "bytes_out"))
}

/// Bytes of managed memory of this process that are on the first GPU.
///
/// # Panics
/// If the simulator does not say.
pub fn resident() -> u64 {
    figure(&own_account(), "resident_bytes")
}

/// The output folder of this test's cargo profile. A body uses what whoever started it has built.
pub(crate) fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    test.ancestors().nth(2).unwrap_or(Path::new("")).to_owned()
}
