//! Which of the bytes that a client brings in are refaults.
//!
//! **Problem.** Byte counters do not name blocks. But a client's device memory is never touched by its CPU
//! and fresh memory is filled on the GPU without a transfer, so what comes in had been pushed out before.
//!
//! **Approach.** A balance per client: bytes out are owed, bytes in pay them back. Only what is owed can be a
//! refault, so no eviction is counted twice, and an agent that starts late sees nothing rather than too much.
//! Where a sensor sees blocks, its classification is taken instead.
//!
//! **Invariants.** The balance never exceeds what the client has allocated. What the counters cannot prove is
//! *weak* evidence or none, never a wrong figure: bins with CPU faults (the bytes may be the program's own
//! host data) are weak where a sensor tells evictions from other moves, and nothing where none does; a client
//! on several GPUs is weak, since its staged copies count twice. Bytes that the shim itself moved are no
//! evidence, but they are moves.

use serde::{Deserialize, Serialize};

use crate::{input::ClientSample, units::Bytes};

/// Bins after which a move that the shim announced, and no counter showed, is written off.
const OWN_MOVE_BINS: u8 = 3;

/// One client's bytes of one bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flow {
    /// Came in.
    pub(crate) bytes_in: Bytes,
    /// Went out.
    pub(crate) bytes_out: Bytes,
    /// Of those out, the ones that made room for something; all of them where no sensor tells.
    pub(crate) evicted: Bytes,
    /// Of those in, the ones that had gone out before, by whatever cause.
    pub(crate) returned: Bytes,
    /// Of the returned ones, those that the shim brought in unasked.
    pub(crate) by_shim: Bytes,
    /// Refaults that turns would avoid: alone, the client would have kept these bytes.
    pub(crate) curable: Bytes,
    /// Refaults that turns would not avoid.
    pub(crate) own: Bytes,
    /// The client fits into what the GPU held ever since the bytes that are owed went out.
    pub(crate) fits: bool,
    /// The classification is uncertain.
    pub(crate) weak: bool,
    /// A sensor that sees blocks made it.
    pub(crate) by_block: bool,
}

/// What a client's bytes are judged by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holder {
    pub(crate) managed: Bytes,
    /// Of the whole job, in whole blocks.
    pub(crate) footprint: Bytes,
    pub(crate) capacity: Bytes,
    /// The client uses several GPUs.
    pub(crate) several_gpus: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Refaults {
    owed: Bytes,
    /// The smallest capacity since the oldest eviction that is still owed.
    capacity_low: Option<Bytes>,
    own_in: Announced,
    own_out: Announced,
}

/// What the shim said it moved and no counter has shown yet.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Announced {
    bytes: Bytes,
    age: u8,
}

impl Announced {
    fn note(&mut self, moved: Bytes) {
        self.bytes += moved;
        self.age = 0;
    }

    /// Takes what a bin's `shown` bytes can contain of it.
    fn take(&mut self, shown: Bytes) -> Bytes {
        let taken = shown.min(self.bytes);
        self.bytes = self.bytes - taken;
        self.age = self.age.saturating_add(1);
        if self.age >= OWN_MOVE_BINS {
            self.bytes = Bytes::ZERO;
        }
        taken
    }
}

impl Refaults {
    /// The shim announced that it brought this much back itself.
    pub(crate) fn note_own_move_in(&mut self, moved: Bytes) {
        self.own_in.note(moved);
    }

    /// The shim announced that it moved this much out itself.
    pub(crate) fn note_own_move_out(&mut self, moved: Bytes) {
        self.own_out.note(moved);
    }

    /// Forgets what is owed as far as evidence goes: it went out while clients took turns, so its return says
    /// nothing about what happens when they run side by side.
    pub(crate) fn settle(&mut self) {
        self.owed = Bytes::ZERO;
        self.capacity_low = None;
    }

    /// What went out and has not come back.
    pub(crate) fn owed(&self) -> Bytes {
        self.owed
    }

