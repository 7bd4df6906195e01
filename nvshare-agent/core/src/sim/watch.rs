//! Looking on: what a run is like from bin to bin, for who wants more of it than its end.

use std::ops::ControlFlow;

use crate::{
    input::{Input, ModeOrder, Order},
    output::Mode,
    sim::{
        fault::FAULTS_PER_BLOCK,
        process::{Gate, State},
        report::Report,
        run::{Options, Run},
        scenario::Scenario,
        world::{World, gpu_of},
    },
    units::{Bytes, Nanos},
};

/// A GPU over one bin.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuBin {
    /// How its clients run at the end of the bin. Policies other than auto know turns and sharing only.
    pub mode: Mode,
    /// The detector's evidence, 1000 = the threshold. `None` for policies without a detector.
    pub score_milli: Option<u32>,
    /// What the engine takes for the share of time that went into fault service lately, in thousandths.
    pub stall_milli: Option<u32>,
    /// Memory that faults brought in, first touches included.
    pub faulted: Bytes,
    /// Of that, what taking turns would have avoided.
    pub curable: Bytes,
    /// Start of the curable refaults that are going on, or of the last ones.
    pub onset: Option<Nanos>,
}

/// A client at the end of a bin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientBin {
    /// It has started and not ended.
    pub alive: bool,
    /// It has work, and its gates let it run or bring its memory back.
    pub on_gpu: bool,
    /// GPU time since its start, on all of its GPUs together.
    pub gpu_time: Nanos,
    /// Time since its start in which its work waited for memory.
    pub stalled: Nanos,
    /// Memory of it for which host pages exist, on all of its GPUs together.
    pub hosted: Bytes,
}

/// The machine at the end of one bin.
#[derive(Clone, Debug, PartialEq)]
pub struct Bin {
    /// When it ended.
    pub at: Nanos,
    /// The GPUs.
    pub gpus: Vec<GpuBin>,
    /// The clients, in the order of the file.
    pub clients: Vec<ClientBin>,
}

/// What the sensors are about to read and to forget: faulted and curable blocks of each GPU.
pub(crate) struct Felt(Vec<(u64, u64)>);

impl Felt {
    pub(crate) fn of(world: &World) -> Self {
        let mut felt = vec![(0, 0); world.cards.len()];
        for seat in world.alive.iter().flat_map(|&index| &world.processes[index].seats) {
            felt[seat.gpu].0 += seat.tally.faults / FAULTS_PER_BLOCK;
            felt[seat.gpu].1 += seat.tally.curable;
        }
        Self(felt)
    }
}

impl Bin {
    pub(crate) fn new(run: &Run<'_>, felt: Felt) -> Self {
        let world = &run.world;
        let view = run.policy.as_ref().and_then(|policy| policy.view(world.now));
        let gpu = |(gpu, (faulted, curable)): (usize, (u64, u64))| {
            let seen = view.as_ref().and_then(|view| view.gpus.iter().find(|seen| gpu_of(seen.gpu) == gpu));
            let turns = run.policy.as_ref().is_some_and(|policy| policy.takes_turns(gpu));
            GpuBin {
                mode: seen.map_or(if turns { Mode::Exclusive } else { Mode::Shared }, |seen| seen.mode),
                score_milli: seen.map(|seen| seen.score_milli),
                stall_milli: seen.and_then(|seen| seen.stall_milli),
                faulted: Bytes(faulted * Bytes::BLOCK.0),
                curable: Bytes(curable * Bytes::BLOCK.0),
                onset: world.episodes[gpu].began,
            }
        };
        let client = |process: &crate::sim::process::Process| ClientBin {
            alive: process.alive(),
            on_gpu: matches!(process.state, State::Runs | State::Stalled)
                || process.seats.iter().any(|seat| matches!(seat.gate, Gate::Opening { .. })),
            gpu_time: Nanos(process.gpu_time() as u64),
            stalled: process.stalled,
            hosted: process
                .seats
                .iter()
                .map(|seat| Bytes(u64::from(seat.hosted.count()) * Bytes::BLOCK.0))
                .sum(),
        };
        Self {
            at: world.now,
            gpus: felt.0.into_iter().enumerate().map(gpu).collect(),
            clients: world.processes.iter().map(client).collect(),
        }
    }
}

