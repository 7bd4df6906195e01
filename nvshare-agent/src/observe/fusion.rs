//! One sample stream from all sources, in which each figure says who obtained it and how sure it is.
//!
//! **Problem.** Several sources may know the same figure, some know only a part of it, and any of them can be missing.
//!
//! **Approach.** A [`Figure`] has a value where somebody knows it, and bounds in any case: what is true lies between
//! them. For each figure the most direct source is taken: faults, evictions and their causes from the probes on
//! nvidia-uvm, bytes from the driver's own counters; causes from sampled events where there are no probes. Where two
//! sources know the same, [`disagreement`] compares them over time.
//!
//! **Invariants.** A missing source widens bounds and never shifts a value. Pure: a recording of what the sources said
//! gives the same stream again.

pub mod disagreement;

use nvshare_core::{Bytes, ClientSample};
use serde::{Deserialize, Serialize};

use super::{
    source::{BlockTotals, SensorName, UvmTotals},
    uvm_counters::CounterTotals,
    uvm_events::EventSample,
};

/// From this many refaulted bytes on, the blocks that events named stand for all that came back.
const REPRESENTATIVE: Bytes = Bytes::mib(16);

/// What each source said of one client on one GPU over one bin. `None`: the source did not look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// The driver's counters.
    pub counters: Option<CounterTotals>,
    /// The probes on nvidia-uvm.
    pub probes: Option<UvmTotals>,
    /// The same probes, of single blocks.
    pub blocks: Option<BlockTotals>,
    /// Bytes that the same probes know to be evicted and not to be back at the end of the bin, less what may have been freed.
    pub out: Option<Bytes>,
    /// Sampled events.
    pub events: Option<EventSample>,
    /// The client's managed memory.
    pub managed: Bytes,
}

/// One figure of one bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figure {
    /// What it is taken to be; `None` if nobody knows.
    pub value: Option<u64>,
    /// It is not less than this.
    pub low: u64,
    /// It is not more than this; `None` if there is no limit.
    pub high: Option<u64>,
    /// Who says so, value or bounds.
    pub source: Option<SensorName>,
}

impl Figure {
    fn exact(value: u64, source: SensorName) -> Self {
        Self { value: Some(value), low: value, high: Some(value), source: Some(source) }
    }

    fn between(low: u64, high: Option<u64>, source: SensorName) -> Self {
        Self { value: None, low, high, source: Some(source) }
    }

    /// Whether the value is certain.
    pub fn is_exact(&self) -> bool {
        self.value.is_some() && self.high == Some(self.low)
    }
}

/// Every figure of one client on one GPU over one bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in `ClientSample`")]
pub struct Fused {
    pub gpu_faults: Figure,
    pub cpu_faults: Figure,
    pub bytes_in: Figure,
    pub bytes_out: Figure,
    pub evicted: Figure,
    pub evicted_by_others: Figure,
    pub curable: Figure,
    pub self_refaulted: Figure,
    pub resident: Figure,
}

impl Fused {
    /// Takes each figure from the source that knows it best. `spilled` is what of the client's memory is known to lie on the
    /// host.
    pub fn of(raw: &Raw, spilled: Bytes) -> Self {
        let Raw { counters, probes, blocks, out, events, managed } = *raw;
        let counted = |figure: fn(&CounterTotals) -> u64| {
            counters.as_ref().map(|all| Figure::exact(figure(all), SensorName::UvmCounters))
        };
        let probed = |figure: fn(&UvmTotals) -> u64| {
            probes.as_ref().map(|all| Figure::exact(figure(all), SensorName::UvmKprobe))
        };
        // Events alone see a bin from a moment after its beginning.
        let sampled = |figure: fn(&EventSample) -> u64| {
            events.as_ref().map(|all| Figure::between(figure(all), None, SensorName::UvmEvents))
        };
        let bytes_in = counted(|c| c.bytes_in)
            .or(probed(|p| p.bytes_in.0))
            .or(sampled(|e| EventSample::sum(&e.bytes_in).0))
            .unwrap_or_default();
        let bytes_out = counted(|c| c.bytes_out)
            .or(probed(|p| p.bytes_out.0))
            .or(sampled(|e| EventSample::sum(&e.bytes_out).0))
            .unwrap_or_default();
        let evicted = probed(|p| p.evicted.0)
            .or_else(|| events.map(|events| evicted_by_events(&events, &bytes_out)))
            .unwrap_or(Figure { value: None, low: 0, ..bytes_out });
        let (curable, self_refaulted) = refaults(blocks, events, &bytes_in);
        Self {
            gpu_faults: probed(|p| p.gpu_faults).or(counted(|c| c.gpu_faults)).unwrap_or_default(),
            cpu_faults: counted(|c| c.cpu_faults).or(probed(|p| p.cpu_faults)).unwrap_or_default(),
            bytes_in,
            bytes_out,
            evicted,
            evicted_by_others: probed(|p| p.evicted_by_others.0).unwrap_or(Figure {
                value: None,
                low: 0,
                ..evicted
            }),
            curable,
            self_refaulted,
            resident: resident(managed, out, spilled, &bytes_out),
        }
    }

