//! Who runs, while clients take turns.
//!
//! **Problem.** One job at a time per GPU; a job on several GPUs needs all of them at once; nobody who hangs,
//! refuses or vanishes may hold the others up beyond a bound.
//!
//! **Approach.** Each GPU has at most one turn. A turn is *acquired* (others drain) and then *runs*. It ends
//! only when somebody waits: at the end of its quantum, or once the holder is idle for about as long as
//! coming back would cost. A job on several GPUs acquires them in the order of their UUIDs and runs when it
//! holds all; while it waits for a further one, the turn that runs there is kept short, since GPUs stand idle.
//!
//! **Invariants.** A job acquires a GPU only while it holds all its lower ones, and a turn that breaks this
//! rule is dropped, so acquisitions never wait in a circle. Running turns end by the clock. A GPU in shared
//! mode needs no turn. Jobs that ignore a revocation are waited for until its deadline, and no longer; jobs
//! that cannot be revoked run beside everybody and take no turn.

use crate::{
    engine::Engine,
    gpu::{Gpu, Turn, TurnStage},
    id::{GpuId, JobId},
    input::ModeOrder,
    lease::Gate,
    member::Member,
    output::{Mode, Output, Reason},
    plan::{Rotated, Verdict},
    quantum,
    rotation::Candidate,
    units::{Bytes, Nanos},
};

/// An idle holder keeps the GPU for what coming back would cost, within these bounds: its page is written a
/// few times a second, so it is not seen sooner; and a gap longer than this is no gap between launches.
const IDLE_GRACE_MIN: Nanos = Nanos::millis(250);
const IDLE_GRACE_MAX: Nanos = Nanos::millis(500);
/// A holder that has not been seen running since its gate opened may have a page that is still stale.
const START_GRACE: Nanos = Nanos::millis(500);
/// The shortest turn that is left to a holder while somebody waits who should not.
const PRESSED_MIN: Nanos = Nanos::millis(100);
/// A job that could not be revoked is asked again once it has been idle for this long.
const RECONSIDER_IDLE: Nanos = Nanos::SECOND;

impl Engine {
    /// Brings gates in line with plans and turns. One GPU's turn can free another's, so this repeats until
    /// nothing changes; each pass settles at least one GPU of a chain.
    pub(crate) fn schedule(&mut self) {
        let ids: Vec<GpuId> = self.gpus.keys().copied().collect();
        for _ in 0..2 * ids.len() + 2 {
            let mut changed = false;
            for &id in &ids {
                changed |= self.step(id);
            }
            if !changed {
                break;
            }
        }
    }

    /// When the engine must look again, if no input comes first.
    pub(crate) fn next_deadline(&self) -> Option<Nanos> {
        self.gpus.iter().flat_map(|(&id, gpu)| self.deadlines(id, gpu)).filter(|&at| at > self.now).min()
    }

    fn deadlines(&self, id: GpuId, gpu: &Gpu) -> Vec<Nanos> {
        if !gpu.plan.takes_turns() {
            return Vec::new();
        }
        let mut deadlines = Vec::new();
        for member in gpu.members.values() {
            match member.lease.gate() {
                Gate::Draining { deadline } => deadlines.push(deadline),
                Gate::Open => deadlines.push(member.lease.retry_at()),
                Gate::Closed => {}
            }
            if member.lease.not_revocable() {
                deadlines.push(member.idle_since() + RECONSIDER_IDLE);
            }
        }
        if let Some(Turn { job, stage: TurnStage::Running { since }, .. }) = gpu.turn
            && !self.waiters(id, job).is_empty()
        {
            deadlines.push(since + self.limit(id, job));
            if !self.wants(job) {
                deadlines.push(self.idle_since(job) + self.idle_grace(job));
            }
        }
        if gpu.order == ModeOrder::Auto {
            deadlines.extend(gpu.blind_at());
        }
        deadlines
    }

