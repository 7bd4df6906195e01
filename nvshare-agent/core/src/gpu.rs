//! One GPU: its clients, its detector, its plan, and whose turn it is.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    detector::{Detector, Totals},
    engine::Config,
    id::{ClientId, GpuId, JobId},
    input::{GpuSample, ModeOrder},
    member::Member,
    output::{GpuView, PlanChange, Reason},
    plan::{Plan, Stage},
    quantum,
    rotation::Rotation,
    units::{Bytes, Nanos},
};

/// What is committed below this share of the capacity (thousandths) fits for certain.
const FITS_MILLI: u64 = 950;
/// An automatic decision to take turns is withdrawn when no byte counter was readable for this long.
const BLIND_AFTER: Nanos = Nanos::seconds(10);
/// Bins outside these bounds are taken as being at the bound: nothing divides by zero, nothing overflows.
const BIN_MIN: Nanos = Nanos::MILLI;
const BIN_MAX: Nanos = Nanos::seconds(60);

/// The job that holds the GPU, or is about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) job: JobId,
    pub(crate) stage: TurnStage,
    /// Time of this turn in which somebody else waited.
    pub(crate) contested: Nanos,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TurnStage {
    /// Others still drain, or the job does not hold all of its GPUs yet.
    Acquiring,
    /// Its gates are open.
    Running {
        /// Since when.
        since: Nanos,
    },
}

#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) capacity: Bytes,
    pub(crate) link_rate: Bytes,
    pub(crate) members: BTreeMap<ClientId, Member>,
    pub(crate) detector: Detector,
    pub(crate) plan: Plan,
    pub(crate) order: ModeOrder,
    pub(crate) rotation: Rotation,
    pub(crate) turn: Option<Turn>,
    /// The drain that preceded the turn that is being acquired.
    pub(crate) last_drain: Nanos,
    pub(crate) last_change: Option<PlanChange>,
    /// When a byte counter was last readable.
    known_at: Nanos,
}

impl Gpu {
    pub(crate) fn new(now: Nanos, capacity: Bytes, link_rate: Bytes, order: ModeOrder) -> Self {
        Self {
            capacity,
            link_rate,
            members: BTreeMap::new(),
            detector: Detector::default(),
            plan: Plan::new(),
            order,
            rotation: Rotation::default(),
            turn: None,
            last_drain: Nanos::ZERO,
            last_change: None,
            known_at: now,
        }
    }

    pub(crate) fn advance(&mut self, elapsed: Nanos) {
        if let Some(turn) = &mut self.turn
            && self.members.values().any(|m| m.job != turn.job && m.demand() && !m.lease.is_open())
        {
            turn.contested += elapsed;
        }
        for member in self.members.values_mut() {
            member.advance(elapsed);
        }
    }

    pub(crate) fn jobs(&self) -> BTreeSet<JobId> {
        self.members.values().map(|member| member.job).collect()
    }

    pub(crate) fn of_job(&self, job: JobId) -> impl Iterator<Item = (ClientId, &Member)> {
        self.members.iter().filter(move |(_, member)| member.job == job).map(|(&id, member)| (id, member))
    }

    pub(crate) fn has_job(&self, job: JobId) -> bool {
        self.of_job(job).next().is_some()
    }

    pub(crate) fn committed(&self) -> Bytes {
        self.members.values().map(|member| member.managed).sum()
    }

    /// The clients by job, as the plan has them.
    pub(crate) fn sets(&self) -> Vec<Vec<ClientId>> {
        if self.plan.takes_turns() {
            self.jobs().into_iter().map(|job| self.of_job(job).map(|(id, _)| id).collect()).collect()
        } else {
            vec![self.members.keys().copied().collect()]
        }
    }

    /// What handing the GPU to a job costs.
    pub(crate) fn job_cost(&self, job: JobId) -> Option<Nanos> {
        self.of_job(job).filter_map(|(_, member)| member.cost(self.capacity, self.link_rate)).max()
    }

    /// What a hand-over costs at most, among the clients that have memory here.
    fn cost(&self) -> Option<Nanos> {
        let with_memory = self.members.values().filter(|member| member.managed > Bytes::ZERO);
        with_memory.filter_map(|member| member.cost(self.capacity, self.link_rate)).max()
    }

    pub(crate) fn cost_or_zero(&self) -> Nanos {
        self.cost().unwrap_or_default()
    }