/// A run that was looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Watched {
    /// Its figures; without a makespan if the onlooker ended it.
    pub report: Report,
    /// When it ended.
    pub end: Nanos,
    /// When turns began on trial.
    pub provisional: Vec<Nanos>,
    /// When turns were decided to stay.
    pub confirmed: Vec<Nanos>,
    /// How long each burst that met a closed gate waited, by client in the order of the file.
    pub waits: Vec<Vec<Nanos>>,
    /// How long each burst took from when its work was there to its end, likewise.
    pub responses: Vec<Vec<Nanos>>,
}

/// Runs a scenario and shows every bin to an onlooker, who may end the run. With another order than
/// [`ModeOrder::Auto`], nvshare's engine is told to keep to that mode, and still gathers its evidence.
pub fn watch(
    scenario: &Scenario,
    options: &Options,
    order: ModeOrder,
    onlooker: &mut dyn FnMut(&Bin) -> ControlFlow<()>,
) -> Watched {
    let mut run = Run::new(scenario, options);
    run.watched = true;
    if order != ModeOrder::Auto
        && let Some(policy) = &mut run.policy
    {
        policy.handle(run.world.now, Input::Order(Order::Mode { gpu: None, mode: order }), &run.world);
        run.carry_out();
    }
    while run.step() {
        if run.bin.take().is_some_and(|bin| onlooker(&bin).is_break()) {
            break;
        }
    }
    run.close();
    let switches = || run.switches.iter();
    let away = |from: Mode, to: Mode| from == Mode::Shared && to != Mode::Shared;
    Watched {
        report: Report::of(&run, options),
        end: run.world.now,
        provisional: switches()
            .filter(|switch| !switch.change.confirmed && away(switch.change.from, switch.change.to))
            .map(|switch| switch.at)
            .collect(),
        confirmed: switches().filter(|switch| switch.change.confirmed).map(|switch| switch.at).collect(),
        waits: run.world.processes.iter().map(|process| process.waits.clone()).collect(),
        responses: run.world.processes.iter().map(|process| process.responses.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::run;

    const THRASH: &str = "[gpu]\npreset = \"h100-pcie5\"\nmemory = \"1 GiB\"\n[[client]]\nname = \"a\"\ncount = 2\n\
        allocated = \"900 MiB\"\ngpu_work = \"20 s\"\nburst = \"100 ms\"\nsweep = \"50 ms\"\n";

    fn scenario() -> Scenario {
        Scenario::parse("test", THRASH).unwrap()
    }

    #[test]
    fn looking_on_changes_nothing_and_its_bins_add_up_to_the_report() {
        let options = Options::new("auto".parse().unwrap());
        let mut last = None;
        let mut curable = Bytes::ZERO;
        let watched = watch(&scenario(), &options, ModeOrder::Auto, &mut |bin| {
            curable += bin.gpus[0].curable;
            last = Some(bin.clone());
            ControlFlow::Continue(())
        });
        assert_eq!(watched.report, run(&scenario(), &options, &mut |_| {}));
        assert!(curable > Bytes::ZERO);
        assert_eq!((watched.provisional.len(), watched.confirmed.len()), (1, 1));
        assert!(watched.provisional[0] < watched.confirmed[0]);
        assert!(watched.waits.iter().all(|waits| !waits.is_empty()));
        let finish = |client: usize| watched.report.clients[client].finish_s.unwrap();
        for client in 0..2 {
            let [all] = watched.responses[client][..] else {
                panic!("a client that never pauses has one burst")
            };
            assert!((all.as_secs_f64() - finish(client)).abs() < 1e-6);
        }
        let work: f64 = last.unwrap().clients.iter().map(|client| client.gpu_time.as_secs_f64()).sum();
        assert!((39.0..=40.0).contains(&work), "{work} s of 40 s in the last bin");
    }

    #[test]
    fn an_engine_told_to_share_gathers_evidence_and_keeps_sharing_until_the_onlooker_has_seen_enough() {
        let options = Options::new("auto".parse().unwrap());
        let mut most = 0;
        let watched = watch(&scenario(), &options, ModeOrder::Shared, &mut |bin| {
            most = most.max(bin.gpus[0].score_milli.unwrap());
            assert_eq!(bin.gpus[0].mode, Mode::Shared);
            if bin.at >= Nanos::seconds(5) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(most >= 1000, "{most}");
        assert_eq!((watched.end, watched.report.makespan_s), (Nanos::seconds(5), None));
        assert!(watched.provisional.is_empty() && watched.confirmed.is_empty());
    }
}
