//! The shares there are and their health.
//!
//! A GPU that was once there stays known until the plugin ends: the kubelet must hear that its devices are ill, not
//! that they never were. Without news from the agent the GPUs stay healthy for a while, so that the agent can be
//! restarted; then nothing new is placed here, because nobody would arrange turns.

use std::{collections::BTreeMap, time::Duration};

use nvshare_core::{GpuId, Inventory, InventoryGpu};
use tokio::time::Instant;

use crate::{
    api::{self, Device},
    placement::Advice,
    share::Share,
};

/// Everything that is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stock {
    shares: u32,
    grace: Duration,
    /// Since when there is no complete list; `None` while there is one.
    silent_since: Option<Instant>,
    agent_lost: bool,
    known: bool,
    gpus: BTreeMap<GpuId, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    listed: bool,
    last: InventoryGpu,
}

/// A share that cannot be given away.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotToBeHad {
    /// No such GPU.
    #[error("device {0} is not on this node: it has no such GPU")]
    UnknownGpu(Share),
    /// No such share.
    #[error("device {share} is not on this node: each GPU is offered as {shares} devices, numbered from 0")]
    UnknownNumber {
        /// The share asked for.
        share: Share,
        /// How many each GPU has.
        shares: u32,
    },
    /// The GPU no longer answers.
    #[error("device {0} is not healthy: its GPU no longer answers")]
    Lost(Share),
    /// Nobody would arrange turns.
    #[error("device {0} is not healthy: nvshare-agent does not answer on this node")]
    NoAgent(Share),
}

impl Stock {
    /// No GPU is known yet. Each will be offered as `shares` devices; the agent may be silent for `grace`.
    pub fn new(shares: u32, grace: Duration) -> Self {
        Self { shares, grace, silent_since: None, agent_lost: false, known: false, gpus: BTreeMap::new() }
    }

    /// How many shares each GPU has.
    pub fn shares(&self) -> u32 {
        self.shares
    }

    /// Takes in what the agent says; `None` if it says nothing. Tells whether the devices or their health changed.
    pub fn update(&mut self, news: Option<&Inventory>, now: Instant) -> bool {
        let before = self.health();
        for gpu in news.into_iter().flat_map(|inventory| &inventory.gpus) {
            self.gpus.insert(gpu.uuid, Entry { listed: true, last: gpu.clone() });
        }
        if let Some(inventory) = news.filter(|inventory| inventory.complete) {
            for (uuid, entry) in &mut self.gpus {
                entry.listed = inventory.gpus.iter().any(|gpu| gpu.uuid == *uuid);
            }
            self.known = true;
            self.silent_since = None;
            self.agent_lost = false;
        } else {
            let since = *self.silent_since.get_or_insert(now);
            self.agent_lost = now.duration_since(since) >= self.grace;
        }
        self.health() != before
    }

    fn health(&self) -> Vec<(GpuId, bool)> {
        self.gpus.iter().map(|(&gpu, entry)| (gpu, self.is_healthy(entry))).collect()
    }

    fn is_healthy(&self, entry: &Entry) -> bool {
        entry.listed && !self.agent_lost
    }

    /// GPUs known, and how many of them are healthy.
    pub fn count(&self) -> (usize, usize) {
        (self.gpus.len(), self.gpus.values().filter(|entry| self.is_healthy(entry)).count())
    }

    /// Whether there ever was a complete list.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// What the kubelet is told.
    pub fn devices(&self) -> Vec<Device> {
        let health = |entry| if self.is_healthy(entry) { api::HEALTHY } else { api::UNHEALTHY };
        self.gpus
            .iter()
            .flat_map(|(&gpu, entry)| {
                (0..self.shares).map(move |number| Device {
                    id: Share { gpu, number }.to_string(),
                    health: health(entry).to_owned(),
                    topology: None,
                })
            })
            .collect()
    }

