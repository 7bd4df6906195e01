//! Hand-overs: gates that close and open, and what the shim moves meanwhile.
//!
//! Whoever leaves pushes out at most the shortfall it was told, once its work has drained; whoever comes brings
//! back what it held when its gate last closed. The two overlap: what comes waits for the room that what
//! leaves makes, chunk by chunk. Where nothing is left to wait for, the driver evicts.
//!
//! **Stricter than the shim.** A gate opens when all that was asked for is back, the shim's after its first window; and who is
//! revoked before that brings back next time only what it had got. So turns shorter than a hand-over come out worse here.

use std::collections::VecDeque;

use crate::{
    id::Epoch,
    input::{Drain, Input},
    sim::{
        fault::transfer,
        process::{Gate, State},
        world::{Engine, World, client_id, gpu_id},
    },
    units::{Bytes, Nanos},
};

/// Blocks that are moved by one call.
const CHUNK: usize = 32;

/// The hand-overs under way on one GPU.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mover {
    outs: VecDeque<Job>,
    ins: VecDeque<Job>,
    out_now: Option<Chunk>,
    in_now: Option<Chunk>,
}

#[derive(Clone, Debug)]
struct Job {
    process: usize,
    /// Still to move; the next is the last.
    blocks: Vec<u32>,
    moved: u64,
}

#[derive(Clone, Debug)]
struct Chunk {
    process: usize,
    blocks: Vec<u32>,
    until: Nanos,
}

impl Mover {
    pub(crate) fn due(&self) -> Option<Nanos> {
        let times = [&self.out_now, &self.in_now];
        times.into_iter().flatten().map(|chunk| chunk.until).min()
    }

    /// The client is gone. A chunk under way ends by itself.
    pub(crate) fn forget(&mut self, process: usize) {
        self.outs.retain(|job| job.process != process);
        self.ins.retain(|job| job.process != process);
    }
}

impl World {
    fn seat_of(&self, index: usize, gpu: usize) -> Option<usize> {
        self.processes.get(index)?.seats.iter().position(|seat| seat.gpu == gpu)
    }

    /// The agent asks a client to close its gate.
    pub(crate) fn revoke(&mut self, index: usize, gpu: usize, epoch: Epoch, within: Nanos, shortfall: Bytes) {
        let Some(seat) = self.seat_of(index, gpu) else { return };
        let in_flight = self.cards[gpu].model.in_flight.0 as f64;
        let (now, process) = (self.now, &mut self.processes[index]);
        let opening = matches!(process.seats[seat].gate, Gate::Opening { .. });
        let target = if opening { process.work } else { process.work + in_flight };
        process.seats[seat].gate =
            Gate::Draining { epoch, since: now, deadline: now + within, target, shortfall };
        if opening {
            self.movers[gpu].ins.retain(|job| job.process != index);
        }
        self.settle_drains(index);
        self.start_moves(gpu);
    }

    /// The agent lets a client run.
    pub(crate) fn grant(&mut self, index: usize, gpu: usize, epoch: Epoch, prefetch: Bytes) {
        let Some(seat) = self.seat_of(index, gpu) else { return };
        let place = &self.processes[index].seats[seat];
        let mut blocks: Vec<u32> = Vec::new();
        if place.gate == Gate::Closed && self.handover != Engine::Demand {
            let limit = usize::try_from(prefetch.0 / Bytes::BLOCK.0).unwrap_or(usize::MAX);
            let out = place.left.iter().copied().filter(|&block| !place.resident.contains(block));
            blocks.extend(out.take(limit));
            blocks.reverse();
        }
        // What has not left yet stays.
        self.movers[gpu].outs.retain(|job| job.process != index);
        let closed = place.gate == Gate::Closed;
        self.processes[index].seats[seat].gate = Gate::Opening { epoch, since: self.now };
        if !closed {
            // It has not stopped running.
            return self.opened(gpu, index, seat, 0);
        }
        self.movers[gpu].ins.push_back(Job { process: index, blocks, moved: 0 });
        self.start_moves(gpu);
    }

