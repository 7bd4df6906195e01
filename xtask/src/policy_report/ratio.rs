//! The plot that answers what over-subscription costs under each policy.

use anyhow::Result;
use nvshare_core::{
    Nanos,
    sim::{Options, PolicyKind, Scenario},
};

use super::{
    arms::{Makespan, makespan, run_to},
    page::Page,
    plot::{Axis, BLUE, GREEN, INK, ORANGE, PURPLE, Series, VERMILION, lines},
    pool,
    table::Table,
};

/// Memory of the card in MiB.
const MEMORY: u64 = 78 << 10;
/// GPU work of each of the two jobs, in seconds.
const WORK: f64 = 200.0;
/// Sharing is stopped after this many times the work of both; the top of the plot.
const TOP: f64 = 5.0;

/// Tenths of the memory that both working sets come to.
const RATIOS: std::ops::RangeInclusive<u64> = 5..=20;

fn scenario(tenths: u64) -> Result<Scenario> {
    let each = MEMORY * tenths / 20;
    let text = format!(
        "[gpu]\npreset = \"h100-pcie5\"\nmemory = \"{MEMORY} MiB\"\n[[client]]\nname = \"job\"\ncount = 2\n\
        allocated = \"{each} MiB\"\ngpu_work = \"{WORK} s\"\nburst = \"300 ms\"\nsweep = \"300 ms\"\n"
    );
    Ok(Scenario::parse("over-subscription", &text)?)
}

pub(super) fn section(page: &mut Page) -> Result<()> {
    let policies = [
        (PolicyKind::Shared, VERMILION, "shared"),
        (PolicyKind::Exclusive(Nanos::seconds(30)), ORANGE, "exclusive:30"),
        (PolicyKind::AllocationSum, GREEN, "allocation-sum"),
        (PolicyKind::Nixie, PURPLE, "nixie"),
        (PolicyKind::Auto, BLUE, "auto"),
        (PolicyKind::Oracle, INK, "oracle"),
    ];
    let mut tasks = Vec::new();
    for tenths in RATIOS {
        for (policy, ..) in policies {
            tasks.push((scenario(tenths)?, policy));
        }
    }
    let limit = 2.0 * WORK * TOP;
    let results = pool::all("over-subscription", &tasks, |(scenario, policy)| {
        makespan(&run_to(scenario, &Options::new(*policy), Some(limit)))
    });
    let rows: Vec<_> = RATIOS.zip(results.chunks(policies.len())).collect();
    page.heading("Over-subscription");
    page.paragraph(&format!(
        "Two jobs of {WORK:.0} s of GPU work each, which sweep over their memory three times a second, on an H100 of 78 GiB. \
        How long both take, as a multiple of their work; below, in seconds (`>`: stopped after {TOP:.0} times the work)."
    ));
    let times = |time: f64| time / (2.0 * WORK);
    let series: Vec<Series> = policies
        .iter()
        .enumerate()
        .map(|(index, &(policy, color, name))| Series {
            name: name.to_owned(),
            color,
            points: rows
                .iter()
                .map(|(tenths, row)| {
                    // What was stopped lies above the picture.
                    let beyond = if matches!(row[index], Makespan::Beyond(_)) { 2.0 } else { 1.0 };
                    (*tenths as f64 / 10.0, times(row[index].at_least()) * beyond)
                })
                .collect(),
            dashed: policy == PolicyKind::Oracle,
            mark: None,
        })
        .collect();
    let x = Axis {
        label: "both working sets together ÷ the card's memory".to_owned(),
        from: 0.5,
        to: 2.0,
        ticks: (5..=20).map(|tenths| f64::from(tenths) / 10.0).collect(),
        log: false,
        show: |ratio| format!("{ratio:.1}"),
    };
    let y = Axis {
        label: "makespan ÷ GPU work of both".to_owned(),
        from: 0.9,
        to: TOP,
        ticks: vec![1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0],
        log: true,
        show: |times| if times < 1.95 { format!("{times:.1} ×") } else { format!("{times:.0} ×") },
    };
    let svg = lines("What over-subscription costs", &x, &y, &series)?;
    let shows = "Makespan against the over-subscription ratio for each policy: sharing is best up to 1.0 and hopeless beyond; auto \
        follows the better of sharing and turns";
    page.picture("over-subscription", shows, svg);
    let heads: Vec<&str> = std::iter::once("ratio").chain(policies.map(|(_, _, name)| name)).collect();
    let mut table = Table::new(&heads);
    for (tenths, row) in &rows {
        let mut cells = vec![format!("{:.1}", *tenths as f64 / 10.0)];
        cells.extend(row.iter().map(|makespan| makespan.shown()));
        table.row(&cells);
    }
    page.table(table);
    Ok(())
}