    /// Whether this share can be given away.
    pub fn check(&self, share: Share) -> Result<(), NotToBeHad> {
        let entry = self.gpus.get(&share.gpu).ok_or(NotToBeHad::UnknownGpu(share))?;
        if share.number >= self.shares {
            return Err(NotToBeHad::UnknownNumber { share, shares: self.shares });
        }
        if !entry.listed {
            return Err(NotToBeHad::Lost(share));
        }
        if self.agent_lost { Err(NotToBeHad::NoAgent(share)) } else { Ok(()) }
    }

    /// What is known of a GPU for placement.
    pub fn advice(&self, gpu: GpuId) -> Advice {
        self.gpus.get(&gpu).map_or_else(Advice::default, |Entry { listed: _, last }| Advice {
            thrashing: last.thrashing,
            committed_milli: last.committed_milli(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_mins(1);

    fn inventory(complete: bool, numbers: &[u8]) -> Inventory {
        let gpu = |&number: &u8| InventoryGpu {
            uuid: GpuId([number; 16]),
            name: None,
            capacity_bytes: Some(1000),
            committed_bytes: 700,
            clients: 1,
            thrashing: number == 2,
        };
        Inventory { complete, gpus: numbers.iter().map(gpu).collect() }
    }

    fn healthy(stock: &Stock) -> Vec<bool> {
        stock.devices().iter().map(|device| device.health == api::HEALTHY).collect()
    }

    #[test]
    fn a_gpu_that_is_no_longer_listed_is_ill_and_recovers() {
        let now = Instant::now();
        let mut stock = Stock::new(1, GRACE);
        assert!(stock.update(Some(&inventory(true, &[1, 2])), now));
        assert!(!stock.update(Some(&inventory(true, &[1, 2])), now), "no news");
        assert!(stock.update(Some(&inventory(true, &[1])), now));
        assert_eq!(healthy(&stock), [true, false]);
        let lost = Share { gpu: GpuId([2; 16]), number: 0 };
        assert_eq!(stock.check(lost), Err(NotToBeHad::Lost(lost)));
        assert!(stock.update(Some(&inventory(true, &[1, 2])), now));
        assert_eq!(stock.check(lost), Ok(()));
    }

    #[test]
    fn an_incomplete_list_takes_nothing_away() {
        let now = Instant::now();
        let mut stock = Stock::new(1, GRACE);
        stock.update(Some(&inventory(true, &[1, 2])), now);
        assert!(!stock.update(Some(&inventory(false, &[1])), now));
        assert_eq!(healthy(&stock), [true, true]);
    }

    #[test]
    fn silence_is_forgiven_for_a_while() {
        let now = Instant::now();
        let mut stock = Stock::new(2, GRACE);
        stock.update(Some(&inventory(true, &[1])), now);
        assert!(!stock.update(None, now + GRACE));
        assert!(!stock.update(None, now + GRACE + GRACE / 2), "the silence is as long as since it began");
        assert!(stock.update(Some(&inventory(false, &[1])), now + 2 * GRACE));
        assert_eq!(healthy(&stock), [false, false]);
        let share = Share { gpu: GpuId([1; 16]), number: 1 };
        assert_eq!(stock.check(share), Err(NotToBeHad::NoAgent(share)));
        assert!(stock.update(Some(&inventory(true, &[1])), now + 3 * GRACE));
        assert_eq!(stock.check(share), Ok(()));
    }

    #[test]
    fn what_is_not_there_is_not_given_away() {
        let mut stock = Stock::new(2, GRACE);
        stock.update(Some(&inventory(true, &[1, 2])), Instant::now());
        let share = Share { gpu: GpuId([1; 16]), number: 2 };
        assert_eq!(stock.check(share), Err(NotToBeHad::UnknownNumber { share, shares: 2 }));
        let share = Share { gpu: GpuId([3; 16]), number: 0 };
        assert_eq!(stock.check(share), Err(NotToBeHad::UnknownGpu(share)));
        assert_eq!(stock.advice(GpuId([2; 16])), Advice { thrashing: true, committed_milli: 700 });
    }
}
