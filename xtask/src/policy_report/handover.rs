//! What a quantum is worth with each way of moving memory.

use std::ops::ControlFlow;

use anyhow::Result;
use nvshare_core::{
    Bytes, Nanos,
    input::ModeOrder,
    sim::{self, HandoverEngine, Options, PolicyKind, Scenario},
};

use super::{
    page::Page,
    plot::{Axis, BLUE, ORANGE, Series, VERMILION, lines},
    pool,
    table::{Table, percent},
};

const QUANTA: [u64; 5] = [2, 5, 10, 30, 60];
const ENGINES: [(HandoverEngine, &str); 3] = [
    (HandoverEngine::Demand, "on demand, by the driver"),
    (HandoverEngine::Prefetch, "plain prefetch"),
    (HandoverEngine::Protected, "write-protected prefetch"),
];
const SCENARIO: &str = "[gpu]\npreset = \"h100-pcie5\"\nmemory = \"78 GiB\"\n[[client]]\nname = \"job\"\ncount = 2\n\
    allocated = \"70 GiB\"\ngpu_work = \"600 s\"\nburst = \"300 ms\"\nsweep = \"300 ms\"\n";

/// GPU work of both jobs, in seconds.
const WORK: f64 = 1200.0;
/// A run is stopped after this many times the work: a quantum shorter than a hand-over never ends.
const HOPELESS: f64 = 10.0;

struct Outcome {
    useful: f64,
    hosted: Bytes,
    stopped: bool,
}

pub(super) fn section(page: &mut Page) -> Result<()> {
    let scenario = Scenario::parse("hand-over", SCENARIO)?;
    let tasks: Vec<(HandoverEngine, u64)> =
        ENGINES.iter().flat_map(|&(engine, _)| QUANTA.map(|quantum| (engine, quantum))).collect();
    let outcomes = pool::all("hand-over", &tasks, |&(engine, quantum)| {
        let policy = PolicyKind::Exclusive(Nanos::seconds(quantum));
        let options = Options { handover: Some(engine), ..Options::new(policy) };
        let mut hosted = Bytes::ZERO;
        let mut work = Nanos::ZERO;
        let watched = sim::watch(&scenario, &options, ModeOrder::Auto, &mut |bin| {
            hosted = hosted.max(bin.clients.iter().map(|client| client.hosted).sum());
            work = bin.clients.iter().map(|client| client.gpu_time).sum();
            if bin.at.as_secs_f64() >= WORK * HOPELESS {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let so_far = work.as_secs_f64() / watched.end.as_secs_f64();
        let useful = watched.report.useful_fraction;
        Outcome { useful: useful.unwrap_or(so_far), hosted, stopped: useful.is_none() }
    });
    page.heading("Hand-over");
    page.paragraph(
        "Share of the time in which the GPU does a job's work, for two jobs of 70 GiB and 600 s of work each on an H100 of \
        78 GiB that take turns with a fixed quantum. In brackets: host memory in use at most, which holds what was pushed out \
        before and is kept until its owner ends. The first push-out of each job, for which the host's pages are allocated, is part \
        of it. A star: stopped before the jobs had ended, after ten times their work.",
    );
    let heads: Vec<String> = std::iter::once("memory moves".to_owned())
        .chain(QUANTA.map(|quantum| format!("{quantum} s")))
        .collect();
    let mut table = Table::new(&heads.iter().map(String::as_str).collect::<Vec<_>>());
    let mut series = Vec::new();
    for ((&(_, name), color), row) in
        ENGINES.iter().zip([VERMILION, ORANGE, BLUE]).zip(outcomes.chunks(QUANTA.len()))
    {
        let mut cells = vec![name.to_owned()];
        cells.extend(row.iter().map(|outcome| {
            let star = if outcome.stopped { " *" } else { "" };
            format!(
                "{}{star} ({:.0} GiB)",
                percent(outcome.useful),
                outcome.hosted.0 as f64 / f64::from(1 << 30)
            )
        }));
        table.row(&cells);
        series.push(Series {
            name: name.to_owned(),
            color,
            points: QUANTA
                .iter()
                .zip(row)
                .map(|(&quantum, outcome)| (quantum as f64, outcome.useful))
                .collect(),
            dashed: false,
            mark: None,
        });
    }
    page.table(table);
    let x = Axis {
        label: "quantum".to_owned(),
        from: 2.0,
        to: 60.0,
        ticks: QUANTA.map(|quantum| quantum as f64).to_vec(),
        log: true,
        show: |seconds| format!("{seconds:.0} s"),
    };
    let y = Axis {
        label: "useful share of the time".to_owned(),
        from: 0.0,
        to: 1.0,
        ticks: (0..=5).map(|fifths| f64::from(fifths) / 5.0).collect(),
        log: false,
        show: |share| format!("{:.0} %", share * 100.0),
    };
    let svg = lines("What a quantum is worth", &x, &y, &series)?;
    page.picture(
        "hand-over",
        "Useful share of the time against the quantum for each way of moving memory",
        svg,
    );
    Ok(())
}
