//! What a client's own work comes to: bursts, pauses, phases, misses, the end.

use crate::{
    sim::{
        access::{Cursor, Order},
        process::State,
        scenario::Access,
        world::World,
    },
    units::Bytes,
};

/// Work within this many nanoseconds of a stop has reached it: event times are rounded up to whole ones.
const REACHED: f64 = 0.5;
/// Bursts vary by this share, so that equal clients do not stay in step.
const JITTER: f64 = 0.1;
/// Pauses vary by this share.
const PAUSE_JITTER: f64 = 0.3;

impl World {
    /// CPU work first, then the GPU's part of the burst.
    pub(crate) fn begin_burst(&mut self, index: usize) {
        let (vary, vary_pause) = (2.0 * self.rng.unit() - 1.0, 2.0 * self.rng.unit() - 1.0);
        let process = &mut self.processes[index];
        let left = process.total() - process.work;
        if process.spec.duty >= 1.0 {
            process.burst_end = process.total();
            return self.begin_gpu_work(index);
        }
        let mut length = process.spec.burst.0 as f64 * (1.0 + JITTER * vary);
        // A remainder too short to be a burst belongs to this one.
        if left - length < process.spec.burst.0 as f64 * 0.5 {
            length = left;
        }
        // A pause begins where it is due.
        if process.spec.pause.is_some() && process.pause_at > process.work {
            length = length.min(process.pause_at - process.work);
        }
        process.burst_end = process.work + length;
        let until = self.now + process.cpu_before(length, PAUSE_JITTER * vary_pause);
        self.set_state(index, State::Cpu { until });
    }

    pub(crate) fn begin_gpu_work(&mut self, index: usize) {
        self.processes[index].burst_began = self.now;
        let state = if self.processes[index].may_run() { State::Runs } else { State::Gated };
        self.set_state(index, state);
    }

    /// The next phase of memory use begins.
    pub(crate) fn enter_phase(&mut self, index: usize) {
        let number = self.processes[index].next_phase;
        self.processes[index].next_phase += 1;
        let Some(phase) = self.processes[index].spec.phases.get(number).cloned() else { return };
        if !self.processes[index].spec.shim {
            return;
        }
        // A new phase is a reason to look again, for whoever knows of it.
        self.requests.push(index);
        let (work, total) = (self.processes[index].work, self.processes[index].spec.gpu_work);
        let all = self.processes[index].blocks();
        let used = u32::try_from(phase.working_set.0.div_ceil(Bytes::BLOCK.0)).unwrap_or(u32::MAX);
        for seat in 0..self.processes[index].seats.len() {
            let rng = &mut self.rng;
            let mut cursor = match phase.access {
                Access::Cyclic => Cursor::new(Order::Sweep, used, phase.sweep, work, work, rng),
                Access::Random => Cursor::new(Order::Random, used, phase.sweep, work, work, rng),
                Access::Stream => Cursor::new(Order::Sweep, all, total, 0.0, work, rng),
            };
            let seat = &mut self.processes[index].seats[seat];
            cursor.locate(work, &seat.resident);
            seat.cursor = cursor;
        }
    }

    /// What the client's own work has come to.
    pub(crate) fn settle_work(&mut self, index: usize) {
        while self.processes[index].state == State::Runs {
            let process = &mut self.processes[index];
            let stop = process.stop_at();
            if process.work + REACHED < stop {
                break;
            }
            process.work = stop;
            let phase = process.spec.phases.get(process.next_phase);
            if phase.is_some_and(|phase| phase.after.0 as f64 <= stop) {
                self.enter_phase(index);
            } else if !process.may_run() {
                self.settle_drains(index);
            } else if stop >= process.burst_end {
                self.end_burst(index);
            } else if let Some(seat) = process.missing_seat() {
                self.stall(index, seat);
            }
        }
    }

    fn end_burst(&mut self, index: usize) {
        let process = &mut self.processes[index];
        process.responses.push(self.now.since(process.burst_began));
        if process.work < process.total() {
            self.begin_burst(index);
            self.settle_drains(index);
        } else {
            self.processes[index].finish = Some(self.now);
            self.end(index, State::Done);
            self.last_finish = Some(self.now);
            self.work_at_last_finish = self.gpu_time();
        }
    }
}
