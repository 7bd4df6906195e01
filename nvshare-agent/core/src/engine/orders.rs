//! What the operator orders.

use super::Engine;
use crate::{
    id::GpuId,
    input::{ModeOrder, Order},
    plan::Stage,
    reason::Reason,
};

impl Engine {
    pub(super) fn ordered(&mut self, order: &Order) {
        match *order {
            Order::Mode { gpu: Some(id), mode } => {
                if let Some(gpu) = self.gpus.get_mut(&id) {
                    gpu.order = mode;
                    self.apply_order(id);
                }
            }
            Order::Mode { gpu: None, mode } => {
                self.default_order = mode;
                let ids: Vec<GpuId> = self.gpus.keys().copied().collect();
                for id in ids {
                    if let Some(gpu) = self.gpus.get_mut(&id) {
                        gpu.order = mode;
                    }
                    self.apply_order(id);
                }
            }
            Order::Quantum { quantum } => {
                self.fixed_quantum = quantum;
                self.touched.extend(self.gpus.keys());
            }
            Order::Weight { client: id, weight_milli } => {
                let Some(client) = self.clients.get_mut(&id) else { return };
                client.weight_milli = weight_milli.max(1);
                for gpu in self.gpus.values_mut() {
                    if let Some(member) = gpu.members.get_mut(&id) {
                        member.weight_milli = weight_milli.max(1);
                    }
                }
            }
            Order::Priority { client: id, priority } => {
                let Some(client) = self.clients.get_mut(&id) else { return };
                client.priority = priority;
                for gpu in self.gpus.values_mut() {
                    if let Some(member) = gpu.members.get_mut(&id) {
                        member.priority = priority;
                    }
                }
                self.touched.extend(client.uses.keys().filter(|gpu| self.gpus.contains_key(gpu)));
            }
            Order::Overhead { milli } => {
                self.config.overhead_milli = milli.max(1);
                self.touched.extend(self.gpus.keys());
            }
            Order::QuantumMax { quantum_max } => {
                self.config.quantum_max = quantum_max;
                self.touched.extend(self.gpus.keys());
            }
        }
    }

    pub(super) fn apply_order(&mut self, id: GpuId) {
        let now = self.now;
        self.touched.insert(id);
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        let reason = Reason::Operator { mode: gpu.order };
        let from = gpu.plan.mode(gpu.has_sets());
        match (gpu.order, gpu.plan.stage()) {
            (ModeOrder::Exclusive, None) => {
                gpu.plan.enter(now, Stage::Ordered);
                self.began_turns(id, reason);
            }
            (ModeOrder::Shared, Some(_)) => {
                gpu.plan.leave();
                self.ended_turns(id, from, reason);
            }
            (ModeOrder::Exclusive, Some(_)) => {
                let had_sets = gpu.has_sets();
                gpu.plan.enter(now, Stage::Ordered);
                gpu.repack(now);
                if had_sets {
                    gpu.turn = None;
                    gpu.interrupted = None;
                    self.announce(id, from, reason);
                }
            }
            // Whether turns are needed is not known: a trial finds out without provoking thrash.
            (ModeOrder::Auto, Some(Stage::Ordered)) => {
                gpu.plan.enter(now, Stage::Provisional);
                gpu.rotation.start_rotation();
            }
            (ModeOrder::Shared, None)
            | (ModeOrder::Auto, None | Some(Stage::Provisional | Stage::Confirmed)) => {}
        }
    }
}
