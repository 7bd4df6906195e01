//! Carrying the measurements out.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nvshare_tests::{Agent, process::Guarded, wait_until};
use serde_json::{Value, json};

use super::{
    Args,
    crew::{Arm, BASE, Crew, Crews, Mode, Setting},
    plan::{self, BENCHES, Metric, Program, Target},
    report::{Rows, Summary},
    stats::Sample,
};

/// The longest that a program may take to be ready: loading PyTorch from a cold disk, many at a time.
const START: Duration = Duration::from_mins(2);
/// The longest that one round may take; the longest real one is below a second.
const ROUND: Duration = Duration::from_secs(30);
/// The longest that a program under the shim may take to find an agent that has started: it tries every 5 s at least.
const CONNECT: Duration = Duration::from_secs(15);
/// The share of the budget after which rounds must leave the rest to fresh processes.
const ROUNDS_SHARE: f64 = 0.7;

/// A generator of which nothing is asked but to shuffle (xorshift).
pub(super) struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, state: seed | 1 }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn shuffled<T: Clone>(&mut self, items: &[T]) -> Vec<T> {
        let mut items = items.to_vec();
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
        items
    }
}

/// A benchmark under way.
pub(super) struct Bench<'a> {
    pub(super) args: &'a Args,
    pub(super) setting: Setting,
    pub(super) config: PathBuf,
    pub(super) arms: Vec<Arm>,
    pub(super) rows: Rows,
    pub(super) random: Random,
    pub(super) began: Instant,
    pub(super) failures: Vec<String>,
    pub(super) complete: bool,
    pub(super) greetings: Value,
    pub(super) host: Value,
    pub(super) out: PathBuf,
}