    fn step(&mut self, id: GpuId) -> bool {
        let Some(gpu) = self.gpus.get(&id) else { return false };
        if !gpu.plan.takes_turns() {
            return self.open_all(id);
        }
        let mut changed = self.expire(id);
        changed |= self.check_turn(id);
        if self.gpus.get(&id).is_some_and(|gpu| gpu.plan.takes_turns() && gpu.turn.is_none())
            && let Some(job) = self.choose(id)
            && let Some(gpu) = self.gpus.get_mut(&id)
        {
            gpu.turn = Some(Turn { job, stage: TurnStage::Acquiring, contested: Nanos::ZERO });
            changed = true;
        }
        changed |= self.set_gates(id);
        changed
    }

    /// Shared: every gate is open.
    fn open_all(&mut self, id: GpuId) -> bool {
        let Some(gpu) = self.gpus.get_mut(&id) else { return false };
        let before = self.outbox.len();
        for (&client, member) in &mut gpu.members {
            if !member.lease.is_open() {
                let epoch = member.grant(self.now, Nanos::ZERO);
                member.cost.void();
                self.outbox.push_back(Output::Grant { client, gpu: id, epoch, prefetch: Bytes::ZERO });
            }
        }
        self.outbox.len() > before
    }

    /// Turns overlong silence into verdicts.
    fn expire(&mut self, id: GpuId) -> bool {
        let Some(gpu) = self.gpus.get_mut(&id) else { return false };
        let before = self.outbox.len();
        for (&client, member) in &mut gpu.members {
            if member.lease.expire(self.now) {
                let epoch = member.lease.epoch();
                self.outbox.push_back(Output::Unresponsive { client, gpu: id, epoch });
            }
        }
        self.outbox.len() > before
    }