    /// What the engine is told.
    pub fn sample(&self) -> ClientSample {
        let bytes = |figure: &Figure| figure.value.map(Bytes);
        ClientSample {
            gpu_faults: self.gpu_faults.value,
            cpu_faults: self.cpu_faults.value,
            bytes_in: bytes(&self.bytes_in),
            bytes_out: bytes(&self.bytes_out),
            evicted: bytes(&self.evicted),
            evicted_by_others: bytes(&self.evicted_by_others),
            curable: bytes(&self.curable),
            self_refaulted: bytes(&self.self_refaulted),
            resident: bytes(&self.resident),
        }
    }
}

/// The share of the events that were evictions, of all bytes that left.
fn evicted_by_events(events: &EventSample, bytes_out: &Figure) -> Figure {
    let source = SensorName::UvmEvents;
    let (seen, evicted) = (EventSample::sum(&events.bytes_out).0, events.evicted().0);
    match bytes_out.value {
        Some(all) => {
            // At the edges of a bin the events may have seen what the counters had before.
            let low = evicted.min(all);
            let high = all.saturating_sub(seen - evicted).max(low);
            // After a drop it is not known of which kind the missing ones were.
            let known = events.dropped == 0 && (seen > 0 || all == 0);
            let value = known.then(|| scaled(all, evicted, seen).clamp(low, high));
            Figure { value, low, high: Some(high), source: Some(source) }
        }
        None => Figure::between(evicted, None, source),
    }
}

/// `all · part / whole`; nothing of nothing.
fn scaled(all: u64, part: u64, whole: u64) -> u64 {
    if whole == 0 { 0 } else { (u128::from(all) * u128::from(part) / u128::from(whole)) as u64 }
}

/// What lies on the GPU. What was allocated may never have been touched, so each of these is a limit; the one by blocks is the
/// closest that there is, and stands for the value.
fn resident(managed: Bytes, out: Option<Bytes>, spilled: Bytes, bytes_out: &Figure) -> Figure {
    let most = |out: Bytes| managed.saturating_sub(out).0;
    match out {
        Some(out) => Figure {
            value: Some(most(out)),
            low: 0,
            high: Some(most(out)),
            source: Some(SensorName::UvmKprobe),
        },
        None => Figure { value: None, low: 0, high: Some(most(spilled)), source: bytes_out.source },
    }
}

/// Which of the bytes in turns would have spared.
fn refaults(blocks: Option<BlockTotals>, events: Option<EventSample>, bytes_in: &Figure) -> (Figure, Figure) {
    if let Some(BlockTotals { curable, own, unjudged, evicted: _, returned: _ }) = blocks {
        let figure = |known: Bytes| Figure {
            value: (unjudged == Bytes::ZERO).then_some(known.0),
            low: known.0,
            high: Some((known + unjudged).0),
            source: Some(SensorName::UvmKprobe),
        };
        return (figure(curable), figure(own));
    }
    let unknown = Figure { value: None, low: 0, ..*bytes_in };
    let Some(events) = events else { return (unknown, unknown) };
    let (curable, own) = (events.refaults.curable, events.refaults.own);
    let judged = curable + own;
    let figure = |known: Bytes| {
        // Blocks that left between samples have no shadow; the others stand for them.
        let stands_for_all = events.dropped == 0 && judged >= REPRESENTATIVE;
        let high = bytes_in.high.map(|all| all.saturating_sub((judged - known).0).max(known.0));
        Figure {
            value: bytes_in
                .value
                .filter(|_| stands_for_all)
                .map(|all| scaled(all, known.0, judged.0).max(known.0)),
            low: known.0,
            high,
            source: Some(SensorName::UvmEvents),
        }
    };
    (figure(curable), figure(own))
}

