//! The driver's fault service: rounds one after the other, each for one client, evicting whoever is oldest.

use std::collections::VecDeque;

use crate::{
    sim::{access::ROUND, process::State, shadow::Class, world::World},
    units::{Bytes, Nanos},
};

/// GPU fault entries that a block raises, as measured on an H100 (80,000 in a GiB).
pub(crate) const FAULTS_PER_BLOCK: u64 = 156;
/// Where nothing can be evicted, faults are tried again after this long.
const RETRY: Nanos = Nanos::millis(10);

/// The fault service of one GPU.
#[derive(Clone, Debug, Default)]
pub(crate) struct FaultService {
    /// Clients that wait for it, with their seat.
    queue: VecDeque<(usize, usize)>,
    round: Option<Round>,
    /// Time spent since the last sample.
    pub(crate) busy: Nanos,
    /// An unused list, kept for its memory.
    spare: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Round {
    process: usize,
    seat: usize,
    blocks: Vec<u32>,
    until: Nanos,
}

impl FaultService {
    pub(crate) fn due(&self) -> Option<Nanos> {
        self.round.as_ref().map(|round| round.until)
    }

    pub(crate) fn pass(&mut self, elapsed: Nanos) {
        if self.round.is_some() {
            self.busy += elapsed;
        }
    }
}

/// The time it takes to move so many blocks.
pub(crate) fn transfer(blocks: u64, rate: Bytes) -> Nanos {
    Nanos((u128::from(blocks * Bytes::BLOCK.0) * 1_000_000_000 / u128::from(rate.0.max(1))) as u64)
}

impl World {
    /// The client's next touch misses: it waits for the fault service.
    pub(crate) fn stall(&mut self, index: usize, seat: usize) {
        self.set_state(index, State::Stalled);
        let gpu = self.processes[index].seats[seat].gpu;
        self.services[gpu].queue.push_back((index, seat));
        self.start_round(gpu);
    }

    pub(crate) fn settle_faults(&mut self, gpu: usize) {
        while self.services[gpu].due().is_some_and(|at| at <= self.now) {
            let Some(round) = self.services[gpu].round.take() else { return };
            self.finish_round(gpu, round);
            self.start_round(gpu);
        }
    }

    fn start_round(&mut self, gpu: usize) {
        while self.services[gpu].round.is_none() {
            let Some((index, seat)) = self.services[gpu].queue.pop_front() else { return };
            if self.processes[index].state != State::Stalled {
                continue;
            }
            let limit = (self.cards[gpu].capacity() / 2).clamp(1, ROUND);
            let mut blocks = std::mem::take(&mut self.services[gpu].spare);
            let place = &self.processes[index].seats[seat];
            place.cursor.due(&place.resident, limit, &mut self.rng, &mut blocks);
            let mut took = self.make_room(gpu, blocks.len() as u32, Some(index));
            let room = self.cards[gpu].room().max(0) as usize;
            let wanted = blocks.len();
            blocks.truncate(room);
            if wanted > 0 && blocks.is_empty() {
                took += RETRY;
            }
            let model = &self.cards[gpu].model;
            let place = &self.processes[index].seats[seat];
            let back = blocks.iter().filter(|&&block| place.populated.contains(block)).count() as u64;
            took += transfer(back, model.fault_in);
            took += transfer(blocks.len() as u64 - back, model.first_touch);
            self.cards[gpu].reserve(blocks.len() as u32);
            let until = self.now + took;
            self.services[gpu].round = Some(Round { process: index, seat, blocks, until });
            self.settle_empty_round(gpu);
        }
    }

    /// A miss that somebody else has cured meanwhile takes no time.
    fn settle_empty_round(&mut self, gpu: usize) {
        if self.services[gpu].due().is_some_and(|at| at <= self.now)
            && let Some(round) = self.services[gpu].round.take()
        {
            self.finish_round(gpu, round);
        }
    }

    fn finish_round(&mut self, gpu: usize, round: Round) {
        let Round { process: index, seat, mut blocks, until: _ } = round;
        self.cards[gpu].release(blocks.len() as u32);
        if self.processes[index].alive() {
            for &block in &blocks {
                self.arrive(gpu, index, seat, block, true);
            }
            let process = &mut self.processes[index];
            let (work, place) = (process.work, &mut process.seats[seat]);
            place.tally.faults += FAULTS_PER_BLOCK * blocks.len() as u64;
            if blocks.is_empty() {
                place.cursor.locate(work, &place.resident);
            } else {
                place.cursor.served(work, blocks.len() as u32, &place.resident, &mut self.rng);
            }
            self.resume(index);
        }
        blocks.clear();
        self.services[gpu].spare = blocks;
    }

    /// The client stalls no longer.
    fn resume(&mut self, index: usize) {
        if self.processes[index].state != State::Stalled {
            return;
        }
        let state = if self.processes[index].may_run() { State::Runs } else { State::Gated };
        self.set_state(index, state);
        self.settle_drains(index);
        self.settle_work(index);
    }

    /// A block comes to the GPU, by a fault or by the shim's hand.
    pub(crate) fn arrive(&mut self, gpu: usize, index: usize, seat: usize, block: u32, fault: bool) {
        let card = &mut self.cards[gpu];
        let place = &mut self.processes[index].seats[seat];
        if !place.resident.insert(block) {
            return;
        }
        card.push(place.base + block);
        if place.populated.insert(block) {
            return;
        }
        place.tally.came += 1;
        card.moved += 1;
        let held = place.resident.count() - 1;
        let capacity = card.capacity();
        let class = card.shadow.as_mut().map(|shadow| shadow.returned(index as u32, block, held, capacity));
        if !fault {
            return;
        }
        match class {
            Some(Class::Curable) => {
                place.tally.curable += 1;
                self.note_curable(gpu);
            }
            Some(Class::Own) => place.tally.own += 1,
            Some(Class::FirstTouch) | None => {}
        }
    }

    /// A block leaves the GPU. True if host pages had to be allocated for it.
    pub(crate) fn leave(&mut self, gpu: usize, number: u32, evicted: bool, by: Option<usize>) -> bool {
        let card = &mut self.cards[gpu];
        let owner = card.owner(number) as usize;
        card.remove(number);
        card.moved += 1;
        let process = &mut self.processes[owner];
        let Some(place) = process.seats.iter_mut().find(|seat| seat.gpu == gpu) else { return false };
        let block = number - place.base;
        place.resident.remove(block);
        place.cursor.lost(process.work, block);
        place.tally.went += 1;
        if evicted {
            place.tally.evicted += 1;
            place.tally.evicted_by_others += u64::from(by != Some(owner));
        }
        if let Some(shadow) = &mut card.shadow {
            shadow.evicted(owner as u32, block);
        }
        place.hosted.insert(block)
    }

    /// Evicts, oldest first, until there is room for so many blocks; the time that takes.
    pub(crate) fn make_room(&mut self, gpu: usize, blocks: u32, by: Option<usize>) -> Nanos {
        let (mut known, mut fresh) = (0, 0);
        while self.cards[gpu].room() < i64::from(blocks)
            && let Some(number) = self.cards[gpu].oldest()
        {
            if self.leave(gpu, number, true, by) {
                fresh += 1;
            } else {
                known += 1;
            }
        }
        let model = &self.cards[gpu].model;
        transfer(known, model.evict) + transfer(fresh, model.first_out)
    }
}
