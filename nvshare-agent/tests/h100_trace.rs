//! What a real H100's sensors said while two programs moved known amounts of memory (`tests/gpu/sensors.py`), fused by
//! this agent. `docs/measurements/2026-11-25-h100-sensors.md` says how it came about.
#![expect(clippy::expect_used, reason = "a trace that cannot be read fails the test")]

use std::collections::BTreeMap;

use nvshare_agent::observe::{fusion::disagreement::Comparer, raw::RawBin};
use nvshare_core::{ClientId, ClientSample, Nanos};

const TRACE: &str = include_str!("data/h100-movement.recording");
const GIB: u64 = 1 << 30;

/// The bins of the trace; its other lines are the engine's, which may decide otherwise today.
fn bins() -> Vec<RawBin> {
    let lines =
        TRACE.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line of JSON"));
    lines
        .filter_map(|mut line| line.get_mut("bin").map(serde_json::Value::take))
        .map(|bin| serde_json::from_value(bin).expect("a bin of the sensors"))
        .collect()
}

/// What each client's samples add up to.
fn sum(of: impl Fn(&ClientSample) -> u64) -> BTreeMap<ClientId, u64> {
    let mut sums = BTreeMap::new();
    for (client, sample) in bins().iter().flat_map(|bin| &bin.gpus).flat_map(|gpu| gpu.sample().clients) {
        *sums.entry(client).or_default() += of(&sample);
    }
    sums
}

#[test]
fn the_bytes_of_each_program_are_those_that_it_moved() {
    // Each pushed its memory out three times, by prefetch twice and by CPU touches once, and got it back by faults twice
    // and once by prefetch; the first touch moves nothing.
    let moved = BTreeMap::from([(ClientId(1), 6 * GIB), (ClientId(2), 9 * GIB / 2)]);
    assert_eq!(sum(|sample| sample.bytes_in.unwrap().0), moved);
    assert_eq!(sum(|sample| sample.bytes_out.unwrap().0), moved);
}

#[test]
fn gpu_faults_keep_the_fault_thread_busy_and_cpu_faults_push_out() {
    let mut touched = 0;
    for gpu in bins().iter().flat_map(|bin| &bin.gpus) {
        let sample = gpu.sample();
        let faults: u64 = sample.clients.iter().map(|(_, client)| client.gpu_faults.unwrap()).sum();
        if faults > 100 {
            assert!(sample.fault_busy.is_none_or(|busy| busy > Nanos(0)), "{sample:?}");
        }
        for (_, client) in sample.clients.iter().filter(|(_, client)| client.cpu_faults.unwrap() > 0) {
            assert!(client.bytes_out.unwrap().0 > 0, "{client:?}");
            touched += client.cpu_faults.unwrap();
        }
    }
    assert_eq!(touched, 6144 + 4608);
}

#[test]
fn no_two_sensors_of_the_trace_disagree() {
    let mut comparer = Comparer::default();
    for gpu in bins().iter().flat_map(|bin| &bin.gpus) {
        for client in &gpu.clients {
            assert!(comparer.observe(client.client, gpu.gpu, &client.raw).is_empty());
        }
    }
}