impl Bench<'_> {
    pub(super) fn measure(&mut self) -> Result<()> {
        self.require_gpu()?;
        let mut besides = Vec::new();
        for (index, command) in self.args.beside.iter().enumerate() {
            besides.push(Beside::start(command, &self.setting.logs.join(format!("beside-{index}.log")))?);
        }
        let wanted: Vec<&str> = BENCHES
            .into_iter()
            .filter(|name| self.args.names.is_empty() || self.args.names.iter().any(|n| n == name))
            .collect();
        let rounds = plan::rounds(&wanted, self.args.pairs.into(), self.args.simulate);
        if self.args.simulate && wanted.iter().any(|name| ["launch", "kernels", "steps"].contains(name)) {
            eprintln!("SKIPPED: PyTorch, as the simulated GPU has no CUDA runtime");
        }
        let fresh = wanted.contains(&"memory") || wanted.contains(&"start");
        if !rounds.is_empty() {
            let share = if fresh { ROUNDS_SHARE } else { 1.0 };
            if let Err(error) = self.interleave(&rounds, share) {
                self.complete = false;
                self.fail(&error);
            }
        }
        if fresh {
            self.in_fresh_processes(wanted.contains(&"memory"), wanted.contains(&"start"))?;
        }
        drop(besides);
        Ok(())
    }

    /// Fails clearly where nothing can be measured. Also compiles the kernel once, so that no arm is charged for it.
    fn require_gpu(&self) -> Result<()> {
        self.setting.lifetime(&Crew::Bare, "gpu", START).map(|_| ()).with_context(|| {
            let advice = if self.args.simulate {
                "the simulated GPU does not work"
            } else {
                "there is no GPU to measure on (--simulate tries everything on the simulated one)"
            };
            advice.to_owned()
        })
    }

    fn agent(&self) -> Result<Agent> {
        Agent::start(&self.setting.binaries, &self.config, &self.setting.run_dir)
    }

    fn out_of_time(&self, share: f64) -> bool {
        self.began.elapsed().as_secs_f64() > self.args.budget as f64 * share
    }

    fn fail(&mut self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        eprintln!("FAILED: {text}");
        self.failures.push(text);
    }

    /// Rounds of long-lived processes.
    fn interleave(&mut self, rounds: &[plan::Round], share: f64) -> Result<()> {
        let mut programs: Vec<Program> = rounds.iter().map(|round| round.program).collect();
        programs.sort_unstable();
        programs.dedup();
        let agent = self.agent()?;
        eprintln!("starting {} processes of each arm for {programs:?}", self.args.instances);
        let mut crews = Crews::start(
            &self.setting,
            &self.arms,
            &programs,
            self.args.instances.into(),
            START,
            &mut self.failures,
        );
        for failure in &self.failures {
            eprintln!("FAILED: {failure}");
        }
        self.greetings = json!(crews.greetings);
        self.host["doctor"] = agent.ctl_json(&["doctor", "--json"]).unwrap_or(Value::Null);
        wait_for_clients(&agent, &crews.ids(&Crew::Shim))?;
        if rounds.iter().any(|round| round.metric.bench == "launch") {
            self.calls(&agent, &mut crews)?;
        }
        let most = rounds.iter().map(|round| round.pairs).max().unwrap_or(0);
        for number in 0..most {
            if self.out_of_time(share) {
                self.complete = false;
                eprintln!("stopped by --budget after {number} of {most} rounds");
                break;
            }
            for round in self.random.shuffled(rounds) {
                if number >= round.pairs {
                    continue;
                }
                for arm in self.random.shuffled(&self.arms) {
                    self.one_round(&agent, &mut crews, &round, &arm, number)?;
                }
            }
            if number % 5 == 4 {
                self.summary().write(&self.out)?;
                eprintln!("{:4.0} s: {} of {most} rounds", self.began.elapsed().as_secs_f64(), number + 1);
            }
        }
        Ok(())
    }

    /// What comes between a program and the driver's launch, both ways in one process. The row of the base in a pair is the
    /// driver's own function in the same process.
    fn calls(&mut self, agent: &Agent, crews: &mut Crews) -> Result<()> {
        let (command, pairs) = plan::CALL;
        let pairs = if self.args.simulate { 20 } else { pairs };
        let metric =
            Metric { bench: "launch", name: command.to_owned(), unit: "ns", target: Target::Ratio(1.01) };
        let mut round = 0;
        for number in 0..usize::from(self.args.instances) {
            for arm in self.arms.clone() {
                // Where nothing comes between, the two functions are the same.
                if matches!(arm.crew, Crew::Bare | Crew::Managed) {
                    continue;
                }
                let Some((instance, worker)) = crews.pick(Program::Driver, &arm, number) else { continue };
                let exclusive = arm.mode == Mode::Exclusive;
                let answer = if exclusive { set_mode(agent, "exclusive") } else { Ok(()) }
                    .and_then(|()| worker.ask(&format!("{command} {pairs}"), ROUND));
                if exclusive {
                    set_mode(agent, "shared")?;
                }
                let rows = answer.and_then(|answer| {
                    serde_json::from_value::<Vec<[f64; 2]>>(answer["pairs_ns"].clone())
                        .with_context(|| format!("{answer} holds no pairs"))
                });
                match rows {
                    Ok(rows) => {
                        for [direct, between] in rows {
                            let sample = |value| Sample { round, instance, value };
                            self.rows.add(&metric, BASE, sample(direct))?;
                            self.rows.add(&metric, &arm.name, sample(between))?;
                            round += 1;
                        }
                    }
                    Err(error) => self.fail(&error.context(format!("{command} of {}", arm.name))),
                }
            }
        }
        Ok(())
    }

    fn one_round(
        &mut self,
        agent: &Agent,
        crews: &mut Crews,
        round: &plan::Round,
        arm: &Arm,
        number: usize,
    ) -> Result<()> {
        let Some((instance, worker)) = crews.pick(round.program, arm, number) else { return Ok(()) };
        let exclusive = arm.mode == Mode::Exclusive;
        let answer = if exclusive { set_mode(agent, "exclusive") } else { Ok(()) }
            .and_then(|()| worker.ask(&round.command, ROUND));
        if exclusive {
            // Back at once: a holder that is idle would keep the next program waiting.
            set_mode(agent, "shared")?;
        }
        match answer.and_then(|answer| {
            answer[round.field].as_f64().with_context(|| format!("{answer} lacks a figure"))
        }) {
            Ok(value) => self.rows.add(&round.metric, &arm.name, Sample { round: number, instance, value }),
            Err(error) => {
                self.fail(&error.context(format!("{} of {}", round.metric.name, arm.name)));
                crews.drop_out(round.program, arm, instance);
                Ok(())
            }
        }
    }

    /// Allocations and starts: every value comes from a process of its own.
    fn in_fresh_processes(&mut self, memory: bool, start: bool) -> Result<()> {
        for epoch in 0..usize::from(self.args.epochs) {
            if self.out_of_time(1.0) {
                self.complete = false;
                eprintln!("stopped by --budget after {epoch} of {} epochs", self.args.epochs);
                break;
            }
            let (ours, others): (Vec<Arm>, Vec<Arm>) = self.arms.clone().into_iter().partition(Arm::is_ours);
            // Which half comes first alternates, so that a drift favours neither.
            let halves = if epoch % 2 == 0 { [others, ours] } else { [ours, others] };
            for half in halves {
                let agent = if half.iter().any(Arm::is_ours) { Some(self.agent()?) } else { None };
                for arm in self.random.shuffled(&half) {
                    if let (Some(agent), Mode::Shared | Mode::Exclusive) = (&agent, arm.mode) {
                        set_mode(agent, if arm.mode == Mode::Shared { "shared" } else { "exclusive" })?;
                    }
                    if start {
                        self.start(&arm, epoch)?;
                    }
                    if memory && let Err(error) = self.memory(&arm, epoch) {
                        self.fail(&error.context(format!("memory of {}", arm.name)));
                    }
                }
            }
            self.summary().write(&self.out)?;
            eprintln!(
                "{:4.0} s: {} of {} epochs",
                self.began.elapsed().as_secs_f64(),
                epoch + 1,
                self.args.epochs
            );
        }
        Ok(())
    }

    fn start(&mut self, arm: &Arm, epoch: usize) -> Result<()> {
        let metric =
            Metric { bench: "start", name: "start".to_owned(), unit: "ms", target: Target::Difference(20.0) };
        for round in [2 * epoch, 2 * epoch + 1] {
            match self.setting.lifetime(&arm.crew, &format!("start {} {round}", arm.name), ROUND) {
                Ok(value) => self.rows.add(&metric, &arm.name, Sample { round, instance: round, value })?,
                Err(error) => self.fail(&error.context(format!("start of {}", arm.name))),
            }
        }
        Ok(())
    }

    fn memory(&mut self, arm: &Arm, epoch: usize) -> Result<()> {
        let mut worker = self.setting.pinned_worker(&arm.crew, &format!("memory {} {epoch}", arm.name))?;
        worker.answer(START)?;
        for &(bytes, repeats, shown) in plan::sizes(self.args.simulate) {
            let answer = worker.ask(&format!("memory {bytes} {repeats}"), ROUND)?;
            for part in ["alloc", "touch", "free"] {
                let value = answer[format!("{part}_us")]
                    .as_f64()
                    .with_context(|| format!("{answer} lacks {part}"))?;
                self.row(arm, epoch, &format!("{shown} {part}"), "us", Target::None, value)?;
            }
        }
        // The same allocations in every arm of an epoch.
        let bytes = plan::pattern_bytes(self.args.simulate);
        let answer = worker.ask(&format!("pattern {} {bytes}", epoch + 1), ROUND)?;
        for (part, target) in [
            ("alloc", Target::None),
            ("touch", Target::None),
            ("reuse", Target::None),
            ("free", Target::None),
            ("sum", Target::NotWorse),
        ] {
            let value =
                answer[format!("{part}_ms")].as_f64().with_context(|| format!("{answer} lacks {part}"))?;
            self.row(arm, epoch, &format!("pattern {part}"), "ms", target, value)?;
        }
        Ok(())
    }

    fn row(
        &mut self,
        arm: &Arm,
        epoch: usize,
        name: &str,
        unit: &'static str,
        target: Target,
        value: f64,
    ) -> Result<()> {
        let metric = Metric { bench: "memory", name: name.to_owned(), unit, target };
        self.rows.add(&metric, &arm.name, Sample { round: epoch, instance: epoch, value })
    }

    pub(super) fn summary(&self) -> Summary {
        let results = self.rows.results(&self.arms, self.args.simulate);
        let count = |kept| results.iter().filter(|result| result.met == Some(kept)).count();
        let mut host = self.host.clone();
        host["programs"] = self.greetings.clone();
        Summary {
            simulated: self.args.simulate,
            complete: self.complete,
            seed: self.random.seed,
            seconds: self.began.elapsed().as_secs_f64(),
            instances: self.args.instances.into(),
            core: self.setting.core,
            host,
            arms: self.arms.iter().map(|arm| arm.name.clone()).collect(),
            targets_met: count(true),
            targets_missed: count(false),
            results,
            failures: self.failures.clone(),
        }
    }

    /// The ends of all logs, in one file.
    pub(super) fn keep_logs(&self, dir: &Path) -> Result<()> {
        let mut names: Vec<PathBuf> =
            std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        names.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        names.sort();
        let mut text = String::new();
        for path in names {
            let log = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
            if !log.trim().is_empty() {
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                text = format!("{text}== {name}\n{}\n", nvshare_tests::process::tail(&log));
            }
        }
        std::fs::write(self.out.join("logs.txt"), text).context("writing the logs")
    }
}

