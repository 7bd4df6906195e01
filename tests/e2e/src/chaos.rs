//! Everything goes wrong at once, and nothing that was promised breaks.
//!
//! **Problem.** Each fault has a test of its own; what they do together, in the middle of each other, has none.
//!
//! **Approach.** Real programs under the real shim share two simulated cards that they over-commit, while a script
//! that follows from a seed ([`script`]) kills and stops them, kills, ends and starts the agent, misbehaves on its
//! sockets as another user, orders other modes, disturbs the link and takes cards away. Then all is let come to rest.
//!
//! **Promises watched.** A program that was not killed ends with the right result, or with the driver's own error if
//! its card was lost. None goes without progress for longer than [`Options::bound`]. The agent answers its operator
//! and forgets dead clients within seconds throughout. At rest it holds no client, no more descriptors and series than
//! one that has just begun, and its memory did not grow; the simulated driver holds no memory of anybody; what the shim
//! holds in programs that lived throughout did not grow.

mod crew;
mod dice;
pub mod script;
pub mod watch;

use std::{
    collections::{BTreeMap, VecDeque},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use self::{crew::Crew, script::Fault, watch::Ghosts};
pub use self::{crew::Tally, dice::Dice};
use crate::{Agent, Binaries, Simulator, SimulatorOptions, is_root, process::Guarded};

/// Cards of the simulated host.
pub const CARDS: usize = 2;
/// The simulator serves no more programs than this, and one that was killed leaves its place a moment later.
pub const MOST_PROGRAMS: usize = 52;
/// What the agent may open: enough for all programs, far from enough for who hoards connections.
const DESCRIPTORS: u64 = 1024;
/// Processes that misbehave at one time.
const ATTACKERS: usize = 4;
/// The agent's settings: short turns and short patience, so that much happens. Those who misbehave may share the
/// programs' container, whose limit would then keep the programs from having sessions: here it does not bind.
const SETTINGS: &str = "[engine]\nquantum_max = \"200 ms\"\ndrain_within = \"1 s\"\n\
                        [listen]\nconnections_per_second = 100000\nmax_clients_per_cgroup = 1000\n";
const QUANTUM_MAX: Duration = Duration::from_millis(200);
/// Memory that an agent may gain between the first and the last quarter of the second half: allocators settle late.
const GROWTH_KIB: u64 = 16 << 10;
/// Series that a card adds at most once it has been used in every way.
const SERIES_OF_A_CARD: usize = 64;
/// Nobody, on every system.
const NOBODY: u32 = 65534;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where chance begins.
    pub seed: u64,
    /// How long things go wrong.
    pub lasting: Duration,
    /// Programs at a time.
    pub programs: usize,
    /// Say each fault as it happens.
    pub verbose: bool,
}

