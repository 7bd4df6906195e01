//! One client on one GPU.

use serde::{Deserialize, Serialize};

use crate::{
    account::Spent,
    detector::{EXPIRY, refault::Refaults},
    engine::Handover,
    id::{ClientId, Epoch, JobId},
    input::{Activity, ClientSample, Drain},
    lease::{Answered, Gate, Lease},
    output::{ClientState, ClientView},
    quantum::HandoverCost,
    rhythm::{IDLE_MAX, Rhythm},
    units::{Bytes, Nanos},
    working_set::WorkingSet,
};

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
    pub(crate) working_set: WorkingSet,
    pub(crate) rhythm: Rhythm,
    pub(crate) spent: Spent,
    /// What it had of its working set when it was last revoked.
    pub(crate) hot: Bytes,
    /// What block-level sensors said of its residency last.
    pub(crate) resident: Option<Bytes>,
    /// The client uses other GPUs as well.
    pub(crate) several_gpus: bool,
    /// The last sample of its GPU that told its bytes.
    pub(crate) sampled: u64,
    demand: bool,
    /// Its last account showed use within the bin.
    used: bool,
    last_demand: Option<Nanos>,
    waiting_since: Option<Nanos>,
    yielded: Option<Nanos>,
    /// Time is booked up to here.
    booked: Nanos,
    granted: Nanos,
    waited: Nanos,
    grants: u64,
}

/// What an account changed that others depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) demand: bool,
    pub(crate) memory: bool,
}

impl Member {
    pub(crate) fn new(now: Nanos, job: JobId, weight_milli: u32, priority: i32, epoch: Epoch) -> Self {
        let mut working_set = WorkingSet::default();
        working_set.begin();
        Self {
            job,
            weight_milli: weight_milli.max(1),
            priority,
            lease: Lease::open(now, epoch),
            managed: Bytes::ZERO,
            device: Bytes::ZERO,
            refaults: Refaults::default(),
            cost: HandoverCost::default(),
            working_set,
            rhythm: Rhythm::new(now),
            spent: Spent::default(),
            hot: Bytes::ZERO,
            resident: None,
            several_gpus: false,
            sampled: 0,
            demand: false,
            used: false,
            last_demand: None,
            waiting_since: None,
            yielded: None,
            booked: now,
            granted: Nanos::ZERO,
            waited: Nanos::ZERO,
            grants: 0,
        }
    }

    /// Books the time until now to the state the client was in. Comes before every change of it.
    fn book(&mut self, now: Nanos) {
        let elapsed = now.since(self.booked);
        match self.state() {
            ClientState::Running => self.granted += elapsed,
            ClientState::Waiting => self.waited += elapsed,
            ClientState::Idle | ClientState::Draining | ClientState::Parked => {}
        }
        self.booked = self.booked.max(now);
    }

    pub(crate) fn activity(&mut self, now: Nanos, activity: &Activity) -> Changed {
        let (had, memory) = (self.demand, self.managed != activity.managed);
        self.managed = activity.managed;
        self.device = activity.device;
        self.spent.calls = self.spent.calls.saturating_add(activity.calls);
        let inside = activity.waiting > 0 || activity.busy_threads > 0;
        let silent = if inside { Nanos::ZERO } else { activity.idle_for };
        let demand = match self.lease.gate() {
            Gate::Open => {
                let echo = self.yielded.is_some_and(|at| now.since(at) < YIELD_ECHO);
                let fresh = silent < self.rhythm.idle_after();
                // Calls with a stamp from long ago come from a client that keeps no stamp.
                let unstamped = activity.calls > 0 && silent >= IDLE_MAX;
                self.rhythm.heard(inside || unstamped, silent);
                inside || (!echo && (fresh || unstamped))
            }
            Gate::Draining { .. } => self.demand || inside,
            Gate::Closed => activity.waiting > 0 || (self.demand && now.since(self.lease.since()) < CARRIED),
        };
        self.used = inside || activity.calls > 0 || silent < Nanos::millis(40);
        self.set_demand(now, demand, now.since(silent));
        if demand {
            // A client that submits and does not wait has shown its last sign some time ago.
            self.last_demand = self.last_demand.max(Some(now.since(silent)));
        } else if activity.calls > 0 && !had && self.lease.is_open() {
            // A burst that began and ended within the bin.
            let at = now.since(silent);
            self.rhythm.began(at);
            self.rhythm.ended(at);
            self.last_demand = self.last_demand.max(Some(at));
        }
        Changed { demand: had != self.demand, memory }
    }