    /// Ends or drops the turn where its time has come.
    fn check_turn(&mut self, id: GpuId) -> bool {
        let Some(turn) = self.gpus.get(&id).and_then(|gpu| gpu.turn) else { return false };
        let job = turn.job;
        let present = self.gpus.get(&id).is_some_and(|gpu| gpu.has_job(job));
        let drop = !present
            || self.exempt(job)
            || match turn.stage {
                TurnStage::Acquiring => {
                    !self.may_acquire(id, job) || (self.gang(job).len() > 1 && !self.wants(job))
                }
                TurnStage::Running { since } => {
                    if self.due(id, job, since) {
                        self.end_turn(job);
                        return true;
                    }
                    false
                }
            };
        if drop && let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.turn = None;
        }
        drop
    }

    /// The GPUs on which a job must hold its turn to run, by UUID.
    fn gang(&self, job: JobId) -> Vec<GpuId> {
        let takes_turns = self.gpus.iter().filter(|(_, gpu)| gpu.plan.takes_turns());
        takes_turns.filter(|(_, gpu)| gpu.has_job(job)).map(|(&id, _)| id).collect()
    }

    fn members_of(&self, job: JobId) -> impl Iterator<Item = &Member> {
        let takes_turns = self.gpus.values().filter(|gpu| gpu.plan.takes_turns());
        takes_turns.flat_map(move |gpu| gpu.of_job(job).map(|(_, member)| member))
    }

    /// The job has work, on whichever of its GPUs.
    fn wants(&self, job: JobId) -> bool {
        self.members_of(job).any(Member::demand)
    }

    /// The job cannot be revoked and is packed around.
    fn exempt(&self, job: JobId) -> bool {
        self.members_of(job).any(|member| member.lease.not_revocable())
    }

    /// The job answers, and holds all of its GPUs before this one.
    fn may_acquire(&self, id: GpuId, job: JobId) -> bool {
        self.members_of(job).all(|member| member.lease.may_take_turns())
            && self.gang(job).iter().take_while(|&&lower| lower < id).all(|lower| self.holds(*lower, job))
    }

    fn holds(&self, id: GpuId, job: JobId) -> bool {
        self.gpus.get(&id).and_then(|gpu| gpu.turn).is_some_and(|turn| turn.job == job)
    }

    /// Other jobs that would run here if they could.
    fn waiters(&self, id: GpuId, holder: JobId) -> Vec<JobId> {
        let jobs = self.gpus.get(&id).map(Gpu::jobs).unwrap_or_default();
        jobs.into_iter()
            .filter(|&job| job != holder && self.wants(job) && self.may_acquire(id, job))
            .collect()
    }

    fn idle_since(&self, job: JobId) -> Nanos {
        self.members_of(job).map(Member::idle_since).max().unwrap_or_default()
    }

    fn idle_grace(&self, job: JobId) -> Nanos {
        let cost = self.gpus.values().filter_map(|gpu| gpu.job_cost(job)).max().unwrap_or_default();
        if self.members_of(job).any(Member::seen_running) {
            cost.clamp(IDLE_GRACE_MIN, IDLE_GRACE_MAX)
        } else {
            START_GRACE
        }
    }

    fn due(&self, id: GpuId, job: JobId, since: Nanos) -> bool {
        if self.waiters(id, job).is_empty() {
            return false;
        }
        if !self.wants(job) {
            let yielded = self.members_of(job).any(Member::yielded);
            if yielded || self.now >= self.idle_since(job) + self.idle_grace(job) {
                return true;
            }
        }
        self.now >= since + self.limit(id, job)
    }

    /// How long the turn of the holder may last: the longest of its GPUs'; or no longer than is worth its
    /// hand-over, if somebody waits who should not.
    fn limit(&self, id: GpuId, job: JobId) -> Nanos {
        let mut limit = Nanos(1);
        let mut shortest = Nanos::ZERO;
        for held in self.gang(job) {
            let Some(gpu) = self.gpus.get(&held) else { continue };
            let of_gpu = quantum::shortest(gpu.job_cost(job).unwrap_or_default());
            let quantum = gpu.quantum(&self.config, self.fixed_quantum);
            limit = limit.max(gpu.rotation.turn_length(job, quantum, of_gpu));
            shortest = shortest.max(of_gpu);
        }
        let priority = self.priority(job);
        let pressing = self.waiters(id, job).into_iter().any(|waiter| {
            self.priority(waiter) > priority || self.gang(waiter).first().is_some_and(|first| *first != id)
        });
        if pressing { limit.min(shortest.max(PRESSED_MIN)) } else { limit }
    }

    fn priority(&self, job: JobId) -> i32 {
        self.members_of(job).map(|member| member.priority).max().unwrap_or_default()
    }

    /// The job whose turn is next.
    fn choose(&mut self, id: GpuId) -> Option<JobId> {
        let gpu = self.gpus.get(&id)?;
        let able: Vec<JobId> = gpu.jobs().into_iter().filter(|&job| self.may_acquire(id, job)).collect();
        let wanting: Vec<JobId> = able.iter().copied().filter(|&job| self.wants(job)).collect();
        let candidate = |&job: &JobId| Candidate {
            job,
            weight_milli: gpu.of_job(job).map(|(_, member)| member.weight_milli).max().unwrap_or(1),
            priority: gpu.of_job(job).map(|(_, member)| member.priority).max().unwrap_or(0),
            waiting: gpu.of_job(job).map(|(_, member)| member.waiting(self.now)).max().unwrap_or_default(),
        };
        let candidates: Vec<Candidate> = wanting.iter().map(candidate).collect();
        // Nobody wants to run: whoever still may keeps the GPU, so that its next launch need not ask.
        let keeper = able.into_iter().find(|&job| {
            self.gang(job).len() == 1 && gpu.of_job(job).any(|(_, member)| member.lease.is_open())
        });
        let quantum = gpu.quantum(&self.config, self.fixed_quantum);
        self.gpus.get_mut(&id)?.rotation.next(&candidates, quantum).or(keeper)
    }

    /// The turn of a job ends on all of its GPUs.
    fn end_turn(&mut self, job: JobId) {
        for id in self.gang(job) {
            if !self.holds(id, job) {
                continue;
            }
            let jobs = self.gpus.get(&id).map(Gpu::jobs).unwrap_or_default();
            let mut wanting = jobs;
            wanting.retain(|&other| {
                self.wants(other) && self.members_of(other).all(|member| member.lease.may_take_turns())
            });
            let Some(gpu) = self.gpus.get_mut(&id) else { continue };
            if let Some(turn) = gpu.turn.take() {
                gpu.rotation.charge(job, turn.contested);
            }
            if let Some(rotated) = gpu.rotation.turn_ended(job, wanting) {
                self.judge(id, rotated);
            }
        }
    }

    /// A whole rotation is over: does it show that turns are, or are not, needed?
    fn judge(&mut self, id: GpuId, rotated: Rotated) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let cost = gpu.cost_or_zero();
        match gpu.plan.rotated(self.now, rotated, gpu.capacity, cost) {
            Verdict::Stay => {}
            Verdict::Confirm => {
                self.announce(id, Mode::Exclusive, Reason::ThrashConfirmed { moved: rotated.moved });
            }
            Verdict::Leave { rotations } => {
                gpu.plan.leave();
                self.ended_turns(id, Reason::EvictionFree { rotations, moved: rotated.moved });
            }
        }
    }

    /// Closes the gates of all but the holder, and opens the holder's once it may run.
    fn set_gates(&mut self, id: GpuId) -> bool {
        let before = self.outbox.len();
        let Some(gpu) = self.gpus.get(&id).filter(|gpu| gpu.plan.takes_turns()) else { return false };
        let holder = gpu.turn.map(|turn| turn.job);
        let mut changed = false;
        for job in gpu.jobs() {
            if self.exempt(job) {
                changed |= self.reconsider(job);
                self.grant_closed(id, job);
            } else if holder != Some(job) {
                self.revoke_open(id, job);
            }
        }
        if let Some(Turn { job, stage, .. }) = self.gpus.get(&id).and_then(|gpu| gpu.turn) {
            let running = match stage {
                TurnStage::Running { .. } => true,
                TurnStage::Acquiring => {
                    let ready = self.ready(job);
                    changed |= ready;
                    ready && self.start(job)
                }
            };
            if running && self.wants(job) {
                self.grant_closed(id, job);
            }
        }
        changed || self.outbox.len() > before
    }

    /// The job holds all of its GPUs, and nobody else runs there who could be stopped.
    fn ready(&self, job: JobId) -> bool {
        self.gang(job).into_iter().all(|id| {
            self.holds(id, job)
                && self.gpus.get(&id).is_some_and(|gpu| {
                    gpu.members.values().all(|member| {
                        if member.job == job {
                            !member.lease.is_draining()
                        } else {
                            !member.lease.is_waited_for() || self.exempt(member.job)
                        }
                    })
                })
        })
    }

    /// The turn begins on all GPUs of the job.
    fn start(&mut self, job: JobId) -> bool {
        for id in self.gang(job) {
            let Some(gpu) = self.gpus.get_mut(&id) else { continue };
            let Some(turn) = &mut gpu.turn else { continue };
            if turn.stage == TurnStage::Acquiring {
                turn.stage = TurnStage::Running { since: self.now };
                for member in gpu.members.values_mut().filter(|member| member.job == job) {
                    member.cost.granted(self.now, gpu.last_drain);
                }
            }
        }
        true
    }

    fn grant_closed(&mut self, id: GpuId, job: JobId) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        for (&client, member) in gpu.members.iter_mut().filter(|(_, member)| member.job == job) {
            if member.lease.gate() == Gate::Closed {
                let epoch = member.grant(self.now, gpu.last_drain);
                self.outbox.push_back(Output::Grant { client, gpu: id, epoch, prefetch: Bytes::ZERO });
            }
        }
        gpu.last_drain = Nanos::ZERO;
    }

    fn revoke_open(&mut self, id: GpuId, job: JobId) {
        let within = self.config.drain_within;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        for (&client, member) in gpu.members.iter_mut().filter(|(_, member)| member.job == job) {
            if member.lease.is_open() && member.lease.retry_at() <= self.now {
                let epoch = member.revoke(self.now, within);
                self.outbox.push_back(Output::Revoke {
                    client,
                    gpu: id,
                    epoch,
                    drain_within: within,
                    shortfall: Bytes::ZERO,
                });
            }
        }
    }

    /// A job that could not be revoked while it worked may well be, now that it is idle.
    fn reconsider(&mut self, job: JobId) -> bool {
        let idle = !self.wants(job) && self.now >= self.idle_since(job) + RECONSIDER_IDLE;
        if !idle || self.members_of(job).any(|member| member.lease.retry_at() > self.now) {
            return false;
        }
        for gpu in self.gpus.values_mut() {
            for member in gpu.members.values_mut().filter(|member| member.job == job) {
                member.lease.reconsider();
            }
        }
        true
    }
}
