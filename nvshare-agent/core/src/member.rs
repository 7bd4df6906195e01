//! One client on one GPU.

use serde::{Deserialize, Serialize};

use crate::{
    detector::{EXPIRY, refault::Refaults},
    id::{ClientId, Epoch, JobId},
    input::Activity,
    lease::{Gate, Lease},
    output::{ClientState, ClientView},
    quantum::{self, HandoverCost},
    units::{Bytes, Nanos},
};

/// A client that used the GPU this recently has demand.
const RECENT: Nanos = Nanos::millis(250);
/// A client that had demand when its gate closed is believed to have it for this long, until its page has
/// had time to show whether threads wait.
const CARRIED: Nanos = Nanos::millis(300);
/// Figures this soon after a client gave its turn away may stem from before.
const YIELD_ECHO: Nanos = Nanos::millis(150);

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) job: JobId,
    pub(crate) weight_milli: u32,
    pub(crate) priority: i32,
    pub(crate) lease: Lease,
    pub(crate) managed: Bytes,
    pub(crate) device: Bytes,
    pub(crate) refaults: Refaults,
    pub(crate) cost: HandoverCost,
    demand: bool,
    last_demand: Option<Nanos>,
    waiting_since: Option<Nanos>,
    yielded: Option<Nanos>,
    granted: Nanos,
    waited: Nanos,
    grants: u64,
}

impl Member {
    pub(crate) fn new(now: Nanos, job: JobId, weight_milli: u32, priority: i32, epoch: Epoch) -> Self {
        Self {
            job,
            weight_milli: weight_milli.max(1),
            priority,
            lease: Lease::open(now, epoch),
            managed: Bytes::ZERO,
            device: Bytes::ZERO,
            refaults: Refaults::default(),
            cost: HandoverCost::default(),
            demand: false,
            last_demand: None,
            waiting_since: None,
            yielded: None,
            granted: Nanos::ZERO,
            waited: Nanos::ZERO,
            grants: 0,
        }
    }

    /// Books the time until now to the state the client was in.
    pub(crate) fn advance(&mut self, elapsed: Nanos) {
        match self.state() {
            ClientState::Running => self.granted += elapsed,
            ClientState::Waiting => self.waited += elapsed,
            ClientState::Idle | ClientState::Draining | ClientState::Parked => {}
        }
    }

    pub(crate) fn activity(&mut self, now: Nanos, activity: &Activity) {
        self.managed = activity.managed;
        self.device = activity.device;
        let inside = activity.waiting > 0 || activity.busy_threads > 0;
        let demand = match self.lease.gate() {
            Gate::Open => {
                let echo = self.yielded.is_some_and(|at| now.since(at) < YIELD_ECHO);
                inside || (!echo && (activity.calls > 0 || activity.idle_for < RECENT))
            }
            Gate::Draining { .. } => self.demand || inside,
            Gate::Closed => activity.waiting > 0 || (self.demand && now.since(self.lease.since()) < CARRIED),
        };
        self.set_demand(now, demand);
        if demand {
            // A client that submits and does not wait has shown its last sign some time ago.
            let sign = if inside { now } else { now.since(activity.idle_for) };
            self.last_demand = self.last_demand.max(Some(sign));
        }
    }

    /// The driver saw its kernels fault: it uses the GPU, although its page, written a few times a second at
    /// most, may not say so yet.
    pub(crate) fn faulted(&mut self, now: Nanos) {
        if self.lease.is_open() {
            self.last_demand = self.last_demand.max(Some(now));
        }
    }

    pub(crate) fn give_away(&mut self, now: Nanos) {
        self.yielded = Some(now);
        self.set_demand(now, false);
    }

    pub(crate) fn yielded(&self) -> bool {
        self.yielded.is_some()
    }

    /// Work is there, running or waiting.
    pub(crate) fn demand(&self) -> bool {
        self.demand
    }

    /// Work was there within the detector's horizon.
    pub(crate) fn recent_demand(&self, now: Nanos) -> bool {
        self.demand || self.last_demand.is_some_and(|at| now.since(at) < EXPIRY)
    }

    /// Since when it holds the GPU without a sign of use.
    pub(crate) fn idle_since(&self) -> Nanos {
        self.last_demand.unwrap_or_default().max(self.lease.since())
    }

    /// It has been seen using the GPU since its gate opened.
    pub(crate) fn seen_running(&self) -> bool {
        self.lease.is_open() && self.last_demand.is_some_and(|at| at > self.lease.since())
    }

    /// How long it has waited for its turn.
    pub(crate) fn waiting(&self, now: Nanos) -> Nanos {
        self.waiting_since.map_or(Nanos::ZERO, |since| now.since(since))
    }

    pub(crate) fn grant(&mut self, now: Nanos, drain: Nanos) -> Epoch {
        self.grants += 1;
        self.yielded = None;
        self.waiting_since = None;
        self.cost.granted(now, drain);
        self.lease.grant(now)
    }

