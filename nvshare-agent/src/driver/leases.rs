//! Which gates were told to be open or closed, and since when clients wait at them.

use std::collections::{BTreeMap, BTreeSet};

use nvshare_core::{ClientId, Epoch, GpuId, Nanos};

/// What each client was told last.
#[derive(Debug, Default)]
pub(super) struct Leases {
    told: BTreeMap<(ClientId, GpuId), Lease>,
}

#[derive(Debug, Default)]
struct Lease {
    epoch: Epoch,
    gated: bool,
    waiting_since: Option<Nanos>,
}

impl Leases {
    /// A client was granted; returns how long it had waited, if it had.
    pub(super) fn granted(&mut self, client: ClientId, gpu: GpuId, epoch: Epoch, at: Nanos) -> Option<Nanos> {
        let lease = self.told.entry((client, gpu)).or_default();
        lease.epoch = epoch;
        lease.gated = false;
        lease.waiting_since.take().map(|since| at.since(since))
    }

    /// A client was revoked.
    pub(super) fn revoked(&mut self, client: ClientId, gpu: GpuId, epoch: Epoch) {
        let lease = self.told.entry((client, gpu)).or_default();
        lease.epoch = epoch;
        lease.gated = true;
        lease.waiting_since = None;
    }

    /// A client has threads at its gate, or none.
    pub(super) fn waits(&mut self, client: ClientId, gpu: GpuId, waiting: bool, at: Nanos) {
        if let Some(lease) = self.told.get_mut(&(client, gpu)).filter(|lease| lease.gated) {
            lease.waiting_since = waiting.then(|| lease.waiting_since.unwrap_or(at));
        }
    }

    /// A client is gone.
    pub(super) fn forget(&mut self, client: ClientId) {
        self.told.retain(|(of, _), _| *of != client);
    }

    /// Clients with a closed gate.
    pub(super) fn gated(&self) -> BTreeSet<ClientId> {
        self.told.iter().filter(|(_, lease)| lease.gated).map(|((client, _), _)| *client).collect()
    }

    /// Every closed gate, with an epoch that opens it.
    pub(super) fn open_all(&mut self) -> Vec<(ClientId, GpuId, Epoch)> {
        let mut opened = Vec::new();
        for (&(client, gpu), lease) in &mut self.told {
            if lease.gated {
                lease.gated = false;
                lease.epoch = lease.epoch.next();
                opened.push((client, gpu, lease.epoch));
            }
        }
        opened
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: ClientId = ClientId(1);
    const GPU: GpuId = GpuId([7; 16]);

    #[test]
    fn waiting_counts_from_the_first_thread_at_a_closed_gate_to_the_grant() {
        let mut leases = Leases::default();
        leases.waits(CLIENT, GPU, true, Nanos(5));
        leases.revoked(CLIENT, GPU, Epoch(1));
        leases.waits(CLIENT, GPU, true, Nanos(10));
        leases.waits(CLIENT, GPU, true, Nanos(20));
        assert_eq!(leases.granted(CLIENT, GPU, Epoch(2), Nanos(50)), Some(Nanos(40)));
        assert_eq!(leases.granted(CLIENT, GPU, Epoch(3), Nanos(60)), None);
    }

    #[test]
    fn opening_all_names_only_closed_gates_and_a_newer_epoch() {
        let mut leases = Leases::default();
        leases.revoked(CLIENT, GPU, Epoch(4));
        leases.granted(ClientId(2), GPU, Epoch(9), Nanos(1));
        assert_eq!(leases.gated(), BTreeSet::from([CLIENT]));
        assert_eq!(leases.open_all(), [(CLIENT, GPU, Epoch(5))]);
        assert_eq!(leases.open_all(), []);
    }

    #[test]
    fn a_client_that_left_is_told_nothing() {
        let mut leases = Leases::default();
        leases.revoked(CLIENT, GPU, Epoch(1));
        leases.forget(CLIENT);
        assert!(leases.gated().is_empty());
    }
}
