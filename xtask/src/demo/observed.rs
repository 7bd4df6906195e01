//! The demo through the eyes of whoever is on call: a real Prometheus scrapes the agents of both runs with the
//! shipped rules, and what the shipped dashboards ask must be answered as the story goes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{
    Agent, Dashboard, Prometheus, dashboards,
    prometheus::{Series, get, promtool, unix_s},
    wait_until,
};
use serde::Serialize;
use serde_json::{Value, json};

/// An alert must be gone this soon after its cause.
const CLEARS_WITHIN: Duration = Duration::from_secs(15);
const THRASHING: &str = "ALERTS{alertname=\"NvshareThrashing\"}";

/// When things happened in a run, in seconds since the epoch.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Moments {
    /// The first program started.
    pub(super) start: f64,
    /// The third joined.
    pub(super) third: f64,
    /// The last ended, or was stopped.
    pub(super) end: f64,
    /// The plan had settled.
    pub(super) settled: f64,
}

/// The Prometheus that watches.
pub(super) struct Watch {
    prometheus: Prometheus,
    linted: bool,
}

impl Watch {
    pub(super) fn start(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let prometheus = Prometheus::start(dir, &dashboards::folder().join("rules"))?;
        Ok(Self { prometheus, linted: false })
    }

    /// Scrapes this agent from here on.
    pub(super) fn scrape(&mut self, instance: &str, agent: &Agent) -> Result<()> {
        self.prometheus.scrape(instance, &agent.metrics_address()?)
    }

    /// In the middle of a run, with clients there and turns taken: the format of what the agent serves.
    pub(super) fn midway(&mut self, agent: &Agent) -> Result<()> {
        if !std::mem::replace(&mut self.linted, true) {
            promtool(&["check", "metrics"], &get(&agent.metrics_address()?, "/metrics")?)?;
        }
        Ok(())
    }

    /// All programs of a run have ended: waits until no series and no alert says otherwise any more.
    pub(super) fn settled(&mut self, instance: &str) -> Result<()> {
        self.prometheus.wait_for_scrape(instance)?;
        let clients = format!("{{__name__=~\"nvshare_client_.*\", client!=\"\", instance=\"{instance}\"}}");
        wait_until("the series of clients to go", CLEARS_WITHIN, || {
            Ok(self.prometheus.query(&clients, unix_s())?.is_empty().then_some(()))
        })?;
        wait_until("the thrash alert to clear", CLEARS_WITHIN, || {
            Ok(self.prometheus.query(THRASHING, unix_s())?.is_empty().then_some(()))
        })
    }

    /// Holds everything that was asked against the story.
    pub(super) fn verdict(&self, auto: &Moments, shared: &Moments, save: Option<&PathBuf>) -> Result<()> {
        let span = (auto.start, shared.settled);
        let sees_causes =
            !self.range("nvshare_sensor_attached{sensor=\"uvm-kprobe\"} == 1", span)?.is_empty();
        let mut answers = BTreeMap::new();
        for dashboard in Dashboard::all()? {
            for query in dashboard.queries() {
                let series = self.range(&query.concrete(), span)?;
                let blind = !sees_causes && query.expr.contains("evicted");
                ensure!(blind || !series.is_empty(), "{} has nothing to show: {}", query.panel, query.expr);
                answers.insert(query.expr, series);
            }
        }
        let rules = self.prometheus.rules()?;
        for rule in &rules {
            let name = rule["name"].as_str().context("a rule without a name")?;
            ensure!(rule["health"] == "ok", "the rule {name} is not well: {rule}");
            ensure!(
                rule["type"] == "alerting" || !self.range(name, span)?.is_empty(),
                "the recording rule {name} recorded nothing"
            );
        }
        self.story(auto, shared)?;
        eprintln!(
            "   Prometheus: {} queries of dashboards and {} rules answered; the thrash alert fired while always shared, and only then",
            answers.len(),
            rules.len()
        );
        if let Some(path) = save {
            save_answers(path, &answers, auto, shared)?;
        }
        Ok(())
    }

