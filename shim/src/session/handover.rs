//! Taking a GPU away and giving it back.
//!
//! A revocation has two steps with one deadline: wait until no thread is inside the gate, then until every
//! context is idle. Whatever goes wrong, the gate opens again and the agent learns that the client runs on: work
//! that is held back while other work of the same program waits for it would never end.
//!
//! Then memory leaves, at most as much as the agent asks for. The agent hears that the GPU is free once the first of it
//! is out; the rest follows, beside what the next client brings back. A client that gets the GPU back brings back what it had,
//! and runs as soon as the first of it is there. No move holds up the answer to the agent, or the gate, beyond a bound.

use std::time::Duration;

use nvshare_wire::{ClientMessage, Direction, DrainOutcome, GpuUuid, Mover, page::SLOTS};

use super::{
    link::{Ended, Link},
    mover::Move,
    worker::{News, Order, Ticket, Workers},
};
use crate::{
    config,
    devices::Drained,
    gate::{self, thread},
    log::debug,
    memory::residency::PIECE,
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
    /// What is to leave, at most.
    shortfall: u64,
}

/// A drain that has ended well, with memory on its way out.
#[derive(Clone, Copy, Debug)]
struct Departure {
    revocation: Revocation,
    drain_ns: u64,
    planned: u64,
}

/// A grant whose gate is about to open.
#[derive(Clone, Copy, Debug)]
struct Return {
    gpu: GpuUuid,
    epoch: u64,
    began_ns: u64,
    /// What may be brought back, at most.
    prefetch: u64,
    /// What is being brought back; 0 before that begins.
    planned: u64,
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
    Draining(Revocation, Ticket),
    /// Drained; the first of its memory is on its way out.
    Leaving(Departure, Ticket),
    /// Drained and given away.
    Closed,
    /// Granted; the first of its memory is on its way back, or waits for what is under way to end.
    Returning(Return, Option<Ticket>),
}

/// A move that was begun, for the agent to hear of its end.
#[derive(Clone, Copy, Debug)]
struct Moving {
    ticket: Ticket,
    gpu: GpuUuid,
    epoch: u64,
    direction: Direction,
}

/// All GPUs of a session.
#[derive(Debug, Default)]
pub(super) struct Handovers {
    phases: [Phase; SLOTS],
    moving: [Option<Moving>; SLOTS],
    epochs: [u64; SLOTS],
    waiting: [u32; SLOTS],
    told: Option<Mover>,
}

/// How often to look whether the last thread has left the gate.
const EMPTYING: Duration = Duration::from_millis(1);
/// How often to look whether a thread that moves memory is still there.
const MOVING: Duration = Duration::from_millis(50);
/// How long a gate that may open stays closed for memory at most.
const RETURN_NS: u64 = 2_000_000_000;

impl Handovers {
    /// How soon to look again.
    pub(super) fn next_look(&self) -> Duration {
        let now = sys::now_ns();
        let moving = if self.moving.iter().any(Option::is_some) { MOVING } else { Duration::MAX };
        self.phases
            .iter()
            .map(|phase| match phase {
                Phase::Granted | Phase::Closed => Duration::MAX,
                Phase::Revoked(_) => Duration::ZERO,
                Phase::Emptying(_) | Phase::Returning(_, None) => EMPTYING,
                Phase::Draining(revocation, _) | Phase::Leaving(Departure { revocation, .. }, _) => {
                    Duration::from_nanos(revocation.deadline_ns.saturating_sub(now))
                }
                Phase::Returning(back, Some(_)) => {
                    Duration::from_nanos((back.began_ns + RETURN_NS).saturating_sub(now))
                }
            })
            .min()
            .unwrap_or(Duration::MAX)
            .min(moving)
    }

    /// Whether a message is newer than what was heard of this GPU.
    fn is_news(&mut self, slot: usize, epoch: u64) -> bool {
        let newer = epoch > self.epochs[slot];
        if newer {
            self.epochs[slot] = epoch;
        }
        newer
    }

    /// The agent grants the GPU, and lets `prefetch` bytes be brought back first. A repeated grant is answered again: the first
    /// answer may have been lost on it.
    pub(super) fn granted(
        &mut self,
        slot: usize,
        (gpu, epoch): (GpuUuid, u64),
        prefetch: u64,
        workers: &Workers,
    ) {
        if !self.is_news(slot, epoch) && epoch != self.epochs[slot] {
            return;
        }
        if matches!(self.phases[slot], Phase::Returning(back, _) if back.epoch == epoch) {
            return;
        }
        debug!("granted, epoch {epoch}, {prefetch} bytes to bring back at most");
        let is_empty = matches!(self.phases[slot], Phase::Leaving(..) | Phase::Closed | Phase::Returning(..));
        let prefetch = match config::get().evacuate {
            _ if !is_empty => 0,
            true => u64::MAX,
            false => prefetch,
        };
        workers.stop(slot);
        let back = Return { gpu, epoch, began_ns: sys::now_ns(), prefetch, planned: 0 };
        self.phases[slot] = Phase::Returning(back, None);
    }

