//! Raw rows as they come, and what they amount to.

use std::{
    fmt::Write as _,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;

use super::{
    crew::{Arm, BASE, BASE_AGAIN},
    plan::{Metric, Target},
    stats::{self, Comparison, Sample},
};

/// What has been measured so far. Every row is in the file as soon as it is known.
#[derive(Debug)]
pub(super) struct Rows {
    file: File,
    series: Vec<Series>,
}

/// Values of one arm for one metric.
#[derive(Debug)]
struct Series {
    metric: Metric,
    arm: String,
    samples: Vec<Sample>,
}

impl Rows {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let mut file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        writeln!(file, "bench,metric,arm,instance,round,value,unit")?;
        Ok(Self { file, series: Vec::new() })
    }

    pub(super) fn add(&mut self, metric: &Metric, arm: &str, sample: Sample) -> Result<()> {
        let Sample { round, instance, value } = sample;
        writeln!(
            self.file,
            "{},{},{arm},{instance},{round},{value},{}",
            metric.bench, metric.name, metric.unit
        )
        .context("writing a row")?;
        let of_arm = |series: &&mut Series| series.metric.name == metric.name && series.arm == arm;
        if let Some(series) = self.series.iter_mut().find(of_arm) {
            series.samples.push(sample);
        } else {
            self.series.push(Series { metric: metric.clone(), arm: arm.to_owned(), samples: vec![sample] });
        }
        Ok(())
    }

    fn samples(&self, metric: &str, arm: &str) -> &[Sample] {
        let found = self.series.iter().find(|series| series.metric.name == metric && series.arm == arm);
        found.map_or(&[], |series| &series.samples)
    }

    /// Every arm against bare, metric by metric.
    pub(super) fn results(&self, arms: &[Arm], simulated: bool) -> Vec<Outcome> {
        let mut metrics: Vec<&Metric> = Vec::new();
        for series in &self.series {
            if !metrics.iter().any(|metric| metric.name == series.metric.name) {
                metrics.push(&series.metric);
            }
        }
        let mut results = Vec::new();
        for metric in metrics {
            let base = self.samples(&metric.name, BASE);
            let noise = stats::compare(base, self.samples(&metric.name, BASE_AGAIN));
            for arm in arms.iter().filter(|arm| arm.name != BASE) {
                let Some(comparison) = stats::compare(base, self.samples(&metric.name, &arm.name)) else {
                    continue;
                };
                // A simulated launch costs many times what a real one does: nothing follows from it.
                let judged = arm.is_ours() && !simulated;
                results.push(Outcome {
                    bench: metric.bench,
                    metric: metric.name.clone(),
                    unit: metric.unit,
                    arm: arm.name.clone(),
                    target: shown(metric.target),
                    met: if judged { met(metric.target, &comparison, noise.as_ref()) } else { None },
                    comparison,
                });
            }
        }
        results
    }
}

/// One arm against bare.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    bench: &'static str,
    metric: String,
    unit: &'static str,
    arm: String,
    #[serde(flatten)]
    comparison: Comparison,
    /// What was promised of our own arms.
    target: Option<String>,
    /// Whether the promise was kept; null where there is none or nothing can be said.
    pub(super) met: Option<bool>,
}

fn shown(target: Target) -> Option<String> {
    match target {
        Target::Ratio(most) => Some(format!("upper bound of the ratio at most {most}")),
        Target::Noise => Some("as far from bare as bare itself".to_owned()),
        Target::NotWorse => Some("no worse than bare".to_owned()),
        Target::Difference(most) => Some(format!("upper bound of the difference at most {most}")),
        Target::None => None,
    }
}

fn met(target: Target, found: &Comparison, noise: Option<&Comparison>) -> Option<bool> {
    let within_noise = || Some(found.ratio_lower95? <= noise?.ratio_upper95?);
    match target {
        Target::Ratio(most) => found.ratio_upper95.map(|upper| upper <= most),
        Target::NotWorse if found.ratio_median <= 1.0 => Some(true),
        Target::Noise | Target::NotWorse => within_noise(),
        Target::Difference(most) => found.difference_upper95.map(|upper| upper <= most),
        Target::None => None,
    }
}

/// The contract of `--json` and of `summary.json`.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    /// Figures of a simulated GPU say nothing about a real one.
    pub(super) simulated: bool,
    /// Whether every round that was wanted was done.
    pub(super) complete: bool,
    pub(super) seed: u64,
    pub(super) seconds: f64,
    pub(super) instances: usize,
    pub(super) core: usize,
    pub(super) host: Value,
    pub(super) arms: Vec<String>,
    pub(super) results: Vec<Outcome>,
    pub(super) targets_met: usize,
    pub(super) targets_missed: usize,
    /// What went wrong or was left out.
    pub(super) failures: Vec<String>,
}

impl Summary {
    pub(super) fn write(&self, out: &Path) -> Result<PathBuf> {
        let path = out.join("summary.json");
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
        std::fs::write(out.join("table.txt"), self.table()).context("writing the table")?;
        Ok(path)
    }

