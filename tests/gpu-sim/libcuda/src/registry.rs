//! Handles: the address of a live object, looked up again at every use so that a stale or made-up handle is an error
//! and never a dereference.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::abi::{Handle, INVALID_HANDLE, Outcome};

/// The live objects of one handle type.
pub(crate) struct Registry<T>(Mutex<BTreeMap<Handle, Arc<T>>>);

impl<T> Registry<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    pub(crate) fn insert(&self, object: Arc<T>) -> Handle {
        let handle = handle_of(&object);
        lock(&self.0).insert(handle, object);
        handle
    }

    pub(crate) fn get(&self, handle: Handle) -> Outcome<Arc<T>> {
        lock(&self.0).get(&handle).cloned().ok_or(INVALID_HANDLE)
    }

    pub(crate) fn remove(&self, handle: Handle) -> Outcome<Arc<T>> {
        lock(&self.0).remove(&handle).ok_or(INVALID_HANDLE)
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        lock(&self.0).values().cloned().collect()
    }
}

/// The handle a program holds for `object`.
pub(crate) fn handle_of<T>(object: &Arc<T>) -> Handle {
    Arc::as_ptr(object) as Handle
}

/// A lock whose holder panicked still guards consistent data here: every critical section is a few plain stores.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