    /// The agent revokes the GPU.
    pub(super) fn revoked(
        &mut self,
        slot: usize,
        (gpu, epoch): (GpuUuid, u64),
        drain: Duration,
        shortfall: u64,
        workers: &Workers,
    ) {
        if self.is_news(slot, epoch) {
            debug!("revoked, epoch {epoch}, {drain:?} to drain, {shortfall} bytes to leave at most");
            let began_ns = sys::now_ns();
            let deadline_ns = began_ns.saturating_add(drain.as_nanos() as u64);
            let shortfall = if config::get().evacuate { u64::MAX } else { shortfall };
            workers.stop(slot);
            self.phases[slot] = Phase::Revoked(Revocation { gpu, epoch, began_ns, deadline_ns, shortfall });
        }
    }

    /// Takes every hand-over as far as it goes now.
    pub(super) fn advance(
        &mut self,
        state: &State,
        workers: &mut Workers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        for (slot, ticket, news) in workers.news(state) {
            self.heard(slot, ticket, news, state, workers, link)?;
        }
        for slot in 0..SLOTS {
            self.advance_one(slot, state, workers, link)?;
        }
        self.tell_mover(state, link)
    }

    /// Something has come of an order.
    fn heard(
        &mut self,
        slot: usize,
        ticket: Ticket,
        news: News,
        state: &State,
        workers: &mut Workers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        match (self.phases[slot], news) {
            (Phase::Draining(revocation, drain), News::Drained(outcome)) if drain == ticket => {
                match outcome {
                    Some(Drained::Idle) => self.drained(slot, revocation, state, workers, link)?,
                    Some(Drained::Capturing) => {
                        self.finish(slot, &revocation, DrainOutcome::Capturing, link)?;
                    }
                    None => self.finish(slot, &revocation, DrainOutcome::TimedOut, link)?,
                }
            }
            (Phase::Leaving(departure, begun), News::Begun | News::Moved(..)) if begun == ticket => {
                let planned = if matches!(news, News::Moved(0, _)) { 0 } else { departure.planned };
                self.left(slot, &departure, planned, link)?;
            }
            (Phase::Returning(back, Some(begun)), News::Begun | News::Moved(..)) if begun == ticket => {
                let planned = if matches!(news, News::Moved(0, _)) { 0 } else { back.planned };
                self.open(slot, &back, (planned, sys::now_ns() - back.began_ns), link)?;
            }
            _ => {}
        }
        if let News::Moved(moved, moved_ns) = news
            && let Some(of) = self.moving[slot].take_if(|of| of.ticket == ticket)
        {
            let Moving { gpu, epoch, direction, .. } = of;
            debug!("epoch {epoch}: moved {moved} bytes {direction:?} in {} us", moved_ns / 1000);
            link.send(&ClientMessage::Moved { gpu, epoch, direction, moved, moved_ns }, None)?;
        }
        Ok(())
    }

    fn advance_one(
        &mut self,
        slot: usize,
        state: &State,
        workers: &mut Workers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        let revocation = match self.phases[slot] {
            Phase::Granted | Phase::Closed => return Ok(()),
            Phase::Returning(back, ticket) => {
                return self.bring_back(slot, back, ticket, state, workers, link);
            }
            Phase::Leaving(departure, _) => {
                if sys::now_ns() >= departure.revocation.deadline_ns {
                    workers.stop(slot);
                    state.memory.residency.lift(slot);
                    return self.left(slot, &departure, 0, link);
                }
                return Ok(());
            }
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
            Phase::Emptying(revocation) | Phase::Draining(revocation, _) => revocation,
        };
        if let Phase::Emptying(_) = self.phases[slot] {
            let is_empty = thread::sum(slot).inside == 0;
            // No capture begins while the gate is closed, but one may have begun in the moment before, by a thread that was
            // inside until now. So this comes after the look at the threads.
            if state.captures.any() {
                return self.finish(slot, &revocation, DrainOutcome::Capturing, link);
            }
            if is_empty && let Some(ticket) = workers.begin(slot, Order::Drain) {
                self.phases[slot] = Phase::Draining(revocation, ticket);
            }
        }
        if sys::now_ns() >= revocation.deadline_ns {
            return self.finish(slot, &revocation, DrainOutcome::TimedOut, link);
        }
        Ok(())
    }

