//! Whose gate stands how: so that nobody looks at all clients to find the few that matter.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    id::ClientId,
    lease::{Gate, Lease},
    units::Nanos,
};

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Gates {
    pub(crate) open: BTreeSet<ClientId>,
    /// Not open.
    pub(crate) shut: BTreeSet<ClientId>,
    /// Asked to close and not known to ignore it, by the time of the verdict.
    draining: BTreeSet<(Nanos, ClientId)>,
    deadlines: BTreeMap<ClientId, Nanos>,
}

impl Gates {
    /// Brings the index in line with a client's lease.
    pub(crate) fn note(&mut self, client: ClientId, lease: &Lease) {
        if let Some(deadline) = self.deadlines.remove(&client) {
            self.draining.remove(&(deadline, client));
        }
        if lease.is_open() {
            self.shut.remove(&client);
            self.open.insert(client);
        } else {
            self.open.remove(&client);
            self.shut.insert(client);
        }
        if let Gate::Draining { deadline } = lease.gate()
            && !lease.unresponsive()
        {
            self.draining.insert((deadline, client));
            self.deadlines.insert(client, deadline);
        }
    }

    pub(crate) fn forget(&mut self, client: ClientId) {
        self.open.remove(&client);
        self.shut.remove(&client);
        if let Some(deadline) = self.deadlines.remove(&client) {
            self.draining.remove(&(deadline, client));
        }
    }

    /// Those asked to close who may still answer in time, soonest verdict first.
    pub(crate) fn draining(&self) -> impl Iterator<Item = (Nanos, ClientId)> {
        self.draining.iter().copied()
    }
}
