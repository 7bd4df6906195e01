//! What is to be seen of a GPU.

use super::Gpu;
use crate::{
    engine::Config,
    id::{ClientId, GpuId, JobId},
    output::{GpuView, Outlook},
    plan::Stage,
    units::Nanos,
};

impl Gpu {
    fn clients_in(&self, jobs: &[JobId]) -> Vec<ClientId> {
        jobs.iter().flat_map(|&job| self.clients_of(job)).collect()
    }

    /// The clients by set, in the order of turns.
    pub(crate) fn client_sets(&self) -> Vec<Vec<ClientId>> {
        if self.plan.takes_turns() {
            self.sets.iter().map(|set| self.clients_in(set)).collect()
        } else {
            vec![self.members.keys().copied().collect()]
        }
    }

    fn outlook(&self, at: Nanos) -> Outlook {
        match (self.order, self.plan.stage(), self.plan.quiet()) {
            (
                crate::input::ModeOrder::Auto,
                Some(stage @ (Stage::Provisional | Stage::Confirmed)),
                Some((rotations, needed)),
            ) => Outlook::Quiet {
                provisional: stage == Stage::Provisional,
                rotations,
                needed,
                not_before: self.plan.dwell_until(self.cost_or_zero()).unwrap_or_default(),
            },
            (crate::input::ModeOrder::Auto, None, _) => {
                Outlook::Alarm { refaults: self.plan.backoff.volume(at, self.capacity) }
            }
            _ => Outlook::Ordered,
        }
    }

    pub(crate) fn view(&self, id: GpuId, at: Nanos, config: &Config, fixed: Option<Nanos>) -> GpuView {
        let bounds = self.bounds();
        let turns = self.plan.takes_turns();
        GpuView {
            gpu: id,
            mode: self.plan.mode(self.has_sets()),
            order: self.order,
            last_change: self.last_change.clone(),
            capacity: self.capacity,
            committed: self.committed,
            quantum: turns.then(|| self.quantum(config, fixed)),
            handover_cost: self.members.values().filter_map(|m| m.cost.measured(self.mover())).max(),
            score_milli: self.detector.score_milli(),
            stall_milli: self.detector.stall_milli(),
            curable_refaults: self.detector.curable_total(),
            self_refaults: self.detector.own_total(),
            expected_cost: self.members.values().filter_map(|member| self.member_cost(member)).max(),
            sets: self.client_sets(),
            holders: self.turn.as_ref().map(|turn| self.clients_in(&turn.jobs)).unwrap_or_default(),
            working_sets: (bounds.low, bounds.high),
            reckoned_milli: self.estimate.map(|estimate| (estimate.shared_milli, estimate.turns_milli)),
            outlook: self.outlook(at),
            account: self.account.view(),
            clients: self.members.iter().map(|(&client, member)| member.view(client, at)).collect(),
        }
    }
}
