//! What must hold on a kernel with kprobes.

mod driver;
mod stand_in;
mod verifier;

use nvshare_abi::uvm::DriverVersion;
use nvshare_agent::{
    config::DriverConfig,
    observe::{
        bpf::Bpf,
        source::{BpfOptions, SensorName, SensorState, SensorStatus},
    },
};

/// A test and its name, a sentence.
type Test = (&'static str, fn());

/// Every test, in the order in which they run.
pub(crate) fn all() -> impl Iterator<Item = &'static Test> {
    verifier::ALL.iter().chain(stand_in::ALL).chain(driver::ALL)
}

fn attach() -> Bpf {
    Bpf::attach(&BpfOptions {
        driver: DriverConfig::default(),
        uvm_kprobe: true,
        fault_thread: true,
        xid: true,
        cuda_uprobe: true,
    })
}

fn status(bpf: &Bpf, sensor: SensorName) -> SensorStatus {
    bpf.status().into_iter().find(|status| status.sensor == sensor).expect("every sensor has a status")
}

#[track_caller]
fn assert_attached(bpf: &Bpf, version: DriverVersion) {
    let expected = SensorState::Attached(format!("kprobes on nvidia_uvm {version}"));
    assert_eq!(status(bpf, SensorName::UvmKprobe).state, expected);
    let expected = SensorState::Attached("1 thread(s) of 1 GPU(s)".to_owned());
    assert_eq!(status(bpf, SensorName::FaultThread).state, expected);
}

#[track_caller]
fn assert_unavailable(bpf: &Bpf, sensor: SensorName, why: &str) {
    match status(bpf, sensor).state {
        SensorState::Unavailable(reason) => assert!(reason.contains(why), "{sensor}: {reason}"),
        SensorState::Attached(detail) => panic!("{sensor} is attached: {detail}"),
    }
}