    fn story(&self, auto: &Moments, shared: &Moments) -> Result<()> {
        let turns = (auto.third, auto.end);
        let thrash = (shared.third + 2.0, shared.end);
        let pressure = "rate(nvshare_gpu_memory_pressure_seconds_total{kind=\"some\"}[3s])";
        let (calm, worst) = (self.highest(pressure, "auto", (auto.start, auto.third))?, 0.05);
        ensure!(calm <= worst, "while a and b fit, {calm:.2} of the time was pressure");
        let stalled = self.highest(pressure, "shared", thrash)?;
        ensure!(stalled >= 0.25, "thrash that is not cured shows as a pressure of only {stalled:.2}");

        let score = "nvshare_thrash_score_ratio";
        ensure!(self.highest(score, "shared", thrash)? >= 1.0, "thrash leaves no evidence");
        let firing = |instance| {
            let query = format!(
                "ALERTS{{alertname=\"NvshareThrashing\", alertstate=\"firing\", instance=\"{instance}\"}}"
            );
            self.range(&query, (auto.start, shared.settled))
        };
        ensure!(firing("auto")?.is_empty(), "the thrash alert fired although nvshare took turns");
        let fired = firing("shared")?;
        let first = fired.iter().flat_map(|series| &series.samples).map(|(at, _)| *at).reduce(f64::min);
        let first = first.context("the thrash alert did not fire while clients were always shared")?;
        ensure!(first > shared.third, "the thrash alert fired before there was any thrash");

        let apart = "nvshare_plan_mode{mode=~\"sets|exclusive\"}";
        ensure!(self.highest(apart, "auto", turns)? >= 1.0, "Prometheus saw no turns");
        ensure!(self.highest(apart, "auto", (auto.settled, auto.settled))? <= 0.0, "turns never ended");
        let last = |query: &str| self.highest(query, "auto", (auto.settled, auto.settled));
        let (before, during) = (
            last("nvshare_plan_effect_stall_ratio{when=\"before\"}")?,
            last("nvshare_plan_effect_stall_ratio{when=\"during\"}")?,
        );
        ensure!(
            during < before,
            "turns lost {during:.2} of the time to paging, the thrash before {before:.2}"
        );
        let gain = last("nvshare_plan_effect_gain_ratio")?;
        ensure!(gain > 1.0, "clients got {gain:.2} times as much done in turns as in the thrash");
        let curable = last("nvshare_uvm_refaulted_bytes_total{kind=\"curable\"}")?;
        ensure!(curable > 0.0, "no curable refault was counted");

        let progress = "sum by (instance) (rate(nvshare_client_submitted_calls_total[3s]))";
        let (in_turns, in_thrash) =
            (self.mean(progress, "auto", turns)?, self.mean(progress, "shared", thrash)?);
        ensure!(
            in_turns > 1.5 * in_thrash,
            "{in_turns:.1} calls per second in turns, {in_thrash:.1} in thrash"
        );
        eprintln!(
            "   Prometheus: {:.0} % of the thrash were lost to paging, {:.0} % of the turns; clients got {gain:.1} times as much done",
            before * 1e2,
            during * 1e2
        );
        Ok(())
    }

    fn range(&self, expression: &str, span: (f64, f64)) -> Result<Vec<Series>> {
        self.prometheus.query_range(expression, span)
    }

    fn samples(&self, expression: &str, instance: &str, span: (f64, f64)) -> Result<Vec<f64>> {
        let all = self.range(expression, span)?;
        let of_instance = all.iter().filter(|series| series.label("instance") == instance);
        let values: Vec<f64> =
            of_instance.flat_map(|series| series.samples.iter().map(|(_, value)| *value)).collect();
        ensure!(!values.is_empty(), "{expression} says nothing of {instance}");
        Ok(values)
    }

    fn highest(&self, expression: &str, instance: &str, span: (f64, f64)) -> Result<f64> {
        Ok(self.samples(expression, instance, span)?.into_iter().fold(f64::NEG_INFINITY, f64::max))
    }

    fn mean(&self, expression: &str, instance: &str, span: (f64, f64)) -> Result<f64> {
        let values = self.samples(expression, instance, span)?;
        Ok(values.iter().sum::<f64>() / values.len() as f64)
    }
}

/// What `dashboards/plot.py` draws.
fn save_answers(
    path: &Path,
    answers: &BTreeMap<String, Vec<Series>>,
    auto: &Moments,
    shared: &Moments,
) -> Result<()> {
    let series = |all: &Vec<Series>| -> Vec<Value> {
        all.iter().map(|one| json!({"labels": one.labels, "samples": one.samples})).collect()
    };
    let answers: BTreeMap<&String, Vec<Value>> =
        answers.iter().map(|(expr, all)| (expr, series(all))).collect();
    let content = json!({"auto": auto, "shared": shared, "answers": answers});
    fs::write(path, serde_json::to_vec(&content)?).with_context(|| format!("writing {}", path.display()))
}
