//! Who runs, while clients take turns.
//!
//! **Problem.** One set of jobs at a time per GPU; a job on several GPUs needs all of them at once; nobody who
//! hangs, refuses or vanishes may hold the others up beyond a bound.
//!
//! **Approach.** Each GPU has at most one turn ([`crate::turn`]). A turn is *acquired* (others drain) and then
//! *runs*. It ends only when somebody waits: at the end of its quantum, once the holder is idle for about as
//! long as coming back would cost, or at once for an interactive job that is within its share. A job on several
//! GPUs acquires them in the order of their UUIDs and runs when it holds all; while it waits for a further one,
//! the turn that runs there is kept short, since GPUs stand idle.
//!
//! **Invariants.** A job acquires a GPU only while it holds all its lower ones, and a turn that breaks this
//! rule is dropped, so acquisitions never wait in a circle. Running turns end by the clock. A GPU in shared
//! mode needs no turn. Jobs that ignore a revocation are waited for until its deadline, and no longer; jobs
//! that cannot be revoked run beside everybody and take no turn.

use crate::{
    engine::Engine,
    gpu::Gpu,
    id::{ClientId, GpuId, JobId},
    input::ModeOrder,
    member::Member,
    output::Output,
    turn::{Kind, Press, Turn, TurnStage},
    units::{Bytes, Nanos},
};

mod gates;
mod index;
mod turns;

/// A job that could not be revoked is asked again once it has been idle for this long.
const RECONSIDER_IDLE: Nanos = Nanos::SECOND;
/// How often one GPU is looked at for one input at most; each look that is not the last changes a turn or a gate.
const LOOKS_MAX: usize = 16;

impl Engine {
    /// Touches the GPUs whose time has come.
    pub(crate) fn wake(&mut self) {
        while let Some(&(at, id)) = self.wakes.first()
            && at <= self.now
        {
            self.wakes.pop_first();
            if let Some(gpu) = self.gpus.get_mut(&id) {
                gpu.wake = None;
            }
            self.touched.insert(id);
        }
    }

    /// Brings gates in line with plans and turns on the GPUs that were touched. One GPU's turn can free
    /// another's, which is touched by that.
    pub(crate) fn schedule(&mut self) {
        let mut looks = LOOKS_MAX * (self.touched.len() + 1);
        while let Some(id) = self.touched.pop_first() {
            if self.gpus.contains_key(&id) {
                self.relieve(id);
                if self.step(id) && looks > 0 {
                    self.touched.insert(id);
                }
                self.set_wake(id);
            }
            looks = looks.saturating_sub(1);
            if looks == 0 {
                break;
            }
        }
    }

    /// When the engine must look again, if no input comes first.
    pub(crate) fn next_deadline(&self) -> Option<Nanos> {
        self.wakes.first().map(|&(at, _)| at)
    }

    fn set_wake(&mut self, id: GpuId) {
        let next = self
            .gpus
            .get(&id)
            .and_then(|gpu| self.deadlines(id, gpu).into_iter().filter(|&at| at > self.now).min());
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        if gpu.wake != next {
            if let Some(at) = std::mem::replace(&mut gpu.wake, next) {
                self.wakes.remove(&(at, id));
            }
            self.wakes.extend(next.map(|at| (at, id)));
        }
    }

    fn deadlines(&self, id: GpuId, gpu: &Gpu) -> Vec<Nanos> {
        if !gpu.plan.takes_turns() {
            return Vec::new();
        }
        let mut deadlines = Vec::new();
        deadlines.extend(gpu.gates.draining().next().map(|(deadline, _)| deadline));
        for member in gpu.gates.open.iter().filter_map(|client| gpu.members.get(client)) {
            deadlines.push(member.lease.retry_at());
            if member.lease.not_revocable() {
                deadlines.push(member.idle_since() + RECONSIDER_IDLE);
            }
        }
        if let Some(turn) = &gpu.turn
            && let TurnStage::Running { since } = turn.stage
        {
            if let Kind::Probe(probe) = turn.kind {
                deadlines.push(since + probe.length);
            } else if gpu.others_want(&turn.jobs) {
                deadlines.push(since + self.limit(id, turn));
                if !gpu.any_wants(&turn.jobs) {
                    deadlines.push(self.idle_since(&turn.jobs) + self.idle_grace(turn));
                }
            }
        }
        if gpu.order == ModeOrder::Auto {
            deadlines.extend(gpu.blind_at());
        }
        deadlines
    }

    /// Ends turns that are certainly not needed.
    fn relieve(&mut self, id: GpuId) {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        if gpu.order == ModeOrder::Auto
            && gpu.plan.takes_turns()
            && let Some(reason) = gpu.relief(now)
        {
            let from = gpu.plan.mode(gpu.has_sets());
            gpu.plan.leave();
            self.ended_turns(id, from, reason);
        }
    }

