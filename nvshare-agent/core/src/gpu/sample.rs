//! Taking in what the driver's sensors say of one bin.

use super::{Gpu, felt::Felt};
use crate::{
    detector::{
        Totals,
        refault::{Flow, Holder},
    },
    id::JobId,
    input::GpuSample,
    turn::{Kind, TurnStage},
    units::{Bytes, Nanos},
    working_set::Use,
};

/// Bins outside these bounds are taken as being at the bound: nothing divides by zero, nothing overflows.
const BIN_MIN: Nanos = Nanos::MILLI;
const BIN_MAX: Nanos = Nanos::seconds(60);
/// A set is judged once it has had as many hand-over costs to come back.
const SETTLING_COSTS: u64 = 2;
/// A bin shows how fast the driver pages if faults were served for this part of it at least.
const PAGING: u64 = 2;
/// A slower bin lowers the known rate by one part in this many at most.
const RATE_FALLS: u64 = 64;

/// Sums over the clients of a GPU.
#[derive(Default)]
struct Sums {
    totals: Totals,
    /// What came back, and what made room, of clients that fit.
    returned: Bytes,
    evicted: Bytes,
    /// The same of the clients whose turn it is.
    held_returned: Bytes,
    held_evicted: Bytes,
    /// What the shim brought in.
    by_shim: Bytes,
    /// Some client's memory made room for something.
    making_room: bool,
    /// What each client felt.
    felt: Vec<Felt>,
}

impl Sums {
    fn add(&mut self, flow: &Flow, runs: bool) {
        let Flow { bytes_in, bytes_out, evicted, returned, by_shim, curable, own, fits, weak, by_block } =
            *flow;
        self.totals.known = true;
        self.by_shim += by_shim;
        self.making_room |= evicted > Bytes::ZERO;
        self.totals.bytes_in += bytes_in;
        self.totals.bytes_out += bytes_out;
        self.totals.curable += curable;
        self.totals.own += own;
        if !fits {
            self.totals.oversize += curable;
        }
        self.totals.weak |= weak && curable > Bytes::ZERO;
        // What the shim brought in unasked shows no need of it, and is told apart.
        let returned = if by_block { curable } else { returned - by_shim };
        if fits || by_block {
            self.returned += returned;
            self.evicted += evicted;
            if runs {
                self.held_returned += returned;
                self.held_evicted += evicted;
            }
        }
    }
}

impl Gpu {
    /// Takes in one bin.
    pub(crate) fn sample(&mut self, at: Nanos, sample: &GpuSample) {
        let interval = Nanos(sample.interval.0.clamp(BIN_MIN.0, BIN_MAX.0));
        self.samples += 1;
        let mut sums = Sums::default();
        let mut used = false;
        for (client, figures) in &sample.clients {
            let Some(member) = self.members.get_mut(client) else { continue };
            // A client that is listed twice counts once.
            if member.sampled == self.samples {
                continue;
            }
            member.sensed(at, figures);
            let runs = member.lease.is_open();
            used |= runs && member.demand();
            let footprint = self.jobs.get(&member.job).map(|here| here.footprint).unwrap_or_default();
            let holder = Holder {
                managed: member.managed,
                footprint,
                capacity: self.capacity,
                several_gpus: member.several_gpus,
            };
            let faulted = figures.gpu_faults.is_some_and(|faults| faults > 0);
            let mut felt = Felt { client: *client, curable: Bytes::ZERO, own: Bytes::ZERO, faulted };
            let Some(flow) = member.refaults.observe(figures, &holder) else {
                sums.felt.push(felt);
                member.cost.void();
                member.working_set.void();
                continue;
            };
            member.sampled = self.samples;
            sums.add(&flow, runs);
            (felt.curable, felt.own) = (flow.curable, flow.own);
            sums.felt.push(felt);
            if flow.fits {
                member.cost.bin(at, interval, flow.returned);
            } else {
                // What a client larger than the card brings in never ebbs, and is no hand-over.
                member.cost.void();
            }
            if member.cost.under_way() {
                member.rhythm.restored(at);
            } else if flow.curable > Bytes::ZERO {
                member.rhythm.spoiled();
            }
            let bin = Use {
                interval,
                demand: member.demand(),
                allocated: member.footprint(),
                returned: flow.returned,
                needed: flow.returned - flow.by_shim,
                evicted: flow.evicted,
                out: member.refaults.owed(),
                resident: member.resident,
            };
            member.working_set.bin(&bin);
        }
        let totals = Totals {
            at,
            interval,
            fault_busy: sample.fault_busy,
            link_rate: self.link_rate,
            contended: self.contended(at),
            ..sums.totals
        };
        if totals.known {
            self.known_at = at;
        }
        self.learn_paging_rate(&totals, sums.by_shim);
        self.book(&totals, sums.making_room, (sums.returned, sums.evicted), &mut sums.felt);
        if !self.plan.takes_turns() {
            self.detector.observe(&totals);
            return;
        }
        self.detector.observe_turns(&totals);
        self.rotation.note_moved(sums.returned, sums.evicted);
        let unknown =
            |member: &crate::member::Member| member.managed > Bytes::ZERO && member.sampled != self.samples;
        if self.members.values().any(unknown) {
            self.rotation.note_unknown();
        }
        self.rotation_time += interval;
        if used {
            self.rotation_used += interval;
        }
        self.watch_turn(&totals, &sums);
    }

    /// How fast the driver brings memory back. Bins in which it also does other things read low, so the rate rises
    /// at once and falls slowly.
    fn learn_paging_rate(&mut self, totals: &Totals, by_shim: Bytes) {
        let Some(busy) = totals.fault_busy.filter(|busy| busy.0 >= totals.interval.0 / PAGING) else {
            return;
        };
        if totals.bytes_in == Bytes::ZERO || by_shim > Bytes::ZERO {
            return;
        }
        let rate = u128::from(totals.bytes_in.0) * u128::from(Nanos::SECOND.0) / u128::from(busy.0.max(1));
        let rate = Bytes(u64::try_from(rate).unwrap_or(u64::MAX));
        let kept = self.paging_rate.unwrap_or_default();
        self.paging_rate = Some(rate.max(kept - Bytes(kept.0 / RATE_FALLS)));
    }

    /// At least two jobs have demand.
    fn contended(&self, at: Nanos) -> bool {
        let mut first: Option<JobId> = None;
        self.members
            .values()
            .filter(|member| member.recent_demand(at))
            .any(|member| *first.get_or_insert(member.job) != member.job)
    }

    /// Do the clients that run together now push each other out?
    fn watch_turn(&mut self, totals: &Totals, sums: &Sums) {
        let cost = self.turn.as_ref().map(|turn| self.set_cost(&turn.jobs)).unwrap_or_default();
        let Some(turn) = &mut self.turn else { return };
        let TurnStage::Running { since } = turn.stage else { return };
        if let Kind::Probe(probe) = &mut turn.kind {
            probe.evicted += sums.evicted;
            probe.last_returned = sums.returned;
            return;
        }
        let settled = since + Nanos(cost.0.saturating_mul(SETTLING_COSTS));
        if turn.jobs.len() < 2 || totals.at.since(totals.interval) < settled {
            return;
        }
        // What comes back of what other sets pushed out is the hand-over's; what the set itself pushed out shows
        // as going and coming at the same time.
        let curable = sums.held_returned.min(sums.held_evicted);
        let within = Totals { curable, contended: self.wanting.len() > 1, ..*totals };
        self.within.observe(&within);
    }
}
