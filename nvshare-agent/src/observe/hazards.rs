//! Drivers known to hang, and a driver that does.
//!
//! **Problem.** Some releases of nvidia-uvm deadlock when memory is over-committed. Then a kernel thread spins, programs
//! cannot be killed, and only a restart of the machine helps. What is left to do is to say so before, and to make
//! nothing worse after.
//!
//! **Approach.** [`KNOWN`] lists published hangs by driver branch and product; whoever runs one is told by the log and by
//! `nvsharectl doctor`. A hang under way shows in the sensors: the fault-service thread does not sleep, and no fault is
//! served and no byte moved all the while ([`Hangs`]). Then the GPU is brought to exclusive mode and nobody new is
//! admitted, until the thread sleeps again.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nvshare_core::{Bytes, ClientSample, GpuId, Nanos};
use serde::{Deserialize, Serialize};

/// A hang that was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hazard {
    /// Driver branches, first and last.
    pub branches: (u16, u16),
    /// What the product's name holds; empty is every product.
    pub product: &'static str,
    /// What happens.
    pub what: &'static str,
    /// What to do about it.
    pub advice: &'static str,
    /// Where it was published.
    pub source: &'static str,
}

/// Every hang that is known, oldest driver first. One more is one more row.
pub const KNOWN: &[Hazard] = &[
    Hazard {
        branches: (515, 515),
        product: "P100",
        what: "registering a GPU can spin in the kernel for ever; the program cannot be killed",
        advice: "use a newer branch",
        source: "NVIDIA/open-gpu-kernel-modules#456",
    },
    Hazard {
        branches: (595, 595),
        product: "RTX 50",
        what: "an eviction can deadlock when memory that the system allocated (HMM) is over-committed: a kernel thread \
               spins, and only a restart of the machine helps",
        advice: "load nvidia-uvm with uvm_disable_hmm=1, or keep managed memory below the card's",
        source: "NVIDIA/open-gpu-kernel-modules#1223",
    },
    Hazard {
        branches: (595, 595),
        product: "H100 NVL",
        what: "the end of a program can leave a lock of nvidia-uvm taken; every NVML call then hangs",
        advice: "use branch 580; nvshare goes on without NVML where it hangs",
        source: "NVIDIA/open-gpu-kernel-modules#1333",
    },
    Hazard {
        branches: (0, u16::MAX),
        product: "GB10",
        what: "the host can wedge under memory pressure, as the GPU uses the host's memory",
        advice: "do not over-commit memory on this machine",
        source: "NVIDIA/open-gpu-kernel-modules#1358",
    },
];

/// The known hangs of a driver with GPUs of these names.
pub fn of(driver: &str, products: &[&str]) -> Vec<&'static Hazard> {
    let branch = driver.split('.').next().and_then(|branch| branch.parse::<u16>().ok());
    let Some(branch) = branch else { return Vec::new() };
    let concerns = |hazard: &&Hazard| {
        (hazard.branches.0..=hazard.branches.1).contains(&branch)
            && products.iter().any(|product| product.contains(hazard.product))
    };
    KNOWN.iter().filter(concerns).collect()
}

/// A known hang as operators are shown it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HazardReport {
    /// What can happen.
    pub what: String,
    /// What to do about it.
    pub advice: String,
    /// Where it was published.
    pub source: String,
}

/// What is known of this machine's driver.
#[derive(Debug, Default)]
pub struct Hazards {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    known: Vec<&'static Hazard>,
    hanging: BTreeMap<GpuId, Nanos>,
}

impl Hazards {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of the driver and the GPUs; what is new goes to the log. Returns how many hangs are known.
    pub fn note_driver(&self, driver: &str, products: &[&str]) -> usize {
        let known = of(driver, products);
        let mut state = self.lock();
        for hazard in &known {
            if !state.known.contains(hazard) {
                let Hazard { what, advice, source, .. } = hazard;
                tracing::warn!(driver, source, advice, "this driver is known to hang: {what}");
            }
        }
        state.known = known;
        state.known.len()
    }

    /// The known hangs of this driver.
    pub fn known(&self) -> Vec<HazardReport> {
        let report = |hazard: &&Hazard| HazardReport {
            what: hazard.what.to_owned(),
            advice: hazard.advice.to_owned(),
            source: hazard.source.to_owned(),
        };
        self.lock().known.iter().map(report).collect()
    }

    /// A GPU's driver hangs since then, or no longer does.
    pub fn set_hanging(&self, gpu: GpuId, since: Option<Nanos>) {
        match since {
            Some(since) => drop(self.lock().hanging.insert(gpu, since)),
            None => drop(self.lock().hanging.remove(&gpu)),
        }
    }

    /// The GPUs whose driver hangs, and since when.
    pub fn hanging(&self) -> BTreeMap<GpuId, Nanos> {
        self.lock().hanging.clone()
    }
}

/// A fault-service thread that neither sleeps nor gets anything done for this long hangs. A long batch moves bytes.
const HANGS_AFTER: Nanos = Nanos::seconds(10);
/// The thread counts as never asleep from this share of a bin on, in thousandths.
const BUSY_MILLI: u64 = 950;