    /// Opens a gate without being asked to: nobody is there who could.
    pub(crate) fn open(&mut self, index: usize, gpu: usize) {
        let Some(seat) = self.seat_of(index, gpu) else { return };
        self.movers[gpu].ins.retain(|job| job.process != index);
        self.processes[index].seats[seat].gate = Gate::Open;
        self.let_run(index);
    }

    fn let_run(&mut self, index: usize) {
        if self.processes[index].state == State::Gated && self.processes[index].may_run() {
            self.set_state(index, State::Runs);
            self.settle_work(index);
        }
    }

    /// Closes the gates behind which nothing is in flight any more.
    pub(crate) fn settle_drains(&mut self, index: usize) {
        for seat in 0..self.processes[index].seats.len() {
            let process = &mut self.processes[index];
            let Gate::Draining { epoch, since, target, shortfall, .. } = process.seats[seat].gate else {
                continue;
            };
            if matches!(process.state, State::Runs | State::Stalled) && process.work < target {
                continue;
            }
            let place = &mut process.seats[seat];
            place.gate = Gate::Closed;
            let (gpu, base) = (place.gpu, place.base);
            let held = self.cards[gpu].blocks_of(index as u32).map(|number| number - base);
            place.left = held.collect();
            if process.state == State::Runs {
                self.set_state(index, State::Gated);
            }
            let mut blocks: Vec<u32> = Vec::new();
            if self.handover != Engine::Demand {
                let limit = usize::try_from(shortfall.0.div_ceil(Bytes::BLOCK.0)).unwrap_or(usize::MAX);
                blocks
                    .extend(self.cards[gpu].blocks_of(index as u32).take(limit).map(|number| number - base));
                blocks.reverse();
            }
            let moved = Bytes(blocks.len() as u64 * Bytes::BLOCK.0);
            if !blocks.is_empty() {
                self.movers[gpu].outs.push_back(Job { process: index, blocks, moved: 0 });
                self.start_moves(gpu);
            }
            let drain = Drain::Done { took: self.now.since(since) };
            self.news.push_back(Input::Revoked {
                client: client_id(index),
                gpu: gpu_id(gpu),
                epoch,
                drain,
                moved,
            });
        }
    }

    /// Opens again the gates whose drain did not end in time.
    pub(crate) fn settle_deadlines(&mut self, index: usize) {
        for seat in 0..self.processes[index].seats.len() {
            let place = &mut self.processes[index].seats[seat];
            if let Gate::Draining { epoch, deadline, .. } = place.gate
                && deadline <= self.now
            {
                place.gate = Gate::Open;
                self.news.push_back(Input::Revoked {
                    client: client_id(index),
                    gpu: gpu_id(place.gpu),
                    epoch,
                    drain: Drain::TimedOut,
                    moved: Bytes::ZERO,
                });
            }
        }
    }

    pub(crate) fn settle_moves(&mut self, gpu: usize) {
        while self.movers[gpu].due().is_some_and(|at| at <= self.now) {
            let now = self.now;
            if let Some(chunk) = self.movers[gpu].out_now.take_if(|chunk| chunk.until <= now) {
                self.finish_out(gpu, &chunk);
            }
            if let Some(chunk) = self.movers[gpu].in_now.take_if(|chunk| chunk.until <= now) {
                self.finish_in(gpu, &chunk);
            }
            self.start_moves(gpu);
        }
    }

    fn start_moves(&mut self, gpu: usize) {
        while self.movers[gpu].out_now.is_none() && self.start_out(gpu) {}
        while self.movers[gpu].in_now.is_none() && self.start_in(gpu) {}
    }

    /// What is left of a rate while the other direction is busy too.
    fn rate(&self, gpu: usize, alone: Bytes, other_busy: bool) -> Bytes {
        if other_busy { alone.per_mille(u64::from(self.cards[gpu].model.duplex_milli)) } else { alone }
    }

