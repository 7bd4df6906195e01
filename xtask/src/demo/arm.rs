//! One run of the three programs.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{
    Agent, Binaries, Simulator, SimulatorOptions, Workload, WorkloadOptions, agent::Events, monotonic_ms,
    prometheus::unix_s, wait_until,
};
use serde::Serialize;

use super::observed::{Moments, Watch};

/// Who decides.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    /// The agent.
    Auto,
    /// The operator, once: share, whatever happens.
    AlwaysShared,
}

impl Policy {
    /// The name of a run's instance, where it is watched.
    const fn instance(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::AlwaysShared => "shared",
        }
    }
}

/// A change of plan, in milliseconds since the first program started.
#[derive(Serialize)]
pub(super) struct Switch {
    pub(super) t_ms: f64,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) reason: String,
}

/// How a program ended.
#[derive(Serialize)]
pub(super) struct Finish {
    pub(super) name: String,
    /// Ended by itself and verified its own result.
    pub(super) finished: bool,
}

/// What came of one run.
pub(super) struct Arm {
    pub(super) makespan_s: f64,
    pub(super) stopped: bool,
    pub(super) detected_ms: Option<f64>,
    pub(super) switches: Vec<Switch>,
    pub(super) final_mode: String,
    pub(super) clients: Vec<Finish>,
    /// What the agent said that it could not know.
    pub(super) gaps: Vec<String>,
    pub(super) moments: Moments,
}

/// How long the first two run alone, so that it can be seen that they fit.
const HEAD_START: Duration = Duration::from_millis(2500);
/// The longest that any run may take; far beyond what the slowest machine needs.
const PATIENCE: Duration = Duration::from_mins(2);
/// After the last program, the plan must be shared again within this time.
const SETTLING: Duration = Duration::from_secs(10);

fn program(name: &str, gpu_work: &str) -> WorkloadOptions {
    WorkloadOptions {
        name: name.to_owned(),
        memory: "400MiB".to_owned(),
        gpu_work: gpu_work.to_owned(),
        sweep_time: "20ms".to_owned(),
        extra: Vec::new(),
    }
}