impl Options {
    /// The longest that a program may go without progress while nobody holds it: two rounds of everybody's longest
    /// turn on its card, one agent that is gone without a word (5 s until gates open by themselves, up to 5 s until the
    /// next attempt to reach it), and as much again for a machine that is busy with all this.
    pub fn bound(&self) -> Duration {
        QUANTUM_MAX * 2 * self.programs.div_ceil(CARDS) as u32 + Duration::from_secs(20)
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Where chance began.
    pub seed: u64,
    /// How long things went wrong.
    pub seconds: f64,
    /// Programs at a time.
    pub at_a_time: usize,
    /// The longest that a program was allowed to go without progress.
    pub bound_s: f64,
    /// The programs.
    pub programs: Tally,
    /// Faults by sort.
    pub faults: BTreeMap<String, u64>,
    /// Agents that ran.
    pub agents: u64,
    /// The slowest answer to an operator, milliseconds.
    pub slowest_answer_ms: f64,
    /// What the last agent counted: sessions, refusals and so on.
    pub counted: BTreeMap<String, f64>,
    /// Descriptors of the last agent at rest, and of one that has just begun.
    pub descriptors: [usize; 2],
    /// The same for series.
    pub series: [usize; 2],
    /// Resident KiB of the last agent: the most in the first and in the last quarter of the second half.
    pub resident_kib: [u64; 2],
    /// The most descriptors that the shim's programs held a quarter into the run, and at its end.
    pub veteran_descriptors: [usize; 2],
    /// Everything that must not be.
    pub violations: Vec<String>,
}

/// Runs a script in `dir`, which must be empty and stays for a look.
pub fn run(binaries: &Binaries, dir: &Path, options: &Options) -> Result<Report> {
    ensure!(
        (1..=MOST_PROGRAMS).contains(&options.programs),
        "the simulated cards serve 1 to {MOST_PROGRAMS} programs at a time"
    );
    // Those who misbehave are another user and must get as far as the sockets.
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    let simulated = SimulatorOptions { gpus: CARDS as u32, memory: "128MiB".to_owned(), extra: Vec::new() };
    let simulator = Simulator::start(binaries, &dir.join("sim"), &simulated)?;
    let config = dir.join("agent.toml");
    let driver = std::fs::read_to_string(simulator.agent_config())?;
    std::fs::write(&config, format!("{driver}{SETTINGS}"))?;
    let hostile = dir.join("hostile");
    std::fs::copy(binaries.workload(), &hostile).context("copying the workload")?;

    let run_dir = dir.join("run");
    let places = (options.seed, options.programs, options.bound());
    let mut scene = Scene {
        options,
        binaries,
        simulator: &simulator,
        crew: Crew::new((binaries, &simulator), (dir, &run_dir), places),
        config,
        run_dir,
        hostile,
        dir: dir.to_owned(),
        agent: None,
        agent_since: Instant::now(),
        gpus: Vec::new(),
        attackers: Vec::new(),
        ghosts: Ghosts::default(),
        report: Report::default(),
        begun: Instant::now(),
        pending: VecDeque::new(),
    };
    scene.start_agent()?;
    scene.play()?;
    scene.rest()
}

/// What follows from a fault at a later time.
enum Sequel {
    StartAgent,
    LinkBack(usize),
    CardBack(usize),
}

struct Scene<'a> {
    options: &'a Options,
    binaries: &'a Binaries,
    simulator: &'a Simulator,
    crew: Crew<'a>,
    config: PathBuf,
    run_dir: PathBuf,
    hostile: PathBuf,
    dir: PathBuf,
    agent: Option<Agent>,
    agent_since: Instant,
    /// UUIDs of the cards, in the order of their indices.
    gpus: Vec<String>,
    attackers: Vec<Guarded>,
    ghosts: Ghosts,
    report: Report,
    begun: Instant,
    pending: VecDeque<(Instant, Sequel)>,
}