    /// True if there may be more to do.
    fn start_out(&mut self, gpu: usize) -> bool {
        let Some(job) = self.movers[gpu].outs.front_mut() else { return false };
        let index = job.process;
        let blocks = job.blocks.split_off(job.blocks.len().saturating_sub(CHUNK));
        if blocks.is_empty() {
            self.movers[gpu].outs.pop_front();
            return true;
        }
        let Some(seat) = self.seat_of(index, gpu) else { return true };
        let place = &self.processes[index].seats[seat];
        let blocks: Vec<u32> =
            blocks.into_iter().rev().filter(|&block| place.resident.contains(block)).collect();
        let known = blocks.iter().filter(|&&block| place.hosted.contains(block)).count() as u64;
        let model = &self.cards[gpu].model;
        let push = if self.handover == Engine::Protected { model.protected_out } else { model.prefetch_out };
        let push = self.rate(gpu, push, !self.movers[gpu].ins.is_empty());
        let took = transfer(known, push) + transfer(blocks.len() as u64 - known, model.first_out);
        self.movers[gpu].out_now = Some(Chunk { process: index, blocks, until: self.now + took });
        true
    }

    fn finish_out(&mut self, gpu: usize, chunk: &Chunk) {
        let Some(seat) = self.seat_of(chunk.process, gpu) else { return };
        for &block in &chunk.blocks {
            let place = &self.processes[chunk.process].seats[seat];
            if place.resident.contains(block) {
                self.leave(gpu, place.base + block, false, None);
            }
        }
    }

    /// True if there may be more to do.
    fn start_in(&mut self, gpu: usize) -> bool {
        let Some(job) = self.movers[gpu].ins.front() else { return false };
        let index = job.process;
        let Some(seat) = self.seat_of(index, gpu) else {
            self.movers[gpu].ins.pop_front();
            return true;
        };
        if job.blocks.is_empty() {
            self.finish_opening(gpu, index, seat);
            return true;
        }
        let wanted = job.blocks.len().min(CHUNK).min((self.cards[gpu].capacity() / 2).max(1) as usize);
        let leaving = self.movers[gpu].out_now.is_some() || !self.movers[gpu].outs.is_empty();
        let mut took = Nanos::ZERO;
        if self.cards[gpu].room() < wanted as i64 {
            if leaving {
                return false;
            }
            took = self.make_room(gpu, wanted as u32, Some(index));
        }
        let room = self.cards[gpu].room().max(0) as usize;
        let Some(job) = self.movers[gpu].ins.front_mut() else { return false };
        let mut blocks = job.blocks.split_off(job.blocks.len() - wanted.min(room));
        blocks.reverse();
        let place = &self.processes[index].seats[seat];
        blocks.retain(|&block| !place.resident.contains(block));
        if room == 0 {
            // Nothing can be brought back: faults will have to do.
            self.finish_opening(gpu, index, seat);
            return true;
        }
        let rate = self.rate(gpu, self.cards[gpu].model.prefetch_in, leaving);
        took += transfer(blocks.len() as u64, rate);
        self.cards[gpu].reserve(blocks.len() as u32);
        self.movers[gpu].in_now = Some(Chunk { process: index, blocks, until: self.now + took });
        true
    }

    fn finish_in(&mut self, gpu: usize, chunk: &Chunk) {
        self.cards[gpu].release(chunk.blocks.len() as u32);
        let Some(seat) = self.seat_of(chunk.process, gpu) else { return };
        for &block in &chunk.blocks {
            self.arrive(gpu, chunk.process, seat, block, false);
        }
        let process = &mut self.processes[chunk.process];
        let (work, place) = (process.work, &mut process.seats[seat]);
        place.cursor.locate(work, &place.resident);
        if let Some(job) = self.movers[gpu].ins.iter_mut().find(|job| job.process == chunk.process) {
            job.moved += chunk.blocks.len() as u64;
        }
    }

    fn finish_opening(&mut self, gpu: usize, index: usize, seat: usize) {
        let Some(job) = self.movers[gpu].ins.pop_front() else { return };
        self.opened(gpu, index, seat, job.moved);
    }

    /// The gate opens; so many blocks were brought back for it.
    fn opened(&mut self, gpu: usize, index: usize, seat: usize, moved: u64) {
        let place = &mut self.processes[index].seats[seat];
        if let Gate::Opening { epoch, since } = place.gate {
            place.gate = Gate::Open;
            self.news.push_back(Input::Resumed {
                client: client_id(index),
                gpu: gpu_id(gpu),
                epoch,
                moved: Bytes(moved * Bytes::BLOCK.0),
                took: self.now.since(since),
            });
            self.let_run(index);
        }
    }
}
