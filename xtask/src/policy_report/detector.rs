//! How soon thrash is seen, and what is taken for it.

use anyhow::Result;
use nvshare_core::{
    Nanos,
    sim::{Options, PolicyKind, Scenario, Sensors},
};

use super::{
    arms::{FORMS, Runs, makespan, run_to},
    bound::Bound,
    library::{Class, Entry, Library},
    page::Page,
    plot::{Axis, BLUE, ORANGE, Series, lines},
    pool,
    roc::{Gate, Point, Trace, area, curve},
    table::{Table, milliseconds, percent},
};
use crate::gpu_bench::stats::median;

/// What detection may take, in seconds.
const MEDIAN_LIMIT: f64 = 0.5;
const WORST_LIMIT: f64 = 1.0;
/// Benign scenarios run, varied by seed, until so much time is simulated.
const BENIGN: f64 = 24.0 * 3600.0;
const PROVISIONAL_LIMIT: f64 = 2.0;
/// Switches in any hour of an adversarial scenario.
const SWITCHES_LIMIT: usize = 4;
const HOUR: f64 = 3600.0;
/// Seeds of each scenario in the curves.
const SEEDS: u64 = 3;
/// Thresholds of which delay and alarms are shown.
const SHOWN: [u32; 5] = [250, 500, 1000, 1500, 2000];
/// Thresholds of the curves, in thousandths of the detector's own; evidence ends at twice that.
const STEP: usize = 25;
const HIGHEST: u32 = 2000;
const OWN: u32 = 1000;

pub(super) fn section(page: &mut Page, library: &Library, runs: &[Runs]) -> Result<()> {
    page.heading("Detector");
    delays(page, library, runs);
    let benign: Vec<(&Entry, &Runs)> =
        library.entries.iter().zip(runs).filter(|(entry, _)| entry.class == Class::Benign).collect();
    quiet(page, &benign);
    swings(page, library, runs);
    curves(page, library, runs)
}

fn delays(page: &mut Page, library: &Library, runs: &[Runs]) {
    page.paragraph(
        "From the onset (the first round trip: a block that was evicted comes back, and would not have left if clients took \
        turns) to the first switch away from sharing, for each scenario in which clients thrash. The sensors are read every 100 ms.",
    );
    let mut table = Table::new(&["scenario", "blocks", "counters"]);
    let mut all: [Vec<f64>; 2] = Default::default();
    for (entry, runs) in library.entries.iter().zip(runs).filter(|(entry, _)| entry.class == Class::Thrash) {
        let mut cells = vec![format!("`{}`", entry.name)];
        for ((form, sensors), all) in FORMS.iter().zip(&mut all) {
            let delay = runs.auto(*sensors).report.detection_delay_s;
            all.push(delay.unwrap_or(f64::INFINITY));
            cells.push(milliseconds(delay.unwrap_or(f64::INFINITY)));
            let key = format!("delay, worst ({form}): {}", entry.name);
            let found = delay.unwrap_or(f64::INFINITY);
            page.bounds.push(Bound::at_most(key, "from onset to turns", found, WORST_LIMIT, milliseconds));
        }
        table.row(&cells);
    }
    for (name, of) in [("**median**", median as fn(&[f64]) -> f64), ("**worst**", worst)] {
        table.row(&[name.to_owned(), milliseconds(of(&all[0])), milliseconds(of(&all[1]))]);
    }
    page.table(table);
    for ((form, _), all) in FORMS.iter().zip(&all) {
        let key = format!("delay, median ({form})");
        page.bounds.push(Bound::at_most(key, "from onset to turns", median(all), MEDIAN_LIMIT, milliseconds));
    }
}

fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// What benign runs came to.
#[derive(Clone, Copy, Debug, Default)]
struct Quiet {
    hours: f64,
    provisional: usize,
    confirmed: usize,
    /// Of those, what the oracle would not have decided.
    mistaken: usize,
}

