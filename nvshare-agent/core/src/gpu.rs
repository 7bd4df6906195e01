//! One GPU: its clients, its detector, its plan, and whose turn it is.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    account::Account,
    benefit::{Estimate, GapUse},
    detector::{Alarm, Detector},
    engine::{Config, Handover},
    id::{ClientId, Epoch, JobId},
    input::{Drain, ModeOrder},
    lease::Answered,
    member::Member,
    output::PlanChange,
    packing::FILL_MILLI,
    plan::{Bounds, Plan},
    quantum::Pace,
    reason::Reason,
    rotation::Rotation,
    turn::Turn,
    units::{Bytes, Nanos},
};

mod cost;
pub(crate) mod felt;
mod gates;
mod sample;
mod sets;
mod view;

use gates::Gates;

/// An automatic decision to take turns is withdrawn when no byte counter was readable for this long.
const BLIND_AFTER: Nanos = Nanos::seconds(10);
/// What a job has on this GPU.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct JobHere {
    pub(crate) clients: Vec<ClientId>,
    pub(crate) managed: Bytes,
    /// In whole blocks.
    pub(crate) footprint: Bytes,
    /// It is a job of several GPUs, or did not fit with others.
    pub(crate) alone_until: Nanos,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Gpu {
    pub(crate) capacity: Bytes,
    pub(crate) link_rate: Bytes,
    /// Who moves memory at a hand-over that is not left to the driver.
    handover: Handover,
    /// Bytes per second that the driver brings in while it serves faults, its evictions included.
    paging_rate: Option<Bytes>,
    pub(crate) members: BTreeMap<ClientId, Member>,
    pub(crate) jobs: BTreeMap<JobId, JobHere>,
    pub(crate) detector: Detector,
    /// Watches the clients of the set whose turn it is.
    pub(crate) within: Detector,
    pub(crate) plan: Plan,
    pub(crate) order: ModeOrder,
    pub(crate) rotation: Rotation,
    pub(crate) pace: Pace,
    /// Which jobs take their turn together.
    pub(crate) sets: Vec<Vec<JobId>>,
    pub(crate) turn: Option<Turn>,
    /// The turn that was interrupted for an interactive job, and goes on after it.
    pub(crate) interrupted: Option<Turn>,
    /// The drain that preceded the turn that is being acquired.
    pub(crate) last_drain: Nanos,
    pub(crate) last_change: Option<PlanChange>,
    pub(crate) account: Account,
    /// Jobs that have work and may get a turn here.
    pub(crate) wanting: BTreeSet<JobId>,
    /// Jobs that cannot be revoked.
    pub(crate) exempt: BTreeSet<JobId>,
    pub(crate) gates: Gates,
    /// When this GPU must be looked at again.
    pub(crate) wake: Option<Nanos>,
    pub(crate) committed: Bytes,
    jobs_with_memory: usize,
    /// What a hand-over costs at most, as of the last look.
    cost: Option<Nanos>,
    gaps: GapUse,
    estimate: Option<Estimate>,
    /// Fewer sets were possible at as many rotation boundaries.
    fewer: u32,
    /// Time since the rotation began, and time of it in which the holder used the GPU.
    rotation_time: Nanos,
    rotation_used: Nanos,
    samples: u64,
    /// When a byte counter was last readable.
    known_at: Nanos,
}

impl Gpu {
    pub(crate) fn new(
        now: Nanos,
        capacity: Bytes,
        link_rate: Bytes,
        order: ModeOrder,
        handover: Handover,
    ) -> Self {
        Self {
            capacity,
            link_rate,
            handover,
            paging_rate: None,
            members: BTreeMap::new(),
            jobs: BTreeMap::new(),
            detector: Detector::default(),
            within: Detector::default(),
            plan: Plan::new(),
            order,
            rotation: Rotation::default(),
            pace: Pace::default(),
            sets: Vec::new(),
            turn: None,
            interrupted: None,
            last_drain: Nanos::ZERO,
            last_change: None,
            account: Account::default(),
            wanting: BTreeSet::new(),
            exempt: BTreeSet::new(),
            gates: Gates::default(),
            wake: None,
            committed: Bytes::ZERO,
            jobs_with_memory: 0,
            cost: None,
            gaps: GapUse::default(),
            estimate: None,
            fewer: 0,
            rotation_time: Nanos::ZERO,
            rotation_used: Nanos::ZERO,
            samples: 0,
            known_at: now,
        }
    }