    /// For a person.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        if self.simulated {
            text.push_str("ON THE SIMULATED GPU: these figures say nothing about a real one.\n");
        }
        let _ = writeln!(
            text,
            "{:<14} {:<15} {:>5} {:>12} {:>12} {:>8} {:>8}   {:<17} {:>9} {:>10}  target",
            "metric",
            "arm",
            "pairs",
            "bare",
            "arm",
            "median",
            "mean",
            "95 % bounds",
            "of median",
            "of process"
        );
        for outcome in
            self.results.iter().filter(|outcome| outcome.bench != "memory" || outcome.target.is_some())
        {
            let c = &outcome.comparison;
            let (bare, arm) = (
                format!("{:.3} {}", c.base_median, outcome.unit),
                format!("{:.3} {}", c.median, outcome.unit),
            );
            let bounds = format!("{} – {}", ratio(c.ratio_lower95), ratio(c.ratio_upper95));
            let verdict = match (outcome.met, &outcome.target) {
                (Some(true), Some(target)) => format!("met: {target}"),
                (Some(false), Some(target)) => format!("MISSED: {target}"),
                _ => String::new(),
            };
            let difference = match c.difference_upper95 {
                Some(upper) if outcome.bench == "start" => {
                    format!(" (difference {:.2}, at most {upper:.2})", c.difference_median)
                }
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                "{:<14} {:<15} {:>5} {bare:>12} {arm:>12} {:>8.4} {:>8.4}   {bounds:<17} {:>9} {:>10}  {verdict}{difference}",
                outcome.metric,
                outcome.arm,
                c.pairs,
                c.ratio_median,
                c.ratio_mean,
                ratio(c.ratio_median_upper95),
                ratio(c.ratio_instances_upper95),
            );
        }
        self.memory_table(&mut text);
        text
    }

    /// Single allocations: medians only, a column for each arm.
    fn memory_table(&self, text: &mut String) {
        let of_memory = |outcome: &&Outcome| outcome.bench == "memory" && outcome.target.is_none();
        let mut metrics: Vec<&str> = Vec::new();
        for outcome in self.results.iter().filter(of_memory) {
            if !metrics.contains(&outcome.metric.as_str()) {
                metrics.push(&outcome.metric);
            }
        }
        if metrics.is_empty() {
            return;
        }
        let _ = write!(text, "\n{:<22}", "median");
        for arm in &self.arms {
            let _ = write!(text, " {arm:>14}");
        }
        text.push('\n');
        for metric in metrics {
            let row: Vec<&Outcome> =
                self.results.iter().filter(of_memory).filter(|outcome| outcome.metric == metric).collect();
            let Some(first) = row.first() else { continue };
            let _ = write!(text, "{:<22}", format!("{metric}, {}", first.unit));
            for arm in &self.arms {
                let value = if arm == BASE {
                    Some(first.comparison.base_median)
                } else {
                    row.iter().find(|outcome| outcome.arm == *arm).map(|outcome| outcome.comparison.median)
                };
                let _ = match value {
                    Some(value) => write!(text, " {value:>14.1}"),
                    None => write!(text, " {:>14}", "-"),
                };
            }
            text.push('\n');
        }
    }
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison(values: &[f64]) -> Comparison {
        let samples = |values: &[f64]| -> Vec<Sample> {
            let rounds = values.iter().enumerate();
            rounds.map(|(round, &value)| Sample { round, instance: round % 3, value }).collect()
        };
        stats::compare(&samples(&vec![1.0; values.len()]), &samples(values)).expect("pairs")
    }

    #[test]
    fn a_ratio_is_judged_by_its_upper_bound_and_not_by_its_median() {
        let scattered = comparison(&[1.0, 1.0, 1.0, 1.2, 1.0, 1.0]);
        assert!(scattered.ratio_median <= 1.01);
        assert_eq!(met(Target::Ratio(1.01), &scattered, None), Some(false));
        assert_eq!(met(Target::Ratio(1.01), &comparison(&[1.001; 6]), None), Some(true));
    }

    #[test]
    fn noise_is_what_two_equal_arms_show() {
        let noise = comparison(&[0.98, 1.02, 0.99, 1.03, 1.0, 1.0]);
        assert_eq!(met(Target::Noise, &comparison(&[1.01; 6]), Some(&noise)), Some(true));
        assert_eq!(met(Target::Noise, &comparison(&[1.10; 6]), Some(&noise)), Some(false));
        assert_eq!(met(Target::Noise, &comparison(&[1.10; 6]), None), None);
        assert_eq!(met(Target::NotWorse, &comparison(&[0.5; 6]), None), Some(true));
    }

    #[test]
    fn a_single_pair_proves_nothing() {
        assert_eq!(met(Target::Ratio(1.01), &comparison(&[1.0]), None), None);
        assert_eq!(met(Target::Difference(20.0), &comparison(&[1.0]), None), None);
    }
}
