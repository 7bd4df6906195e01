//! What a GPU is to the paging model: how much it holds and how fast memory moves.
//!
//! Every constant is a published or measured figure, or says how it was derived from one. No figure here
//! stems from real eviction under pressure on a card of ours: none may be oversubscribed.

use crate::units::{Bytes, Nanos};

/// The paging model's figures of one GPU. Rates are bytes per second.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuModel {
    /// What managed memory can use.
    pub memory: Bytes,
    /// The link, in one direction; told to the engine as its upper bound.
    pub link: Bytes,
    /// Bringing evicted memory back by GPU faults, the driver's prefetcher included, without eviction.
    pub fault_in: Bytes,
    /// Populating memory by the GPU's first touch (no bytes cross the link).
    pub first_touch: Bytes,
    /// The driver's eviction, inside the fault service, of memory whose host pages exist.
    pub evict: Bytes,
    /// Pushing memory out for the first time, by whoever: its host pages are allocated on the way.
    pub first_out: Bytes,
    /// Bringing memory back ahead of need (`cuMemPrefetchAsync`).
    pub prefetch_in: Bytes,
    /// Pushing memory out by `cuMemPrefetchAsync`.
    pub prefetch_out: Bytes,
    /// Pushing memory out by `cuMemPrefetchAsync` while it is write-protected.
    pub protected_out: Bytes,
    /// What is left of either direction's rate while both are busy, in thousandths.
    pub duplex_milli: u32,
    /// GPU work that a program has submitted ahead: what a drain waits for.
    pub in_flight: Nanos,
}

const GB: f64 = 1e9;

const fn rate(gb_per_s: f64) -> Bytes {
    Bytes((gb_per_s * GB) as u64)
}

impl GpuModel {
    /// The names of the presets.
    pub const PRESETS: [&'static str; 3] = ["p100-pcie3", "h100-pcie5", "rtx5090-pcie5"];

    /// The preset of this name.
    pub fn preset(name: &str) -> Option<Self> {
        match name {
            "p100-pcie3" => Some(Self::p100()),
            "h100-pcie5" => Some(Self::h100()),
            "rtx5090-pcie5" => Some(Self::rtx5090()),
            _ => None,
        }
    }

    /// NVIDIA P100 16 GB on PCIe 3 x16, the card of the nvshare thesis (NTUA 2021).
    ///
    /// * `memory`: 15.5 GiB are left of 16 GB (thesis, chapter 12).
    /// * `link`: PCIe 3 x16 carries about 12.3 GB/s; the thesis' 20.4 GiB of evictions took 1.79 s on the wire.
    /// * `fault_in`, `evict`: a hand-over of 15.3 GB costs 2.5 s (fit to table 12.2, in and out one after the
    ///   other); with evictions at the wire's 12.2 GB/s this leaves the link's rate for the way in, and the
    ///   calibration (`calibrate`) confirms the sum. The chapter-10 microbenchmark, which walks memory page by
    ///   page, faults in at 2.8 GB/s only; frameworks touch memory widely.
    /// * `first_touch`: not published; the microbenchmark's first pass is bound by the fault service, whose
    ///   groups per block do not depend on the copy. Taken as the way in.
    /// * `prefetch_in`, `prefetch_out`: 10 GiB in 1.179 s and 1.025 s (figures 10.10, 10.11); out is bounded by
    ///   the processor's page mapping at what the H100 host reached, less its slower Haswell cores.
    /// * `protected_out`: the wire, as on the H100.
    /// * `first_out`: as on the H100 host, a little less.
    /// * `duplex_milli`: as on the H100.
    fn p100() -> Self {
        Self {
            memory: Bytes::mib(15_872),
            link: rate(12.3),
            fault_in: rate(12.3),
            first_touch: rate(12.3),
            evict: rate(12.2),
            first_out: rate(4.0),
            prefetch_in: rate(9.1),
            prefetch_out: rate(8.0),
            protected_out: rate(10.5),
            duplex_milli: 880,
            in_flight: Nanos::millis(10),
        }
    }

    /// NVIDIA H100 80GB HBM3 on PCIe 5 x16, driver 580.159.04: measured within free memory.
    ///
    /// * `memory`: 81,559 MiB less about 1.6 GiB that the driver, contexts and page tables take.
    /// * `link`: 54.6 GB/s pinned host to device.
    /// * `fault_in`: 9.2 GB/s for pushed-out memory brought back by demand faults (7.3 – 8.4 for 4 GiB on a
    ///   fresh host range, 11.2 for 16 GiB).
    /// * `first_touch`: 11.6 GB/s.
    /// * `evict`: not measured. Eviction copies a block without the processor's mapping pass, as a
    ///   write-protected push-out does: 43 GB/s, the low end of that.
    /// * `first_out`: 3.7 – 4.8 GB/s while host pages are allocated.
    /// * `prefetch_in`: 48.5 – 50.1; `prefetch_out`: 13.9 – 14.6; `protected_out`: 43 – 52.
    /// * `duplex_milli`: 44 out + 42 in at once under protection against 48 + 48 alone.
    fn h100() -> Self {
        Self {
            memory: Bytes::gib(78),
            link: rate(54.6),
            fault_in: rate(9.2),
            first_touch: rate(11.6),
            evict: rate(43.0),
            first_out: rate(4.3),
            prefetch_in: rate(49.0),
            prefetch_out: rate(14.0),
            protected_out: rate(48.0),
            duplex_milli: 880,
            in_flight: Nanos::millis(10),
        }
    }

    /// NVIDIA RTX 5090 32 GB on PCIe 5 x16, from published figures.
    ///
    /// * `memory`: 32,607 MiB less about 0.8 GiB.
    /// * `link`: 54 GB/s, the link of the H100.
    /// * `fault_in`, `evict`: gpu_ext (arXiv 2512.12615) streams at 21.8 – 34.7 GB/s over a 1.25 – 1.5 times
    ///   oversubscribed card, eviction included; 40 in and 43 out one after the other give 20.7.
    /// * `first_touch`: not published; as `fault_in`.
    /// * `prefetch_in`: 41.7 GB/s, `duplex_milli`: 63.5 both ways (MSched, arXiv 2512.24637, RTX 5080).
    /// * `prefetch_out`, `protected_out`, `first_out`: bound by the host, as on the H100.
    fn rtx5090() -> Self {
        Self {
            memory: Bytes::gib(31),
            link: rate(54.0),
            fault_in: rate(40.0),
            first_touch: rate(40.0),
            evict: rate(43.0),
            first_out: rate(4.3),
            prefetch_in: rate(41.7),
            prefetch_out: rate(14.0),
            protected_out: rate(41.7),
            duplex_milli: 761,
            in_flight: Nanos::millis(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_preset_and_no_rate_is_above_its_link() {
        for name in GpuModel::PRESETS {
            let gpu = GpuModel::preset(name).unwrap();
            for rate in [
                gpu.fault_in,
                gpu.first_touch,
                gpu.evict,
                gpu.first_out,
                gpu.prefetch_in,
                gpu.prefetch_out,
                gpu.protected_out,
            ] {
                assert!(rate > Bytes::ZERO && rate <= gpu.link, "{name}: {rate}");
            }
        }
        assert_eq!(GpuModel::preset("v100"), None);
    }
}