    pub(crate) fn quantum(&self, config: &Config, fixed: Option<Nanos>) -> Nanos {
        fixed.map_or_else(
            || {
                let provisional = self.plan.stage() == Some(Stage::Provisional);
                quantum::derived(self.cost(), config.overhead_milli, config.quantum_max, provisional)
            },
            |fixed| fixed.max(quantum::FIXED_MIN),
        )
    }

    /// Takes in what the driver's sensors say of one bin.
    pub(crate) fn sample(&mut self, at: Nanos, sample: &GpuSample) {
        let interval = Nanos(sample.interval.0.clamp(BIN_MIN.0, BIN_MAX.0));
        let mut footprints: BTreeMap<JobId, Bytes> = BTreeMap::new();
        for member in self.members.values() {
            *footprints.entry(member.job).or_default() += member.footprint();
        }
        for (client, figures) in &sample.clients {
            if figures.gpu_faults.is_some_and(|faults| faults > 0)
                && let Some(member) = self.members.get_mut(client)
            {
                member.faulted(at);
            }
        }
        let contending = self.members.values().filter(|m| m.recent_demand(at)).map(|m| m.job);
        let mut totals = Totals {
            at,
            interval,
            fault_busy: sample.fault_busy,
            link_rate: self.link_rate,
            contended: contending.collect::<BTreeSet<_>>().len() >= 2,
            ..Totals::default()
        };
        let (mut returned, mut evicted) = (Bytes::ZERO, Bytes::ZERO);
        let mut seen = BTreeSet::new();
        for (client, figures) in &sample.clients {
            let Some(member) = self.members.get_mut(client) else { continue };
            if !seen.insert(*client) {
                continue;
            }
            let footprint = footprints.get(&member.job).copied().unwrap_or_default();
            let Some(flow) = member.refaults.observe(figures, member.managed, footprint, self.capacity)
            else {
                seen.remove(client);
                member.cost.void();
                continue;
            };
            totals.known = true;
            totals.bytes_in += flow.bytes_in;
            totals.bytes_out += flow.bytes_out;
            if flow.fits {
                totals.curable += flow.refaulted;
                returned += flow.returned;
                evicted += flow.evicted;
                member.cost.bin(at, interval, flow.returned);
            } else {
                totals.own += flow.refaulted;
                // What a client larger than the card brings in never ebbs, and is no hand-over.
                member.cost.void();
            }
        }
        if totals.known {
            self.known_at = at;
        }
        let all_known = self.members.iter().all(|(id, m)| m.managed == Bytes::ZERO || seen.contains(id));
        if self.plan.takes_turns() {
            self.detector.observe_turns(&totals);
            self.rotation.note_moved(returned, evicted);
            if !all_known {
                self.rotation.note_unknown();
            }
        } else {
            self.detector.observe(&totals);
        }
    }

    /// Whether it is time to take turns, and why.
    pub(crate) fn thrash(&self, now: Nanos) -> Option<Reason> {
        let alarm = self.detector.alarm()?;
        let contending = || self.members.values().filter(|m| m.managed > Bytes::ZERO && m.recent_demand(now));
        let jobs: BTreeSet<JobId> = contending().map(|member| member.job).collect();
        let committed: Bytes = contending().map(|member| member.managed).sum();
        (jobs.len() >= 2 && committed > self.capacity.per_mille(FITS_MILLI)).then_some(Reason::Thrash {
            first_refault: alarm.first_refault,
            refaulted: alarm.refaulted,
            stall_milli: alarm.stall_milli,
            committed: self.committed(),
            capacity: self.capacity,
            provisional: true,
        })
    }

    /// Whether there is, for certain, nothing to take turns for.
    pub(crate) fn relief(&self, now: Nanos) -> Option<Reason> {
        let with_memory = self.members.values().filter(|member| member.managed > Bytes::ZERO);
        let committed = self.committed();
        if with_memory.map(|member| member.job).collect::<BTreeSet<_>>().len() <= 1 {
            Some(Reason::Alone)
        } else if committed <= self.capacity.per_mille(FITS_MILLI) {
            Some(Reason::Fits { committed, capacity: self.capacity })
        } else if now >= self.blind_at()? {
            Some(Reason::Blind)
        } else {
            None
        }
    }

