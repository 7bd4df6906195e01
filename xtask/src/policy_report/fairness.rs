//! Shares, and how long somebody waits who needs little.

use std::ops::ControlFlow;

use anyhow::{Context as _, Result};
use nvshare_core::{
    Bytes, Nanos,
    input::ModeOrder,
    sim::{self, Bin, Options, PolicyKind, Scenario, Sensors, Watched},
};

use super::{
    arms::FORMS,
    bound::Bound,
    library::Library,
    page::Page,
    pool,
    regret::handover,
    table::{Table, milliseconds, percent, signed_percent},
};

const RATIO_LIMIT: f64 = 0.05;
/// The heavy job's weight, beside one of 1.
const WEIGHTS: [u32; 3] = [1, 3, 9];
/// The weighted jobs have so many times the work of their scenario, for dozens of rotations: until quanta have grown to what they
/// stay at, a single turn is a fifth of a shorter run.
const LONG: u64 = 6;
/// Of a hand-over, what an interactive client may wait besides a drain.
const WAIT_FACTOR: f64 = 1.2;
/// Equal jobs whose fairness is shown as well.
const EQUAL: [&str; 4] = ["thrash-two-h100", "thrash-three", "thrash-four-large", "thrash-eight"];

/// What clients had up to some moment, in seconds.
#[derive(Clone, Debug, Default, PartialEq)]
struct Had {
    /// GPU work.
    work: Vec<f64>,
    /// Turns, hand-overs of what came in included.
    turns: Vec<f64>,
}

/// What clients had in whole rotations while all of them had work: from the second to the last turn of the first client.
#[derive(Clone, Debug, Default)]
struct Rotations {
    so_far: Had,
    first_runs: bool,
    turns_of_first: usize,
    from: Had,
    to: Had,
    over: bool,
}

impl Rotations {
    fn take(&mut self, bin: &Bin, length: f64) {
        let running = bin.clients.iter().all(|client| client.alive);
        if self.over || !running {
            // Before all have started there is nothing to compare yet.
            self.over |= self.turns_of_first > 0;
            return;
        }
        self.so_far.turns.resize(bin.clients.len(), 0.0);
        self.so_far.work = bin.clients.iter().map(|client| client.gpu_time.as_secs_f64()).collect();
        let turns = bin.gpus.iter().any(|gpu| gpu.mode != nvshare_core::output::Mode::Shared);
        let first_runs = turns && bin.clients[0].on_gpu;
        if first_runs && !self.first_runs {
            self.turns_of_first += 1;
            if self.turns_of_first == 2 {
                self.from = self.so_far.clone();
            }
            self.to = self.so_far.clone();
        }
        self.first_runs = first_runs;
        for (turns, client) in self.so_far.turns.iter_mut().zip(&bin.clients) {
            *turns += f64::from(client.on_gpu) * length;
        }
    }

    /// What each had between the two moments.
    fn shares(&self, of: impl Fn(&Had) -> &[f64]) -> Vec<f64> {
        of(&self.to).iter().zip(of(&self.from)).map(|(to, from)| to - from).collect()
    }
}

/// How far the ratio of the second to the first is from that of their weights.
fn ratio_error(shares: &[f64], weight: u32) -> f64 {
    match shares {
        [light, heavy] => heavy / light / f64::from(weight) - 1.0,
        _ => f64::NAN,
    }
}

fn observe(scenario: &Scenario, sensors: Sensors) -> (Rotations, Watched) {
    let options = Options { sensors, ..Options::new(PolicyKind::Auto) };
    let mut rotations = Rotations::default();
    let mut before = Nanos::ZERO;
    let watched = sim::watch(scenario, &options, ModeOrder::Auto, &mut |bin| {
        rotations.take(bin, bin.at.since(before).as_secs_f64());
        before = bin.at;
        ControlFlow::Continue(())
    });
    (rotations, watched)
}

/// The value that so many thousandths of all do not exceed; zeros may be left out of the values.
fn percentile(values: &[f64], count: usize, milli: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (count * milli).div_ceil(1000).max(1);
    let zeros = count.saturating_sub(sorted.len());
    rank.checked_sub(zeros + 1).and_then(|index| sorted.get(index)).copied().unwrap_or(0.0)
}

pub(super) fn section(page: &mut Page, library: &Library) -> Result<()> {
    page.heading("Fairness");
    weights(page, library)?;
    equal(page, library)?;
    interactive(page, library)
}

