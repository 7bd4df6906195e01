//! The arms that are compared, and the processes that stand for them.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{ChildStdin, Command},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nvshare_tests::{Binaries, process::Guarded, process::tail};
use serde_json::Value;

use super::plan::Program;

/// Processes with the same environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Crew {
    /// No library of ours or anybody's.
    Bare,
    /// The same again, to see how far two equal crews are apart.
    BareAgain,
    /// The program allocates managed memory itself.
    Managed,
    /// Under our shim.
    Shim,
    /// Under another preloaded library.
    Baseline { name: String, library: PathBuf },
}

/// Whether turns are taken while an arm is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Of no importance: no agent looks after these processes.
    Any,
    Shared,
    Exclusive,
}

/// One column of the comparison.
#[derive(Clone, Debug)]
pub(super) struct Arm {
    pub(super) name: String,
    pub(super) crew: Crew,
    pub(super) mode: Mode,
}

impl Arm {
    /// Ours, on which promises were made.
    pub(super) fn is_ours(&self) -> bool {
        self.crew == Crew::Shim
    }
}

/// The name of the arm that the others are compared with, and of the same again.
pub(super) const BASE: &str = "bare";
pub(super) const BASE_AGAIN: &str = "bare again";

/// All arms, the base first.
pub(super) fn arms(baselines: &[(String, PathBuf)]) -> Vec<Arm> {
    let arm = |name: &str, crew, mode| Arm { name: name.to_owned(), crew, mode };
    let mut arms = vec![
        arm(BASE, Crew::Bare, Mode::Any),
        arm(BASE_AGAIN, Crew::BareAgain, Mode::Any),
        arm("bare managed", Crew::Managed, Mode::Any),
        arm("shared", Crew::Shim, Mode::Shared),
        arm("exclusive", Crew::Shim, Mode::Exclusive),
    ];
    for (name, library) in baselines {
        arms.push(arm(name, Crew::Baseline { name: name.clone(), library: library.clone() }, Mode::Any));
    }
    arms
}

/// How measuring programs are started.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) binaries: Binaries,
    /// Folder of `worker.py`.
    pub(super) scripts: PathBuf,
    pub(super) python: PathBuf,
    /// Where the agent's sockets are.
    pub(super) run_dir: PathBuf,
    pub(super) logs: PathBuf,
    /// The core on which everything that is measured runs.
    pub(super) core: usize,
    /// What a program needs to find the simulated GPU.
    pub(super) environment: Vec<(&'static str, PathBuf)>,
}