#[cfg(test)]
mod tests {
    use nvshare_abi::uvm::MigrationCause;

    use super::*;
    use crate::observe::blocks::Refault;

    const COUNTERS: CounterTotals = CounterTotals { bytes_in: 1, bytes_out: 2, cpu_faults: 3, gpu_faults: 4 };
    const PROBES: UvmTotals = UvmTotals {
        gpu_faults: 40,
        gpu_fault_instances: 50,
        bytes_in: Bytes(10),
        bytes_out: Bytes(20),
        evicted: Bytes(15),
        evicted_by_others: Bytes(5),
        cpu_faults: 30,
    };

    fn of(counters: Option<CounterTotals>, probes: Option<UvmTotals>, events: Option<EventSample>) -> Fused {
        Fused::of(&Raw { counters, probes, events, managed: Bytes(100), ..Raw::default() }, Bytes(30))
    }

    fn events(evicted: u64, user: u64, dropped: u64) -> EventSample {
        let mut sample = EventSample { dropped, ..EventSample::default() };
        sample.bytes_out[MigrationCause::Eviction as usize] = Bytes(evicted);
        sample.bytes_out[MigrationCause::User as usize] = Bytes(user);
        sample
    }

    #[test]
    fn bytes_come_from_the_counters_and_causes_from_the_probes() {
        let both = of(Some(COUNTERS), Some(PROBES), None);
        let sample = both.sample();
        assert_eq!((sample.bytes_in, sample.bytes_out), (Some(Bytes(1)), Some(Bytes(2))));
        assert_eq!((sample.gpu_faults, sample.cpu_faults), (Some(40), Some(3)));
        assert_eq!((sample.evicted, sample.evicted_by_others), (Some(Bytes(15)), Some(Bytes(5))));
        assert_eq!(both.bytes_in.source, Some(SensorName::UvmCounters));
        assert_eq!(both.evicted.source, Some(SensorName::UvmKprobe));
        assert!(both.bytes_in.is_exact() && both.evicted.is_exact());
    }

    #[test]
    fn what_no_source_knows_has_no_value_and_no_limit() {
        let none = of(None, None, None);
        assert_eq!(none.sample(), ClientSample::default());
        assert_eq!(none.bytes_in, Figure::default());
        assert_eq!(none.evicted.high, None);
        let probes = of(None, Some(PROBES), None).sample();
        assert_eq!((probes.bytes_in, probes.cpu_faults), (Some(Bytes(10)), Some(30)));
    }

    #[test]
    fn a_missing_source_leaves_bounds_that_hold() {
        let counters = of(Some(COUNTERS), None, None);
        assert_eq!((counters.evicted.value, counters.evicted.low, counters.evicted.high), (None, 0, Some(2)));
        assert_eq!(counters.evicted_by_others.high, Some(2), "no more for others than left at all");
        assert_eq!(counters.curable.high, Some(1), "no more than came in");
        assert_eq!((counters.resident.value, counters.resident.high), (None, Some(70)));
    }

    #[test]
    fn what_is_resident_is_taken_from_the_blocks_that_are_out() {
        let known = |out| Raw { out, managed: Bytes(100), counters: Some(COUNTERS), ..Raw::default() };
        let by_block = Fused::of(&known(Some(Bytes(40))), Bytes(30));
        assert_eq!(by_block.sample().resident, Some(Bytes(60)));
        assert_eq!((by_block.resident.low, by_block.resident.high), (0, Some(60)));
        assert_eq!(by_block.resident.source, Some(SensorName::UvmKprobe));
        let shrunk = Fused::of(&known(Some(Bytes(140))), Bytes::ZERO);
        assert_eq!(shrunk.sample().resident, Some(Bytes::ZERO), "more is out than is left");
        assert_eq!(Fused::of(&known(None), Bytes(30)).sample().resident, None);
    }