fn weights(page: &mut Page, library: &Library) -> Result<()> {
    let base = &library.named("weights-1-3")?.scenario;
    let mut tasks = Vec::new();
    for weight in WEIGHTS {
        let mut short = base.clone();
        let heavy = short.clients.get_mut(1).context("weights-1-3 has two clients")?;
        heavy.weight_milli = 1000 * weight;
        let mut long = short.clone();
        for client in &mut long.clients {
            client.gpu_work = Nanos(client.gpu_work.0 * LONG);
        }
        tasks.extend(FORMS.map(|(form, sensors)| (weight, form, sensors, short.clone(), long.clone())));
    }
    let results = pool::all("weights", &tasks, |(_, _, sensors, short, long)| {
        [short, long].map(|scenario| observe(scenario, *sensors).0)
    });
    page.paragraph(
        "Two jobs of 60 GiB and an hour of work each on an H100, the heavy one with this many times the weight (`weights-1-3` with \
        other weights and six times the work), over whole rotations while both have work. Turns are what is to follow the weights: \
        a turn is GPU time and the hand-over that brought its client in. Jain's index is that of turns ÷ weight. With ten minutes \
        of work the error is larger: quanta still grow, and there are three rotations or four.",
    );
    let mut table = Table::new(&[
        "weights",
        "sensors",
        "turns, heavy ÷ light",
        "error",
        "with ten minutes",
        "GPU work, heavy ÷ light",
        "Jain",
    ]);
    for ((weight, form, ..), [short, long]) in tasks.iter().zip(&results) {
        let (turns, work) = (long.shares(|had| &had.turns), long.shares(|had| &had.work));
        let ratio = |shares: &[f64]| (ratio_error(shares, *weight) + 1.0) * f64::from(*weight);
        let error = ratio_error(&turns, *weight);
        let weighted: Vec<f64> =
            turns.iter().zip([1, *weight]).map(|(share, weight)| share / f64::from(weight)).collect();
        table.row(&[
            format!("1:{weight}"),
            (*form).to_owned(),
            format!("{:.2}", ratio(&turns)),
            signed_percent(error),
            signed_percent(ratio_error(&short.shares(|had| &had.turns), *weight)),
            format!("{:.2}", ratio(&work)),
            sim::jain(&weighted).map_or_else(String::new, |jain| format!("{jain:.4}")),
        ]);
        let key = format!("weights ({form}): 1:{weight}");
        page.bounds.push(Bound::at_most(
            key,
            "error of the ratio of turns",
            error.abs(),
            RATIO_LIMIT,
            percent,
        ));
    }
    page.table(table);
    Ok(())
}

fn equal(page: &mut Page, library: &Library) -> Result<()> {
    let entries = EQUAL.iter().map(|name| library.named(name)).collect::<Result<Vec<_>>>()?;
    let results = pool::all("equal jobs", &entries, |entry| observe(&entry.scenario, Sensors::Blocks).0);
    page.paragraph(
        "Jain's index of GPU work between jobs of equal weight, over whole rotations while all have work:",
    );
    let mut table = Table::new(&["scenario", "jobs", "Jain"]);
    for (entry, rotations) in entries.iter().zip(&results) {
        let work = rotations.shares(|had| &had.work);
        table.row(&[
            format!("`{}`", entry.name),
            entry.scenario.clients.len().to_string(),
            sim::jain(&work).map_or_else(String::new, |jain| format!("{jain:.4}")),
        ]);
    }
    page.table(table);
    Ok(())
}

