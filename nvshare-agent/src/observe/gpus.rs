//! The GPUs of this machine and the memory that clients can use on them.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nvshare_core::{Bytes, GpuId, Input};

use super::nvml::{NvmlGpu, NvmlReading};

/// PCIe 5 x16 in one direction: no link of a supported card is faster.
const LINK_RATE_MAX: Bytes = Bytes(63_000_000_000);
/// Capacity of a GPU whose size nobody knows: nothing is ever over-committed there.
const UNKNOWN_CAPACITY: Bytes = Bytes(u64::MAX);

/// GPUs that are known from clients' words alone at most; more than any host has.
const CLAIMED_MAX: usize = 64;

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// What NVML says; absent if the GPU is known from a client only.
    pub nvml: Option<NvmlGpu>,
    /// What the engine was told.
    capacity: Option<(Bytes, Bytes)>,
}

impl Gpu {
    /// What managed memory can use; `None` if nobody knows.
    pub fn capacity(&self) -> Option<Bytes> {
        self.capacity.map(|(capacity, _)| capacity).filter(|&capacity| !Gpus::is_unknown(capacity))
    }
}

/// All GPUs.
#[derive(Debug)]
pub struct Gpus {
    usable_memory: Option<Bytes>,
    gpus: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    gpus: BTreeMap<GpuId, Gpu>,
    /// NVML has listed all there are.
    complete: bool,
}

/// A client claims to use a GPU that this machine does not have.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownGpu(GpuId);

impl fmt::Display for UnknownGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVML knows no {} on this machine", self.0)
    }
}

impl Gpus {
    /// No GPU is known yet. `usable_memory` is the administrator's word on each.
    pub fn new(usable_memory: Option<Bytes>) -> Self {
        Self { usable_memory, gpus: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.gpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every GPU by UUID.
    pub fn all(&self) -> BTreeMap<GpuId, Gpu> {
        self.lock().gpus.clone()
    }

    /// A client uses this GPU. Returns what is news to the engine.
    pub fn seen_by_client(&self, gpu: GpuId) -> Result<Option<Input>, UnknownGpu> {
        let mut known = self.lock();
        if known.gpus.contains_key(&gpu) {
            return Ok(None);
        }
        // Without NVML anybody may name GPUs; each costs memory and series.
        if known.complete || known.gpus.len() >= CLAIMED_MAX {
            return Err(UnknownGpu(gpu));
        }
        let capacity = (self.usable_memory.unwrap_or(UNKNOWN_CAPACITY), LINK_RATE_MAX);
        if self.usable_memory.is_none() {
            tracing::warn!(%gpu, "the size of this GPU is unknown without NVML; set [gpu] usable_memory to have turns arranged by themselves");
        }
        known.gpus.insert(gpu, Gpu { nvml: None, capacity: Some(capacity) });
        Ok(Some(Input::Gpu { gpu, capacity: capacity.0, link_rate: capacity.1 }))
    }

    /// Takes in a reading of NVML. `device` is the plain device memory of all clients on a GPU. Returns what is
    /// news to the engine.
    pub fn update(&self, reading: &NvmlReading, device: impl Fn(GpuId) -> Bytes) -> Vec<Input> {
        let mut known = self.lock();
        known.complete = true;
        let mut news = Vec::new();
        for described in &reading.gpus {
            let gpu = described.id;
            let capacity = self.usable_memory.unwrap_or_else(|| {
                // Processes without the shim have plain memory too; whichever figure is larger counts.
                let plain = device(gpu).max(described.process_memory.unwrap_or_default());
                described.total.saturating_sub(described.reserved).saturating_sub(plain)
            });
            let link_rate = described.link_rate.unwrap_or(LINK_RATE_MAX);
            let entry = known.gpus.entry(gpu).or_insert(Gpu { nvml: None, capacity: None });
            entry.nvml = Some(described.clone());
            if entry.capacity != Some((capacity, link_rate)) {
                entry.capacity = Some((capacity, link_rate));
                news.push(Input::Gpu { gpu, capacity, link_rate });
            }
        }
        let listed = |gpu: &GpuId| reading.gpus.iter().any(|described| described.id == *gpu);
        let gone: Vec<GpuId> = known
            .gpus
            .iter()
            .filter(|(gpu, at)| at.nvml.is_some() && !listed(gpu))
            .map(|(gpu, _)| *gpu)
            .collect();
        for gpu in gone {
            known.gpus.remove(&gpu);
            news.push(Input::GpuGone { gpu });
        }
        news
    }

    /// Whether a capacity stands for an unknown one.
    pub fn is_unknown(capacity: Bytes) -> bool {
        capacity == UNKNOWN_CAPACITY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuId = GpuId([1; 16]);

    fn reading(total: Bytes) -> NvmlReading {
        let gpu = NvmlGpu {
            id: GPU,
            name: "test".to_owned(),
            total,
            used: Bytes::mib(100),
            reserved: Bytes::mib(24),
            process_memory: Some(Bytes::mib(50)),
            link_rate: None,
        };
        NvmlReading { driver: "580.126.20".to_owned(), gpus: vec![gpu] }
    }

    #[test]
    fn capacity_is_what_the_reserve_and_plain_allocations_leave() {
        let gpus = Gpus::new(None);
        let news = gpus.update(&reading(Bytes::gib(1)), |_| Bytes::mib(200));
        assert_eq!(news, [Input::Gpu { gpu: GPU, capacity: Bytes::mib(800), link_rate: LINK_RATE_MAX }]);
        assert_eq!(gpus.update(&reading(Bytes::gib(1)), |_| Bytes::mib(200)), [], "no news");
        let news = gpus.update(&reading(Bytes::gib(1)), |_| Bytes::ZERO);
        assert!(matches!(news[..], [Input::Gpu { capacity, .. }] if capacity == Bytes::mib(950)));
    }

    #[test]
    fn the_administrators_word_on_memory_counts_more() {
        let gpus = Gpus::new(Some(Bytes::mib(300)));
        let news = gpus.update(&reading(Bytes::gib(1)), |_| Bytes::mib(200));
        assert!(matches!(news[..], [Input::Gpu { capacity, .. }] if capacity == Bytes::mib(300)));
    }

    #[test]
    fn a_client_can_add_a_gpu_only_while_nvml_is_silent() {
        let gpus = Gpus::new(None);
        assert!(matches!(gpus.seen_by_client(GPU), Ok(Some(Input::Gpu { .. }))));
        assert_eq!(gpus.seen_by_client(GPU), Ok(None));
        gpus.update(&reading(Bytes::gib(1)), |_| Bytes::ZERO);
        assert_eq!(gpus.seen_by_client(GpuId([9; 16])), Err(UnknownGpu(GpuId([9; 16]))));
    }

    #[test]
    fn clients_cannot_name_gpus_without_end() {
        let gpus = Gpus::new(None);
        let named = (0..1000_u128).filter(|n| gpus.seen_by_client(GpuId(n.to_le_bytes())).is_ok()).count();
        assert_eq!(named, CLAIMED_MAX);
    }

    #[test]
    fn a_gpu_that_nvml_no_longer_lists_is_gone() {
        let gpus = Gpus::new(None);
        gpus.update(&reading(Bytes::gib(1)), |_| Bytes::ZERO);
        let empty = NvmlReading { driver: String::new(), gpus: Vec::new() };
        assert_eq!(gpus.update(&empty, |_| Bytes::ZERO), [Input::GpuGone { gpu: GPU }]);
    }
}