    /// The driver saw its kernels fault: it uses the GPU, although its page, written a few times a second at
    /// most, may not say so yet.
    pub(crate) fn faulted(&mut self, now: Nanos) {
        if self.lease.is_open() {
            self.last_demand = self.last_demand.max(Some(now));
        }
    }

    /// What the driver's sensors say of it beyond bytes; comes with each bin.
    pub(crate) fn sensed(&mut self, now: Nanos, figures: &ClientSample) {
        if figures.gpu_faults.is_some_and(|faults| faults > 0) {
            self.faulted(now);
        }
        self.resident = figures.resident;
        if self.lease.is_open() && self.last_demand.is_some() {
            self.rhythm.bin(self.used);
        }
    }

    pub(crate) fn give_away(&mut self, now: Nanos) {
        self.yielded = Some(now);
        self.set_demand(now, false, now);
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

    /// It uses the GPU shortly and seldom.
    pub(crate) fn interactive(&self, now: Nanos) -> bool {
        self.rhythm.interactive(now, self.lease.is_open())
    }

    /// How long it has waited for its turn.
    pub(crate) fn waiting(&self, now: Nanos) -> Nanos {
        self.waiting_since.map_or(Nanos::ZERO, |since| now.since(since))
    }

    /// Opens the gate. `measured`: what a hand-over costs where this one moves memory is to be learned from it.
    pub(crate) fn grant(&mut self, now: Nanos, drain: Nanos, measured: Option<Handover>) -> Epoch {
        self.book(now);
        self.grants += 1;
        self.yielded = None;
        self.waiting_since = None;
        if let Some(mover) = measured {
            self.cost.granted(now, drain, mover);
        }
        self.working_set.begin();
        if self.demand {
            self.rhythm.began(now);
        }
        self.lease.grant(now)
    }

    pub(crate) fn revoke(&mut self, now: Nanos, within: Nanos) -> Epoch {
        self.book(now);
        self.cost.ended(now);
        self.working_set.end(self.footprint());
        self.hot = self.working_set_high().min(self.present());
        self.yielded = None;
        if self.demand {
            self.rhythm.spoiled();
        }
        self.lease.revoke(now, within)
    }

    /// What comes of its answer to a revocation. Demand that it had is waiting demand once the gate is closed.
    pub(crate) fn answer(&mut self, now: Nanos, epoch: Epoch, drain: Drain) -> Answered {
        self.book(now);
        let answered = self.lease.answer(now, epoch, drain);
        match answered {
            Answered::Drained => self.set_demand(now, self.demand, now),
            Answered::Failed { .. } => self.working_set.begin(),
            Answered::Stale => {}
        }
        answered
    }

    /// Memory in whole blocks, as the driver evicts it.
    pub(crate) fn footprint(&self) -> Bytes {
        Bytes(self.managed.0.div_ceil(Bytes::BLOCK.0).saturating_mul(Bytes::BLOCK.0))
    }

    pub(crate) fn working_set_low(&self) -> Bytes {
        self.working_set.low(self.footprint())
    }

    pub(crate) fn working_set_high(&self) -> Bytes {
        self.working_set.high(self.footprint())
    }

    /// What of it lies on the GPU, at most.
    pub(crate) fn present(&self) -> Bytes {
        self.resident.unwrap_or_else(|| self.footprint() - self.refaults.owed())
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

    /// What is to be seen of it at `at`.
    pub(crate) fn view(&self, client: ClientId, at: Nanos) -> ClientView {
        let state = self.state();
        let elapsed = at.since(self.booked);
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
            working_set_low: self.working_set_low(),
            working_set_high: self.working_set_high(),
            interactive: self.interactive(at),
            calls: self.spent.calls,
            stalled: self.spent.stalled,
            curable_refaults: self.spent.curable,
            self_refaults: self.spent.own,
        }
    }

    /// `sign`: when the client last showed use.
    fn set_demand(&mut self, now: Nanos, demand: bool, sign: Nanos) {
        if demand != self.demand {
            self.book(now);
            if demand { self.rhythm.began(now) } else { self.rhythm.ended(sign) }
        }
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

    fn member() -> Member {
        Member::new(Nanos::ZERO, JobId(1), 1000, 0, Epoch(0))
    }

    fn gate(member: &mut Member, now: Nanos) {
        let epoch = member.revoke(now, Nanos::SECOND);
        member.answer(now, epoch, Drain::Done { took: Nanos::ZERO });
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
        gate(&mut member, Nanos::SECOND);
        let view = member.view(ClientId(1), Nanos::seconds(4));
        assert_eq!((view.granted, view.waited), (Nanos::SECOND, Nanos::seconds(3)));
    }
}