fn quiet(page: &mut Page, benign: &[(&Entry, &Runs)]) {
    let one_pass: f64 = benign.iter().map(|(_, runs)| makespan(&runs.blocks).at_least()).sum();
    let passes = (BENIGN / one_pass.max(1.0)).ceil() as u64;
    let mut tasks = Vec::new();
    for (entry, _) in benign {
        for (_, sensors) in FORMS {
            tasks.extend((1..=passes).map(|seed| (*entry, sensors, seed)));
        }
    }
    let results = pool::all("benign", &tasks, |(entry, sensors, seed)| {
        let options = Options { sensors: *sensors, seed: *seed, ..Options::new(PolicyKind::Auto) };
        let watched = run_to(&entry.scenario.varied(*seed), &options, None);
        Quiet {
            hours: watched.end.as_secs_f64() / HOUR,
            provisional: watched.provisional.len(),
            confirmed: watched.confirmed.len(),
            mistaken: watched.report.false_detections as usize,
        }
    });
    page.paragraph(&format!(
        "### Quiet where nothing is wrong\n\nEvery benign scenario {passes} times, with other seeds, starts (up to 10 s later), \
        bursts and sweeps (up to 10 % longer or shorter). A provisional switch is a trial that ends by itself; a confirmed one is a \
        decision for turns; it is false (in brackets) if the oracle would not have made it, for a variation of a scenario that only just \
        fits may not."
    ));
    let mut table = Table::new(&[
        "scenario",
        "hours",
        "provisional (blocks)",
        "confirmed (blocks)",
        "provisional (counters)",
        "confirmed (counters)",
    ]);
    let mut sums = [Quiet::default(); 2];
    for (entry, _) in benign {
        let mut cells = vec![format!("`{}`", entry.name)];
        for ((_, sensors), sum) in FORMS.iter().zip(&mut sums) {
            let here = tasks.iter().zip(&results);
            let here = here.filter(|((other, form, _), _)| other.name == entry.name && form == sensors);
            let of_scenario = total(here.map(|(_, quiet)| *quiet));
            *sum = total([*sum, of_scenario].into_iter());
            if cells.len() == 1 {
                cells.push(format!("{:.2}", of_scenario.hours));
            }
            cells.extend([
                of_scenario.provisional.to_string(),
                format!("{} ({})", of_scenario.confirmed, of_scenario.mistaken),
            ]);
        }
        table.row(&cells);
    }
    let per_hour = |count: usize, quiet: &Quiet| format!("{:.2} an hour", count as f64 / quiet.hours);
    let mut cells = vec!["**all**".to_owned(), format!("{:.2}", sums[0].hours)];
    for sum in &sums {
        cells.extend([per_hour(sum.provisional, sum), format!("{} ({})", sum.confirmed, sum.mistaken)]);
    }
    table.row(&cells);
    page.table(table);
    for ((form, _), sum) in FORMS.iter().zip(&sums) {
        let hours = format!("in {:.1} simulated hours", sum.hours);
        page.bounds.push(Bound::new(
            format!("false switches, confirmed ({form})"),
            format!("none {hours}"),
            sum.mistaken.to_string(),
            sum.mistaken == 0 && sum.hours * HOUR >= BENIGN,
        ));
        let rate = sum.provisional as f64 / sum.hours;
        let key = format!("false switches, provisional ({form})");
        page.bounds
            .push(Bound::at_most(key, "an hour", rate, PROVISIONAL_LIMIT, |rate| format!("{rate:.2}")));
    }
}

fn total(all: impl Iterator<Item = Quiet>) -> Quiet {
    all.fold(Quiet::default(), |sum, one| Quiet {
        hours: sum.hours + one.hours,
        provisional: sum.provisional + one.provisional,
        confirmed: sum.confirmed + one.confirmed,
        mistaken: sum.mistaken + one.mistaken,
    })
}

/// The same for at least an hour: jobs that do one thing throughout get more of it.
fn lengthened(scenario: &Scenario, makespan: f64) -> Scenario {
    let mut scenario = scenario.clone();
    let steady = scenario.clients.iter().all(|client| client.phases.len() == 1);
    let factor = (HOUR / makespan).ceil() as u64;
    if steady && factor > 1 {
        for client in &mut scenario.clients {
            client.gpu_work = Nanos(client.gpu_work.0 * factor);
        }
    }
    scenario
}

/// The most events in any hour.
fn most_in_an_hour(times: &[f64]) -> usize {
    let within = |&from: &f64| times.iter().filter(|&&at| at >= from && at < from + HOUR).count();
    times.iter().map(within).max().unwrap_or(0)
}