    pub(crate) fn revoke(&mut self, now: Nanos, within: Nanos) -> Epoch {
        self.cost.ended(now);
        self.yielded = None;
        self.lease.revoke(now, within)
    }

    /// The gate closed; demand that the client had when it was revoked is waiting demand from here on.
    pub(crate) fn gated(&mut self, now: Nanos) {
        self.set_demand(now, self.demand);
    }

    /// Memory in whole blocks, as the driver evicts it.
    pub(crate) fn footprint(&self) -> Bytes {
        Bytes(self.managed.0.div_ceil(Bytes::BLOCK.0).saturating_mul(Bytes::BLOCK.0))
    }

    /// What handing the GPU to it costs, measured or estimated.
    pub(crate) fn cost(&self, capacity: Bytes, link_rate: Bytes) -> Option<Nanos> {
        self.cost.measured().or_else(|| quantum::estimated_cost(self.managed, capacity, link_rate))
    }

    pub(crate) fn state(&self) -> ClientState {
        match (self.lease.gate(), self.demand) {
            (Gate::Open, true) => ClientState::Running,
            (Gate::Open, false) => ClientState::Idle,
            (Gate::Draining { .. }, _) => ClientState::Draining,
            (Gate::Closed, true) => ClientState::Waiting,
            (Gate::Closed, false) => ClientState::Parked,
        }
    }

    /// What is to be seen of it this long after the last input.
    pub(crate) fn view(&self, client: ClientId, elapsed: Nanos) -> ClientView {
        let state = self.state();
        let until = |spent: Nanos, when: ClientState| if state == when { spent + elapsed } else { spent };
        ClientView {
            client,
            state,
            managed: self.managed,
            device: self.device,
            weight_milli: self.weight_milli,
            priority: self.priority,
            granted: until(self.granted, ClientState::Running),
            waited: until(self.waited, ClientState::Waiting),
            grants: self.grants,
        }
    }

    fn set_demand(&mut self, now: Nanos, demand: bool) {
        self.demand = demand;
        if demand && !self.lease.is_open() {
            self.waiting_since.get_or_insert(now);
        } else {
            self.waiting_since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Drain;

    fn member() -> Member {
        Member::new(Nanos::ZERO, JobId(1), 1000, 0, Epoch(0))
    }

    fn gate(member: &mut Member, now: Nanos) {
        let epoch = member.revoke(now, Nanos::SECOND);
        member.lease.answer(now, epoch, Drain::Done { took: Nanos::ZERO });
        member.gated(now);
    }

    const IDLE: Activity = Activity {
        managed: Bytes::ZERO,
        device: Bytes::ZERO,
        calls: 0,
        waiting: 0,
        busy_threads: 0,
        idle_for: Nanos::seconds(100),
    };

    #[test]
    fn a_gated_client_has_demand_only_while_threads_wait_or_its_page_is_still_stale() {
        let mut member = member();
        member.activity(Nanos::SECOND, &Activity { busy_threads: 1, ..IDLE });
        gate(&mut member, Nanos::SECOND);
        member.activity(Nanos::millis(1100), &IDLE);
        assert_eq!(member.state(), ClientState::Waiting);
        member.activity(Nanos::millis(1400), &IDLE);
        assert_eq!(member.state(), ClientState::Parked);
        member.activity(Nanos::millis(1500), &Activity { waiting: 1, ..IDLE });
        assert_eq!(member.state(), ClientState::Waiting);
    }

    #[test]
    fn faults_show_demand_before_the_page_does_but_not_through_a_closed_gate() {
        let mut member = member();
        member.activity(Nanos::SECOND, &IDLE);
        assert!(!member.recent_demand(Nanos::SECOND));
        member.faulted(Nanos::SECOND);
        assert!(member.recent_demand(Nanos::SECOND));
        gate(&mut member, Nanos::SECOND);
        member.faulted(Nanos::seconds(9));
        assert!(!member.recent_demand(Nanos::seconds(9)));
    }

    #[test]
    fn a_yield_is_not_undone_by_figures_from_before_it() {
        let mut member = member();
        let busy = Activity { calls: 9, ..IDLE };
        member.activity(Nanos::SECOND, &busy);
        member.give_away(Nanos::millis(1010));
        member.activity(Nanos::millis(1100), &busy);
        assert_eq!(member.state(), ClientState::Idle);
        member.activity(Nanos::millis(1200), &busy);
        assert_eq!(member.state(), ClientState::Running);
    }

    #[test]
    fn time_is_booked_to_the_state_it_was_spent_in() {
        let mut member = member();
        member.activity(Nanos::ZERO, &Activity { calls: 1, ..IDLE });
        member.advance(Nanos::SECOND);
        gate(&mut member, Nanos::SECOND);
        member.advance(Nanos::seconds(2));
        let view = member.view(ClientId(1), Nanos::SECOND);
        assert_eq!((view.granted, view.waited), (Nanos::SECOND, Nanos::seconds(3)));
    }
}
