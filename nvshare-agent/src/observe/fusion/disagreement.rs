//! Two sources that know the same figure, compared over time.
//!
//! **Problem.** Sources are read one after the other, so each bin's figures differ at its edges although both sources are
//! right; and a source can be wrong for good, as with a layout that fits no more.
//!
//! **Approach.** Both are summed over [`WINDOW`] bins. The sums may differ by [`TOLERANCE_PER_MILLE`] and by what moved in the
//! bins at the window's ends. Only after [`SUSTAINED`] windows in a row is it a disagreement; one window that agrees ends it.
//!
//! **Invariants.** Windows in which little happened, or in which one of the two was silent for a bin, judge nothing.

use std::collections::BTreeMap;

use nvshare_core::{ClientId, GpuId};
use serde::{Deserialize, Serialize};

use super::Raw;
use crate::observe::{source::SensorName, uvm_events::EventSample};

/// Bins that are summed up.
pub const WINDOW: u32 = 50;
/// What two sources may differ by.
pub const TOLERANCE_PER_MILLE: u64 = 20;
/// Windows in a row that must differ.
pub const SUSTAINED: u32 = 2;

/// A figure that two sources know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shared {
    /// GPU fault entries.
    GpuFaults,
    /// CPU faults.
    CpuFaults,
    /// Bytes to the GPU.
    BytesIn,
    /// Bytes from the GPU.
    BytesOut,
}

impl Shared {
    const ALL: [Self; 4] = [Self::GpuFaults, Self::CpuFaults, Self::BytesIn, Self::BytesOut];

    /// The name in metrics and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GpuFaults => "gpu_faults",
            Self::CpuFaults => "cpu_faults",
            Self::BytesIn => "bytes_in",
            Self::BytesOut => "bytes_out",
        }
    }

    /// Less than this in a window is too little to judge.
    const fn enough(self) -> u64 {
        match self {
            Self::GpuFaults | Self::CpuFaults => 500,
            Self::BytesIn | Self::BytesOut => 32 << 20,
        }
    }

    fn by_counters(self, raw: &Raw) -> Option<u64> {
        let counters = raw.counters?;
        Some(match self {
            Self::GpuFaults => counters.gpu_faults,
            Self::CpuFaults => counters.cpu_faults,
            Self::BytesIn => counters.bytes_in,
            Self::BytesOut => counters.bytes_out,
        })
    }

    fn by_probes(self, raw: &Raw) -> Option<u64> {
        let probes = raw.probes?;
        Some(match self {
            Self::GpuFaults => probes.gpu_faults,
            Self::CpuFaults => probes.cpu_faults,
            Self::BytesIn => probes.bytes_in.0,
            Self::BytesOut => probes.bytes_out.0,
        })
    }

    /// Events that were dropped would show as a difference that is none.
    fn by_events(self, raw: &Raw) -> Option<u64> {
        let events = raw.events.filter(|events| events.dropped == 0)?;
        match self {
            Self::GpuFaults | Self::CpuFaults => None,
            Self::BytesIn => Some(EventSample::sum(&events.bytes_in).0),
            Self::BytesOut => Some(EventSample::sum(&events.bytes_out).0),
        }
    }
}

/// Two sources that say different things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disagreement {
    /// The source that is compared.
    pub sensor: SensorName,
    /// With which.
    pub with: SensorName,
    /// Of what.
    pub figure: Shared,
    /// Of whom.
    pub client: ClientId,
    /// Where.
    pub gpu: GpuId,
    /// What the first said over the last window.
    pub says: u64,
    /// What the second said.
    pub other_says: u64,
}

/// Sums over a window.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    bins: u32,
    sums: [u64; 2],
    /// What may be on the wrong side of the window's beginning, of its end if it ended here, and of samples within.
    begins: u64,
    ends: u64,
    within: u64,
    differing: u32,
}