fn swings(page: &mut Page, library: &Library, runs: &[Runs]) {
    let mut tasks = Vec::new();
    for (entry, runs) in
        library.entries.iter().zip(runs).filter(|(entry, _)| entry.class == Class::Adversarial)
    {
        let scenario = lengthened(&entry.scenario, makespan(&runs.blocks).at_least());
        tasks.extend(FORMS.map(|(form, sensors)| (entry, form, sensors, scenario.clone())));
    }
    let results = pool::all("adversarial", &tasks, |(_, _, sensors, scenario)| {
        run_to(scenario, &Options { sensors: *sensors, ..Options::new(PolicyKind::Auto) }, None)
    });
    page.paragraph(
        "### Calm where demand swings\n\nSwitches of mode in the worst hour of each adversarial scenario. Jobs without phases are \
        made so long that the run lasts an hour.",
    );
    let mut table = Table::new(&["scenario", "minutes", "blocks", "counters"]);
    for (tasks, results) in tasks.chunks(FORMS.len()).zip(results.chunks(FORMS.len())) {
        let Some(((entry, ..), first)) = tasks.first().zip(results.first()) else { continue };
        let mut cells = vec![format!("`{}`", entry.name), format!("{:.0}", first.end.as_secs_f64() / 60.0)];
        for ((_, form, ..), watched) in tasks.iter().zip(results) {
            let times: Vec<f64> = watched.report.mode_switches.iter().map(|switch| switch.t_s).collect();
            let most = most_in_an_hour(&times);
            cells.push(most.to_string());
            page.bounds.push(Bound::new(
                format!("switches ({form}): {}", entry.name),
                format!("at most {SWITCHES_LIMIT} in an hour"),
                most.to_string(),
                most <= SWITCHES_LIMIT,
            ));
        }
        table.row(&cells);
    }
    page.table(table);
}

/// Sharing must take this many times as long as the oracle for a mixed scenario to count as thrash in the curves.
const WORTH_SEEING: f64 = 1.1;

fn curves(page: &mut Page, library: &Library, runs: &[Runs]) -> Result<()> {
    let mut tasks: Vec<(&Entry, Sensors, u64, bool)> = Vec::new();
    let mut counts = [0, 0];
    for (entry, runs) in library.entries.iter().zip(runs) {
        let costly = runs.shared.makespan.at_least() > WORTH_SEEING * runs.oracle.makespan.at_least();
        let thrash = match entry.class {
            Class::Thrash => true,
            Class::Benign => false,
            Class::Mixed if costly => true,
            Class::Mixed | Class::Adversarial => continue,
        };
        counts[usize::from(thrash)] += 1;
        for (_, sensors) in FORMS {
            tasks.extend((1..=SEEDS).map(|seed| (entry, sensors, seed, thrash)));
        }
    }
    let traces = pool::all("curves", &tasks, |(entry, sensors, seed, thrash)| {
        Trace::record(&entry.scenario.varied(*seed), *sensors, *seed, *thrash)
    });
    let of = |thrash: bool, sensors: Sensors| -> Vec<Trace> {
        let here =
            tasks.iter().zip(&traces).filter(|((_, form, _, is), _)| *is == thrash && *form == sensors);
        here.map(|(_, trace)| trace.clone()).collect()
    };
    let thresholds: Vec<u32> = (0..=HIGHEST).step_by(STEP).skip(1).collect();
    page.paragraph(&format!(
        "### Evidence alone\n\nThe detector's evidence while everybody shares, whatever it says, against a threshold that is swept from \
        {STEP} to {HIGHEST} thousandths of its own: in {SEEDS} variations each of {} scenarios with thrash (those of that class, and \
        mixed ones in which sharing takes more than {WORTH_SEEING} times as long as the oracle) and of the {} benign ones. Detected: \
        evidence reaches the threshold within a second of the onset. Fooled: it does so at any time of a benign run. The second \
        curve of each form counts evidence only while paging holds the GPU up, as the detector does. The engine asks for \
        more than that: at least two jobs with demand and more memory than fits, and turns must be worth their cost; then it tries \
        turns before it confirms them. So fooled evidence is no false switch; those are counted above.",
        counts[1], counts[0]
    ));
    let mut table = Table::new(&[
        "evidence",
        "area",
        "detected",
        "fooled",
        "alarms in a benign hour",
        "least fooled with all detected",
    ]);
    let mut steps = Table::new(&[
        "threshold, thousandths",
        "sensors",
        "delay, median",
        "delay, worst",
        "alarms in a benign hour",
    ]);
    let mut series = Vec::new();
    for (form, sensors) in FORMS {
        let (thrash, benign) = (of(true, sensors), of(false, sensors));
        for (gate, word) in [(Gate::None, "evidence alone"), (Gate::Stall, "while held up")] {
            let points = curve(&thrash, &benign, &thresholds, gate);
            let Some(own) = points.iter().find(|point| point.threshold == OWN) else { continue };
            let most = points.iter().map(|point| point.detected).fold(0.0, f64::max);
            let best = points
                .iter()
                .filter(|point| point.detected >= most)
                .map(|point| point.fooled)
                .fold(1.0, f64::min);
            table.row(&[
                format!("{form}, {word}"),
                format!("{:.3}", area(&points)),
                percent(own.detected),
                percent(own.fooled),
                format!("{:.2}", own.alarms_per_hour),
                format!("{} ({} detected)", percent(best), percent(most)),
            ]);
            for point in points.iter().filter(|point| gate == Gate::Stall && SHOWN.contains(&point.threshold))
            {
                steps.row(&[
                    point.threshold.to_string(),
                    form.to_owned(),
                    milliseconds(point.delay_median),
                    milliseconds(point.delay_worst),
                    format!("{:.2}", point.alarms_per_hour),
                ]);
            }
            series.push(Series {
                name: format!("{form}, {word}"),
                color: if sensors == Sensors::Blocks { BLUE } else { ORANGE },
                points: line(&points),
                dashed: gate == Gate::None,
                mark: (gate == Gate::Stall).then(|| ((own.fooled, own.detected), "own threshold".to_owned())),
            });
        }
    }
    page.table(table);
    page.paragraph(
        "What a higher threshold buys and costs, counting evidence while paging holds the GPU up:",
    );
    page.table(steps);
    draw(page, &series)
}