    /// The GPU is idle: its memory leaves, as far as that is wanted and known.
    fn drained(
        &mut self,
        slot: usize,
        revocation: Revocation,
        state: &State,
        workers: &mut Workers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        let planned = match state.best.get() {
            Mover::Demand => 0,
            _ => state.memory.residency.known(slot).inside.min(revocation.shortfall),
        };
        let direction = Direction::Out;
        if planned >= PIECE
            && state.memory.residency.may_protect_while(slot, || gate::is_closed(slot))
            && let Some(ticket) = workers.begin(slot, Order::Move(Move { direction, bytes: planned }))
        {
            let drain_ns = sys::now_ns() - revocation.began_ns;
            let Revocation { gpu, epoch, .. } = revocation;
            self.moving[slot] = Some(Moving { ticket, gpu, epoch, direction });
            self.phases[slot] = Phase::Leaving(Departure { revocation, drain_ns, planned }, ticket);
            return Ok(());
        }
        state.memory.residency.lift(slot);
        self.finish(slot, &revocation, DrainOutcome::Drained, link)
    }

    /// The first of the memory is out, or nothing will be: the GPU is free.
    fn left(
        &mut self,
        slot: usize,
        departure: &Departure,
        planned: u64,
        link: &mut Link,
    ) -> Result<(), Ended> {
        self.phases[slot] = Phase::Closed;
        let Revocation { gpu, epoch, .. } = departure.revocation;
        debug!("epoch {epoch}: drained after {} us, {planned} bytes leave", departure.drain_ns / 1000);
        let (outcome, drain_ns) = (DrainOutcome::Drained, departure.drain_ns);
        link.send(&ClientMessage::Revoked { gpu, epoch, outcome, drain_ns, moved: planned }, None)
    }

    /// Begins to bring memory back once nothing else is under way, and opens the gate where that takes too long.
    fn bring_back(
        &mut self,
        slot: usize,
        back: Return,
        ticket: Option<Ticket>,
        state: &State,
        workers: &mut Workers,
        link: &mut Link,
    ) -> Result<(), Ended> {
        let is_late = sys::now_ns() >= back.began_ns + RETURN_NS;
        if ticket.is_some() && !is_late {
            return Ok(());
        }
        let known = state.memory.residency.known(slot);
        let wanted = match state.best.get() {
            Mover::Demand => 0,
            _ => back.prefetch.min(known.outside + known.somewhere),
        };
        if wanted >= PIECE && !is_late {
            if workers.is_busy(slot) {
                return Ok(());
            }
            let direction = Direction::In;
            if let Some(ticket) = workers.begin(slot, Order::Move(Move { direction, bytes: wanted })) {
                let Return { gpu, epoch, .. } = back;
                self.moving[slot] = Some(Moving { ticket, gpu, epoch, direction });
                let planned = known.outside.min(wanted);
                self.phases[slot] = Phase::Returning(Return { planned, ..back }, Some(ticket));
                return Ok(());
            }
        }
        workers.stop(slot);
        // Its kernels will have memory brought back that nobody reports.
        state.memory.residency.displaced(slot, true, false);
        let shut_ns = if ticket.is_some() { sys::now_ns() - back.began_ns } else { 0 };
        self.open(slot, &back, (0, shut_ns), link)
    }

    /// The program runs, after so many bytes and nanoseconds.
    fn open(
        &mut self,
        slot: usize,
        back: &Return,
        (moved, moved_ns): (u64, u64),
        link: &mut Link,
    ) -> Result<(), Ended> {
        self.phases[slot] = Phase::Granted;
        gate::open(slot);
        let Return { gpu, epoch, .. } = *back;
        link.send(&ClientMessage::Resumed { gpu, epoch, moved, moved_ns }, None)
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

    /// Tells the agent how memory is moved here, whenever that is news.
    fn tell_mover(&mut self, state: &State, link: &mut Link) -> Result<(), Ended> {
        let by = state.best.get();
        if self.told != Some(by) {
            self.told = Some(by);
            link.send(&ClientMessage::Moves { by }, None)?;
        }
        Ok(())
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
        let closed = |phase: &Phase| {
            matches!(phase, Phase::Emptying(_) | Phase::Draining(..) | Phase::Leaving(..) | Phase::Closed)
        };
        self.phases.iter().enumerate().any(|(slot, phase)| closed(phase) && !gate::is_closed(slot))
    }
}
