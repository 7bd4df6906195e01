//! The model against what was measured, and what it cannot show.

use anyhow::Result;
use nvshare_core::sim::calibrate::{self, Row};

use super::{
    bound::Bound,
    page::Page,
    pool,
    table::{Table, percent, signed_percent},
};
use crate::simulate::calibrate::{
    EXCLUSIVE_LIMIT, FREE_LIMIT, RATE_LIMIT, WORKLOADS, exclusive_error, factor, ground, quanta,
};

pub(super) fn section(page: &mut Page) -> Result<()> {
    let (workloads, published) = ground()?;
    let rows: Vec<Row> =
        pool::all("calibration", &workloads, |(name, scenario)| calibrate::rows(scenario, name, &published))
            .into_iter()
            .flatten()
            .collect();
    page.heading("Calibration");
    page.paragraph(
        "Two jobs under stock nvshare's lock, and sharing freely, on a P100: the table 12.2 of the nvshare thesis (NTUA 2021). \
        Simulated makespan in seconds and its error. What the thesis does not say of its jobs was fitted on the rows with a \
        star; the others are the check.",
    );
    let heads: Vec<&str> = std::iter::once("quantum").chain(WORKLOADS).collect();
    let mut table = Table::new(&heads);
    for quantum in quanta(&rows) {
        let mut cells = vec![quantum.map_or_else(|| "shared".to_owned(), |quantum| format!("{quantum} s"))];
        for name in WORKLOADS {
            let row = rows.iter().find(|r| r.published.workload == name && r.published.quantum == quantum);
            cells.push(row.map_or_else(String::new, |row| {
                let star = if row.fitted { " *" } else { "" };
                format!("{:.0} ({}){star}", row.simulated, signed_percent(row.error()))
            }));
        }
        table.row(&cells);
    }
    page.table(table);
    for (key, fitted) in [("exclusive rows, fit", true), ("exclusive rows, check", false)] {
        page.bounds.push(Bound::at_most(
            key,
            "rms error",
            exclusive_error(&rows, fitted),
            EXCLUSIVE_LIMIT,
            percent,
        ));
    }
    let free = rows.iter().filter(|row| row.published.quantum.is_none());
    let worst = free.map(factor).fold(1.0, f64::max);
    let show = |factor: f64| format!("a factor of {factor:.2}");
    page.bounds.push(Bound::at_most("shared rows", "off by", worst, FREE_LIMIT, show));
    page.paragraph(&format!(
        "Exclusive rows: {} rms where fitted, {} rms where checked. Shared rows: at most {}.",
        percent(exclusive_error(&rows, true)),
        percent(exclusive_error(&rows, false)),
        show(worst)
    ));

    page.paragraph(
        "Hand-over rates of one H100 80GB HBM3 on PCIe 5 x16 in GB/s, within free memory. `protected`: the range is \
        write-protected while it moves.",
    );
    let mut table = Table::new(&["path", "measured", "simulated", "off by"]);
    let mut worst = 0.0f64;
    let mut seen: Vec<&str> = Vec::new();
    for rate in calibrate::handover_rates() {
        worst = worst.max(rate.error().abs());
        let (low, high) = rate.measured;
        // Two paths are taken with and without protection, to the same result.
        if seen.contains(&rate.path) && rate.error().abs() <= 0.0 {
            continue;
        }
        seen.push(rate.path);
        table.row(&[
            rate.path.to_owned(),
            format!("{low:.1} – {high:.1}"),
            format!("{:.1}", rate.simulated),
            signed_percent(rate.error()),
        ]);
    }
    page.table(table);
    page.bounds.push(Bound::at_most("hand-over rates", "off by", worst, RATE_LIMIT, percent));
    page.paragraph(
        "**What no simulator can show.** No figure here or anywhere in this project stems from real eviction under pressure on \
        a card of ours: an error in the driver's eviction can hang a card until the machine is started anew, so none was \
        oversubscribed. What the model says of thrash rests on the thesis' shared rows (a P100, drivers of 2021) and on \
        published figures. `cargo xtask gpu-bench thrash --allow-oversubscription` measures it on a real card for whoever owns \
        one.",
    );
    Ok(())
}