fn draw(page: &mut Page, series: &[Series]) -> Result<()> {
    let share = |label: &str| Axis {
        label: label.to_owned(),
        from: 0.0,
        to: 1.0,
        ticks: (0..=5).map(|fifths| f64::from(fifths) / 5.0).collect(),
        log: false,
        show: |share| format!("{:.0} %", share * 100.0),
    };
    let svg = lines(
        "Evidence against the threshold (receiver operating characteristic)",
        &share("benign runs in which evidence reaches the threshold"),
        &share("thrash seen within 1 s"),
        series,
    )?;
    page.picture(
        "roc",
        "Share of thrash seen in time against share of benign runs that fool the evidence, for both forms",
        svg,
    );
    Ok(())
}

/// The curve from the corner where nothing is seen to the one where everything is.
fn line(points: &[Point]) -> Vec<(f64, f64)> {
    let mut corners = vec![(0.0, 0.0)];
    corners.extend(points.iter().rev().map(|point| (point.fooled, point.detected)));
    corners.push((1.0, 1.0));
    corners.dedup();
    corners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_hour_is_found_wherever_it_begins() {
        assert_eq!(most_in_an_hour(&[]), 0);
        assert_eq!(most_in_an_hour(&[0.0, 3599.0, 3600.0, 5000.0, 7198.0]), 4);
        assert_eq!(most_in_an_hour(&[0.0, 3600.0, 7200.0]), 1);
    }

    #[test]
    fn steady_jobs_are_made_longer_and_jobs_with_phases_are_left_alone() {
        let text = "[[client]]\nname = \"a\"\nallocated = \"2 GiB\"\ngpu_work = \"300 s\"\nburst = \"1 s\"\n";
        let steady = Scenario::parse("test", text).unwrap();
        assert_eq!(lengthened(&steady, 1000.0).clients[0].gpu_work, Nanos::seconds(1200));
        assert_eq!(lengthened(&steady, 4000.0), steady);
        let phases = format!("{text}[[client.phase]]\nafter = \"1 s\"\nworking_set = \"1 GiB\"\n");
        let phases = Scenario::parse("test", &phases).unwrap();
        assert_eq!(lengthened(&phases, 1000.0), phases);
    }
}
