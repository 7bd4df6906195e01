//! Whose turn it is, how long it lasts, and what follows from its end.

use super::Engine;
use crate::{
    id::{ClientId, GpuId, JobId},
    member::Member,
    plan::{Rotated, Verdict},
    quantum,
    reason::Reason,
    rotation::Candidate,
    turn::{Kind, Press, Probe, Turn, TurnStage},
    units::{Bytes, Nanos},
};

/// An idle holder whose gaps are not known yet keeps the GPU for what coming back would cost, but no longer.
const IDLE_GRACE_MAX: Nanos = Nanos::millis(500);
/// Giving the GPU away in a gap takes as many hand-overs: to whoever waits, and back.
const GAP_HANDOVERS: u64 = 2;
/// A holder that has not been seen running since its gate opened may have a page that is still stale.
const START_GRACE: Nanos = Nanos::millis(500);
/// The shortest turn that is left to a holder while somebody waits who should not.
const PRESSED_MIN: Nanos = Nanos::millis(100);
/// An interlude lasts as many of the job's bursts at most, or this long.
const INTERLUDE_BURSTS: u64 = 4;
const INTERLUDE_MIN: Nanos = Nanos::millis(500);
/// A probe in which more than this share of the capacity (thousandths) was evicted, or still came in at its
/// end, has failed.
const PROBE_MILLI: u64 = 20;
/// A set whose clients brought back less than this share of the capacity (thousandths) from each other may just
/// be settling: what others left behind is evicted last, whoever comes for it.
const MISFIT_MILLI: u64 = 250;

impl Engine {
    /// Ends or drops the turn where its time has come.
    pub(super) fn check_turn(&mut self, id: GpuId) -> bool {
        let Some(turn) = self.gpus.get(&id).and_then(|gpu| gpu.turn.clone()) else { return false };
        let drop = match turn.stage {
            TurnStage::Acquiring => {
                let able = turn.jobs.iter().any(|&job| self.may_acquire(id, job));
                let gang = self.span(id, &turn.jobs).len() > 1;
                !able || (gang && !turn.jobs.iter().any(|&job| self.wants(job)))
            }
            TurnStage::Running { since } => {
                if let Kind::Probe(probe) = turn.kind {
                    return self.check_probe(id, probe, since);
                }
                if self.due(id, &turn, since) {
                    self.end_turn(id, &turn);
                    return true;
                }
                turn.jobs.iter().all(|&job| self.exempt(job))
            }
        };
        if drop {
            if let Some(gpu) = self.gpus.get_mut(&id) {
                gpu.turn = None;
            }
            self.reindex_gangs(&turn.jobs);
        }
        drop
    }

    fn exempt(&self, job: JobId) -> bool {
        self.members_of(job).any(|member| member.lease.not_revocable())
    }

    /// The job answers, and holds all of its GPUs before this one.
    fn may_acquire(&self, id: GpuId, job: JobId) -> bool {
        self.members_of(job).all(|member| member.lease.may_take_turns())
            && self.gang(job).iter().take_while(|&&lower| lower < id).all(|lower| self.holds(*lower, job))
    }

    pub(super) fn holds(&self, id: GpuId, job: JobId) -> bool {
        let turn = self.gpus.get(&id).and_then(|gpu| gpu.turn.as_ref());
        turn.is_some_and(|turn| turn.jobs.contains(&job))
    }

    pub(super) fn idle_since(&self, jobs: &[JobId]) -> Nanos {
        let members = jobs.iter().flat_map(|&job| self.members_of(job));
        members.map(Member::idle_since).max().unwrap_or_default()
    }