    pub(crate) fn add(&mut self, client: ClientId, member: Member) {
        let job = member.job;
        self.jobs.entry(job).or_default().clients.push(client);
        self.members.insert(client, member);
        self.index_gate(client);
        self.give_set(job);
    }

    /// Takes a client out; true if it was the last of its job.
    pub(crate) fn remove(&mut self, client: ClientId) -> bool {
        let Some(member) = self.members.remove(&client) else { return false };
        self.gates.forget(client);
        self.memory_changed(member.job, (member.managed, member.footprint()), (Bytes::ZERO, Bytes::ZERO));
        let Some(here) = self.jobs.get_mut(&member.job) else { return false };
        here.clients.retain(|&other| other != client);
        if !here.clients.is_empty() {
            return false;
        }
        let job = member.job;
        self.jobs.remove(&job);
        self.rotation.forget(job);
        self.wanting.remove(&job);
        self.exempt.remove(&job);
        for set in &mut self.sets {
            set.retain(|&other| other != job);
        }
        self.sets.retain(|set| !set.is_empty());
        for turn in [&mut self.turn, &mut self.interrupted] {
            if let Some(held) = turn {
                held.jobs.retain(|&other| other != job);
                if held.jobs.is_empty() {
                    *turn = None;
                }
            }
        }
        true
    }

    /// Books a job's memory, each as managed bytes and as whole blocks.
    pub(crate) fn memory_changed(&mut self, job: JobId, before: (Bytes, Bytes), now: (Bytes, Bytes)) {
        self.committed = self.committed - before.0 + now.0;
        let Some(here) = self.jobs.get_mut(&job) else { return };
        let had = here.managed > Bytes::ZERO;
        here.managed = here.managed - before.0 + now.0;
        here.footprint = here.footprint - before.1 + now.1;
        match (had, here.managed > Bytes::ZERO) {
            (false, true) => self.jobs_with_memory += 1,
            (true, false) => self.jobs_with_memory -= 1,
            (false, false) | (true, true) => {}
        }
    }

    /// Brings the index of gates in line with a client's lease.
    pub(crate) fn index_gate(&mut self, client: ClientId) {
        let Some(member) = self.members.get(&client) else { return };
        self.gates.note(client, &member.lease);
    }

    pub(crate) fn grant(
        &mut self,
        client: ClientId,
        now: Nanos,
        drain: Nanos,
        measured: Option<Handover>,
    ) -> Option<Epoch> {
        let epoch = self.members.get_mut(&client)?.grant(now, drain, measured);
        self.index_gate(client);
        Some(epoch)
    }

    pub(crate) fn revoke(&mut self, client: ClientId, now: Nanos, within: Nanos) -> Option<Epoch> {
        let epoch = self.members.get_mut(&client)?.revoke(now, within);
        self.index_gate(client);
        Some(epoch)
    }

    pub(crate) fn answer(&mut self, client: ClientId, now: Nanos, epoch: Epoch, drain: Drain) -> Answered {
        let Some(member) = self.members.get_mut(&client) else { return Answered::Stale };
        let answered = member.answer(now, epoch, drain);
        self.index_gate(client);
        answered
    }

    pub(crate) fn of_job(&self, job: JobId) -> impl Iterator<Item = (ClientId, &Member)> {
        let clients = self.jobs.get(&job).map(|here| here.clients.as_slice()).unwrap_or_default();
        clients.iter().filter_map(|&id| Some((id, self.members.get(&id)?)))
    }

    pub(crate) fn clients_of(&self, job: JobId) -> Vec<ClientId> {
        self.jobs.get(&job).map(|here| here.clients.clone()).unwrap_or_default()
    }

    pub(crate) fn weight(&self, job: JobId) -> u32 {
        self.of_job(job).map(|(_, member)| member.weight_milli).max().unwrap_or(1)
    }

    pub(crate) fn interactive(&self, job: JobId, now: Nanos) -> bool {
        self.jobs.contains_key(&job) && self.of_job(job).all(|(_, member)| member.interactive(now))
    }

