//! What handing a GPU over costs, and how long turns are by that.

use std::collections::BTreeMap;

use super::Gpu;
use crate::{
    engine::{Config, Handover},
    id::{ClientId, JobId},
    member::Member,
    quantum,
    units::{Bytes, Nanos},
};

impl Gpu {
    /// Who moves memory now.
    pub(crate) fn mover(&self) -> Handover {
        if self.plan.certifies() { Handover::Demand } else { self.handover }
    }

    /// What handing the GPU to a client costs now.
    pub(crate) fn member_cost(&self, member: &Member) -> Option<Nanos> {
        member.cost.measured(self.mover()).or_else(|| self.estimated_cost(member))
    }

    fn estimated_cost(&self, member: &Member) -> Option<Nanos> {
        let rate = match (self.mover(), self.paging_rate) {
            (Handover::Demand, Some(paging)) => (paging + paging).min(self.link_rate),
            (Handover::Demand | Handover::Shim, _) => self.link_rate,
        };
        quantum::estimated_cost(member.working_set_high(), self.capacity, rate)
    }

    /// What handing the GPU to a set costs, if anything is known of that. Who was measured was so beside the others
    /// of its set; what is estimated adds up. Who has no memory here says nothing about it.
    fn known_set_cost(&self, jobs: &[JobId]) -> Option<Nanos> {
        let (mut measured, mut estimated) = (None, None);
        let members = jobs.iter().flat_map(|&job| self.of_job(job)).map(|(_, member)| member);
        for member in members.filter(|member| member.managed > Bytes::ZERO) {
            if let Some(cost) = member.cost.measured(self.mover()) {
                measured = measured.max(Some(cost));
            } else if let Some(cost) = self.estimated_cost(member) {
                estimated = Some(estimated.unwrap_or_default() + cost);
            }
        }
        measured.max(estimated)
    }

    /// What handing the GPU to a set costs.
    pub(crate) fn set_cost(&self, jobs: &[JobId]) -> Nanos {
        self.known_set_cost(jobs).unwrap_or_default()
    }

    /// Looks anew at what a hand-over costs at most, among those that have memory here.
    pub(crate) fn refresh_cost(&mut self) {
        let with_memory = self.members.values().filter(|member| member.managed > Bytes::ZERO);
        let alone = with_memory.filter_map(|member| self.member_cost(member)).max();
        let sets = self.sets.iter().filter_map(|set| self.known_set_cost(set)).max();
        self.cost = alone.max(sets);
    }

    pub(crate) fn cost_or_zero(&self) -> Nanos {
        self.cost.unwrap_or_default()
    }

    pub(super) fn derived_quantum(&self, config: &Config) -> Nanos {
        quantum::derived(self.cost, config.overhead_milli, config.quantum_max, false)
    }

    pub(crate) fn quantum(&self, config: &Config, fixed: Option<Nanos>) -> Nanos {
        if let Some(fixed) = fixed {
            fixed.max(quantum::FIXED_MIN)
        } else if self.plan.hurries() {
            quantum::derived(self.cost, config.overhead_milli, config.quantum_max, true)
        } else {
            self.pace.quantum(self.derived_quantum(config), self.cost_or_zero(), config.quantum_max)
        }
    }

    /// Somebody who uses the GPU shortly waited too long.
    pub(crate) fn hurt(&mut self, config: &Config) {
        self.pace.hurt(self.derived_quantum(config));
    }

    /// A rotation is complete: the quantum adapts, and it is learned how well gaps are used.
    pub(crate) fn adapt(&mut self, config: &Config) {
        if !self.plan.hurries() {
            self.pace.rotated(self.derived_quantum(config), self.cost_or_zero(), config.quantum_max);
        }
        if let Some(used) =
            (u128::from(self.rotation_used.0) * 1000).checked_div(u128::from(self.rotation_time.0))
        {
            let duties = self.duties(self.members.keys().copied(), 0);
            let (cost, quantum) = (self.cost_or_zero(), self.quantum(config, None));
            self.gaps.learn(&duties, cost, quantum, used as u64);
        }
        (self.rotation_time, self.rotation_used) = (Nanos::ZERO, Nanos::ZERO);
    }

    /// How much of the GPU each job of these clients would use alone, in thousandths.
    pub(super) fn duties(&self, clients: impl Iterator<Item = ClientId>, stall: u64) -> Vec<u64> {
        let mut jobs: BTreeMap<JobId, u64> = BTreeMap::new();
        for member in clients.filter_map(|id| self.members.get(&id)) {
            let duty = jobs.entry(member.job).or_default();
            *duty = (*duty + member.rhythm.duty_milli(stall)).min(1000);
        }
        jobs.into_values().collect()
    }
}