    pub(super) fn idle_grace(&self, turn: &Turn) -> Nanos {
        let members = || turn.jobs.iter().flat_map(|&job| self.members_of(job));
        if !members().any(Member::seen_running) {
            return START_GRACE;
        }
        if turn.kind == Kind::Interlude {
            return Nanos::ZERO;
        }
        let jobs = || turn.jobs.iter().filter_map(|job| self.jobs.get(job)).flatten();
        let cost = jobs().filter_map(|id| self.gpus.get(id)).map(|gpu| gpu.set_cost(&turn.jobs)).max();
        let cost = cost.unwrap_or_default();
        match members().filter_map(|member| member.rhythm.usual_pause()).min() {
            None => cost.min(IDLE_GRACE_MAX),
            Some(pause) if pause.0 >= cost.0.saturating_mul(GAP_HANDOVERS) => Nanos::ZERO,
            // Work comes back before anybody else would have got somewhere; if not, that was no usual gap.
            Some(pause) => cost.max(pause + Nanos(pause.0 / 2)),
        }
    }

    fn due(&self, id: GpuId, turn: &Turn, since: Nanos) -> bool {
        let Some(gpu) = self.gpus.get(&id) else { return false };
        if !gpu.others_want(&turn.jobs) {
            return false;
        }
        if turn.press == Press::Now && turn.kind == Kind::Regular {
            return true;
        }
        if !gpu.any_wants(&turn.jobs) && !turn.jobs.iter().any(|&job| self.wants(job)) {
            let mut members = turn.jobs.iter().flat_map(|&job| self.members_of(job));
            let yielded = members.any(Member::yielded);
            if yielded || self.now >= self.idle_since(&turn.jobs) + self.idle_grace(turn) {
                return true;
            }
        }
        self.now >= since + self.limit(id, turn)
    }

    /// How long the turn of the holder may last: the longest of its GPUs'; or no longer than is worth its
    /// hand-over, if somebody waits who should not.
    pub(super) fn limit(&self, id: GpuId, turn: &Turn) -> Nanos {
        let mut limit = Nanos(1);
        let mut shortest = Nanos::ZERO;
        for held in self.span(id, &turn.jobs) {
            let Some(gpu) = self.gpus.get(&held) else { continue };
            let cost = gpu.set_cost(&turn.jobs);
            let of_gpu = quantum::shortest(cost);
            let quantum = gpu.quantum(&self.config, self.fixed_quantum);
            let length = match turn.kind {
                Kind::Interlude => {
                    let bursts = turn.jobs.iter().flat_map(|&job| gpu.of_job(job));
                    let burst = bursts.map(|(_, member)| member.rhythm.cycle().1).max().unwrap_or_default();
                    of_gpu + Nanos(burst.0.saturating_mul(INTERLUDE_BURSTS)).max(INTERLUDE_MIN)
                }
                Kind::Regular | Kind::Probe(_) => {
                    // What is left of a turn that was interrupted.
                    gpu.rotation.turn_length(&turn.jobs, quantum, of_gpu) - turn.before
                }
            };
            limit = limit.max(length);
            shortest = shortest.max(of_gpu);
        }
        if turn.press == Press::Short { limit.min(shortest.max(PRESSED_MIN)) } else { limit }
    }

    /// The turn that is next.
    pub(super) fn choose(&mut self, id: GpuId) -> Option<Turn> {
        let now = self.now;
        let gpu = self.gpus.get_mut(&id)?;
        gpu.refresh_cost();
        let gpu = self.gpus.get(&id)?;
        let quantum = gpu.quantum(&self.config, self.fixed_quantum);
        let pressing = gpu.wanting.iter().copied().find(|&job| self.may_interrupt(gpu, job, quantum, now));
        if let Some(job) = pressing.filter(|_| gpu.wanting.len() > 1 || gpu.interrupted.is_some()) {
            return Some(self.make_turn(vec![job], Kind::Interlude));
        }
        if gpu.interrupted.as_ref().is_some_and(|turn| gpu.any_wants(&turn.jobs)) {
            let mut turn = self.gpus.get_mut(&id)?.interrupted.take()?;
            turn.resume(now);
            return Some(turn);
        }
        let candidates: Vec<Candidate> = gpu.sets.iter().filter_map(|set| self.candidate(gpu, set)).collect();
        // Nobody wants to run: whoever still may keeps the GPU, so that its next launch need not ask.
        let keeper = || {
            let open = |job: &JobId| gpu.of_job(*job).any(|(_, member)| member.lease.is_open());
            let keeps = |job: &JobId| open(job) && self.may_acquire(id, *job) && self.gang(*job).len() == 1;
            gpu.sets.iter().find(|set| set.iter().any(keeps)).cloned()
        };
        let keeper = if candidates.is_empty() { keeper() } else { None };
        let gpu = self.gpus.get_mut(&id)?;
        gpu.interrupted = None;
        let next = gpu.rotation.next(&candidates, quantum);
        let jobs = next.and_then(|index| candidates.into_iter().nth(index)).map(|set| set.jobs).or(keeper)?;
        Some(self.make_turn(jobs, Kind::Regular))
    }