fn interactive(page: &mut Page, library: &Library) -> Result<()> {
    let base = &library.named("interactive")?.scenario;
    let guest = base.clients.iter().position(|client| client.name == "notebook").context("no notebook")?;
    let mut tasks = Vec::new();
    for memory in [Bytes::gib(4), Bytes::gib(20)] {
        let mut scenario = base.clone();
        let client = &mut scenario.clients[guest];
        client.allocated = memory;
        for phase in &mut client.phases {
            phase.working_set = memory;
        }
        tasks.extend(FORMS.map(|(form, sensors)| (memory, form, sensors, scenario.clone())));
    }
    let results = pool::all("interactive", &tasks, |(_, _, sensors, scenario)| observe(scenario, *sensors).1);
    page.paragraph(&format!(
        "An interactive client (50 ms of work every 2 s) beside two batch jobs of 70 GiB on an H100 of 78 GiB. With 4 GiB it fits \
        beside either of them, with 20 GiB beside none. Wait: from a burst's first submission to an open gate. Response: to the \
        burst's end; a burst takes 50 ms alone, and 100 ms beside a job that shares the GPU's time. The wait may be {WAIT_FACTOR} \
        times a hand-over and what is in flight."
    ));
    let mut table = Table::new(&[
        "memory",
        "sensors",
        "bursts",
        "wait, p50",
        "wait, p99",
        "allowed",
        "response, p50",
        "response, p99",
        "worst",
    ]);
    for ((memory, form, _, scenario), watched) in tasks.iter().zip(&results) {
        let times = |all: &[Nanos]| -> Vec<f64> { all.iter().map(|time| time.as_secs_f64()).collect() };
        let (waits, responses) = (times(&watched.waits[guest]), times(&watched.responses[guest]));
        let count = responses.len();
        let in_flight = scenario.gpus.iter().map(|gpu| gpu.in_flight).max().unwrap_or_default().as_secs_f64();
        // `handover` counts what is in flight once itself.
        let allowed = WAIT_FACTOR * (handover(scenario) - in_flight) + in_flight;
        let wait = percentile(&waits, count, 990);
        let gib = memory.0 >> 30;
        table.row(&[
            format!("{gib} GiB"),
            (*form).to_owned(),
            count.to_string(),
            milliseconds(percentile(&waits, count, 500)),
            milliseconds(wait),
            milliseconds(allowed),
            milliseconds(percentile(&responses, count, 500)),
            milliseconds(percentile(&responses, count, 990)),
            milliseconds(percentile(&responses, count, 1000)),
        ]);
        let key = format!("interactive wait ({form}): {gib} GiB");
        page.bounds.push(Bound::at_most(key, "p99", wait, allowed, milliseconds));
    }
    page.table(table);
    Ok(())
}

#[cfg(test)]
mod tests {
    use nvshare_core::{
        output::Mode,
        sim::{ClientBin, GpuBin},
    };

    use super::*;

    #[test]
    fn percentiles_count_bursts_that_did_not_wait() {
        let waits = [3.0, 1.0, 2.0];
        assert!((percentile(&waits, 3, 500) - 2.0).abs() < 1e-9);
        assert!((percentile(&waits, 3, 990) - 3.0).abs() < 1e-9);
        assert!(percentile(&waits, 100, 970).abs() < 1e-9, "97 of 100 did not wait");
        assert!((percentile(&waits, 100, 980) - 1.0).abs() < 1e-9);
        assert!((percentile(&waits, 100, 1000) - 3.0).abs() < 1e-9);
        assert!(percentile(&[], 0, 990).abs() < 1e-9);
    }

    #[test]
    fn a_ratio_is_off_in_proportion_to_the_weights() {
        assert!((ratio_error(&[10.0, 33.0], 3) - 0.1).abs() < 1e-9);
        assert!(ratio_error(&[10.0], 3).is_nan());
    }

    #[test]
    fn whole_rotations_are_compared_and_nothing_before_or_after() {
        let mut rotations = Rotations::default();
        let mut at = 0;
        // First: sharing; then turns of 1 and 3 bins; at the end the first client has gone.
        let mut bin = |mode: Mode, on_gpu: [bool; 2], alive: bool| {
            at += 1;
            let client = |on_gpu| ClientBin {
                alive,
                on_gpu,
                gpu_time: Nanos::ZERO,
                stalled: Nanos::ZERO,
                hosted: Bytes::ZERO,
            };
            let gpu = GpuBin {
                mode,
                score_milli: None,
                stall_milli: None,
                faulted: Bytes::ZERO,
                curable: Bytes::ZERO,
                onset: None,
            };
            rotations.take(
                &Bin { at: Nanos::millis(100 * at), gpus: vec![gpu], clients: on_gpu.map(client).to_vec() },
                0.1,
            );
        };
        for _ in 0..50 {
            bin(Mode::Shared, [true, true], true);
        }
        for _ in 0..5 {
            bin(Mode::Exclusive, [true, false], true);
            for _ in 0..3 {
                bin(Mode::Exclusive, [false, true], true);
            }
        }
        for _ in 0..50 {
            bin(Mode::Exclusive, [false, true], false);
        }
        let turns = rotations.shares(|had| &had.turns);
        assert!((turns[0] - 0.3).abs() < 1e-9 && (turns[1] - 0.9).abs() < 1e-9, "{turns:?}");
        assert!(ratio_error(&turns, 3).abs() < 1e-9);
    }
}