impl Scene<'_> {
    fn violated(&mut self, what: String) {
        self.say(&format!("VIOLATION: {what}"));
        self.report.violations.push(what);
    }

    #[expect(clippy::print_stderr, reason = "the log of a run")]
    fn say(&self, what: &str) {
        if self.options.verbose {
            eprintln!("{:9.3} {what}", self.begun.elapsed().as_secs_f64());
        }
    }

    fn start_agent(&mut self) -> Result<()> {
        let agent = Agent::start_within(self.binaries, &self.config, &self.run_dir, &[], Some(DESCRIPTORS))?;
        self.agent = Some(agent);
        self.agent_since = Instant::now();
        self.ghosts.forget();
        self.report.agents += 1;
        if self.gpus.is_empty() {
            let status = watch::ask(&self.run_dir, "status")?;
            let gpus = status["gpus"].as_array().context("no list of GPUs")?;
            self.gpus = gpus.iter().filter_map(|gpu| Some(gpu["gpu"].as_str()?.to_owned())).collect();
            ensure!(self.gpus.len() == CARDS, "the agent knows {} cards", self.gpus.len());
        }
        Ok(())
    }

    fn play(&mut self) -> Result<()> {
        let script = script::write(self.options.seed, self.options.lasting, self.options.programs);
        self.begun = Instant::now();
        let half = self.options.lasting / 2;
        let mut next_watch = Duration::from_secs(1);
        let mut residents = Vec::new();
        let mut script = script.into_iter().peekable();
        while self.begun.elapsed() < self.options.lasting {
            self.crew.look();
            self.crew.fill()?;
            self.sequels()?;
            while let Some((_, fault)) = script.next_if(|(at, _)| *at <= self.begun.elapsed()) {
                self.inflict(&fault)?;
            }
            let now = self.begun.elapsed();
            if now >= next_watch {
                next_watch = now + Duration::from_secs(1);
                self.watch();
                if now >= self.options.lasting / 4 && self.report.veteran_descriptors[0] == 0 {
                    self.report.veteran_descriptors[0] = self.veteran_descriptors();
                }
                if now >= half
                    && let Some(agent) = &mut self.agent
                {
                    residents.push(watch::resident_kib(agent.process().id())?);
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.report.seconds = self.begun.elapsed().as_secs_f64();
        self.report.veteran_descriptors[1] = self.veteran_descriptors();
        let quarter = residents.len().div_ceil(4);
        let most = |part: &[u64]| part.iter().copied().max().unwrap_or_default();
        self.report.resident_kib =
            [most(&residents[..quarter]), most(&residents[residents.len() - quarter..])];
        Ok(())
    }

    fn veteran_descriptors(&mut self) -> usize {
        let veterans = self.crew.veterans();
        veterans.into_iter().filter_map(|pid| watch::descriptors(pid).ok()).max().unwrap_or_default()
    }

    /// Does what is due because of an earlier fault.
    fn sequels(&mut self) -> Result<()> {
        let now = Instant::now();
        for _ in 0..self.pending.len() {
            let Some((at, sequel)) = self.pending.pop_front() else { break };
            if at > now {
                self.pending.push_back((at, sequel));
                continue;
            }
            match sequel {
                Sequel::StartAgent => self.start_agent()?,
                Sequel::LinkBack(card) => self.simulator.fault(self.binaries, card, "link 50")?,
                Sequel::CardBack(card) => {
                    self.simulator.fault(self.binaries, card, "back")?;
                    self.crew.card_lost(card, false);
                }
            }
        }
        Ok(())
    }

    fn inflict(&mut self, fault: &Fault) -> Result<()> {
        self.say(&fault.to_string());
        let now = Instant::now();
        match fault {
            Fault::Kill { place } => self.crew.kill(*place),
            Fault::Stop { place, lasting } => self.crew.stop(*place, now + *lasting),
            Fault::Restart { kill, absent } => {
                let Some(mut agent) = self.agent.take() else { return Ok(()) };
                if *kill {
                    agent.process().signal(libc::SIGKILL);
                    agent.process().wait(Duration::from_secs(10))?;
                } else {
                    let ended = agent.process().stop(Duration::from_secs(10));
                    match ended {
                        Ok(status) if status.success() => {}
                        Ok(status) => self.violated(format!("the agent, asked to end, ended with {status}")),
                        Err(error) => self.violated(format!("the agent, asked to end, did not: {error:#}")),
                    }
                }
                self.pending.push_back((now + *absent, Sequel::StartAgent));
            }
            Fault::Attack { kind, card, lasting, seed } => self.attack(kind, *card, *lasting, *seed)?,
            Fault::Order { words } => {
                if let Some(agent) = &self.agent {
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    let output = agent.ctl(&words)?;
                    if !output.status.success() {
                        self.violated(format!("nvsharectl {words:?}: {output:?}"));
                    }
                }
            }
            Fault::Link { card, rate, lasting } => {
                self.simulator.fault(self.binaries, *card, &format!("link {rate}"))?;
                self.crew.link_slow(*card, now + *lasting);
                self.pending.push_back((now + *lasting, Sequel::LinkBack(*card)));
            }
            Fault::Lost { card, lasting } => {
                self.crew.card_lost(*card, true);
                self.simulator.fault(self.binaries, *card, "lost")?;
                self.pending.push_back((now + *lasting, Sequel::CardBack(*card)));
            }
        }
        *self.report.faults.entry(fault.sort()).or_default() += 1;
        Ok(())
    }

    fn attack(&mut self, kind: &str, card: usize, lasting: Duration, seed: u64) -> Result<()> {
        let ended = |attacker: &mut Guarded| matches!(attacker.finished(), Ok(Some(_)));
        self.attackers.retain_mut(|attacker| !ended(attacker));
        if self.attackers.len() >= ATTACKERS {
            return Ok(());
        }
        let mut command = Command::new(&self.hostile);
        command
            .args(["hostile", "--kind", kind, "--for", &format!("{}ms", lasting.as_millis())])
            .args(["--seed", &seed.to_string(), "--gpu", &self.gpus[card]])
            .arg("--run-dir")
            .arg(&self.run_dir)
            .current_dir("/");
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        self.attackers.push(Guarded::spawn(
            "an attacker",
            &mut command,
            &self.dir.join("hostile.log"),
            false,
        )?);
        Ok(())
    }

    /// Looks whether the agent keeps its promises while things go wrong.
    fn watch(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        match agent.process().finished() {
            Ok(None) => {}
            other => {
                let log = crate::process::tail(&agent.process().log());
                return self.violated(format!("the agent ended by itself: {other:?}\n{log}"));
            }
        }
        let begun = Instant::now();
        match self.ghosts.look(&self.run_dir) {
            Ok(ghosts) => {
                for ghost in ghosts {
                    self.violated(ghost);
                }
            }
            Err(error) => self.violated(format!("the agent does not answer: {error:#}")),
        }
        let took = begun.elapsed().as_secs_f64() * 1e3;
        self.report.slowest_answer_ms = self.report.slowest_answer_ms.max(took);
    }

    /// Lets everything come to rest and looks what is left.
    fn rest(mut self) -> Result<Report> {
        self.say("all is let come to rest");
        for (at, _) in &mut self.pending {
            *at = Instant::now();
        }
        self.sequels()?;
        self.attackers.clear();
        let order = self.agent.as_ref().context("no agent at the end")?.ctl(&["set", "mode", "auto"])?;
        ensure!(order.status.success(), "{order:?}");
        self.crew.finish()?;
        self.say("all programs have ended");
        self.check_agent()?;
        self.check_driver()?;
        let [early, late] = self.report.veteran_descriptors;
        if late > early + 2 {
            self.violated(format!("descriptors of a program grew from {early} to {late}"));
        }
        let [early, late] = self.report.resident_kib;
        if late > early + GROWTH_KIB {
            self.violated(format!("the agent's memory grew from {early} to {late} KiB"));
        }
        self.report.seed = self.options.seed;
        self.report.at_a_time = self.options.programs;
        self.report.bound_s = self.options.bound().as_secs_f64();
        self.report.programs = self.crew.tally.clone();
        self.report.violations.append(&mut self.crew.violations);
        Ok(self.report)
    }

    /// What the last agent holds, beside what one holds that has just begun.
    fn check_agent(&mut self) -> Result<()> {
        let forgotten = crate::wait_until("the agent to have no client", Duration::from_secs(10), || {
            let clients = watch::ask(&self.run_dir, "clients")?;
            Ok(clients["clients"].as_array().is_some_and(Vec::is_empty).then_some(()))
        });
        if let Err(error) = forgotten {
            self.violated(format!("{error:#}"));
        }
        let (descriptors, metrics) = self.holdings()?;
        for name in [
            "nvshare_sessions_total",
            "nvshare_sessions_refused_total",
            "nvshare_client_slow_readers_total",
            "nvshare_client_rejected_descriptors_total",
            "nvshare_client_extra_descriptors_total",
            "nvshare_scheduler_grants_total",
            "nvshare_scheduler_revocations_total",
            "nvshare_scheduler_unresponsive_total",
            "nvshare_plan_changes_total",
        ] {
            self.report.counted.insert(name.to_owned(), watch::sum_of(&metrics, name));
        }
        let status = watch::ask(&self.run_dir, "status")?;
        for gpu in status["gpus"].as_array().into_iter().flatten() {
            if gpu["clients"].as_array().is_none_or(|clients| !clients.is_empty()) {
                self.violated(format!("a grant is left: {gpu}"));
            }
            if gpu["committed_bytes"] != 0 {
                self.violated(format!("{} bytes are left", gpu["committed_bytes"]));
            }
        }
        let stopped = self.agent.take().map(|mut agent| agent.process().stop(Duration::from_secs(10)));
        ensure!(stopped.transpose()?.is_some_and(|status| status.success()), "the last agent ended badly");
        self.start_agent()?;
        let (fresh_descriptors, fresh_metrics) = self.holdings()?;
        let ((all, of_clients), (fresh_all, _)) = (watch::series(&metrics), watch::series(&fresh_metrics));
        self.report.descriptors = [descriptors, fresh_descriptors];
        self.report.series = [all, fresh_all];
        // A connection that just ended may linger for a moment.
        if descriptors > fresh_descriptors + 4 {
            self.violated(format!("the agent holds {descriptors} descriptors, at first {fresh_descriptors}"));
        }
        // What appears with its first use (hand-overs by phase and direction with their buckets, changes of plan by
        // mode and reason) is bounded by the cards; thousands of sessions would show far beyond it.
        if of_clients > 0 || all > fresh_all + SERIES_OF_A_CARD * CARDS {
            self.violated(format!("{all} series ({of_clients} of clients), at first {fresh_all}"));
        }
        Ok(())
    }

    fn holdings(&mut self) -> Result<(usize, String)> {
        let status = watch::ask(&self.run_dir, "status")?;
        let address = status["metrics"].as_str().context("no metrics")?.to_owned();
        let metrics = watch::metrics(&address)?;
        let agent = self.agent.as_mut().context("no agent")?;
        Ok((watch::descriptors(agent.process().id())?, metrics))
    }

    /// The simulated driver holds nothing of anybody.
    fn check_driver(&mut self) -> Result<()> {
        let stats = self.simulator.stats(self.binaries)?;
        for gpu in stats["gpus"].as_array().into_iter().flatten() {
            let left: Vec<_> = gpu["clients"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|client| client["ended"] != true)
                .collect();
            if !left.is_empty() || gpu["managed_bytes"] != 0 || gpu["plain_bytes"] != 0 {
                self.violated(format!(
                    "the driver still holds {} managed and {} plain bytes, and {left:?}",
                    gpu["managed_bytes"], gpu["plain_bytes"]
                ));
            }
        }
        Ok(())
    }
}
