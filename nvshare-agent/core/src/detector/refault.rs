//! Which of the bytes that a client brings in are refaults.
//!
//! **Problem.** Byte counters do not name blocks. But a client's device memory is never touched by its CPU
//! and fresh memory is filled on the GPU without a transfer, so what comes in had been pushed out before.
//!
//! **Approach.** A balance per client: bytes out are owed, bytes in pay them back. Only what is owed can be a
//! refault, so no eviction is counted twice, and an agent that starts late sees nothing rather than too much.
//!
//! **Invariants.** The balance never exceeds what the client has allocated. Bins with CPU faults give no
//! evidence (the bytes may be the program's own host data). Bytes that the shim itself moved are no evidence
//! either, but they are moves.

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
    /// Of the returned ones, those that the driver brought in because the GPU faulted on them.
    pub(crate) refaulted: Bytes,
    /// Alone, the client would have kept them: it fits into what the GPU held ever since they went out.
    pub(crate) fits: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Refaults {
    owed: Bytes,
    /// The smallest capacity since the oldest eviction that is still owed.
    capacity_low: Option<Bytes>,
    own_in: Bytes,
    own_in_age: u8,
}

impl Refaults {
    /// The shim announced that it brought this much back itself.
    pub(crate) fn note_own_move_in(&mut self, moved: Bytes) {
        self.own_in += moved;
        self.own_in_age = 0;
    }

    /// Forgets what is owed: it went out while clients took turns, so its return says nothing about what
    /// happens when they run side by side.
    pub(crate) fn settle(&mut self) {
        self.owed = Bytes::ZERO;
        self.capacity_low = None;
    }

    /// Takes in one bin. `None` where the counters do not say enough to tell anything.
    pub(crate) fn observe(
        &mut self,
        sample: &ClientSample,
        managed: Bytes,
        footprint: Bytes,
        capacity: Bytes,
    ) -> Option<Flow> {
        let (Some(bytes_in), Some(bytes_out)) = (sample.bytes_in, sample.bytes_out) else {
            self.settle();
            return None;
        };
        let evicted = sample.evicted.unwrap_or(bytes_out);
        self.owed += evicted;
        if self.owed > Bytes::ZERO {
            self.capacity_low = Some(self.capacity_low.map_or(capacity, |low| low.min(capacity)));
        }
        let fits = footprint <= self.capacity_low.unwrap_or(capacity);
        let returned = bytes_in.min(self.owed);
        let own = returned.min(self.own_in);
        self.own_in = self.own_in - own;
        self.own_in_age = self.own_in_age.saturating_add(1);
        if self.own_in_age >= OWN_MOVE_BINS {
            self.own_in = Bytes::ZERO;
        }
        self.owed = (self.owed - returned).min(managed);
        if self.owed == Bytes::ZERO {
            self.capacity_low = None;
        }
        let touched_by_cpu = sample.cpu_faults.is_some_and(|faults| faults > 0);
        let refaulted = if touched_by_cpu { Bytes::ZERO } else { returned - own };
        Some(Flow { bytes_in, bytes_out, evicted, returned, refaulted, fits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Bytes = Bytes::gib(1);

    fn sample(bytes_in: Bytes, bytes_out: Bytes) -> ClientSample {
        ClientSample { bytes_in: Some(bytes_in), bytes_out: Some(bytes_out), ..ClientSample::default() }
    }

    fn observe(refaults: &mut Refaults, sample: ClientSample) -> Option<Flow> {
        refaults.observe(&sample, Bytes::mib(600), Bytes::mib(600), CAPACITY)
    }

    #[test]
    fn only_what_went_out_can_refault_and_only_once() {
        let mut refaults = Refaults::default();
        let upload = observe(&mut refaults, sample(Bytes::mib(100), Bytes::ZERO));
        assert_eq!(upload.map(|f| f.refaulted), Some(Bytes::ZERO));
        observe(&mut refaults, sample(Bytes::ZERO, Bytes::mib(60)));
        let first = observe(&mut refaults, sample(Bytes::mib(40), Bytes::ZERO));
        assert_eq!(first.map(|f| f.refaulted), Some(Bytes::mib(40)));
        let second = observe(&mut refaults, sample(Bytes::mib(40), Bytes::ZERO));
        assert_eq!(second.map(|f| f.refaulted), Some(Bytes::mib(20)));
    }

    #[test]
    fn bins_with_cpu_faults_and_moves_of_the_shim_are_no_evidence() {
        let mut refaults = Refaults::default();
        observe(&mut refaults, sample(Bytes::ZERO, Bytes::mib(100)));
        let touched = ClientSample { cpu_faults: Some(3), ..sample(Bytes::mib(50), Bytes::ZERO) };
        assert_eq!(observe(&mut refaults, touched).map(|f| f.refaulted), Some(Bytes::ZERO));
        refaults.note_own_move_in(Bytes::mib(30));
        let flow = observe(&mut refaults, sample(Bytes::mib(50), Bytes::ZERO));
        assert_eq!(flow.map(|f| (f.returned, f.refaulted)), Some((Bytes::mib(50), Bytes::mib(20))));
    }

    #[test]
    fn a_client_that_did_not_fit_when_its_memory_went_out_is_not_curable_later() {
        let mut refaults = Refaults::default();
        let managed = Bytes::mib(600);
        let fits = |refaults: &mut Refaults, sample: &ClientSample, capacity| {
            refaults.observe(sample, managed, managed, capacity).map(|flow| flow.fits)
        };
        assert_eq!(fits(&mut refaults, &sample(Bytes::ZERO, Bytes::mib(9)), Bytes::mib(500)), Some(false));
        assert_eq!(fits(&mut refaults, &sample(Bytes::mib(5), Bytes::ZERO), CAPACITY), Some(false));
        assert_eq!(fits(&mut refaults, &sample(Bytes::mib(4), Bytes::ZERO), CAPACITY), Some(false));
        assert_eq!(fits(&mut refaults, &sample(Bytes::ZERO, Bytes::ZERO), CAPACITY), Some(true));
    }

    #[test]
    fn unknown_counters_tell_nothing() {
        let mut refaults = Refaults::default();
        assert_eq!(observe(&mut refaults, ClientSample::default()), None);
    }
}