    /// Takes in one bin. `None` where the counters do not say enough to tell anything.
    pub(crate) fn observe(&mut self, sample: &ClientSample, holder: &Holder) -> Option<Flow> {
        let (Some(bytes_in), Some(bytes_out)) = (sample.bytes_in, sample.bytes_out) else {
            self.settle();
            return None;
        };
        let evicted = sample.evicted.unwrap_or(bytes_out);
        // What the shim moved out is owed as well, also where evictions are counted by themselves.
        let own_out = self.own_out.take(bytes_out);
        self.owed += evicted + own_out.min(bytes_out - evicted);
        if self.owed > Bytes::ZERO {
            let low = self.capacity_low.map_or(holder.capacity, |low| low.min(holder.capacity));
            self.capacity_low = Some(low);
        }
        let fits = holder.footprint <= self.capacity_low.unwrap_or(holder.capacity);
        let returned = bytes_in.min(self.owed);
        let own_in = self.own_in.take(returned);
        self.owed = (self.owed - returned).min(holder.managed);
        if self.owed == Bytes::ZERO {
            self.capacity_low = None;
        }
        let mut flow =
            Flow { bytes_in, bytes_out, evicted, returned, by_shim: own_in, fits, ..Flow::default() };
        if let (Some(curable), Some(own)) = (sample.curable, sample.self_refaulted) {
            (flow.curable, flow.own, flow.by_block) = (curable.min(bytes_in), own, true);
            return Some(flow);
        }
        let touched_by_cpu = sample.cpu_faults.is_some_and(|faults| faults > 0);
        let refaulted = if touched_by_cpu && sample.evicted.is_none() {
            Bytes::ZERO
        } else if holder.several_gpus {
            // Each byte may have been counted twice.
            Bytes((returned - own_in).0 / 2)
        } else {
            returned - own_in
        };
        flow.weak = touched_by_cpu || holder.several_gpus;
        *(if fits { &mut flow.curable } else { &mut flow.own }) = refaulted;
        Some(flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Bytes = Bytes::gib(1);
    const HOLDER: Holder = Holder {
        managed: Bytes::mib(600),
        footprint: Bytes::mib(600),
        capacity: CAPACITY,
        several_gpus: false,
    };

    fn sample(bytes_in: Bytes, bytes_out: Bytes) -> ClientSample {
        ClientSample { bytes_in: Some(bytes_in), bytes_out: Some(bytes_out), ..ClientSample::default() }
    }

    fn observe(refaults: &mut Refaults, sample: ClientSample) -> Option<Flow> {
        refaults.observe(&sample, &HOLDER)
    }

    #[test]
    fn only_what_went_out_can_refault_and_only_once() {
        let mut refaults = Refaults::default();
        let upload = observe(&mut refaults, sample(Bytes::mib(100), Bytes::ZERO));
        assert_eq!(upload.map(|f| f.curable), Some(Bytes::ZERO));
        observe(&mut refaults, sample(Bytes::ZERO, Bytes::mib(60)));
        let first = observe(&mut refaults, sample(Bytes::mib(40), Bytes::ZERO));
        assert_eq!(first.map(|f| f.curable), Some(Bytes::mib(40)));
        let second = observe(&mut refaults, sample(Bytes::mib(40), Bytes::ZERO));
        assert_eq!(second.map(|f| f.curable), Some(Bytes::mib(20)));
    }

    #[test]
    fn bins_with_cpu_faults_and_moves_of_the_shim_are_no_evidence() {
        let mut refaults = Refaults::default();
        observe(&mut refaults, sample(Bytes::ZERO, Bytes::mib(100)));
        let touched = ClientSample { cpu_faults: Some(3), ..sample(Bytes::mib(50), Bytes::ZERO) };
        assert_eq!(observe(&mut refaults, touched).map(|f| f.curable), Some(Bytes::ZERO));
        refaults.note_own_move_in(Bytes::mib(30));
        let flow = observe(&mut refaults, sample(Bytes::mib(50), Bytes::ZERO));
        assert_eq!(flow.map(|f| (f.returned, f.curable)), Some((Bytes::mib(50), Bytes::mib(20))));
    }

    #[test]
    fn a_client_that_did_not_fit_when_its_memory_went_out_is_not_curable_later() {
        let mut refaults = Refaults::default();
        let fits = |refaults: &mut Refaults, sample: &ClientSample, capacity| {
            refaults.observe(sample, &Holder { capacity, ..HOLDER }).map(|flow| flow.fits)
        };
        assert_eq!(fits(&mut refaults, &sample(Bytes::ZERO, Bytes::mib(9)), Bytes::mib(500)), Some(false));
        assert_eq!(fits(&mut refaults, &sample(Bytes::mib(5), Bytes::ZERO), CAPACITY), Some(false));
        assert_eq!(fits(&mut refaults, &sample(Bytes::mib(4), Bytes::ZERO), CAPACITY), Some(false));
        assert_eq!(fits(&mut refaults, &sample(Bytes::ZERO, Bytes::ZERO), CAPACITY), Some(true));
    }

    #[test]
    fn cpu_faults_beside_counted_evictions_are_weak_evidence_and_so_are_several_gpus() {
        let mut refaults = Refaults::default();
        let touched =
            |bytes_in, out| ClientSample { cpu_faults: Some(3), evicted: Some(out), ..sample(bytes_in, out) };
        observe(&mut refaults, touched(Bytes::ZERO, Bytes::mib(100)));
        let flow = observe(&mut refaults, touched(Bytes::mib(50), Bytes::ZERO));
        assert_eq!(flow.map(|f| (f.curable, f.weak)), Some((Bytes::mib(50), true)));
        let several = Holder { several_gpus: true, ..HOLDER };
        let flow = refaults.observe(&sample(Bytes::mib(50), Bytes::ZERO), &several);
        assert_eq!(flow.map(|f| (f.curable, f.weak)), Some((Bytes::mib(25), true)));
    }

    #[test]
    fn a_classification_by_blocks_stands_above_the_balance() {
        let mut refaults = Refaults::default();
        let by_block = ClientSample {
            curable: Some(Bytes::mib(7)),
            self_refaulted: Some(Bytes::mib(3)),
            cpu_faults: Some(9),
            ..sample(Bytes::mib(20), Bytes::ZERO)
        };
        let flow = observe(&mut refaults, by_block);
        assert_eq!(flow.map(|f| (f.curable, f.own, f.weak)), Some((Bytes::mib(7), Bytes::mib(3), false)));
    }

    #[test]
    fn what_the_shim_moved_out_is_owed_also_where_evictions_are_counted_apart() {
        let mut refaults = Refaults::default();
        refaults.note_own_move_out(Bytes::mib(80));
        let moved = ClientSample { evicted: Some(Bytes::ZERO), ..sample(Bytes::ZERO, Bytes::mib(80)) };
        observe(&mut refaults, moved);
        assert_eq!(refaults.owed(), Bytes::mib(80));
    }

    #[test]
    fn unknown_counters_tell_nothing() {
        let mut refaults = Refaults::default();
        assert_eq!(observe(&mut refaults, ClientSample::default()), None);
    }
}