    /// When turns end for want of figures.
    pub(crate) fn blind_at(&self) -> Option<Nanos> {
        self.plan.since().map(|since| since.max(self.known_at) + BLIND_AFTER)
    }

    /// Begins to take turns.
    pub(crate) fn begin_turns(&mut self) {
        self.turn = None;
        self.rotation.start_rotation();
        self.detector.reset();
        for member in self.members.values_mut() {
            member.lease.set_newcomer(false);
        }
    }

    /// Ends taking turns. What went out meanwhile went out by plan; its return is no thrash.
    pub(crate) fn end_turns(&mut self) {
        self.turn = None;
        self.detector.reset();
        for member in self.members.values_mut() {
            member.refaults.settle();
            member.cost.void();
        }
    }

    pub(crate) fn view(&self, id: GpuId, quantum: Nanos, elapsed: Nanos) -> GpuView {
        GpuView {
            gpu: id,
            mode: self.plan.mode(),
            order: self.order,
            last_change: self.last_change.clone(),
            capacity: self.capacity,
            committed: self.committed(),
            quantum: self.plan.takes_turns().then_some(quantum),
            handover_cost: self.members.values().filter_map(|member| member.cost.measured()).max(),
            score_milli: self.detector.score_milli(),
            stall_milli: self.detector.stall_milli(),
            curable_refaults: self.detector.curable_total(),
            self_refaults: self.detector.own_total(),
            clients: self.members.iter().map(|(&client, member)| member.view(client, elapsed)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::Epoch,
        input::{Activity, ClientSample},
    };

    const BIN: Nanos = Nanos::millis(100);

    /// A GPU of 1 GiB with a busy client for each of these amounts, each a job of its own.
    fn gpu(managed: &[Bytes]) -> Gpu {
        let mut gpu = Gpu::new(Nanos::ZERO, Bytes::gib(1), Bytes::gib(10), ModeOrder::Auto);
        for (index, &managed) in managed.iter().enumerate() {
            let mut member = Member::new(Nanos::ZERO, JobId(index as u64), 1000, 0, Epoch(0));
            member.activity(Nanos::ZERO, &Activity { managed, busy_threads: 1, ..Activity::default() });
            gpu.members.insert(ClientId(index as u64), member);
        }
        gpu
    }

    /// Bins in which every client refaults; whether they are taken for thrash.
    fn refault(gpu: &mut Gpu, bins: std::ops::Range<u64>) -> bool {
        let moved = Some(Bytes::mib(50));
        let figures = ClientSample { bytes_in: moved, bytes_out: moved, ..ClientSample::default() };
        let clients: Vec<_> = gpu.members.keys().map(|&id| (id, figures)).collect();
        let sample = GpuSample { interval: BIN, fault_busy: Some(BIN), clients };
        bins.into_iter().any(|bin| {
            let at = Nanos(BIN.0 * (bin + 1));
            gpu.sample(at, &sample);
            gpu.thrash(at).is_some()
        })
    }

    #[test]
    fn thrash_takes_two_jobs_with_memory_that_do_not_fit_together() {
        assert!(refault(&mut gpu(&[Bytes::mib(600), Bytes::mib(600)]), 0..10));
        assert!(!refault(&mut gpu(&[Bytes::mib(400), Bytes::mib(400)]), 0..10), "they fit");
        assert!(!refault(&mut gpu(&[Bytes::gib(1), Bytes::ZERO]), 0..10), "one has no memory");
        assert!(!refault(&mut gpu(&[Bytes::gib(2), Bytes::gib(2)]), 0..10), "none fits alone");
    }

    #[test]
    fn what_went_out_during_turns_is_no_refault_afterwards() {
        let mut gpu = gpu(&[Bytes::mib(600), Bytes::mib(600)]);
        gpu.plan.alarm(Nanos::ZERO);
        let figures = |bytes_in, bytes_out| GpuSample {
            interval: BIN,
            clients: vec![(ClientId(0), ClientSample { bytes_in, bytes_out, ..ClientSample::default() })],
            ..GpuSample::default()
        };
        gpu.sample(BIN, &figures(Some(Bytes::ZERO), Some(Bytes::mib(300))));
        gpu.plan.leave();
        gpu.end_turns();
        gpu.sample(BIN, &figures(Some(Bytes::mib(300)), Some(Bytes::ZERO)));
        assert_eq!(gpu.detector.curable_total(), Bytes::ZERO);
    }
}
