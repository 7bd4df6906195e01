//! One client: its work, its bursts, its memory on each of its GPUs.

use crate::{
    id::Epoch,
    sim::{access::Cursor, blocks::Blocks, scenario::ClientSpec},
    units::{Bytes, Nanos},
};

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It has not started.
    Absent,
    /// It computes on the CPU.
    Cpu {
        /// The next burst begins.
        until: Nanos,
    },
    /// It has GPU work, and a gate is closed.
    Gated,
    /// Its GPU work runs, or has its share of the GPU's time.
    Runs,
    /// A GPU waits for memory.
    Stalled,
    /// Finished.
    Done,
    /// Killed, or the simulation had no more time for it.
    Killed,
}

/// A gate on one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Gate {
    Open,
    /// Asked to close; what is in flight runs out.
    Draining {
        epoch: Epoch,
        since: Nanos,
        deadline: Nanos,
        /// GPU work at which nothing is in flight any more.
        target: f64,
        shortfall: Bytes,
    },
    Closed,
    /// Granted; memory is brought back before the gate opens.
    Opening {
        epoch: Epoch,
        since: Nanos,
    },
}

/// What moved since the last sample, in blocks unless said otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) faults: u64,
    pub(crate) came: u64,
    pub(crate) went: u64,
    pub(crate) evicted: u64,
    pub(crate) evicted_by_others: u64,
    pub(crate) curable: u64,
    pub(crate) own: u64,
}

/// A client's memory on one GPU.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) gpu: usize,
    /// The card's number of the first block.
    pub(crate) base: u32,
    pub(crate) resident: Blocks,
    /// Touched at least once.
    pub(crate) populated: Blocks,
    /// Host pages exist.
    pub(crate) hosted: Blocks,
    /// What was resident when the gate last closed, in the order in which it came.
    pub(crate) left: Vec<u32>,
    pub(crate) cursor: Cursor,
    pub(crate) gate: Gate,
    pub(crate) tally: Tally,
}

#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) spec: ClientSpec,
    pub(crate) state: State,
    pub(crate) seats: Vec<Seat>,
    /// GPU work done, in nanoseconds.
    pub(crate) work: f64,
    /// GPU time of all clients when it started.
    pub(crate) work_before: f64,
    /// GPU work at which the current burst ends.
    pub(crate) burst_end: f64,
    /// GPU work at which the next pause is due.
    pub(crate) pause_at: f64,
    /// Pauses so far, and by how much of its length the last one was longer.
    pauses: u64,
    longer: f64,
    /// The phase that comes next.
    pub(crate) next_phase: usize,
    pub(crate) weight_milli: u32,
    /// When it last did GPU work.
    pub(crate) last_used: Nanos,
    /// GPU work at the last sample.
    pub(crate) sampled_work: f64,
    pub(crate) stalled: Nanos,
    pub(crate) waited: Nanos,
    /// Waits of interactive interest: how long each burst waited for its gate.
    pub(crate) waits: Vec<Nanos>,
    pub(crate) waiting_since: Nanos,
    /// When the GPU work of the current burst was there to be done, and how long each burst took from then on.
    pub(crate) burst_began: Nanos,
    pub(crate) responses: Vec<Nanos>,
    pub(crate) finish: Option<Nanos>,
}

impl Process {
    pub(crate) fn new(spec: ClientSpec) -> Self {
        Self {
            state: State::Absent,
            seats: Vec::new(),
            work: 0.0,
            work_before: 0.0,
            burst_end: 0.0,
            pause_at: 0.0,
            pauses: 0,
            longer: 0.0,
            next_phase: 0,
            weight_milli: spec.weight_milli,
            last_used: Nanos::ZERO,
            sampled_work: 0.0,
            stalled: Nanos::ZERO,
            waited: Nanos::ZERO,
            waits: Vec::new(),
            waiting_since: Nanos::ZERO,
            burst_began: Nanos::ZERO,
            responses: Vec::new(),
            finish: None,
            spec,
        }
    }

    /// It has started and not ended.
    pub(crate) fn alive(&self) -> bool {
        !matches!(self.state, State::Absent | State::Done | State::Killed)
    }

    /// All that the client has to do.
    pub(crate) fn total(&self) -> f64 {
        self.spec.gpu_work.0 as f64
    }

    /// GPU time it has had, on all of its GPUs together.
    pub(crate) fn gpu_time(&self) -> f64 {
        self.work * self.spec.gpus.len() as f64
    }

    /// CPU time that precedes a burst of so much GPU work. Pauses vary by `vary` of their length, in pairs that
    /// even out.
    pub(crate) fn cpu_before(&mut self, burst: f64, vary: f64) -> Nanos {
        let (total, duty) = (self.total(), self.spec.duty);
        let cpu = total * (1.0 - duty) / duty;
        let Some(pause) = self.spec.pause else { return Nanos((burst * cpu / total).round() as u64) };
        let (length, count) = (pause.length.0 as f64, pause.count(self.spec.gpu_work));
        let mut time = burst * (cpu - length * count as f64).max(0.0) / total;
        while self.pause_at <= self.work {
            self.pause_at += pause.every.0 as f64;
            self.longer = if self.pauses % 2 == 1 {
                -self.longer
            } else if self.pauses + 1 == count {
                0.0
            } else {
                vary
            };
            time += length * (1.0 + self.longer);
            self.pauses += 1;
        }
        Nanos(time.round() as u64)
    }

    /// Blocks it allocates on each of its GPUs.
    pub(crate) fn blocks(&self) -> u32 {
        u32::try_from(self.spec.allocated.0.div_ceil(Bytes::BLOCK.0)).unwrap_or(u32::MAX)
    }

    /// Its gates let it run, or let it finish what is in flight.
    pub(crate) fn may_run(&self) -> bool {
        self.seats.iter().all(|seat| match seat.gate {
            Gate::Open => true,
            Gate::Draining { target, .. } => self.work < target,
            Gate::Closed | Gate::Opening { .. } => false,
        })
    }

    /// GPU work at which something happens to it.
    pub(crate) fn stop_at(&self) -> f64 {
        let mut stop = self.burst_end;
        if let Some(phase) = self.spec.phases.get(self.next_phase) {
            stop = stop.min(phase.after.0 as f64);
        }
        for seat in &self.seats {
            stop = stop.min(seat.cursor.miss_at);
            if let Gate::Draining { target, .. } = seat.gate {
                stop = stop.min(target);
            }
        }
        stop
    }

    /// The seat whose next touch misses now.
    pub(crate) fn missing_seat(&self) -> Option<usize> {
        self.seats.iter().position(|seat| seat.cursor.miss_at <= self.work)
    }

    /// Bytes of its working set in this phase, on each of its GPUs.
    pub(crate) fn working_set(&self) -> Bytes {
        let phase = &self.spec.phases[self.next_phase.saturating_sub(1).min(self.spec.phases.len() - 1)];
        phase.working_set
    }
}
