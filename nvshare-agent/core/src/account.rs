//! What paging costs, and whether taking turns helps: for metrics, `status` and people.
//!
//! **Problem.** Faults and bytes do not say how much time they took from whom, and a plan that changed does not
//! say what came of it.
//!
//! **Approach.** Each bin is booked once it has been classified: pressure as the kernel has it for main memory
//! ([`pressure`]), what hand-overs took, and what clients got done before and after turns began ([`effect`]).
//!
//! **Invariants.** No decision reads any of this.

use serde::{Deserialize, Serialize};

use crate::{
    id::ClientId,
    units::{Bytes, Nanos},
};

mod effect;
mod pressure;
pub(crate) mod view;

use effect::Effect;
use pressure::Pressure;
use view::AccountView;

/// One bin of a GPU, classified.
#[derive(Debug, Default)]
pub(crate) struct Bin {
    pub(crate) at: Nanos,
    pub(crate) interval: Nanos,
    /// Share of the bin that went into serving faults, in thousandths; `None`: no sensor says it.
    pub(crate) stall_milli: Option<u32>,
    /// Clients take turns.
    pub(crate) turns: bool,
    /// Memory that came back or went out, of clients that fit.
    pub(crate) returned: Bytes,
    pub(crate) evicted: Bytes,
    pub(crate) clients: Vec<Seen>,
}

/// One client in one bin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) client: ClientId,
    /// It had work, running or waiting for its turn.
    pub(crate) demand: bool,
    /// It had work and was let through.
    pub(crate) working: bool,
    /// It waited for memory: what it had lost came back because its kernels faulted on it, or its kernels
    /// faulted while room was made.
    pub(crate) stalled: bool,
    /// Work-submitting calls so far.
    pub(crate) calls: u64,
}

/// What a client spent on one GPU so far.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Spent {
    /// Work-submitting calls.
    pub(crate) calls: u64,
    /// Time of bins in which it waited for memory that went into serving faults.
    pub(crate) stalled: Nanos,
    /// Refaults that turns would have avoided.
    pub(crate) curable: Bytes,
    /// Refaults that they would not.
    pub(crate) own: Bytes,
}

/// The books of one GPU.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Account {
    pressure: Pressure,
    effect: Effect,
    drained: Nanos,
    refilled: Nanos,
    handed_in: Bytes,
    handed_out: Bytes,
}

impl Account {
    /// Books a bin; gives the time that stalled clients lost in it.
    pub(crate) fn bin(&mut self, bin: &Bin) -> Nanos {
        let lost = Nanos(bin.interval.0 / 1000 * u64::from(bin.stall_milli.unwrap_or(0).min(1000)));
        let some = bin.clients.iter().any(|seen| seen.stalled);
        let full = some && bin.clients.iter().all(|seen| seen.stalled || !seen.working);
        let share = |stalls: bool| if stalls { lost } else { Nanos::ZERO };
        // Nobody is held up where nobody is at work, whether or not a sensor looks.
        let known = bin.stall_milli.is_some() || !bin.clients.iter().any(|seen| seen.working);
        if known {
            self.pressure.observe(bin.interval, share(some), share(full));
        } else {
            self.pressure.unknown();
        }
        if bin.turns {
            self.refilled += share(some);
            self.handed_in += bin.returned;
            self.handed_out += bin.evicted;
        }
        self.effect.bin(bin, known.then_some(share(some)));
        lost
    }

    /// A client's work was drained for a hand-over.
    pub(crate) fn drained(&mut self, took: Nanos) {
        self.drained += took;
    }

    /// Turns began, because of thrash since `first_refault` or for another reason.
    pub(crate) fn began_turns(&mut self, first_refault: Option<Nanos>) {
        self.effect.began(first_refault);
    }

    /// Turns ended.
    pub(crate) fn ended_turns(&mut self) {
        self.effect.ended();
    }

    pub(crate) fn view(&self) -> AccountView {
        AccountView {
            pressure: self.pressure.view(),
            effect: self.effect.view(),
            drained: self.drained,
            refilled: self.refilled,
            handed_in: self.handed_in,
            handed_out: self.handed_out,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIN: Nanos = Nanos::millis(100);

    fn seen(client: u64, working: bool, stalled: bool) -> Seen {
        Seen { client: ClientId(client), demand: working, working, stalled, calls: 0 }
    }

    fn totals(clients: Vec<Seen>, stall_milli: Option<u32>) -> Option<(u64, u64)> {
        let mut account = Account::default();
        account.bin(&Bin { at: BIN, interval: BIN, stall_milli, clients, ..Bin::default() });
        account.view().pressure.map(|p| (p.some.total.as_millis(), p.full.total.as_millis()))
    }

    #[test]
    fn some_takes_one_that_waits_for_memory_and_full_takes_all_that_are_at_work() {
        let (waits, works, idles) = (seen(1, true, true), seen(2, true, false), seen(3, false, false));
        assert_eq!(totals(vec![waits, works], Some(800)), Some((80, 0)));
        assert_eq!(totals(vec![waits, waits], Some(800)), Some((80, 80)));
        assert_eq!(totals(vec![waits, idles], Some(800)), Some((80, 80)));
        assert_eq!(totals(vec![works, idles], Some(800)), Some((0, 0)), "a cold start is no pressure");
    }

    #[test]
    fn without_a_sensor_pressure_is_unknown_while_someone_works_and_nil_while_nobody_does() {
        assert_eq!(totals(vec![seen(1, true, true)], None), None);
        assert_eq!(totals(vec![seen(1, false, false)], None), Some((0, 0)));
        assert_eq!(totals(Vec::new(), None), Some((0, 0)));
    }

    #[test]
    fn what_moves_during_turns_is_a_hand_over_and_what_moves_otherwise_is_not() {
        let mut account = Account::default();
        let bin = |turns| Bin {
            at: BIN,
            interval: BIN,
            stall_milli: Some(500),
            turns,
            returned: Bytes::mib(6),
            evicted: Bytes::mib(4),
            clients: vec![seen(1, true, true)],
        };
        account.bin(&bin(false));
        assert_eq!((account.view().handed_in, account.view().refilled), (Bytes::ZERO, Nanos::ZERO));
        account.bin(&bin(true));
        account.drained(Nanos::millis(7));
        let view = account.view();
        assert_eq!((view.handed_in, view.handed_out), (Bytes::mib(6), Bytes::mib(4)));
        assert_eq!((view.refilled, view.drained), (Nanos::millis(50), Nanos::millis(7)));
    }
}
