//! How well the model reproduces what was measured: the exclusive-mode and free-sharing rows of the nvshare
//! thesis, and the hand-over rates of an H100.
//!
//! What the thesis does not say of its jobs (their pauses, their sweep) is fitted on every other quantum; the
//! quanta between them are the check. No figure of the check went into the fit.

mod rates;

use crate::{
    sim::{
        policy::PolicyKind,
        run::{Options, run},
        scenario::{Pause, Scenario},
    },
    units::Nanos,
};

pub use rates::{MeasuredRate, handover_rates};

/// A row of the published table.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// `two_managed_exclusive` or `two_managed_free`.
    pub method: String,
    /// The quantum in seconds, for the exclusive rows.
    pub quantum: Option<u64>,
    /// The workload.
    pub workload: String,
    /// Makespan in seconds.
    pub seconds: f64,
}

/// A row of the table and what the model says.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was published.
    pub published: Published,
    /// The simulated makespan.
    pub simulated: f64,
    /// It served the fit; if not, it is a check.
    pub fitted: bool,
}

impl Row {
    /// Simulated ÷ published, less 1.
    pub fn error(&self) -> f64 {
        self.simulated / self.published.seconds - 1.0
    }
}

/// Reads the rows of two jobs under the lock or sharing freely: `method,tq_s,workload,seconds`.
pub fn published(csv: &str) -> Result<Vec<Published>, String> {
    let mut rows = Vec::new();
    for (index, line) in csv.lines().enumerate().skip(1) {
        let wrong = || format!("line {}: `{line}` is no row of method,tq_s,workload,seconds", index + 1);
        let [method, quantum, workload, seconds] = line.split(',').collect::<Vec<_>>()[..] else {
            return Err(wrong());
        };
        if !matches!(method, "two_managed_exclusive" | "two_managed_free") {
            continue;
        }
        let parsed = if quantum.is_empty() { Ok(None) } else { quantum.parse().map(Some) };
        let (Ok(quantum), Ok(seconds)) = (parsed, seconds.parse()) else { return Err(wrong()) };
        rows.push(Published { method: method.to_owned(), quantum, workload: workload.to_owned(), seconds });
    }
    Ok(rows)
}

/// Every other quantum serves the fit, in the order of the table; of the free rows, that of `big_90`.
fn serves_fit(rows: &[Published], row: &Published) -> bool {
    if row.quantum.is_none() {
        return row.workload == "big_90";
    }
    let same = rows.iter().filter(|r| r.workload == row.workload && r.quantum.is_some());
    same.take_while(|r| *r != row).count().is_multiple_of(2)
}

/// Simulates the published rows of one workload.
pub fn rows(scenario: &Scenario, workload: &str, all: &[Published]) -> Vec<Row> {
    let here = all.iter().filter(|row| row.workload == workload);
    here.map(|row| Row {
        published: row.clone(),
        simulated: makespan(scenario, row.quantum),
        fitted: serves_fit(all, row),
    })
    .collect()
}

/// Root of the mean squared error.
pub fn rms<'a>(rows: impl IntoIterator<Item = &'a Row>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for row in rows {
        sum += row.error() * row.error();
        count += 1.0;
    }
    if count > 0.0 { f64::sqrt(sum / count) } else { 0.0 }
}

fn makespan(scenario: &Scenario, quantum: Option<u64>) -> f64 {
    let policy = quantum.map_or(PolicyKind::Shared, |s| PolicyKind::Exclusive(Nanos::seconds(s)));
    run(scenario, &Options::new(policy), &mut |_| {}).makespan_s.unwrap_or(f64::INFINITY)
}

/// Pauses that a fit may choose: GPU work between two of them, and the share of CPU time they take.
const EVERY: [u64; 8] = [20, 26, 33, 50, 110, 160, 330, 1000];
const SHARES: [f64; 5] = [0.3, 0.5, 0.6, 0.75, 0.8];

/// The pauses that suit the fit's rows of some workloads best, with the error. The workloads have one duty.
pub fn fit_pauses(workloads: &[(&str, &Scenario)], all: &[Published]) -> Option<(Pause, f64)> {
    let mut best: Option<(Pause, f64)> = None;
    for every in EVERY {
        for share in SHARES {
            let mut rows = Vec::new();
            let mut pause = None;
            for &(workload, scenario) in workloads {
                let mut scenario = scenario.clone();
                for client in &mut scenario.clients {
                    let cpu = client.gpu_work.0 as f64 * (1.0 - client.duty) / client.duty;
                    let mut chosen = Pause { length: Nanos::ZERO, every: Nanos::seconds(every) };
                    chosen.length = Nanos((share * cpu / chosen.count(client.gpu_work) as f64) as u64);
                    client.pause = Some(*pause.get_or_insert(chosen));
                }
                let here = all.iter().filter(|r| r.workload == workload && r.quantum.is_some());
                rows.extend(here.filter(|row| serves_fit(all, row)).map(|row| Row {
                    published: row.clone(),
                    simulated: makespan(&scenario, row.quantum),
                    fitted: true,
                }));
            }
            let error = rms(&rows);
            if best.is_none_or(|(_, least)| error < least) {
                best = pause.map(|pause| (pause, error));
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fit_and_the_check_share_no_row_and_split_the_quanta_in_halves() {
        let csv = "method,tq_s,workload,seconds\n\
            solo_stock,,big_90,719\n\
            two_managed_free,,big_90,11434\ntwo_managed_free,,big_50,11757\n\
            two_managed_exclusive,100,big_90,1\ntwo_managed_exclusive,100,big_50,2\n\
            two_managed_exclusive,60,big_90,3\ntwo_managed_exclusive,60,big_50,4\n";
        let rows = published(csv).unwrap();
        assert_eq!(rows.len(), 6);
        let fit: Vec<bool> = rows.iter().map(|row| serves_fit(&rows, row)).collect();
        assert_eq!(fit, [true, false, true, true, false, false]);
        assert!(published("h\nx,y\n").unwrap_err().contains("line 2"));
    }
}