    /// Upper bound of what a job uses.
    pub(crate) fn working_set(&self, job: JobId) -> Bytes {
        self.of_job(job).map(|(_, member)| member.working_set_high()).sum()
    }

    /// Some job other than these has work here.
    pub(crate) fn others_want(&self, jobs: &[JobId]) -> bool {
        self.wanting.len() > jobs.len() || self.wanting.iter().any(|job| !jobs.contains(job))
    }

    /// Books the time of the turn, and notes whether somebody else waits from here on.
    pub(crate) fn book_turn(&mut self, now: Nanos) {
        let contended = self.turn.as_ref().is_some_and(|turn| self.others_want(&turn.jobs));
        if let Some(turn) = &mut self.turn {
            turn.book(now, contended);
        }
    }

    /// One of these jobs has work here.
    pub(crate) fn any_wants(&self, jobs: &[JobId]) -> bool {
        jobs.iter().any(|job| self.wanting.contains(job))
    }

    /// Whether it is time to take turns, and why.
    pub(crate) fn thrash(&mut self, now: Nanos, config: &Config) -> Option<Reason> {
        let alarm = self.detector.alarm()?;
        let contending: Vec<ClientId> = self
            .members
            .iter()
            .filter(|(_, member)| member.managed > Bytes::ZERO && member.recent_demand(now))
            .map(|(&id, _)| id)
            .collect();
        let members = || contending.iter().filter_map(|id| self.members.get(id));
        let jobs: BTreeSet<JobId> = members().map(|member| member.job).collect();
        let committed: Bytes = members().map(|member| member.managed).sum();
        // Turns give nothing to whoever is larger than the card, as far as is known: what one other could gain
        // must add up, and so must what only a first turnover shows.
        let fit = |job: &&JobId| self.jobs.get(job).is_some_and(|here| here.footprint <= self.capacity);
        let doubtful = alarm.oversize || jobs.iter().filter(fit).count() < 2;
        if jobs.len() < 2
            || committed <= self.capacity.per_mille(FILL_MILLI)
            || alarm.episode < self.plan.backoff.volume(now, self.capacity)
            || (doubtful && alarm.episode <= self.capacity)
        {
            return None;
        }
        self.refresh_cost();
        let Alarm { first_refault, refaulted, stall_milli, held_up_milli, weak, .. } = alarm;
        let duties = self.duties(contending.into_iter(), u64::from(held_up_milli));
        let (cost, quantum) = (self.cost_or_zero(), self.derived_quantum(config));
        let estimate = self.gaps.estimate(&duties, u64::from(held_up_milli), cost, quantum);
        self.estimate = Some(estimate);
        estimate.favours_turns().then_some(Reason::Thrash {
            first_refault,
            refaulted,
            stall_milli,
            committed: self.committed,
            capacity: self.capacity,
            provisional: true,
            shared_milli: estimate.shared_milli,
            turns_milli: estimate.turns_milli,
            weak,
        })
    }

