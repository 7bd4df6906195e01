//! A turn: the jobs that hold a GPU together, or are about to.

use serde::{Deserialize, Serialize};

use crate::{
    id::JobId,
    units::{Bytes, Nanos},
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Turn {
    /// In order.
    pub(crate) jobs: Vec<JobId>,
    pub(crate) stage: TurnStage,
    pub(crate) kind: Kind,
    /// Time of this turn in which somebody else waited, booked up to `booked`.
    pub(crate) contested: Nanos,
    /// The part of it that lies before an interruption.
    pub(crate) before: Nanos,
    booked: Nanos,
    /// Somebody else waits.
    contended: bool,
    pub(crate) press: Press,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TurnStage {
    /// Others still drain, or the job does not hold all of its GPUs yet.
    Acquiring,
    /// Its gates are open.
    Running {
        /// Since when.
        since: Nanos,
    },
}

/// What kind of turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// A set's regular turn.
    Regular,
    /// An interactive job runs between, or within, the turns of others.
    Interlude,
    /// Everybody runs, to see whether turns are needed.
    Probe(Probe),
}

/// What was seen of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Probe {
    pub(crate) length: Nanos,
    pub(crate) evicted: Bytes,
    /// What came back in the last bin.
    pub(crate) last_returned: Bytes,
}

/// How urgently somebody else waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Press {
    /// As usual.
    #[default]
    None,
    /// Somebody of a higher class, or with other GPUs that stand idle: the turn lasts no longer than is worth
    /// its hand-over.
    Short,
    /// Somebody who will be done in a moment.
    Now,
}

impl Turn {
    pub(crate) fn new(now: Nanos, jobs: Vec<JobId>, kind: Kind) -> Self {
        Self {
            jobs,
            stage: TurnStage::Acquiring,
            kind,
            contested: Nanos::ZERO,
            before: Nanos::ZERO,
            booked: now,
            contended: false,
            press: Press::None,
        }
    }

    /// The turn was interrupted and goes on, once its jobs have the GPU again.
    pub(crate) fn resume(&mut self, now: Nanos) {
        self.stage = TurnStage::Acquiring;
        self.press = Press::None;
        self.before = self.contested;
        self.contended = false;
        self.booked = now;
    }

    /// Books the time until now, and notes whether somebody else waits from here on.
    pub(crate) fn book(&mut self, now: Nanos, contended: bool) {
        if self.contended {
            self.contested += now.since(self.booked);
        }
        self.booked = self.booked.max(now);
        self.contended = contended;
    }
}