impl Setting {
    fn command(&self, program: Program, crew: &Crew) -> Command {
        let mut command = match program {
            Program::Driver => {
                let mut command = Command::new(self.binaries.workload());
                command.arg("bench");
                if *crew == Crew::Managed {
                    command.arg("--managed-own");
                }
                command
            }
            Program::Torch => {
                let mut command = Command::new(&self.python);
                command.arg(self.scripts.join("worker.py"));
                command
            }
        };
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("NVSHARE_") {
                command.env_remove(name);
            }
        }
        // Where a library lies and how a dictionary is laid out differ from one start to the next, and with them the speed.
        command.env("PYTHONHASHSEED", "0");
        // SAFETY: a system call between fork and exec, on constants.
        unsafe {
            command.pre_exec(|| {
                libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
                Ok(())
            })
        };
        // A failure is one line of a report.
        command.env_remove("LD_PRELOAD").env_remove("RUST_BACKTRACE").envs(self.environment.iter().cloned());
        match crew {
            Crew::Managed if program == Program::Torch => {
                command.env("LD_PRELOAD", self.binaries.managed_malloc());
            }
            Crew::Bare | Crew::BareAgain | Crew::Managed => {}
            Crew::Shim => {
                command.env("LD_PRELOAD", self.binaries.shim()).env("NVSHARE_RUN_DIR", &self.run_dir);
            }
            Crew::Baseline { library, .. } => {
                command.env("LD_PRELOAD", library);
            }
        }
        command
    }

    /// Starts a program that measures on command.
    pub(super) fn worker(&self, program: Program, crew: &Crew, name: &str) -> Result<Worker> {
        Worker::start(&mut self.command(program, crew), name, &self.log(name))
    }

    /// The same on the measuring core from its first instruction.
    pub(super) fn pinned_worker(&self, crew: &Crew, name: &str) -> Result<Worker> {
        let mut command = self.command(Program::Driver, crew);
        pin_from_start(&mut command, self.core);
        Worker::start(&mut command, name, &self.log(name))
    }

    /// Milliseconds from the start of a program to its end, with one launch between.
    pub(super) fn lifetime(&self, crew: &Crew, name: &str, deadline: Duration) -> Result<f64> {
        let mut command = self.command(Program::Driver, crew);
        command.arg("--once");
        pin_from_start(&mut command, self.core);
        let log = self.log(name);
        let began = Instant::now();
        let mut process = Guarded::spawn(name, &mut command, &log, false)?;
        // Waiting by looking again would round the time up.
        let (done_tx, done_rx) = mpsc::channel();
        let pid = process.id();
        std::thread::spawn(move || {
            let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
            // SAFETY: waits for our own child and leaves it to be reaped by its owner; `info` is writable.
            let code =
                unsafe { libc::waitid(libc::P_PID, pid, info.as_mut_ptr(), libc::WEXITED | libc::WNOWAIT) };
            let _gone = done_tx.send((code, Instant::now()));
        });
        match done_rx.recv_timeout(deadline) {
            Ok((0, ended)) => {
                let status = process.wait(Duration::from_secs(1))?;
                ensure!(status.success(), "{name} ended with {status}: {}", tail(&process.log()));
                Ok((ended - began).as_secs_f64() * 1e3)
            }
            Ok(_) => bail!("cannot wait for {name}"),
            Err(_) => bail!("{name} did not end within {deadline:?}: {}", tail(&process.log())),
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{}.log", name.replace(' ', "-")))
    }
}

fn mask(core: usize) -> libc::cpu_set_t {
    // SAFETY: all-zero is an empty set; CPU_SET checks the bound.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        set
    }
}

fn pin_from_start(command: &mut Command, core: usize) {
    let set = mask(core);
    // SAFETY: a system call between fork and exec, on a value that was made before.
    unsafe {
        command.pre_exec(move || {
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
            Ok(())
        })
    };
}

/// The last core that this process may use: the first ones serve most interrupts.
pub(super) fn last_core() -> usize {
    // SAFETY: a live local of the type that the call writes.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) != 0 {
            return 0;
        }
        let cores = 0..libc::CPU_SETSIZE as usize;
        cores.rev().find(|&core| libc::CPU_ISSET(core, &set)).unwrap_or(0)
    }
}

/// A program that measures on command.
#[derive(Debug)]
pub(super) struct Worker {
    name: String,
    process: Guarded,
    input: ChildStdin,
    answers: mpsc::Receiver<Value>,
}

impl Worker {
    fn start(command: &mut Command, name: &str, log: &Path) -> Result<Self> {
        let mut process = Guarded::spawn_to_talk(name, command, log)?;
        let input = process.child().stdin.take().context("no pipe to the program")?;
        let output = process.child().stdout.take().context("no pipe from the program")?;
        let (answer_tx, answer_rx) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // Libraries print lines of their own.
                let Ok(answer) = serde_json::from_str(&line) else { continue };
                if answer_tx.send(answer).is_err() {
                    return;
                }
            }
        });
        Ok(Self { name: name.to_owned(), process, input, answers: answer_rx })
    }

    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The next answer.
    pub(super) fn answer(&self, within: Duration) -> Result<Value> {
        let answer: Value = match self.answers.recv_timeout(within) {
            Ok(answer) => answer,
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("{} did not answer within {within:?}", self.name),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("{} ended: {}", self.name, tail(&self.process.log()))
            }
        };
        if let Some(error) = answer["error"].as_str() {
            bail!("{}: {error}", self.name);
        }
        Ok(answer)
    }

    /// Sends a command and takes its answer.
    pub(super) fn ask(&mut self, command: &str, within: Duration) -> Result<Value> {
        writeln!(self.input, "{command}").with_context(|| format!("{} takes no commands", self.name))?;
        self.answer(within)
    }

    /// Keeps all its threads, and those they will start, on one core.
    pub(super) fn pin(&self, core: usize) -> Result<()> {
        let set = mask(core);
        let tasks = PathBuf::from(format!("/proc/{}/task", self.id()));
        for task in std::fs::read_dir(&tasks).with_context(|| format!("reading {}", tasks.display()))? {
            let Some(tid) = task?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // SAFETY: a system call on a live local; a thread that has ended makes it fail, which is fine.
            unsafe { libc::sched_setaffinity(tid, size_of_val(&set), &raw const set) };
        }
        Ok(())
    }

    /// Asks it to end, without waiting for the end.
    pub(super) fn dismiss(&self) {
        self.process.signal(libc::SIGTERM);
    }
}