impl Window {
    /// Takes in a bin, of which `edges` may belong to its neighbours; at the end of a window, whether the two differ for
    /// good.
    fn add(&mut self, values: [u64; 2], edges: u64, enough: u64) -> Option<(bool, [u64; 2])> {
        let most = values[0].max(values[1]);
        if self.bins == 0 {
            self.begins = most;
        }
        self.bins += 1;
        let ends = std::mem::replace(&mut self.ends, most).saturating_add(most);
        self.within = self.within.saturating_add(edges);
        for (sum, value) in self.sums.iter_mut().zip(values) {
            *sum = sum.saturating_add(value);
        }
        if self.bins < WINDOW {
            return None;
        }
        let Self { bins: _, sums, begins, ends: _, within, differing } = *self;
        let all = sums[0].max(sums[1]);
        let allowed = [all / 1000 * TOLERANCE_PER_MILLE, begins, ends, within];
        let allowed = allowed.into_iter().fold(0, u64::saturating_add);
        let differing = match (all >= enough, sums[0].abs_diff(sums[1]) > allowed) {
            (false, _) => differing,
            (true, true) => differing.saturating_add(1),
            (true, false) => 0,
        };
        *self = Self { differing, ..Self::default() };
        Some((differing >= SUSTAINED, sums))
    }

    /// A bin that only one of the two saw.
    fn void(&mut self) {
        *self = Self { differing: self.differing, ..Self::default() };
    }
}

type Key = (SensorName, Shared, ClientId, GpuId);

/// Compares everything that two sources know.
#[derive(Debug, Default)]
pub struct Comparer {
    windows: BTreeMap<Key, Window>,
    standing: BTreeMap<Key, Disagreement>,
}

impl Comparer {
    /// Takes in a bin. Returns the windows that ended in a lasting disagreement.
    pub fn observe(&mut self, client: ClientId, gpu: GpuId, raw: &Raw) -> Vec<Disagreement> {
        let mut found = Vec::new();
        for figure in Shared::ALL {
            let counters = figure.by_counters(raw);
            let others = [
                (SensorName::UvmKprobe, figure.by_probes(raw), false),
                // Bins between two samples say nothing, and do not part one from the other.
                (SensorName::UvmEvents, figure.by_events(raw), true),
            ];
            for (sensor, value, sparse) in others {
                let key = (sensor, figure, client, gpu);
                let (Some(value), Some(counted)) = (value, counters) else {
                    if !sparse && let Some(window) = self.windows.get_mut(&key) {
                        window.void();
                    }
                    continue;
                };
                // Each sample has edges of its own.
                let edges = if sparse { value.max(counted) / 10 } else { 0 };
                let window = self.windows.entry(key).or_default();
                let ended = window.add([value, counted], edges, figure.enough());
                let Some((lasting, [says, other_says])) = ended else { continue };
                if lasting {
                    let with = SensorName::UvmCounters;
                    let news = Disagreement { sensor, with, figure, client, gpu, says, other_says };
                    self.standing.insert(key, news.clone());
                    found.push(news);
                } else {
                    self.standing.remove(&key);
                }
            }
        }
        found
    }

    /// Forgets clients that are gone.
    pub fn retain(&mut self, alive: impl Fn(ClientId) -> bool) {
        self.windows.retain(|(_, _, client, _), _| alive(*client));
        self.standing.retain(|(_, _, client, _), _| alive(*client));
    }

    /// The disagreements that last.
    pub fn standing(&self) -> impl Iterator<Item = &Disagreement> {
        self.standing.values()
    }
}

#[cfg(test)]
mod tests {
    use nvshare_core::Bytes;

    use super::*;
    use crate::observe::{source::UvmTotals, uvm_counters::CounterTotals};

    const CLIENT: ClientId = ClientId(1);
    const GPU: GpuId = GpuId([1; 16]);
    const MIB: u64 = 1 << 20;

    fn bin(counted: u64, probed: u64) -> Raw {
        Raw {
            counters: Some(CounterTotals { bytes_in: counted, ..CounterTotals::default() }),
            probes: Some(UvmTotals { bytes_in: Bytes(probed), ..UvmTotals::default() }),
            ..Raw::default()
        }
    }

    fn feed(comparer: &mut Comparer, bins: u32, raw: impl Fn(u32) -> Raw) -> Vec<Disagreement> {
        (0..bins).flat_map(|index| comparer.observe(CLIENT, GPU, &raw(index))).collect()
    }