/// Tells hangs from work.
#[derive(Debug, Default)]
pub struct Hangs {
    suspects: BTreeMap<GpuId, Suspect>,
}

#[derive(Debug)]
struct Suspect {
    since: Nanos,
    told: bool,
}

/// What became clear about a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its driver has hung since then.
    Hangs(Nanos),
    /// It gets things done again.
    Recovered,
}

impl Hangs {
    /// Takes in a bin that ends at `now`. Without a sensor for the thread, or one for what it gets done, nothing is
    /// concluded.
    pub fn bin(
        &mut self,
        gpu: GpuId,
        now: Nanos,
        interval: Nanos,
        busy: Option<Nanos>,
        clients: &[(nvshare_core::ClientId, ClientSample)],
    ) -> Option<Verdict> {
        let stuck = busy
            .is_some_and(|busy| busy.0.saturating_mul(1000) >= interval.0.saturating_mul(BUSY_MILLI))
            && clients.iter().any(|(_, sample)| is_told(sample))
            && !clients.iter().any(|(_, sample)| gets_done(sample));
        if !stuck {
            let suspect = self.suspects.remove(&gpu)?;
            return suspect.told.then_some(Verdict::Recovered);
        }
        let suspect = self.suspects.entry(gpu).or_insert(Suspect { since: now.since(interval), told: false });
        let hangs = now.since(suspect.since) >= HANGS_AFTER && !suspect.told;
        suspect.told |= hangs;
        hangs.then_some(Verdict::Hangs(suspect.since))
    }
}

/// Some sensor sees what the driver does for this client.
fn is_told(sample: &ClientSample) -> bool {
    sample.gpu_faults.is_some() || sample.bytes_in.is_some()
}

fn gets_done(sample: &ClientSample) -> bool {
    let moved = |bytes: Option<Bytes>| bytes.is_some_and(|bytes| bytes > Bytes::ZERO);
    sample.gpu_faults.is_some_and(|faults| faults > 0) || moved(sample.bytes_in) || moved(sample.bytes_out)
}

#[cfg(test)]
mod tests {
    use nvshare_core::ClientId;

    use super::*;

    const GPU: GpuId = GpuId([3; 16]);
    const BIN: Nanos = Nanos::millis(100);

    /// So many bins with these faults, bytes and this busy time of the thread.
    type Stretch = (usize, Option<(u64, u64)>, Option<Nanos>);

    /// The bins after which something is concluded.
    fn verdicts(stretches: &[Stretch]) -> Vec<(usize, Verdict)> {
        let mut hangs = Hangs::default();
        let (mut now, mut index, mut found) = (Nanos::SECOND, 0, Vec::new());
        for &(bins, seen, busy) in stretches {
            let sample = ClientSample {
                gpu_faults: seen.map(|(faults, _)| faults),
                bytes_in: seen.map(|(_, bytes)| Bytes(bytes)),
                ..ClientSample::default()
            };
            for _ in 0..bins {
                (now, index) = (now + BIN, index + 1);
                let verdict = hangs.bin(GPU, now, BIN, busy, &[(ClientId(1), sample)]);
                found.extend(verdict.map(|verdict| (index, verdict)));
            }
        }
        found
    }

    #[test]
    fn a_thread_that_never_sleeps_and_gets_nothing_done_hangs_after_ten_seconds_and_is_told_once() {
        let found = verdicts(&[(250, Some((0, 0)), Some(BIN)), (1, Some((9, 0)), Some(BIN))]);
        assert_eq!(found, [(100, Verdict::Hangs(Nanos::SECOND)), (251, Verdict::Recovered)]);
    }

    #[test]
    fn paging_at_full_speed_is_no_hang_and_neither_is_what_nobody_sees() {
        for quiet in [
            (300, Some((100, 0)), Some(BIN)),
            (300, Some((0, 2 << 20)), Some(BIN)),
            (300, Some((0, 0)), Some(Nanos::millis(60))),
            (300, Some((0, 0)), None),
            (300, None, Some(BIN)),
        ] {
            assert_eq!(verdicts(&[quiet]), [], "{quiet:?}");
        }
    }

    #[test]
    fn a_hazard_concerns_the_branch_and_the_product_it_was_published_for() {
        let of = |driver, product: &'static str| of(driver, &[product]).len();
        assert_eq!(of("595.10", "NVIDIA H100 NVL"), 1);
        assert_eq!(of("580.126.20", "NVIDIA H100 NVL"), 0);
        assert_eq!(of("595.10", "NVIDIA H100 80GB HBM3"), 0);
        assert_eq!(of("595.10", "NVIDIA GeForce RTX 5090"), 1);
        assert_eq!(of("unknown", "NVIDIA GB10"), 0);
        assert_eq!(of("580.1", "NVIDIA GB10"), 1);
        for hazard in KNOWN {
            assert!(hazard.branches.0 <= hazard.branches.1 && hazard.source.contains('#'), "{hazard:?}");
        }
    }
}