impl Arm {
    pub(super) fn run(
        binaries: &Binaries,
        dir: &Path,
        policy: Policy,
        tables: &str,
        limit: Option<Duration>,
        mut watch: Option<&mut Watch>,
    ) -> Result<Self> {
        let simulator = Simulator::start(binaries, &dir.join("sim"), &SimulatorOptions::default())?;
        let agent = Agent::start(binaries, &simulator.agent_config_with("demo", tables)?, &dir.join("run"))?;
        if policy == Policy::AlwaysShared {
            let order = agent.ctl(&["set", "mode", "shared"])?;
            ensure!(order.status.success(), "nvsharectl: {}", String::from_utf8_lossy(&order.stderr));
        }
        if let Some(watch) = watch.as_mut() {
            watch.scrape(policy.instance(), &agent)?;
        }
        let events = agent.events()?;
        let mut moments = Moments { start: unix_s(), ..Moments::default() };
        let mut telling = Telling { start_ms: monotonic_ms(), detected_ms: None, switches: Vec::new() };
        let start = |name, gpu_work| {
            Workload::start(binaries, &simulator, Some(agent.run_dir()), dir, &program(name, gpu_work))
        };

        let mut clients = vec![start("a", "5s")?, start("b", "5s")?];
        telling.say("a and b start; they fit");
        let third_at = telling.start_ms + HEAD_START.as_secs_f64() * 1e3;
        wait_until("the head start", HEAD_START * 2, || {
            telling.follow(&events)?;
            Ok((monotonic_ms() >= third_at).then_some(()))
        })?;
        ensure!(telling.switches.is_empty(), "the plan changed although a and b fit");
        clients.push(start("c", "1500ms")?);
        moments.third = unix_s();
        telling.say("c starts; together they need more than the card has");

        let deadline_ms = limit.map(|limit| telling.start_ms + limit.as_secs_f64() * 1e3);
        let mut ended_ms = vec![None; clients.len()];
        let all_done = wait_until("the programs to end", PATIENCE, || {
            telling.follow(&events)?;
            for (client, ended) in clients.iter_mut().zip(&mut ended_ms) {
                if ended.is_none() && client.process().finished()?.is_some() {
                    *ended = Some(monotonic_ms());
                    telling.say(&format!("{} ends", client.name()));
                    if let Some(watch) = watch.as_mut() {
                        watch.midway(&agent)?;
                    }
                }
            }
            if ended_ms.iter().all(Option::is_some) {
                return Ok(Some(true));
            }
            Ok(deadline_ms.is_some_and(|deadline| monotonic_ms() > deadline).then_some(false))
        })?;
        let end_ms =
            if all_done { ended_ms.iter().flatten().copied().fold(0.0, f64::max) } else { monotonic_ms() };

        moments.end = unix_s();
        let mut endings = Vec::new();
        if all_done {
            for client in &mut clients {
                let finished = client.finish(Duration::from_secs(1));
                if let Err(error) = &finished {
                    eprintln!("   {}: {error:#}", client.name());
                }
                endings.push(Finish { name: client.name().to_owned(), finished: finished.is_ok() });
            }
        }
        drop(clients);
        let settled = wait_until("the plan to be shared again", SETTLING, || {
            telling.follow(&events)?;
            Ok((agent.mode()? == "shared").then_some(()))
        });
        telling.follow(&events)?;
        let doctor = agent.ctl_json(&["doctor", "--json"])?;
        let gaps = doctor["gaps"].as_array().context("doctor names no gaps")?;
        let gaps = gaps.iter().map(gap_text).collect::<Result<_>>()?;
        if let Some(watch) = watch.as_mut() {
            watch.settled(policy.instance())?;
        }
        moments.settled = unix_s();
        Ok(Self {
            makespan_s: (end_ms - telling.start_ms) / 1e3,
            stopped: !all_done,
            detected_ms: telling.detected_ms,
            switches: telling.switches,
            final_mode: if settled.is_ok() { "shared".to_owned() } else { agent.mode()? },
            clients: endings,
            gaps,
            moments,
        })
    }
}

/// A gap in words.
fn gap_text(gap: &serde_json::Value) -> Result<String> {
    let text = |field: &str| gap[field].as_str().with_context(|| format!("gap without `{field}`: {gap}"));
    Ok(format!("{}: {}", text("unknown")?, text("instead")?))
}

/// Follows the plan and tells a person.
struct Telling {
    start_ms: f64,
    detected_ms: Option<f64>,
    switches: Vec<Switch>,
}

impl Telling {
    fn say(&self, what: &str) {
        eprintln!("   {:6.2} s  {what}", (monotonic_ms() - self.start_ms) / 1e3);
    }

    /// Takes in what the agent announced since the last call.
    fn follow(&mut self, events: &Events) -> Result<()> {
        while let Some(event) = events.next() {
            let text = |field: &str| -> Result<String> {
                Ok(event[field]
                    .as_str()
                    .with_context(|| format!("event without `{field}`: {event}"))?
                    .to_owned())
            };
            let t_ms = event["t_ms"].as_f64().with_context(|| format!("event without time: {event}"))?;
            let switch = Switch {
                t_ms: t_ms - self.start_ms,
                from: text("from")?,
                to: text("to")?,
                reason: text("reason")?,
            };
            if self.detected_ms.is_none() && switch.to != "shared" {
                self.detected_ms = event["first_refault_ms"].as_f64().map(|first| t_ms - first);
            }
            eprintln!(
                "   {:6.2} s  plan: {} -> {}: {}",
                switch.t_ms / 1e3,
                switch.from,
                switch.to,
                switch.reason
            );
            // A trial that is confirmed is announced too, but switches nothing.
            if switch.from != switch.to {
                self.switches.push(switch);
            }
        }
        Ok(())
    }
}
