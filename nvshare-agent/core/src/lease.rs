//! The right of one client to run on one GPU.
//!
//! A lease is open from the moment the client has a context. Every grant and every revocation raises its
//! epoch, and an answer counts only if it names the epoch that is in force: whatever a client says late,
//! twice or out of thin air changes nothing.

use serde::{Deserialize, Serialize};

use crate::{id::Epoch, input::Drain, units::Nanos};

/// Failed drains after which a client counts as not revocable.
const FAILURES_MAX: u32 = 3;
/// Pause before the first retry after a failed drain; doubles with each further failure.
const RETRY_FIRST: Nanos = Nanos::millis(250);
/// The longest pause between retries.
const RETRY_MAX: Nanos = Nanos::seconds(30);
/// A client may use all of its drain time and still needs a moment to say so. Without this, every honest
/// "did not end in time" would come too late to be told from silence.
const ANSWER_SLACK: Nanos = Nanos::millis(500);

/// Where the gate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Gate {
    /// Open: the client may run.
    Open,
    /// Asked to close; the client has not answered yet.
    Draining {
        /// When the silence becomes a verdict.
        deadline: Nanos,
    },
    /// Closed and drained.
    Closed,
}

/// What an answer to a revocation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    /// It answers nothing that is in force.
    Stale,
    /// Gate closed, work done.
    Drained,
    /// The client keeps running.
    Failed {
        /// This failure is the one that makes it count as not revocable.
        gave_up: bool,
    },
}

/// What is known of how a client answers revocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Standing {
    /// It came while turns were taken and has drained for nobody yet.
    Newcomer,
    /// Others wait for it to drain.
    Trusted,
    /// It ignored a revocation and has drained none since.
    Unresponsive,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Lease {
    epoch: Epoch,
    gate: Gate,
    since: Nanos,
    standing: Standing,
    not_revocable: bool,
    failures: u32,
    retry_at: Nanos,
    /// A grant that has not been confirmed yet.
    unconfirmed: bool,
}

impl Lease {
    /// The lease of a client that just began to use the GPU.
    pub(crate) fn open(now: Nanos, epoch: Epoch) -> Self {
        Self {
            epoch,
            gate: Gate::Open,
            since: now,
            standing: Standing::Trusted,
            not_revocable: false,
            failures: 0,
            retry_at: Nanos::ZERO,
            unconfirmed: false,
        }
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn gate(&self) -> Gate {
        self.gate
    }

    /// When the gate came to stand as it does.
    pub(crate) fn since(&self) -> Nanos {
        self.since
    }

    pub(crate) fn is_open(&self) -> bool {
        self.gate == Gate::Open
    }

    pub(crate) fn is_draining(&self) -> bool {
        matches!(self.gate, Gate::Draining { .. })
    }

    /// It ignored a revocation and has drained none since: others do not wait for it.
    pub(crate) fn unresponsive(&self) -> bool {
        self.standing == Standing::Unresponsive
    }

    /// Whether others wait for it to drain. A newcomer is not waited for before it has drained once: whoever
    /// comes again and again under another number and never drains would otherwise stop all turns.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.gate != Gate::Closed && self.standing == Standing::Trusted
    }

    /// Whether it may have a turn: it answers, and owes no first drain.
    pub(crate) fn may_take_turns(&self) -> bool {
        let owes = match self.standing {
            Standing::Trusted => false,
            Standing::Newcomer => self.is_draining(),
            Standing::Unresponsive => true,
        };
        !self.not_revocable && !owes
    }

    /// It came while turns are taken; or turns begin, and all who are there are waited for.
    pub(crate) fn set_newcomer(&mut self, newcomer: bool) {
        self.standing = match (newcomer, self.standing) {
            (true, _) => Standing::Newcomer,
            (false, Standing::Newcomer) => Standing::Trusted,
            (false, other) => other,
        };
    }

    /// Its drains keep failing: it runs, and others run beside it.
    pub(crate) fn not_revocable(&self) -> bool {
        self.not_revocable
    }

    /// A failed drain is followed by a pause; this is its end.
    pub(crate) fn retry_at(&self) -> Nanos {
        self.retry_at
    }

    pub(crate) fn grant(&mut self, now: Nanos) -> Epoch {
        self.epoch = self.epoch.next();
        self.gate = Gate::Open;
        self.since = now;
        if self.standing == Standing::Unresponsive {
            self.standing = Standing::Trusted;
        }
        self.unconfirmed = true;
        self.epoch
    }

    /// The client confirms a grant. True if it is the one in force, and the first time: what it says it
    /// moved is believed once.
    pub(crate) fn resumed(&mut self, epoch: Epoch) -> bool {
        self.is_open() && epoch == self.epoch && std::mem::take(&mut self.unconfirmed)
    }

    pub(crate) fn revoke(&mut self, now: Nanos, within: Nanos) -> Epoch {
        self.epoch = self.epoch.next();
        self.gate = Gate::Draining { deadline: now + within + ANSWER_SLACK };
        self.since = now;
        self.epoch
    }

