//! `cargo xtask simulate --calibrate`: the model against what was measured.

use anyhow::{Result, anyhow, ensure};
use nvshare_core::sim::{
    Scenario,
    calibrate::{self, Published, Row},
};

use super::load;
use crate::cargo::root;

/// The workloads of the published table.
pub(crate) const WORKLOADS: [&str; 4] = ["small_50", "small_90", "big_50", "big_90"];
/// What the exclusive rows must keep to, as the root of the mean square.
pub(crate) const EXCLUSIVE_LIMIT: f64 = 0.05;
/// What the free rows must keep to, as a factor.
pub(crate) const FREE_LIMIT: f64 = 1.5;
/// What hand-over rates must keep to.
pub(crate) const RATE_LIMIT: f64 = 0.1;

/// A workload of the published table and its scenario.
pub(crate) type Workload = (&'static str, Scenario);

/// The workloads and the published rows.
pub(crate) fn ground() -> Result<(Vec<Workload>, Vec<Published>)> {
    let scenarios = root().join("tests/scenarios");
    let csv = std::fs::read_to_string(scenarios.join("data/nvshare-thesis-table-12-2.csv"))?;
    let published = calibrate::published(&csv).map_err(|message| anyhow!(message))?;
    let mut workloads = Vec::new();
    for name in WORKLOADS {
        workloads.push((name, load(&scenarios.join(format!("thesis/{name}.toml")))?));
    }
    Ok((workloads, published))
}

/// Error of the exclusive rows that served the fit, or of those that are its check.
pub(crate) fn exclusive_error(rows: &[Row], fitted: bool) -> f64 {
    calibrate::rms(rows.iter().filter(move |row| row.published.quantum.is_some() && row.fitted == fitted))
}

/// By what factor a row is off, in either direction.
pub(crate) fn factor(row: &Row) -> f64 {
    let ratio = row.error() + 1.0;
    ratio.max(1.0 / ratio)
}

/// The quanta of some rows, in the order of the table; `None` is free sharing.
pub(crate) fn quanta(rows: &[Row]) -> Vec<Option<u64>> {
    let mut quanta: Vec<Option<u64>> = Vec::new();
    for row in rows {
        if !quanta.contains(&row.published.quantum) {
            quanta.push(row.published.quantum);
        }
    }
    quanta
}

pub(super) fn run(fit: bool) -> Result<()> {
    let (workloads, published) = ground()?;
    if fit {
        search(&workloads, &published);
    }
    let mut rows = Vec::new();
    for (name, scenario) in &workloads {
        eprintln!("simulating {name} ...");
        rows.extend(calibrate::rows(scenario, name, &published));
    }
    table(&rows);
    let (fitted, checked) = (exclusive_error(&rows, true), exclusive_error(&rows, false));
    println!(
        "exclusive rows: rms {:.1} % where fitted, {:.1} % where checked",
        fitted * 100.0,
        checked * 100.0
    );
    let mut worst_rate = 0.0f64;
    println!("\nhand-over rates of an H100, GB/s (measured, simulated)");
    for rate in calibrate::handover_rates() {
        let (low, high) = rate.measured;
        worst_rate = worst_rate.max(rate.error().abs());
        println!("  {:44} {low:5.1} - {high:5.1}  {:5.1}", rate.path, rate.simulated);
    }
    println!(
        "\nNo run here shows real eviction under pressure; `cargo xtask gpu-bench` measures it where it is allowed."
    );
    ensure!(checked <= EXCLUSIVE_LIMIT, "the checked exclusive rows are off by {:.1} % rms", checked * 100.0);
    for row in rows.iter().filter(|row| row.published.quantum.is_none()) {
        let factor = factor(row);
        ensure!(
            factor <= FREE_LIMIT,
            "free sharing of {} is off by a factor {factor:.2}",
            row.published.workload
        );
    }
    ensure!(worst_rate <= RATE_LIMIT, "a hand-over rate is off by {:.0} %", worst_rate * 100.0);
    Ok(())
}

/// One line for each quantum, one column for each workload: simulated, and the error.
fn table(rows: &[Row]) {
    println!("makespan in seconds, simulated (error); * served the fit");
    print!("{:>9}", "quantum");
    for name in WORKLOADS {
        print!("{name:>18}");
    }
    println!();
    for quantum in quanta(rows) {
        print!("{:>9}", quantum.map_or_else(|| "free".to_owned(), |quantum| format!("{quantum} s")));
        for name in WORKLOADS {
            let row = rows.iter().find(|r| r.published.workload == name && r.published.quantum == quantum);
            let text = row.map_or_else(String::new, |row| {
                let mark = if row.fitted { "*" } else { " " };
                format!("{:.0} ({:+.1} %){mark}", row.simulated, row.error() * 100.0)
            });
            print!("{text:>18}");
        }
        println!();
    }
}

fn search(workloads: &[(&str, Scenario)], published: &[Published]) {
    for duty in ["50", "90"] {
        eprintln!("searching the pauses of the jobs with {duty} % GPU time ...");
        let same: Vec<(&str, &Scenario)> =
            workloads.iter().filter(|(name, _)| name.ends_with(duty)).map(|(name, s)| (*name, s)).collect();
        if let Some((pause, error)) = calibrate::fit_pauses(&same, published) {
            println!(
                "duty {duty}: pause {} every {} of GPU work fits best, rms {:.1} %",
                pause.length,
                pause.every,
                error * 100.0
            );
        }
    }
}
