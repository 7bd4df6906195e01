//! Opening and closing gates, and what is asked of clients with it.

use super::{Engine, RECONSIDER_IDLE};
use crate::{
    engine::Handover,
    gpu::Gpu,
    id::{GpuId, JobId},
    output::Output,
    turn::{Kind, Turn, TurnStage},
    units::{Bytes, Nanos},
};

/// An interactive client that waited longer than this makes quanta shorter.
const PATIENCE_COSTS: u64 = 2;
const PATIENCE_MIN: Nanos = Nanos::millis(500);

impl Engine {
    /// Closes the gates of all but the holders, and opens the holders' once they may run.
    pub(super) fn set_gates(&mut self, id: GpuId) -> bool {
        let before = self.outbox.len();
        let Some(gpu) = self.gpus.get(&id).filter(|gpu| gpu.plan.takes_turns()) else { return false };
        let holders = gpu.turn.as_ref().map(|turn| turn.jobs.clone()).unwrap_or_default();
        let mut changed = false;
        let exempt: Vec<JobId> = gpu.exempt.iter().copied().collect();
        for job in exempt {
            changed |= self.reconsider(job);
            self.grant_closed(id, job, false);
        }
        self.revoke_others(id, &holders);
        if let Some(Turn { jobs, stage, kind, before, .. }) =
            self.gpus.get(&id).and_then(|gpu| gpu.turn.clone())
        {
            let running = match stage {
                TurnStage::Running { .. } => true,
                TurnStage::Acquiring => {
                    let ready = self.ready(id, &jobs);
                    changed |= ready;
                    ready && self.start(id, &jobs)
                }
            };
            if running {
                for &job in &jobs {
                    if self.wants(job) {
                        // Going on after an interruption brings back only what that took.
                        let measured = match kind {
                            Kind::Regular => before == Nanos::ZERO,
                            Kind::Interlude => true,
                            Kind::Probe(_) => false,
                        };
                        self.grant_closed(id, job, measured);
                    }
                }
                if let Some(gpu) = self.gpus.get_mut(&id) {
                    gpu.last_drain = Nanos::ZERO;
                }
            }
        }
        changed || self.outbox.len() > before
    }

    /// The turn begins on all GPUs of the set.
    fn start(&mut self, id: GpuId, jobs: &[JobId]) -> bool {
        for held in self.span(id, jobs) {
            let now = self.now;
            let Some(gpu) = self.gpus.get_mut(&held) else { continue };
            let Some(turn) = &mut gpu.turn else { continue };
            if turn.stage == TurnStage::Acquiring {
                turn.stage = TurnStage::Running { since: now };
                gpu.within.reset();
                self.touched.insert(held);
            }
        }
        true
    }

    fn grant_closed(&mut self, id: GpuId, job: JobId, measured: bool) {
        let now = self.now;
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let (drain, mover) = (gpu.last_drain, gpu.mover());
        let measured = measured.then_some(mover);
        for client in gpu.clients_of(job) {
            let Some(member) = gpu.members.get(&client) else { continue };
            if member.lease.gate() != crate::lease::Gate::Closed {
                continue;
            }
            // An interactive client should wait for a hand-over and little else.
            let patience = Nanos(gpu.cost_or_zero().0.saturating_mul(PATIENCE_COSTS)).max(PATIENCE_MIN);
            if member.interactive(now) && member.waiting(now) > patience {
                gpu.hurt(&self.config);
            }
            let Some(member) = gpu.members.get(&client) else { continue };
            let prefetch = if mover == Handover::Shim { member.hot } else { Bytes::ZERO };
            if let Some(epoch) = gpu.grant(client, now, drain, measured) {
                self.outbox.push_back(Output::Grant { client, gpu: id, epoch, prefetch });
            }
        }
    }

    fn revoke_others(&mut self, id: GpuId, holders: &[JobId]) {
        let (now, within) = (self.now, self.config.drain_within);
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let going: Vec<_> = gpu
            .gates
            .open
            .iter()
            .filter(|client| {
                gpu.members.get(client).is_some_and(|member| {
                    !holders.contains(&member.job)
                        && !gpu.exempt.contains(&member.job)
                        && member.lease.retry_at() <= now
                })
            })
            .copied()
            .collect();
        let asks = gpu.mover() == Handover::Shim && !going.is_empty();
        let mut lacking = if asks { lacking(gpu, holders) } else { Bytes::ZERO };
        let mut owing = Vec::new();
        for client in going {
            let present = gpu.members.get(&client).map(crate::member::Member::present).unwrap_or_default();
            let shortfall = lacking.min(present);
            lacking = lacking - shortfall;
            if let Some(epoch) = gpu.revoke(client, now, within) {
                // Who owes its first drain may not have a turn before.
                owing.extend(
                    gpu.members
                        .get(&client)
                        .filter(|member| !member.lease.may_take_turns())
                        .map(|member| member.job),
                );
                self.outbox.push_back(Output::Revoke {
                    client,
                    gpu: id,
                    epoch,
                    drain_within: within,
                    shortfall,
                });
            }
        }
        for job in owing {
            self.reindex(job);
        }
    }

    /// A job that could not be revoked while it worked may well be, now that it is idle.
    fn reconsider(&mut self, job: JobId) -> bool {
        let idle = !self.wants(job) && self.now >= self.idle_since(&[job]) + RECONSIDER_IDLE;
        if !idle || self.members_of(job).any(|member| member.lease.retry_at() > self.now) {
            return false;
        }
        let gpus: Vec<GpuId> = self.jobs.get(&job).into_iter().flatten().copied().collect();
        for id in gpus {
            let Some(gpu) = self.gpus.get_mut(&id) else { continue };
            for client in gpu.clients_of(job) {
                if let Some(member) = gpu.members.get_mut(&client) {
                    member.lease.reconsider();
                }
            }
        }
        self.reindex(job);
        true
    }
}

/// What the jobs that come may lack, beyond what is free. Left to the driver, their faults would evict first what
/// they have had for longest themselves.
fn lacking(gpu: &Gpu, holders: &[JobId]) -> Bytes {
    let coming = holders.iter().flat_map(|&job| gpu.of_job(job));
    let lack: Bytes =
        coming.map(|(_, member)| member.working_set_high().min(gpu.capacity) - member.present()).sum();
    let present: Bytes = gpu.members.values().map(crate::member::Member::present).sum();
    lack - (gpu.capacity - present)
}
