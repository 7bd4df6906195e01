//! How a kernel spends its time: computing in turns with other processes, and waiting for faults.
//!
//! Computing is simulated by sleeping while holding the card's engine. Sleeps are long enough to be precise; what a sleep
//! took too long is credited against the next. A kernel that waits for faults does not hold the engine.

use std::{
    sync::{MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use super::{Session, SimError, ranges::Touch};
use crate::{
    shared::{CardSlot, FAULT_SLOTS, encode_fault},
    sync::{advance, now_ns, sleep_until, wait_on},
};

/// GPU time is slept off once this much has come together.
const GRAIN_NS: i64 = 200_000;
/// Credit for oversleeping is kept up to this: a process that was stopped for long has not computed meanwhile.
const MAX_CREDIT_NS: i64 = 4_000_000;
/// How long a waiter goes without looking whether a wake-up was lost.
const RECHECK: Duration = Duration::from_millis(20);
/// What a write to a block costs that was pushed out and is write-protected, on top of bringing it back: 64 MiB took
/// 112 to 165 ms on an H100, where they take 10 to 13 otherwise.
const PROTECTED_WRITE_NS: u64 = 4_000_000;
/// A holder this far beyond its slice is dead or stopped.
const OVERRUN_NS: u64 = 100_000_000;

/// One process's GPU time on one card that has been used but not slept off; negative after oversleeping.
#[derive(Debug, Default)]
pub(super) struct EngineTime {
    debt_ns: i64,
}

/// The engine, held.
struct Turn<'a> {
    session: &'a Session,
    card: &'a CardSlot,
    gpu: usize,
    time: MutexGuard<'a, EngineTime>,
}

impl<'a> Turn<'a> {
    fn take(session: &'a Session, gpu: usize) -> Result<Self, SimError> {
        let card = session.card(gpu)?;
        let time = session.engines[gpu].lock().unwrap_or_else(PoisonError::into_inner);
        let turn = Self { session, card, gpu, time };
        turn.wait()?;
        Ok(turn)
    }

    /// Queues up and waits until this process holds the engine.
    fn wait(&self) -> Result<(), SimError> {
        let (engine, slot) = (&self.card.engine, self.session.slot);
        let grant = &self.session.client().grant[self.gpu];
        loop {
            let seen = grant.load(Ordering::Acquire);
            if engine.request(slot) {
                break;
            }
            wait_on(grant, seen, RECHECK);
            if !engine.is_held_by(slot) {
                self.session.check_alive(self.gpu)?;
                let overrun = now_ns() > self.card.slice_end.load(Ordering::Relaxed) + OVERRUN_NS;
                if let Some(holder) = engine.holder().filter(|_| overrun) {
                    engine.take_from(holder, slot);
                }
            }
        }
        self.card.slice_end.store(now_ns() + self.card.slice_ns.load(Ordering::Relaxed), Ordering::Relaxed);
        Ok(())
    }

    fn pass_on(&self, again: bool) {
        if let Some(next) = self.card.engine.pass_on(self.session.slot, again)
            && let Some(client) = self.session.state().clients.get(next)
        {
            advance(&client.grant[self.gpu]);
        }
    }

    /// Computes for that long, slice by slice.
    fn compute(&mut self, nanoseconds: u64) -> Result<(), SimError> {
        let mut left = nanoseconds;
        while left > 0 {
            let piece = left.min(self.card.slice_ns.load(Ordering::Relaxed).max(1));
            left -= piece;
            if self.card.is_lost() {
                return Err(SimError::Lost(self.gpu));
            }
            self.card.busy_ns.fetch_add(piece, Ordering::Relaxed);
            self.time.debt_ns += piece as i64;
            self.sleep_off()?;
        }
        Ok(())
    }

    /// Spends the debt while holding the engine, and passes the engine on whenever a slice has ended.
    fn sleep_off(&mut self) -> Result<(), SimError> {
        while self.time.debt_ns >= GRAIN_NS {
            let start = now_ns();
            let slice_left = self.card.slice_end.load(Ordering::Relaxed).saturating_sub(start);
            sleep_until(start + (self.time.debt_ns as u64).min(slice_left));
            let end = now_ns();
            self.time.debt_ns = (self.time.debt_ns - (end - start) as i64).max(-MAX_CREDIT_NS);
            if end >= self.card.slice_end.load(Ordering::Relaxed) {
                self.pass_on(true);
                self.wait()?;
            }
        }
        Ok(())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.pass_on(false);
    }
}

impl Session {
    /// Touches blocks in order, computing `compute_ns` in all.
    pub(super) fn sweep(&self, gpu: usize, touches: &[Touch], compute_ns: u64) -> Result<(), SimError> {
        let window = (self.card(gpu)?.fault_window.load(Ordering::Relaxed) as usize).clamp(1, FAULT_SLOTS);
        let here = gpu as u8 + 1;
        let resident = |touch: &Touch| {
            let blocks = &self.state().resident;
            blocks.get(touch.block as usize).is_some_and(|word| word.load(Ordering::Acquire) == here)
        };
        // Up to `done` of `touches.len()` blocks, this much has been computed.
        let share = |done: usize| compute_ns as u128 * done as u128 / touches.len().max(1) as u128;
        let mut turn = Turn::take(self, gpu)?;
        if touches.is_empty() {
            return turn.compute(compute_ns);
        }
        let mut done = 0;
        while done < touches.len() {
            let mut next = done + 1;
            if !resident(&touches[done]) {
                next = touches.len().min(done + window);
                let missing: Vec<_> =
                    touches[done..next].iter().filter(|touch| !resident(touch)).copied().collect();
                drop(turn);
                self.fault(gpu, &missing)?;
                let written = missing.iter().filter(|touch| touch.write).map(|touch| touch.address);
                let slow = u64::from(self.protected_of(written)) * PROTECTED_WRITE_NS;
                sleep_until(now_ns() + slow);
                turn = Turn::take(self, gpu)?;
            }
            turn.compute((share(next) - share(done)) as u64)?;
            done = next;
        }
        Ok(())
    }

    /// Raises faults and waits until all have been replayed.
    fn fault(&self, gpu: usize, touches: &[Touch]) -> Result<(), SimError> {
        let client = self.client();
        let mut pending: Vec<(usize, u64)> = Vec::with_capacity(touches.len());
        let mut waiting =
            touches.iter().map(|touch| encode_fault(touch.address, gpu, touch.write)).peekable();
        loop {
            let seen = client.replay.load(Ordering::Acquire);
            let before = pending.len();
            for (index, slot) in client.faults.iter().enumerate() {
                let Some(&word) = waiting.peek() else { break };
                if slot.compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    pending.push((index, word));
                    waiting.next();
                }
            }
            if pending.len() > before {
                advance(&self.card(gpu)?.doorbell);
            }
            pending.retain(|&(index, word)| client.faults[index].load(Ordering::Acquire) == word);
            if pending.is_empty() && waiting.peek().is_none() {
                return Ok(());
            }
            wait_on(&client.replay, seen, RECHECK);
            self.check_alive(gpu)?;
        }
    }
}