fn set_mode(agent: &Agent, mode: &str) -> Result<()> {
    let order = agent.ctl(&["set", "mode", mode])?;
    if !order.status.success() {
        bail!("nvsharectl set mode {mode}: {}", String::from_utf8_lossy(&order.stderr));
    }
    agent.wait_for_mode(mode, ROUND)
}

/// Programs under the shim that the agent does not know would be measured as they run without it.
fn wait_for_clients(agent: &Agent, wanted: &[u32]) -> Result<()> {
    wait_until("the agent to know all programs under the shim", CONNECT, || {
        let known = agent.ctl_json(&["clients", "--json"])?;
        let pids: Vec<u64> = known["clients"]
            .as_array()
            .context("no list of clients")?
            .iter()
            .filter_map(|client| client["pid"].as_u64())
            .collect();
        Ok(wanted.iter().all(|&id| pids.contains(&id.into())).then_some(()))
    })
}

/// A command that runs beside a baseline, with all that it starts.
struct Beside(Guarded);

impl Beside {
    fn start(command: &str, log: &Path) -> Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).process_group(0);
        Ok(Self(Guarded::spawn(command, &mut shell, log, false)?))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // SAFETY: a signal to the process group that was made for this command.
        unsafe { libc::kill(-(self.0.id() as libc::pid_t), libc::SIGTERM) };
    }
}
