//! All clients that have a session.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nvshare_core::ClientId;

use super::{admission::Limit, cgroup::Cgroup, client::Client, identity::Identity};
use crate::config::ListenConfig;

/// The clients by number, within limits.
#[derive(Debug)]
pub struct Registry {
    clients: Mutex<BTreeMap<ClientId, Arc<Client>>>,
    next: AtomicU64,
    max: usize,
    max_per_uid: usize,
    max_per_cgroup: usize,
}

impl Registry {
    /// An empty registry with these limits.
    pub fn new(config: &ListenConfig) -> Self {
        Self {
            clients: Mutex::default(),
            next: AtomicU64::new(1),
            max: config.max_clients,
            max_per_uid: config.max_clients_per_uid,
            max_per_cgroup: config.max_clients_per_cgroup,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClientId, Arc<Client>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a client, made by `make` with a number that was never used before.
    pub fn add(
        &self,
        identity: Identity,
        cgroup: Option<&Cgroup>,
        make: impl FnOnce(ClientId) -> Client,
    ) -> Result<Arc<Client>, Limit> {
        let mut clients = self.lock();
        if clients.len() >= self.max {
            return Err(Limit::Clients(self.max));
        }
        let of_cgroup =
            clients.values().filter(|client| cgroup.is_some() && client.cgroup.as_ref() == cgroup).count();
        if of_cgroup >= self.max_per_cgroup {
            return Err(Limit::CgroupClients(self.max_per_cgroup));
        }
        let of_user = clients.values().filter(|client| client.identity.uid == identity.uid).count();
        if of_user >= self.max_per_uid {
            return Err(Limit::UidClients(identity.uid, self.max_per_uid));
        }
        let id = ClientId(self.next.fetch_add(1, Ordering::Relaxed));
        let client = Arc::new(make(id));
        clients.insert(id, Arc::clone(&client));
        Ok(client)
    }

    /// Forgets a client and lets go of all that was held of it.
    pub fn remove(&self, id: ClientId) {
        let client = self.lock().remove(&id);
        if let Some(client) = client {
            client.release();
        }
    }

    /// Every client at this moment.
    pub fn all(&self) -> Vec<Arc<Client>> {
        self.lock().values().cloned().collect()
    }
}
