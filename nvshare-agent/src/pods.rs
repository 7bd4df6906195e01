//! What Kubernetes says of the pod that a client runs in: its weight, priority and memory limit, by annotation.
//!
//! Problem: the kubelet passes a device plugin no annotations, and what a client says of itself may only lower its share.
//!
//! Approach: the kernel says in which control group a client is, and the group's path names the pod ([`cgroup`]). The API
//! server says what is written on the pods of this node ([`api`]), of which only our own annotations are kept
//! ([`annotations`]). [`Pods`] keeps them and asks anew when a pod is not known yet.
//!
//! Invariants: switched off unless the configuration says otherwise. A client never waits long for the API server, and runs on
//! its own word if there is no answer. Annotations raise a share no further than the administrator allows.

pub mod annotations;
pub mod api;
pub mod cgroup;

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nvshare_core::Nanos;
use tokio_util::sync::CancellationToken;

use self::{
    annotations::{Bounds, Terms},
    api::ApiServer,
    cgroup::PodUid,
};
use crate::{clock, config::PodsConfig};

/// A new client waits this long for the API server.
const PATIENCE: Duration = Duration::from_secs(1);
/// The API server is asked no more often than this.
const PACE: Nanos = Nanos::seconds(1);
/// Annotations may change while a pod runs.
const REFRESH: Duration = Duration::from_secs(30);

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    source: Option<Source>,
    known: Mutex<BTreeMap<PodUid, Terms>>,
}

#[derive(Debug)]
struct Source {
    api: ApiServer,
    bounds: Bounds,
    /// When it was last asked; held while it is being asked.
    asked: tokio::sync::Mutex<Option<Nanos>>,
}

impl Pods {
    /// Nobody is asked: every client is what it says of itself.
    pub fn off() -> Self {
        Self { source: None, known: Mutex::default() }
    }

    /// As configured.
    pub fn new(config: &PodsConfig) -> Result<Self> {
        if !config.annotations {
            return Ok(Self::off());
        }
        let api = ApiServer::in_cluster().context("[pods] annotations cannot be used")?;
        Ok(Self::asking(api, config.bounds()))
    }

    /// Asks this server.
    pub fn asking(api: ApiServer, bounds: Bounds) -> Self {
        let source = Source { api, bounds, asked: tokio::sync::Mutex::default() };
        Self { source: Some(source), known: Mutex::default() }
    }

    /// What is written on the pod of this process; nothing outside of pods.
    pub async fn terms(&self, pid: u32) -> Terms {
        if self.source.is_none() {
            return Terms::default();
        }
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        match PodUid::of(&groups) {
            Some(pod) => self.terms_of(&pod).await,
            None => Terms::default(),
        }
    }

    /// What is written on this pod.
    pub async fn terms_of(&self, pod: &PodUid) -> Terms {
        if let Some(terms) = self.cached(pod) {
            return terms;
        }
        if let Some(source) = &self.source
            && tokio::time::timeout(PATIENCE, self.ask(source)).await.is_err()
        {
            tracing::warn!(%pod, "the API server is slow; a client starts without what its pod's annotations say");
        }
        self.cached(pod).unwrap_or_default()
    }

    fn cached(&self, pod: &PodUid) -> Option<Terms> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(pod).copied()
    }

    /// Asks, unless somebody has just done so.
    async fn ask(&self, source: &Source) {
        let mut asked = source.asked.lock().await;
        let now = clock::now();
        if asked.is_some_and(|asked| now.since(asked) < PACE) {
            return;
        }
        *asked = Some(now);
        match source.api.pods().await {
            Ok(pods) => self.learn(pods, source.bounds),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the pods of this node cannot be listed");
            }
        }
    }

    fn learn(&self, pods: Vec<api::Pod>, bounds: Bounds) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = BTreeMap::new();
        for api::Pod { uid, name, annotations } in pods {
            let (terms, complaints) = Terms::of(&annotations, bounds);
            // Said once for each pod, and again when the annotations change.
            if known.get(&uid) != Some(&terms) {
                for complaint in complaints {
                    tracing::warn!(pod = name, "{complaint}");
                }
            }
            next.insert(uid, terms);
        }
        *known = next;
    }

    /// Keeps what is known fresh until cancelled.
    pub async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let Some(source) = &self.source else { return };
        loop {
            self.ask(source).await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(REFRESH) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
