//! All clients that have a session.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nvshare_core::ClientId;

use super::{client::Client, identity::Identity};

/// The clients by number, within limits.
#[derive(Debug)]
pub struct Registry {
    clients: Mutex<BTreeMap<ClientId, Arc<Client>>>,
    next: AtomicU64,
    max: usize,
    max_per_uid: usize,
}

/// Why there is no room for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// All clients together.
    #[error("the agent serves its limit of {0} clients ([listen] max_clients)")]
    All(usize),
    /// The clients of one user.
    #[error("user {0} has its limit of {1} clients ([listen] max_clients_per_uid)")]
    User(u32, usize),
}

impl Registry {
    /// An empty registry with these limits.
    pub fn new(max: usize, max_per_uid: usize) -> Self {
        Self { clients: Mutex::default(), next: AtomicU64::new(1), max, max_per_uid }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClientId, Arc<Client>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a client, made by `make` with a number that was never used before.
    pub fn add(
        &self,
        identity: Identity,
        make: impl FnOnce(ClientId) -> Client,
    ) -> Result<Arc<Client>, Full> {
        let mut clients = self.lock();
        if clients.len() >= self.max {
            return Err(Full::All(self.max));
        }
        let of_user = clients.values().filter(|client| client.identity.uid == identity.uid).count();
        if of_user >= self.max_per_uid {
            return Err(Full::User(identity.uid, self.max_per_uid));
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