    fn candidate(&self, gpu: &crate::gpu::Gpu, set: &[JobId]) -> Option<Candidate> {
        let answers = |job: &JobId| gpu.of_job(*job).all(|(_, member)| member.lease.may_take_turns());
        let jobs: Vec<JobId> =
            set.iter().copied().filter(|job| !gpu.exempt.contains(job) && answers(job)).collect();
        let wanting: Vec<(JobId, u32)> =
            jobs.iter().filter(|job| gpu.wanting.contains(job)).map(|&job| (job, gpu.weight(job))).collect();
        let members = || wanting.iter().flat_map(|&(job, _)| gpu.of_job(job)).map(|(_, member)| member);
        let priority = members().map(|member| member.priority).max()?;
        let waited = members().map(|member| member.waiting(self.now)).max().unwrap_or_default();
        Some(Candidate { jobs, wanting, priority, waiting: waited })
    }

    /// The turn of a set ends, on all GPUs of its job.
    fn end_turn(&mut self, id: GpuId, turn: &Turn) {
        for held in self.span(id, &turn.jobs) {
            if !turn.jobs.iter().any(|&job| self.holds(held, job)) {
                continue;
            }
            let now = self.now;
            let Some(gpu) = self.gpus.get_mut(&held) else { continue };
            let Some(mut ended) = gpu.turn.take() else { continue };
            ended.book(now, false);
            let mut paying: Vec<(JobId, u32)> = Vec::new();
            let any = gpu.any_wants(&ended.jobs);
            for &job in ended.jobs.iter().filter(|job| !any || gpu.wanting.contains(job)) {
                paying.push((job, gpu.weight(job)));
            }
            let total: u64 = paying.iter().map(|(_, weight)| u64::from(*weight)).sum();
            for debtor in gpu.rotation.debtors() {
                if !gpu.wanting.contains(&debtor) && !ended.jobs.contains(&debtor) {
                    let weight = gpu.weight(debtor);
                    gpu.rotation.relieve(debtor, ended.contested, weight, total);
                }
            }
            self.touched.insert(held);
            if ended.press == Press::Now && ended.kind == Kind::Regular {
                // It goes on afterwards, and is charged when it is over.
                gpu.rotation.served(&ended.jobs);
                gpu.interrupted = Some(ended);
                continue;
            }
            gpu.rotation.charge(&paying, ended.contested);
            let wanting: Vec<JobId> = gpu.wanting.iter().copied().collect();
            if let Some(rotated) = gpu.rotation.turn_ended(&ended.jobs, wanting) {
                self.judge(held, rotated);
            }
        }
        self.reindex_gangs(&turn.jobs);
    }