/// Long-lived processes: several of each crew.
#[derive(Debug, Default)]
pub(super) struct Crews {
    workers: BTreeMap<(Program, String), Vec<(usize, Worker)>>,
    /// What the first process of each kind said of itself.
    pub(super) greetings: BTreeMap<String, Value>,
}

impl Crews {
    /// Starts `instances` of every crew for every program. A process that does not come up is left out and named.
    pub(super) fn start(
        setting: &Setting,
        arms: &[Arm],
        programs: &[Program],
        instances: usize,
        within: Duration,
        failures: &mut Vec<String>,
    ) -> Self {
        let mut crews = Self::default();
        let mut names: Vec<(String, &Crew)> = Vec::new();
        for arm in arms {
            if !names.iter().any(|(_, crew)| **crew == arm.crew) {
                names.push((arm.name.clone(), &arm.crew));
            }
        }
        // All at once: loading PyTorch takes seconds, and there are many cores.
        let mut starting = Vec::new();
        for &program in programs {
            for (arm, crew) in &names {
                for instance in 0..instances {
                    let name = format!("{program:?} {arm} {instance}").to_lowercase();
                    match setting.worker(program, crew, &name) {
                        Ok(worker) => starting.push((program, *crew, instance, worker)),
                        Err(error) => failures.push(format!("{error:#}")),
                    }
                }
            }
        }
        let deadline = Instant::now() + within;
        for (program, crew, instance, worker) in starting {
            let ready = worker.answer(deadline.saturating_duration_since(Instant::now())).and_then(|ready| {
                ensure!(
                    *crew != Crew::Managed || ready["managed"] == true,
                    "{} was to allocate managed memory and does not",
                    worker.name
                );
                worker.pin(setting.core)?;
                Ok(ready)
            });
            match ready {
                Ok(ready) => {
                    crews.greetings.entry(format!("{program:?} {}", key(crew))).or_insert(ready);
                    crews.workers.entry((program, key(crew))).or_default().push((instance, worker));
                }
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        crews
    }

    /// The process whose turn it is in `round`, with its number. Arms other than the base shift by one once the base is
    /// through, so that all combinations are paired.
    pub(super) fn pick(&mut self, program: Program, arm: &Arm, round: usize) -> Option<(usize, &mut Worker)> {
        let members = self.workers.get_mut(&(program, key(&arm.crew)))?;
        let count = members.len().max(1);
        let shift = if arm.name == BASE { 0 } else { round / count };
        let (instance, worker) = members.get_mut((round + shift) % count)?;
        Some((*instance, worker))
    }

    /// Drops a process that failed.
    pub(super) fn drop_out(&mut self, program: Program, arm: &Arm, instance: usize) {
        if let Some(members) = self.workers.get_mut(&(program, key(&arm.crew))) {
            members.retain(|(other, _)| *other != instance);
        }
    }

    /// Process ids of a crew.
    pub(super) fn ids(&self, crew: &Crew) -> Vec<u32> {
        let of_crew = self.workers.iter().filter(|((_, name), _)| *name == key(crew));
        of_crew.flat_map(|(_, members)| members.iter().map(|(_, worker)| worker.id())).collect()
    }
}

impl Drop for Crews {
    fn drop(&mut self) {
        // Together: tearing a CUDA context down takes a while.
        for (_, worker) in self.workers.values().flatten() {
            worker.dismiss();
        }
    }
}

fn key(crew: &Crew) -> String {
    match crew {
        Crew::Baseline { name, .. } => format!("baseline {name}"),
        other => format!("{other:?}"),
    }
}