    /// Whether there is, for certain, nothing to take turns for.
    pub(crate) fn relief(&self, now: Nanos) -> Option<Reason> {
        if self.jobs_with_memory <= 1 {
            Some(Reason::Alone)
        } else if self.committed <= self.capacity.per_mille(FILL_MILLI) {
            Some(Reason::Fits { committed: self.committed, capacity: self.capacity })
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

    /// What is known of all jobs' working sets together.
    pub(crate) fn bounds(&self) -> Bounds {
        let with_memory = || self.members.values().filter(|member| member.managed > Bytes::ZERO);
        Bounds {
            low: with_memory().map(Member::working_set_low).sum(),
            high: with_memory().map(Member::working_set_high).sum(),
            by_block: with_memory().all(|member| member.resident.is_some()),
        }
    }

    /// Begins to take turns.
    pub(crate) fn begin_turns(&mut self, now: Nanos) {
        self.turn = None;
        self.interrupted = None;
        self.rotation.start_rotation();
        self.pace.reset();
        self.refresh_cost();
        self.repack(now);
        (self.rotation_time, self.rotation_used) = (Nanos::ZERO, Nanos::ZERO);
        self.detector.reset();
        for member in self.members.values_mut() {
            member.lease.set_newcomer(false);
        }
    }

    /// Ends taking turns. What went out meanwhile went out by plan; its return is no thrash.
    pub(crate) fn end_turns(&mut self) {
        self.turn = None;
        self.interrupted = None;
        self.sets.clear();
        self.wanting.clear();
        self.exempt.clear();
        self.detector.reset();
        for member in self.members.values_mut() {
            member.refaults.settle();
            member.cost.void();
            member.working_set.void();
            member.working_set.begin();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::GpuId,
        input::{Activity, ClientSample, GpuSample},
    };

    const BIN: Nanos = Nanos::millis(100);

    /// A GPU of 1 GiB with a busy client for each of these amounts, each a job of its own.
    fn gpu(managed: &[Bytes]) -> Gpu {
        let mut gpu = Gpu::new(Nanos::ZERO, Bytes::gib(1), Bytes::gib(10), ModeOrder::Auto, Handover::Demand);
        for (index, &managed) in managed.iter().enumerate() {
            let mut member = Member::new(Nanos::ZERO, JobId(index as u64), 1000, 0, Epoch(0));
            member.activity(Nanos::ZERO, &Activity { managed, busy_threads: 1, ..Activity::default() });
            let (job, memory) = (member.job, (member.managed, member.footprint()));
            gpu.add(ClientId(index as u64), member);
            gpu.memory_changed(job, (Bytes::ZERO, Bytes::ZERO), memory);
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
            gpu.thrash(at, &Config::default()).is_some()
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

    #[test]
    fn refaults_are_pressure_of_their_client_and_a_cold_start_is_nobodys() {
        let figures = |bytes_in, bytes_out| ClientSample {
            gpu_faults: Some(9),
            bytes_in: Some(bytes_in),
            bytes_out: Some(bytes_out),
            ..ClientSample::default()
        };
        let mut gpu = gpu(&[Bytes::mib(600), Bytes::mib(600)]);
        let mut bin = |number: u64, first: ClientSample, second: ClientSample| {
            let clients = vec![(ClientId(0), first), (ClientId(1), second)];
            gpu.sample(Nanos(BIN.0 * number), &GpuSample { interval: BIN, fault_busy: Some(BIN), clients });
            let view = gpu.view(GpuId([1; 16]), BIN, &Config::default(), None);
            let pressure = view.account.pressure.unwrap();
            let stalled = view.clients.iter().map(|client| client.stalled.as_millis());
            (pressure.some.total.as_millis(), pressure.full.total.as_millis(), stalled.collect::<Vec<_>>())
        };
        let (cold, calm) = (figures(Bytes::ZERO, Bytes::ZERO), ClientSample::default());
        assert_eq!(bin(1, cold, cold), (0, 0, vec![0, 0]), "first touches of memory that is there");
        let lost = figures(Bytes::ZERO, Bytes::mib(50));
        let calm = ClientSample { bytes_in: Some(Bytes::ZERO), bytes_out: Some(Bytes::ZERO), ..calm };
        assert_eq!(bin(2, ClientSample { gpu_faults: Some(0), ..lost }, cold), (100, 0, vec![0, 100]));
        let refault = figures(Bytes::mib(30), Bytes::ZERO);
        assert_eq!(bin(3, refault, calm), (200, 0, vec![100, 100]));
        assert_eq!(bin(4, figures(Bytes::mib(10), Bytes::mib(10)), lost), (300, 100, vec![200, 200]));
        let view = gpu.view(GpuId([1; 16]), BIN, &Config::default(), None);
        let refaults: Vec<_> = view.clients.iter().map(|client| client.curable_refaults).collect();
        assert_eq!(refaults, [Bytes::mib(40), Bytes::ZERO]);
        assert_eq!(view.curable_refaults, Bytes::mib(40));
    }

    #[test]
    fn a_trial_that_came_to_nothing_makes_the_next_one_ask_for_more() {
        let mut gpu = gpu(&[Bytes::mib(600), Bytes::mib(600)]);
        assert!(refault(&mut gpu, 0..5));
        gpu.plan.alarm(Nanos::ZERO);
        gpu.plan.leave_hoping(Nanos::ZERO);
        gpu.end_turns();
        assert!(!refault(&mut gpu, 5..15), "1000 MiB of 1024");
        assert!(refault(&mut gpu, 15..16));
    }
}
