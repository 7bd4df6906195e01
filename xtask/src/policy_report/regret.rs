//! Auto against the oracle and the other policies, over the library.

use std::fmt::Write as _;

use nvshare_core::{
    Bytes,
    sim::{self, Scenario, Sensors},
};

use super::{
    arms::{FORMS, HOPELESS, Makespan, Rival, Runs, makespan},
    bound::{Bound, Lost},
    library::Library,
    page::Page,
    table::{Table, percent, seconds, signed_percent},
};
use crate::gpu_bench::stats::median;

/// Auto lost to a policy that is faster by more than this share of its makespan.
const LOST: f64 = 0.005;
/// What the median and the worst regret may be.
const MEDIAN_LIMIT: f64 = 0.05;
const WORST_LIMIT: f64 = 0.15;

/// What handing a GPU from one client to another takes where the shim moves memory: the two largest working sets, less
/// what fits, at the rate of both directions at once, after what is in flight.
pub(super) fn handover(scenario: &Scenario) -> f64 {
    let on_gpu = |(gpu, model): (usize, &sim::GpuModel)| {
        let here = || scenario.clients.iter().filter(|client| client.gpus.contains(&gpu));
        let plain: Bytes = here().filter(|client| !client.shim).map(|client| client.allocated).sum();
        let mut sets: Vec<Bytes> = here()
            .filter(|client| client.shim)
            .map(|client| client.phases.iter().map(|phase| phase.working_set).max().unwrap_or_default())
            .collect();
        sets.sort_unstable_by(|a, b| b.cmp(a));
        let two: Bytes = sets.iter().take(2).copied().sum();
        let rate = model.protected_out.min(model.prefetch_in).per_mille(model.duplex_milli.into());
        let moved = two - (model.memory - plain);
        moved.0 as f64 / rate.0.max(1) as f64 + model.in_flight.as_secs_f64()
    };
    scenario.gpus.iter().enumerate().map(on_gpu).fold(0.0, f64::max)
}

/// By how much auto may be slower than `other`: 3 %, or three hand-overs and a second.
fn allowance(other: f64, handover: f64) -> f64 {
    (0.03 * other).max(3.0 * handover + 1.0)
}

/// Auto's loss to a policy that is faster, as a share of the other's makespan.
fn loss(auto: f64, other: Makespan) -> Option<f64> {
    match other {
        Makespan::Took(time) if auto > time * (1.0 + LOST) => Some(auto / time - 1.0),
        _ => None,
    }
}

pub(super) fn section(page: &mut Page, library: &Library, runs: &[Runs]) {
    page.heading("Regret");
    page.paragraph(&format!(
        "Makespan in seconds of every scenario of `tests/scenarios`, and auto's distance from the oracle, which knows working \
        sets, phases and arrivals, decides without delay and pays for its hand-overs. `counters` is auto without sight of \
        blocks. `> N`: sharing was stopped after {HOPELESS:.0} times the makespan of `exclusive:30`, which is stock nvshare; \
        `allocation-sum` is XPUShare's rule."
    ));
    let mut table = Table::new(&[
        "scenario",
        "class",
        "oracle",
        "auto",
        "regret",
        "counters",
        "regret",
        "shared",
        "exclusive:30",
        "allocation-sum",
        "nixie",
    ]);
    for (entry, runs) in library.entries.iter().zip(runs) {
        let oracle = runs.oracle.makespan.at_least();
        let auto = |sensors| makespan(runs.auto(sensors));
        let regret = |sensors| signed_percent(auto(sensors).at_least() / oracle - 1.0);
        table.row(&[
            format!("`{}`", entry.name),
            entry.class.to_string(),
            runs.oracle.makespan.shown(),
            auto(Sensors::Blocks).shown(),
            regret(Sensors::Blocks),
            auto(Sensors::Counters).shown(),
            regret(Sensors::Counters),
            runs.shared.makespan.shown(),
            runs.stock.makespan.shown(),
            runs.sum.makespan.shown(),
            runs.nixie.makespan.shown(),
        ]);
    }
    page.table(table);
    summary(page, runs);
    promises(page, library, runs);
    lost(page, library, runs);
}

/// What another policy's makespan is in a scenario.
type Other<'a> = &'a dyn Fn(&Runs) -> f64;

fn summary(page: &mut Page, runs: &[Runs]) {
    let mut summary =
        Table::new(&["against", "auto, median", "auto, worst", "counters, median", "counters, worst"]);
    let compare = |sensors: Sensors, other: Other<'_>| -> Vec<f64> {
        runs.iter().map(|runs| makespan(runs.auto(sensors)).at_least() / other(runs) - 1.0).collect()
    };
    let rivals: [(&str, Other<'_>); 6] = [
        ("oracle", &|runs| runs.oracle.makespan.at_least()),
        ("better of shared and exclusive:30", &Runs::better),
        ("shared", &|runs| runs.shared.makespan.at_least()),
        ("exclusive:30", &|runs| runs.stock.makespan.at_least()),
        ("allocation-sum", &|runs| runs.sum.makespan.at_least()),
        ("nixie", &|runs| runs.nixie.makespan.at_least()),
    ];
    for (name, other) in rivals {
        let mut cells = vec![name.to_owned()];
        for (form, sensors) in FORMS {
            let values = compare(sensors, other);
            let worst = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            cells.extend([signed_percent(median(&values)), signed_percent(worst)]);
            if name == "oracle" {
                let key = format!("regret, median ({form})");
                page.bounds.push(Bound::at_most(
                    key,
                    "median distance from the oracle",
                    median(&values),
                    MEDIAN_LIMIT,
                    percent,
                ));
            } else if ["allocation-sum", "nixie"].contains(&name) {
                let key = format!("better than {name} ({form})");
                page.bounds.push(Bound::at_most(
                    key,
                    "median difference",
                    median(&values),
                    0.0,
                    signed_percent,
                ));
            }
        }
        summary.row(&cells);
    }
    page.paragraph("Auto's makespan less the other's, as a share of the other's (below zero: auto is faster; where the other was stopped, at least):");
    page.table(summary);
}

