//! Taking a GPU away and giving it back.
//!
//! A revocation has two steps with one deadline: wait until no thread is inside the gate, then until every
//! context is idle. Whatever goes wrong, the gate opens again and the agent learns that the client runs on: work
//! that is held back while other work of the same program waits for it would never end.

use std::time::Duration;

use nvshare_wire::{ClientMessage, DrainOutcome, GpuUuid, page::SLOTS};

use super::{
    drainer::Drainers,
    link::{Ended, Link},
};
use crate::{
    devices::Drained,
    gate::{self, thread},
    log::debug,
    state::State,
    sys,
};

/// A revocation that is being carried out.
#[derive(Clone, Copy, Debug)]
struct Revocation {
    gpu: GpuUuid,
    epoch: u64,
    began_ns: u64,
    deadline_ns: u64,
}

/// Where a GPU stands.
#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    /// The program may use it.
    #[default]
    Granted,
    /// Revoked a moment ago: the gate is not yet closed.
    Revoked(Revocation),
    /// Closed; threads may be inside.
    Emptying(Revocation),
    /// Nobody inside; the drain is under way.
    Draining(Revocation),
    /// Drained and given away.
    Closed,
}

/// All GPUs of a session.
#[derive(Debug, Default)]
pub(super) struct Handovers {
    phases: [Phase; SLOTS],
    epochs: [u64; SLOTS],
    waiting: [u32; SLOTS],
}

/// How often to look whether the last thread has left the gate.
const EMPTYING: Duration = Duration::from_millis(1);

impl Handovers {
    /// How soon to look again.
    pub(super) fn next_look(&self) -> Duration {
        let now = sys::now_ns();
        self.phases
            .iter()
            .map(|phase| match phase {
                Phase::Granted | Phase::Closed => Duration::MAX,
                Phase::Revoked(_) => Duration::ZERO,
                Phase::Emptying(_) => EMPTYING,
                Phase::Draining(revocation) => {
                    Duration::from_nanos(revocation.deadline_ns.saturating_sub(now))
                }
            })
            .min()
            .unwrap_or(Duration::MAX)
    }

    /// Whether a message is newer than what was heard of this GPU.
    fn is_news(&mut self, slot: usize, epoch: u64) -> bool {
        let newer = epoch > self.epochs[slot];
        if newer {
            self.epochs[slot] = epoch;
        }
        newer
    }

    /// The agent grants the GPU. A repeated grant is answered again: the first answer may have been lost on it.
    pub(super) fn granted(
        &mut self,
        slot: usize,
        gpu: GpuUuid,
        epoch: u64,
        link: &mut Link,
    ) -> Result<(), Ended> {
        if !self.is_news(slot, epoch) && epoch != self.epochs[slot] {
            return Ok(());
        }
        self.phases[slot] = Phase::Granted;
        gate::open(slot);
        debug!("granted, epoch {epoch}");
        link.send(&ClientMessage::Resumed { gpu, epoch, moved: 0, moved_ns: 0 }, None)
    }

    /// The agent revokes the GPU.
    pub(super) fn revoked(&mut self, slot: usize, gpu: GpuUuid, epoch: u64, drain: Duration) {
        if self.is_news(slot, epoch) {
            debug!("revoked, epoch {epoch}, {drain:?} to drain");
            let began_ns = sys::now_ns();
            let deadline_ns = began_ns.saturating_add(drain.as_nanos() as u64);
            self.phases[slot] = Phase::Revoked(Revocation { gpu, epoch, began_ns, deadline_ns });
        }
    }

    /// Takes every revocation as far as it goes now.
    pub(super) fn advance(
        &mut self,
        state: &State,
        drainers: &mut Drainers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        for (slot, ticket, outcome) in drainers.ended() {
            if let Phase::Draining(revocation) = self.phases[slot]
                && revocation.epoch == ticket
            {
                let outcome = match outcome {
                    Some(Drained::Idle) => DrainOutcome::Drained,
                    Some(Drained::Capturing) => DrainOutcome::Capturing,
                    None => DrainOutcome::TimedOut,
                };
                self.finish(slot, &revocation, outcome, link)?;
            }
        }
        for slot in 0..SLOTS {
            self.advance_one(slot, state, drainers, link)?;
        }
        Ok(())
    }

    fn advance_one(
        &mut self,
        slot: usize,
        state: &State,
        drainers: &mut Drainers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        let revocation = match self.phases[slot] {
            Phase::Granted | Phase::Closed => return Ok(()),
            Phase::Revoked(revocation) => {
                if state.captures.any() {
                    return self.finish(slot, &revocation, DrainOutcome::Capturing, link);
                }
                if !gate::close(slot) {
                    return self.finish(slot, &revocation, DrainOutcome::TimedOut, link);
                }
                self.phases[slot] = Phase::Emptying(revocation);
                revocation
            }
            Phase::Emptying(revocation) | Phase::Draining(revocation) => revocation,
        };
        if let Phase::Emptying(_) = self.phases[slot] {
            let is_empty = thread::sum(slot).inside == 0;
            // No capture begins while the gate is closed, but one may have begun in the moment before, by a thread that was
            // inside until now. So this comes after the look at the threads.
            if state.captures.any() {
                return self.finish(slot, &revocation, DrainOutcome::Capturing, link);
            }
            if is_empty && drainers.begin(slot, revocation.epoch) {
                self.phases[slot] = Phase::Draining(revocation);
            }
        }
        if sys::now_ns() >= revocation.deadline_ns {
            return self.finish(slot, &revocation, DrainOutcome::TimedOut, link);
        }
        Ok(())
    }

    fn finish(
        &mut self,
        slot: usize,
        revocation: &Revocation,
        outcome: DrainOutcome,
        link: &mut Link,
    ) -> Result<(), Ended> {
        self.phases[slot] = match outcome {
            DrainOutcome::Drained => Phase::Closed,
            DrainOutcome::TimedOut | DrainOutcome::Capturing => {
                gate::open(slot);
                Phase::Granted
            }
        };
        let drain_ns = sys::now_ns() - revocation.began_ns;
        debug!("epoch {}: {outcome:?} after {} us", revocation.epoch, drain_ns / 1000);
        let Revocation { gpu, epoch, .. } = *revocation;
        link.send(&ClientMessage::Revoked { gpu, epoch, outcome, drain_ns, moved: 0 }, None)
    }

    /// Tells the agent where threads wait or wait no longer.
    pub(super) fn tell_waiting(&mut self, state: &State, link: &mut Link) -> Result<(), Ended> {
        for (slot, device) in state.devices.iter() {
            let threads = gate::waiting(slot);
            if threads != self.waiting[slot] {
                self.waiting[slot] = threads;
                link.send(&ClientMessage::Waiting { gpu: device.uuid, threads }, None)?;
            }
        }
        Ok(())
    }

    /// Whether the agent believes that work is held back here.
    pub(super) fn holds_back(&self) -> bool {
        self.phases.iter().any(|phase| !matches!(phase, Phase::Granted))
    }

    /// Whether a gate that this session closed is open: a waiting thread has opened it.
    pub(super) fn was_opened(&self) -> bool {
        let closed = |phase: &Phase| matches!(phase, Phase::Emptying(_) | Phase::Draining(_) | Phase::Closed);
        self.phases.iter().enumerate().any(|(slot, phase)| closed(phase) && !gate::is_closed(slot))
    }
}