    #[test]
    fn events_tell_causes_where_there_are_no_probes() {
        let counters = CounterTotals { bytes_out: 1000, ..COUNTERS };
        let fused = of(Some(counters), None, Some(events(600, 200, 0)));
        // Three quarters of what was seen; the 200 that were not seen may be either.
        assert_eq!((fused.evicted.value, fused.evicted.low), (Some(750), 600));
        assert_eq!((fused.evicted.high, fused.evicted.source), (Some(800), Some(SensorName::UvmEvents)));
        let overflowed = of(Some(counters), None, Some(events(600, 200, 1)));
        assert_eq!((overflowed.evicted.value, overflowed.evicted.low), (None, 600), "a lower bound");
        let unseen = of(Some(counters), None, Some(events(0, 0, 0)));
        assert_eq!((unseen.evicted.value, unseen.evicted.high), (None, Some(1000)));
        let still = CounterTotals { bytes_out: 0, ..COUNTERS };
        assert_eq!(of(Some(still), None, Some(events(0, 0, 0))).evicted.value, Some(0));
        assert_eq!(of(Some(counters), Some(PROBES), Some(events(600, 200, 0))).evicted.value, Some(15));
        let alone = of(None, None, Some(events(600, 200, 0)));
        assert_eq!((alone.bytes_out.value, alone.bytes_out.low, alone.bytes_out.high), (None, 800, None));
    }

    #[test]
    fn refaults_by_block_are_exact_from_probes_and_estimated_from_enough_events() {
        let blocks =
            BlockTotals { curable: Bytes(7), own: Bytes(2), unjudged: Bytes::ZERO, ..BlockTotals::default() };
        let fused = |blocks| Fused::of(&Raw { blocks: Some(blocks), ..Raw::default() }, Bytes::ZERO);
        let exact = fused(blocks);
        assert_eq!((exact.curable.value, exact.self_refaulted.value), (Some(7), Some(2)));
        let vague = fused(BlockTotals { unjudged: Bytes(1), ..blocks });
        assert_eq!((vague.curable.value, vague.curable.low, vague.curable.high), (None, 7, Some(8)));

        let counters = CounterTotals { bytes_in: 100 << 20, ..COUNTERS };
        let refaults = |curable, own| EventSample {
            refaults: Refault { curable: Bytes::mib(curable), own: Bytes::mib(own) },
            ..EventSample::default()
        };
        let enough = of(Some(counters), None, Some(refaults(30, 10)));
        let mib =
            |figure: Figure| (figure.value.map(|v| v >> 20), figure.low >> 20, figure.high.map(|v| v >> 20));
        assert_eq!(mib(enough.curable), (Some(75), 30, Some(90)));
        assert_eq!(mib(enough.self_refaulted), (Some(25), 10, Some(70)));
        let few = of(Some(counters), None, Some(refaults(3, 1)));
        assert_eq!(mib(few.curable), (None, 3, Some(99)));
    }

    #[test]
    fn every_value_lies_within_its_bounds() {
        let options =
            [None, Some(COUNTERS), Some(CounterTotals { bytes_in: 1 << 40, bytes_out: 1 << 40, ..COUNTERS })];
        for counters in options {
            for probes in [None, Some(PROBES)] {
                for sample in
                    [None, Some(events(5, 0, 0)), Some(events(1 << 41, 7, 0)), Some(events(0, 3, 9))]
                {
                    let Fused {
                        gpu_faults,
                        cpu_faults,
                        bytes_in,
                        bytes_out,
                        evicted,
                        evicted_by_others,
                        curable,
                        self_refaulted,
                        resident,
                    } = of(counters, probes, sample);
                    for figure in [
                        gpu_faults,
                        cpu_faults,
                        bytes_in,
                        bytes_out,
                        evicted,
                        evicted_by_others,
                        curable,
                        self_refaulted,
                        resident,
                    ] {
                        assert!(figure.high.is_none_or(|high| figure.low <= high), "{figure:?}");
                        let inside =
                            |value| figure.low <= value && figure.high.is_none_or(|high| value <= high);
                        assert!(figure.value.is_none_or(inside), "{figure:?}");
                    }
                }
            }
        }
    }
}
