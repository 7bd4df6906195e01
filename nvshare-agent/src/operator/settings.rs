//! What operators change: carried out, remembered, and kept over a restart where they say so.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nvshare_core::Bytes;

use crate::{
    clients::client::Client,
    config::{
        EngineConfig,
        overrides::{Change, Overrides, Rule, Uid},
    },
};

/// What operators changed.
#[derive(Debug)]
pub struct Settings {
    /// The configuration below it.
    engine: EngineConfig,
    file: Option<PathBuf>,
    state: Mutex<State>,
    /// Held while the file is written, so that it holds what the last of several changes left.
    writing: Mutex<()>,
}

#[derive(Clone, Debug, Default)]
struct State {
    in_force: Overrides,
    persisted: Overrides,
}

/// Why a change is not kept over a restart.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// There is no place for it.
    #[error(
        "the agent has no file to keep this in, and nothing was changed; leave --persist out, or start the agent with --config FILE (then the file lies beside it) or --overrides FILE"
    )]
    NoFile,
    /// The file cannot be replaced.
    #[error("cannot write {path}: {why}; nothing was changed")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
}

impl Settings {
    /// What was kept in `file`, over the configuration.
    pub fn new(engine: EngineConfig, file: Option<PathBuf>, persisted: Overrides) -> Self {
        let state = State { in_force: persisted.clone(), persisted };
        Self { engine, file, state: Mutex::new(state), writing: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where changes are kept.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What differs from the configuration, and what of it will hold after a restart.
    pub fn overrides(&self) -> (Overrides, Overrides) {
        let State { in_force, persisted } = self.state().clone();
        (in_force, persisted)
    }

    /// The engine's configuration with everything in force.
    pub fn engine(&self) -> EngineConfig {
        self.state().in_force.over(&self.engine)
    }

    /// What holds for a client: what is written on its pod, under the rule of its user, under what was ordered for
    /// it alone.
    pub fn rule(&self, client: &Client) -> Rule {
        let user = self.state().in_force.user.get(&Uid(client.identity.uid)).copied().unwrap_or_default();
        client.pod.under(user.under(client.rule()))
    }

    /// The most that a client may hold on each GPU, by its own word or the operator's.
    pub fn limit(&self, client: &Client) -> Option<Bytes> {
        self.rule(client).memory_limit.into_iter().chain(client.wish.memory_limit).min()
    }

    /// Remembers a change that is about to be carried out. If it is to last and cannot, nothing is changed.
    pub async fn change(self: &Arc<Self>, change: Change, persist: bool) -> Result<(), PersistError> {
        let mine = Arc::clone(self);
        let changing = tokio::task::spawn_blocking(move || mine.change_blocking(&change, persist));
        // The task ends early only with the whole runtime.
        changing.await.unwrap_or(Err(PersistError::NoFile))
    }

    fn change_blocking(&self, change: &Change, persist: bool) -> Result<(), PersistError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if persist {
            let path = self.file.as_deref().ok_or(PersistError::NoFile)?;
            let mut persisted = self.state().persisted.clone();
            persisted.apply(change);
            persisted.save(path).map_err(|why| PersistError::Write { path: path.to_owned(), why })?;
            self.state().persisted = persisted;
        }
        self.state().in_force.apply(change);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nvshare_core::{ModeOrder, Nanos};

    use super::*;

    #[test]
    fn what_holds_for_now_is_not_written_with_what_is_to_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.toml");
        let settings = Settings::new(EngineConfig::default(), Some(path.clone()), Overrides::default());
        settings.change_blocking(&Change::Mode(None, ModeOrder::Exclusive), false).unwrap();
        settings.change_blocking(&Change::QuantumMax(Some(Nanos::seconds(7))), true).unwrap();
        let kept = Overrides::load(&path).unwrap();
        assert_eq!((kept.mode, kept.quantum_max), (None, Some(Nanos::seconds(7))));
        assert_eq!(settings.overrides().0.mode, Some(ModeOrder::Exclusive));
        assert_eq!(settings.engine().quantum_max, Nanos::seconds(7));
    }

    #[test]
    fn a_change_that_cannot_be_kept_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        for file in [None, Some(dir.path().join("missing/o.toml"))] {
            let settings = Settings::new(EngineConfig::default(), file, Overrides::default());
            let error = settings.change_blocking(&Change::Overhead(Some(100)), true).unwrap_err();
            assert!(error.to_string().contains("nothing was changed"), "{error}");
            assert_eq!(settings.overrides(), (Overrides::default(), Overrides::default()));
        }
    }
}