    fn step(&mut self, id: GpuId) -> bool {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return false };
        if !gpu.plan.takes_turns() {
            return self.open_all(id);
        }
        gpu.book_turn(now);
        let mut changed = self.expire(id);
        changed |= self.check_turn(id);
        if self.gpus.get(&id).is_some_and(|gpu| gpu.plan.takes_turns() && gpu.turn.is_none())
            && let Some(turn) = self.choose(id)
        {
            let jobs = turn.jobs.clone();
            if let Some(gpu) = self.gpus.get_mut(&id) {
                gpu.turn = Some(turn);
            }
            // A job that waits for further GPUs may ask for the next one now.
            self.reindex_gangs(&jobs);
            changed = true;
        }
        changed |= self.set_gates(id);
        if let Some(gpu) = self.gpus.get_mut(&id) {
            gpu.book_turn(now);
        }
        changed
    }

    /// Shared: every gate is open.
    fn open_all(&mut self, id: GpuId) -> bool {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return false };
        let shut: Vec<_> = gpu.gates.shut.iter().copied().collect();
        for &client in &shut {
            if let Some(epoch) = gpu.grant(client, now, Nanos::ZERO, None) {
                self.outbox.push_back(Output::Grant { client, gpu: id, epoch, prefetch: Bytes::ZERO });
            }
        }
        !shut.is_empty()
    }

    /// Turns overlong silence into verdicts.
    fn expire(&mut self, id: GpuId) -> bool {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return false };
        let mut silent = Vec::new();
        let overdue: Vec<ClientId> = gpu
            .gates
            .draining()
            .take_while(|(deadline, _)| *deadline <= now)
            .map(|(_, client)| client)
            .collect();
        for client in overdue {
            let Some(member) = gpu.members.get_mut(&client) else { continue };
            if member.lease.expire(now) {
                let epoch = member.lease.epoch();
                self.outbox.push_back(Output::Unresponsive { client, gpu: id, epoch });
                silent.push(member.job);
            }
            gpu.index_gate(client);
        }
        for &job in &silent {
            self.reindex(job);
        }
        !silent.is_empty()
    }

    /// The GPUs on which a job must hold its turn to run, by UUID.
    fn gang(&self, job: JobId) -> Vec<GpuId> {
        let gpus = self.jobs.get(&job).into_iter().flatten();
        gpus.filter(|id| self.gpus.get(id).is_some_and(|gpu| gpu.plan.takes_turns())).copied().collect()
    }

    /// The GPUs on which a turn of these jobs runs.
    fn span(&self, id: GpuId, jobs: &[JobId]) -> Vec<GpuId> {
        match jobs {
            [job] => self.gang(*job),
            _ => vec![id],
        }
    }

    fn members_of(&self, job: JobId) -> impl Iterator<Item = &Member> {
        let gpus = self.jobs.get(&job).into_iter().flatten().filter_map(|id| self.gpus.get(id));
        gpus.filter(|gpu| gpu.plan.takes_turns())
            .flat_map(move |gpu| gpu.of_job(job).map(|(_, member)| member))
    }

    /// The job has work, on whichever of its GPUs.
    fn wants(&self, job: JobId) -> bool {
        self.members_of(job).any(Member::demand)
    }

    fn priority(&self, jobs: &[JobId]) -> i32 {
        let members = jobs.iter().flat_map(|&job| self.members_of(job));
        members.map(|member| member.priority).max().unwrap_or_default()
    }

    /// Who uses the GPU shortly may have come while it had used up its share, and be within it now.
    pub(crate) fn press_again(&mut self, id: GpuId) {
        let Some(gpu) = self.gpus.get(&id) else { return };
        let Some(turn) = gpu.turn.as_ref().filter(|turn| turn.press != Press::Now) else { return };
        let waits = |job: &&JobId| !turn.jobs.contains(job) && gpu.interactive(**job, self.now);
        let waiting: Vec<JobId> = gpu.wanting.iter().filter(waits).copied().collect();
        for job in waiting {
            self.press(id, job);
            self.touched.insert(id);
        }
    }

    /// Raises how urgently a job that came to wait here does so.
    fn press(&mut self, id: GpuId, job: JobId) {
        let now = self.now;
        let Some(gpu) = self.gpus.get(&id) else { return };
        let Some(turn) = gpu.turn.as_ref().filter(|turn| !turn.jobs.contains(&job)) else { return };
        let quantum = gpu.quantum(&self.config, self.fixed_quantum);
        let elsewhere = self.gang(job).first().is_some_and(|first| *first != id);
        let press = if turn.kind == Kind::Regular && self.may_interrupt(gpu, job, quantum, now) {
            Press::Now
        } else if elsewhere || self.priority(&[job]) > self.priority(&turn.jobs) {
            Press::Short
        } else {
            Press::None
        };
        if let Some(turn) = self.gpus.get_mut(&id).and_then(|gpu| gpu.turn.as_mut()) {
            turn.press = turn.press.max(press);
        }
    }

    /// An interactive job may run within another's turn while it stays within its share of the GPU, and as long
    /// as its coming takes no longer than its bursts lie apart, or than it has waited already.
    fn may_interrupt(&self, gpu: &Gpu, job: JobId, quantum: Nanos, now: Nanos) -> bool {
        if gpu.plan.stage() == Some(crate::plan::Stage::Ordered) && self.fixed_quantum.is_some() {
            return false;
        }
        gpu.interactive(job, now)
            && self.gang(job).len() == 1
            && gpu.rotation.solvent(job, quantum)
            && gpu.of_job(job).all(|(_, member)| {
                let (cycle, burst) = member.rhythm.cycle();
                let cost = gpu.member_cost(member).unwrap_or_default();
                cost + burst <= cycle.max(member.waiting(now))
            })
    }

    fn make_turn(&self, jobs: Vec<JobId>, kind: Kind) -> Turn {
        Turn::new(self.now, jobs, kind)
    }
}
