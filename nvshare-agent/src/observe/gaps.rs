//! What cannot be known, given the sources that deliver.
//!
//! Losing a source makes the picture less sharp, never wrong; this is the list of what is then less sharp, in words for
//! `status`, `explain`, `doctor` and the log.

use serde::{Deserialize, Serialize};

use super::source::{SensorName, SensorStatus};

/// One thing that nobody on this host can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// What is not known.
    pub unknown: String,
    /// What follows from that.
    pub instead: String,
    /// Any one of these would tell.
    pub told_by: Vec<SensorName>,
}

struct Fact {
    what: &'static str,
    told_by: &'static [SensorName],
    instead: &'static str,
}

const FACTS: [Fact; 8] = [
    Fact {
        what: "what the driver moves for each program",
        told_by: &[SensorName::UvmKprobe, SensorName::UvmCounters],
        instead: "thrash is not detected; the mode changes by order only (`nvsharectl set mode`)",
    },
    Fact {
        what: "for whom a program's memory is evicted",
        told_by: &[SensorName::UvmKprobe],
        instead: "whoever is over-committed beside it is taken to be the cause",
    },
    Fact {
        what: "why memory leaves the GPU",
        told_by: &[SensorName::UvmKprobe, SensorName::UvmEvents],
        instead: "all that goes out counts as evicted, a program's own prefetches too",
    },
    Fact {
        what: "which blocks leave and come back",
        told_by: &[SensorName::UvmKprobe, SensorName::UvmEvents],
        instead: "whether a program would have kept its memory alone is judged by what it allocated",
    },
    Fact {
        what: "how much of the time the GPU waits for the driver's fault service",
        told_by: &[SensorName::FaultThread],
        instead: "the share of the link that paging takes stands in, so thrash is confirmed later",
    },
    Fact {
        what: "how large the GPUs are and how much of them is taken for good",
        told_by: &[SensorName::Nvml],
        instead: "[gpu] usable_memory counts; where it is not set, turns never begin by themselves",
    },
    Fact {
        what: "GPU errors (Xid)",
        told_by: &[SensorName::Xid],
        instead: "they are neither counted nor logged here",
    },
    Fact {
        what: "which programs use CUDA without nvshare",
        told_by: &[SensorName::CudaUprobe],
        instead: "only programs under nvshare are listed",
    },
];

/// Everything that none of the sources tells, most important first.
pub fn gaps(sensors: &[SensorStatus]) -> Vec<Gap> {
    let attached =
        |name: SensorName| sensors.iter().any(|status| status.sensor == name && status.state.is_attached());
    FACTS
        .iter()
        .filter(|fact| !fact.told_by.iter().copied().any(attached))
        .map(|fact| Gap {
            unknown: fact.what.to_owned(),
            instead: fact.instead.to_owned(),
            told_by: fact.told_by.to_vec(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(attached: &[SensorName]) -> Vec<String> {
        let sensors: Vec<SensorStatus> = SensorName::ALL
            .into_iter()
            .map(|name| {
                if attached.contains(&name) {
                    SensorStatus::attached(name, "")
                } else {
                    SensorStatus::unavailable(name, "switched off")
                }
            })
            .collect();
        gaps(&sensors).into_iter().map(|gap| gap.unknown).collect()
    }

    #[test]
    fn with_every_sensor_nothing_is_missing_and_with_none_everything_is() {
        assert_eq!(with(&SensorName::ALL), Vec::<String>::new());
        assert_eq!(with(&[]).len(), FACTS.len());
    }

    #[test]
    fn counters_and_the_fault_thread_leave_causes_and_culprits_unknown() {
        let missing = with(&[SensorName::UvmCounters, SensorName::FaultThread]);
        assert!(missing.iter().any(|what| what.contains("for whom")), "{missing:?}");
        assert!(missing.iter().any(|what| what.contains("why memory leaves")), "{missing:?}");
        assert!(!missing.iter().any(|what| what.contains("for each program")), "{missing:?}");
        assert!(!missing.iter().any(|what| what.contains("fault service")), "{missing:?}");
    }

    #[test]
    fn each_sensor_that_tells_something_is_named_by_some_fact() {
        // The shim is what makes a program a client at all.
        for name in SensorName::ALL.into_iter().filter(|name| *name != SensorName::Shim) {
            let told = FACTS.iter().any(|fact| fact.told_by.contains(&name));
            assert!(told, "{name} tells nothing");
        }
    }
}