    /// A whole rotation is over: does it show that turns are, or are not, needed?
    fn judge(&mut self, id: GpuId, rotated: Rotated) {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let bounds = gpu.bounds();
        let from = gpu.plan.mode(gpu.has_sets());
        gpu.adapt(&self.config);
        let verdict = gpu.plan.rotated(now, rotated, bounds, gpu.capacity, gpu.cost_or_zero());
        let left = match verdict {
            Verdict::Stay | Verdict::Probe { .. } => None,
            Verdict::Confirm => {
                self.announce(id, from, Reason::ThrashConfirmed { moved: rotated.moved });
                None
            }
            Verdict::LeaveQuiet { rotations } => {
                Some(Reason::EvictionFree { rotations, moved: rotated.moved })
            }
            Verdict::LeaveBounds => {
                Some(Reason::WorkingSetsFit { high: bounds.high, capacity: gpu.capacity })
            }
        };
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        if let Some(reason) = left {
            gpu.plan.leave_hoping(now);
            self.ended_turns(id, from, reason);
            return;
        }
        if let Some(reason) = gpu.repack_if_better(now) {
            gpu.interrupted = None;
            self.announce(id, from, reason);
        }
        if let Verdict::Probe { length } = verdict {
            self.begin_probe(id, length);
        }
    }

    /// Lets all jobs of this GPU run together, unless some need other GPUs as well or do not answer.
    fn begin_probe(&mut self, id: GpuId, length: Nanos) {
        let Some(gpu) = self.gpus.get(&id) else { return };
        let jobs: Vec<JobId> = gpu.jobs.keys().copied().filter(|job| !gpu.exempt.contains(job)).collect();
        let silent =
            jobs.iter().flat_map(|&job| gpu.of_job(job)).any(|(_, member)| !member.lease.may_take_turns());
        if silent || jobs.iter().any(|&job| self.gang(job).len() > 1) {
            return;
        }
        let probe = Probe { length, evicted: Bytes::ZERO, last_returned: Bytes::ZERO };
        let turn = self.make_turn(jobs, Kind::Probe(probe));
        if let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.interrupted = None;
            gpu.turn = Some(turn);
        }
    }

    fn check_probe(&mut self, id: GpuId, probe: Probe, since: Nanos) -> bool {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return false };
        let most = gpu.capacity.per_mille(PROBE_MILLI);
        let over = now >= since + probe.length;
        if probe.evicted > most || (over && probe.last_returned > most) {
            gpu.plan.backoff.probe_failed(now);
            gpu.turn = None;
            return true;
        }
        if over {
            let from = gpu.plan.mode(gpu.has_sets());
            gpu.plan.leave_hoping(now);
            self.ended_turns(id, from, Reason::ProbeHeld { length: probe.length });
        }
        over
    }

    /// A set whose clients push each other out is taken apart.
    pub(crate) fn watch_set(&mut self, id: GpuId) {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let Some(turn) = gpu.turn.clone() else { return };
        if matches!(turn.kind, Kind::Probe(_)) {
            self.touched.insert(id);
            return;
        }
        if turn.jobs.len() > 1
            && let Some(alarm) = gpu.within.alarm()
            && alarm.episode >= gpu.capacity.per_mille(MISFIT_MILLI)
        {
            let from = gpu.plan.mode(gpu.has_sets());
            gpu.within.reset();
            gpu.split(&turn.jobs, now);
            gpu.interrupted = None;
            self.end_turn(id, &turn);
            self.announce(id, from, Reason::SetMisfit { refaulted: alarm.refaulted });
        }
    }

    /// The set holds all of its GPUs, and nobody else runs there who could be stopped.
    pub(super) fn ready(&self, id: GpuId, jobs: &[JobId]) -> bool {
        self.span(id, jobs).into_iter().all(|id| {
            jobs.iter().any(|&job| self.holds(id, job))
                && self.gpus.get(&id).is_some_and(|gpu| {
                    let member = |client: &ClientId| gpu.members.get(client);
                    let stoppable = |member: &Member| {
                        !jobs.contains(&member.job)
                            && !gpu.exempt.contains(&member.job)
                            && member.lease.is_waited_for()
                    };
                    let mut draining = gpu.gates.draining().filter_map(|(_, client)| member(&client));
                    let mut open = gpu.gates.open.iter().filter_map(member);
                    !draining.any(|member| jobs.contains(&member.job) || stoppable(member))
                        && !open.any(stoppable)
                })
        })
    }
}