    /// Turns silence past the deadline into a verdict. True once until the client drains or is granted again.
    pub(crate) fn expire(&mut self, now: Nanos) -> bool {
        let Gate::Draining { deadline } = self.gate else { return false };
        let expired = now >= deadline && self.standing != Standing::Unresponsive;
        if expired {
            self.standing = Standing::Unresponsive;
        }
        expired
    }

    pub(crate) fn answer(&mut self, now: Nanos, epoch: Epoch, drain: Drain) -> Answered {
        if epoch != self.epoch || !self.is_draining() {
            return Answered::Stale;
        }
        self.since = now;
        match drain {
            Drain::Done { .. } => {
                self.gate = Gate::Closed;
                self.standing = Standing::Trusted;
                self.not_revocable = false;
                self.failures = 0;
                Answered::Drained
            }
            Drain::TimedOut | Drain::Capturing => {
                self.gate = Gate::Open;
                let pause = RETRY_FIRST.0.saturating_mul(1 << self.failures.min(16));
                self.retry_at = now + Nanos(pause.min(RETRY_MAX.0));
                self.failures += 1;
                let gave_up = self.failures >= FAILURES_MAX;
                self.not_revocable |= gave_up;
                Answered::Failed { gave_up }
            }
        }
    }

    /// Puts a client that counted as not revocable to the test again; one more failure restores the verdict.
    pub(crate) fn reconsider(&mut self) {
        self.not_revocable = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Nanos = Nanos::seconds(5);

    #[test]
    fn an_answer_to_an_older_epoch_changes_nothing() {
        let mut lease = Lease::open(Nanos::ZERO, Epoch(0));
        let old = lease.revoke(Nanos::ZERO, WITHIN);
        lease.grant(Nanos::ZERO);
        lease.revoke(Nanos::ZERO, WITHIN);
        let done = Drain::Done { took: Nanos::MILLI };
        assert_eq!(lease.answer(Nanos::ZERO, old, done), Answered::Stale);
        assert!(lease.is_draining());
        assert_eq!(lease.answer(Nanos::ZERO, lease.epoch(), done), Answered::Drained);
        assert_eq!(lease.answer(Nanos::ZERO, lease.epoch(), done), Answered::Stale);
    }

    #[test]
    fn a_grant_is_confirmed_once_and_only_while_it_is_in_force() {
        let mut lease = Lease::open(Nanos::ZERO, Epoch(0));
        assert!(!lease.resumed(Epoch(0)), "nothing was granted");
        let epoch = lease.grant(Nanos::ZERO);
        assert!(!lease.resumed(Epoch(0)));
        assert!(lease.resumed(epoch));
        assert!(!lease.resumed(epoch));
        let epoch = lease.grant(Nanos::ZERO);
        lease.revoke(Nanos::ZERO, WITHIN);
        assert!(!lease.resumed(epoch));
    }

    #[test]
    fn the_third_failed_drain_makes_a_client_not_revocable_and_pauses_grow() {
        let mut lease = Lease::open(Nanos::ZERO, Epoch(0));
        let mut pauses = Vec::new();
        for round in 0..3 {
            let epoch = lease.revoke(Nanos::ZERO, WITHIN);
            let answered = lease.answer(Nanos::ZERO, epoch, Drain::TimedOut);
            assert_eq!(answered, Answered::Failed { gave_up: round == 2 });
            assert!(lease.is_open());
            pauses.push(lease.retry_at());
        }
        assert!(lease.not_revocable());
        assert!(pauses.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn silence_is_reported_once_and_a_late_answer_still_counts() {
        let mut lease = Lease::open(Nanos::ZERO, Epoch(0));
        let epoch = lease.revoke(Nanos::ZERO, WITHIN);
        assert!(!lease.expire(WITHIN));
        assert!(lease.expire(WITHIN + Nanos::SECOND));
        assert!(!lease.expire(WITHIN + Nanos::SECOND));
        let done = Drain::Done { took: Nanos::seconds(9) };
        assert_eq!(lease.answer(Nanos::seconds(9), epoch, done), Answered::Drained);
        assert!(lease.may_take_turns());
    }

    #[test]
    fn a_newcomer_is_neither_waited_for_nor_given_a_turn_before_it_has_drained() {
        let mut lease = Lease::open(Nanos::ZERO, Epoch(0));
        lease.set_newcomer(true);
        assert!(lease.may_take_turns(), "nobody has asked it to drain");
        let epoch = lease.revoke(Nanos::ZERO, WITHIN);
        assert!(!lease.is_waited_for() && !lease.may_take_turns());
        lease.answer(Nanos::ZERO, epoch, Drain::Done { took: Nanos::ZERO });
        lease.grant(Nanos::ZERO);
        assert!(lease.is_waited_for() && lease.may_take_turns());
    }
}