    #[test]
    fn sources_that_agree_but_for_the_edges_of_bins_agree() {
        let mut comparer = Comparer::default();
        // One source is always a third of a bin late, and bins differ in size.
        let flow = |index: u32| u64::from(index % 7) * 10 * MIB;
        let late = |index: u32| flow(index) * 2 / 3 + flow(index.wrapping_sub(1).min(index)) / 3;
        let found = feed(&mut comparer, 40 * WINDOW, |index| bin(flow(index), late(index)));
        assert_eq!(found, []);
        // A burst that one sees a bin later than the other, at whatever place in the window.
        for place in 0..WINDOW {
            let burst = |index: u32, at: u32| if index % WINDOW == at { 900 * MIB } else { 0 };
            let mut comparer = Comparer::default();
            let found = feed(&mut comparer, 6 * WINDOW, |index| {
                bin(burst(index, place), burst(index.wrapping_sub(1), place))
            });
            assert_eq!(found, [], "{place}");
        }
    }

    #[test]
    fn a_source_that_is_wrong_by_a_tenth_is_found_in_its_second_window() {
        let mut comparer = Comparer::default();
        let wrong = |_| bin(10 * MIB, 9 * MIB);
        assert_eq!(feed(&mut comparer, 2 * WINDOW - 1, wrong), []);
        let found = feed(&mut comparer, 1, wrong);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].sensor, found[0].with), (SensorName::UvmKprobe, SensorName::UvmCounters));
        assert_eq!((found[0].says, found[0].other_says), (450 * MIB, 500 * MIB));
        assert_eq!(comparer.standing().count(), 1);
        // It ends with the first window that agrees.
        feed(&mut comparer, WINDOW, |_| bin(10 * MIB, 10 * MIB));
        assert_eq!(comparer.standing().count(), 0);
    }

    #[test]
    fn a_source_that_sees_nothing_is_found_and_one_that_is_silent_is_not() {
        let mut comparer = Comparer::default();
        let found = feed(&mut comparer, 2 * WINDOW, |_| bin(10 * MIB, 0));
        assert_eq!(found.len(), 1);
        let mut comparer = Comparer::default();
        let silent = |_| Raw { probes: None, ..bin(10 * MIB, 0) };
        assert_eq!(feed(&mut comparer, 4 * WINDOW, silent), []);
        let mut comparer = Comparer::default();
        assert_eq!(feed(&mut comparer, 4 * WINDOW, |_| bin(1000, 0)), [], "too little to judge");
    }

    #[test]
    fn sampled_events_are_compared_over_their_own_bins() {
        let events = |seen: u64| {
            let mut sample = EventSample::default();
            sample.bytes_in[2] = Bytes(seen);
            sample
        };
        // A tenth of the bins is sampled; each sample misses a twentieth at its beginning.
        let sampled = |seen: u64, dropped: u64| {
            move |index: u32| Raw {
                probes: None,
                events: index.is_multiple_of(10).then_some(EventSample { dropped, ..events(seen) }),
                ..bin(100 * MIB, 0)
            }
        };
        let mut comparer = Comparer::default();
        assert_eq!(feed(&mut comparer, 40 * WINDOW, sampled(95 * MIB, 0)), []);
        let found = feed(&mut comparer, 40 * WINDOW, sampled(50 * MIB, 0));
        assert!(found.iter().all(|found| found.sensor == SensorName::UvmEvents));
        assert!(!found.is_empty());
        let mut comparer = Comparer::default();
        assert_eq!(feed(&mut comparer, 40 * WINDOW, sampled(50 * MIB, 7)), [], "dropped events are no lie");
    }

    #[test]
    fn clients_that_are_gone_are_forgotten() {
        let mut comparer = Comparer::default();
        feed(&mut comparer, 2 * WINDOW, |_| bin(10 * MIB, 0));
        comparer.retain(|client| client != CLIENT);
        assert_eq!((comparer.standing().count(), comparer.windows.len()), (0, 0));
    }
}