fn promises(page: &mut Page, library: &Library, runs: &[Runs]) {
    page.paragraph(&format!(
        "Two promises are kept for each scenario: auto is not slower than the better of `shared` and `exclusive:30` by more \
        than the allowance, which is the larger of 3 % and three hand-overs and a second; and not slower than the oracle by \
        more than {:.0} % or that allowance. A hand-over is what the two largest working sets lack, at the rate of \
        both directions at once.",
        WORST_LIMIT * 100.0
    ));
    for (form, sensors) in FORMS {
        for (entry, runs) in library.entries.iter().zip(runs) {
            let auto = makespan(runs.auto(sensors)).at_least();
            let handover = handover(&entry.scenario);
            let (better, oracle) = (runs.better(), runs.oracle.makespan.at_least());
            let limit = better + allowance(better, handover);
            let key = format!("allowance ({form}): {}", entry.name);
            page.bounds.push(Bound::at_most(key, "makespan", auto, limit, seconds));
            let limit = oracle + (WORST_LIMIT * oracle).max(allowance(oracle, handover));
            let key = format!("regret, worst ({form}): {}", entry.name);
            page.bounds.push(Bound::at_most(key, "makespan", auto, limit, seconds));
        }
    }
}

fn lost(page: &mut Page, library: &Library, runs: &[Runs]) {
    page.paragraph(&format!(
        "### Comparisons lost\n\nEvery policy but the oracle that is faster than auto by more than {}: auto's loss with either form of \
        the test, the longest time that anybody's work waited under the faster policy and under auto, and the number of the reason. \
        A makespan says nothing of who waits: whoever runs one job after the other has no hand-overs at all.",
        percent(LOST)
    ));
    let mut table = Table::new(&[
        "scenario",
        "faster",
        "loss (blocks)",
        "loss (counters)",
        "longest wait there",
        "under auto",
        "reason",
    ]);
    let mut all = 0;
    for (entry, runs) in library.entries.iter().zip(runs) {
        for (policy, rival) in runs.others() {
            let of = |sensors| loss(makespan(runs.auto(sensors)).at_least(), rival.makespan);
            let (blocks, counters) = (of(Sensors::Blocks), of(Sensors::Counters));
            if blocks.is_none() && counters.is_none() {
                continue;
            }
            all += 1;
            let lost = Lost { scenario: entry.name.clone(), policy: policy.to_owned() };
            let reasons: Vec<String> = library.known.reasons(&lost).iter().map(ToString::to_string).collect();
            let shown = |loss: Option<f64>| loss.map_or_else(|| "–".to_owned(), percent);
            table.row(&[
                format!("`{}`", entry.name),
                policy.to_owned(),
                shown(blocks),
                shown(counters),
                seconds(rival.longest_wait),
                seconds(Rival::of(&runs.blocks).longest_wait),
                if reasons.is_empty() { "**none**".to_owned() } else { reasons.join(", ") },
            ]);
            page.lost.push(lost);
        }
    }
    if all == 0 {
        return page.paragraph("None.");
    }
    page.table(table);
    let mut list = String::new();
    for (number, known) in (1..).zip(&library.known.loss) {
        let _infallible = writeln!(list, "{number}. {}", known.why);
    }
    page.paragraph(list.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allowance_is_the_larger_of_3_percent_and_three_handovers_and_a_second() {
        assert!((allowance(1000.0, 1.0) - 30.0).abs() < 1e-9);
        assert!((allowance(100.0, 1.5) - 5.5).abs() < 1e-9);
    }

    #[test]
    fn a_faster_policy_is_a_loss_and_a_stopped_or_equal_one_is_none() {
        assert!((loss(110.0, Makespan::Took(100.0)).unwrap() - 0.1).abs() < 1e-9);
        for other in [Makespan::Beyond(50.0), Makespan::Took(109.8), Makespan::Took(200.0)] {
            assert_eq!(loss(110.0, other), None, "{other:?}");
        }
        assert_eq!(Makespan::Beyond(50.4).shown(), "> 50");
    }

    #[test]
    fn a_handover_moves_what_two_working_sets_lack_and_nothing_where_they_fit() {
        let scenario = |size: &str| {
            let text = format!(
                "[gpu]\npreset = \"h100-pcie5\"\nmemory = \"78 GiB\"\n[[client]]\nname = \"a\"\ncount = 3\n\
                allocated = \"{size}\"\ngpu_work = \"1 s\"\nburst = \"1 s\"\n"
            );
            Scenario::parse("test", &text).unwrap()
        };
        let in_flight = 0.01;
        assert!((handover(&scenario("39 GiB")) - in_flight).abs() < 1e-9);
        let expected = 62.0 * f64::from(1 << 30) / (48e9 * 0.88) + in_flight;
        assert!((handover(&scenario("70 GiB")) - expected).abs() < 1e-6, "{}", handover(&scenario("70 GiB")));
    }
}
