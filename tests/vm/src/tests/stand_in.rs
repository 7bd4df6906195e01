//! What must hold with any version of the driver, shown with modules of ours in its place.

use std::{thread::sleep, time::Duration};

use nvshare_abi::uvm::{BLOCK_BYTES, DriverVersion, Event, MakeResidentCause, Processor, symbol};
use nvshare_agent::{
    clock,
    observe::{
        bpf::Bpf,
        source::{SensorName, UvmTotals},
    },
};
use nvshare_core::{Bytes, Nanos};

use super::{Test, assert_attached, assert_unavailable, attach, status};
use crate::{
    kernel_module::{self, until},
    stand_in::{self, GPU, GPU_1, Module},
    tenant::Tenant,
};

/// One version of each layout. They differ also in the name of the service function and in procfs.
const V525: DriverVersion = DriverVersion::new(525, 147, 5);
const V535: DriverVersion = DriverVersion::new(535, 288, 1);
const V550: DriverVersion = DriverVersion::new(550, 163, 1);
const V560: DriverVersion = DriverVersion::new(560, 35, 3);
const V575: DriverVersion = DriverVersion::new(575, 64, 5);
const V580: DriverVersion = DriverVersion::new(580, 126, 20);

/// Every test, in the order in which they run.
pub(super) const ALL: &[Test] = &[
    ("without the module the sensors say that it is not loaded", without_the_module),
    ("a module that comes late is probed and its events are counted exactly (525)", || counted_exactly(V525)),
    ("the same holds for the layout of 535", || counted_exactly(V535)),
    ("the same holds for the layout of 550", || counted_exactly(V550)),
    ("the same holds for the fault entries of 560", || counted_exactly(V560)),
    ("the same holds for the layout of 575", || counted_exactly(V575)),
    ("the same holds for the layout of 580", || counted_exactly(V580)),
    ("an unknown driver is not probed, and said to be unknown", unknown_driver),
    (
        "a driver without a required function is not probed, and the function is named",
        required_function_missing,
    ),
    ("a driver without the service function is probed all the same", service_function_missing),
    ("the probes let the module go, and find it again in another version", another_version),
    ("a module that was reloaded between two looks is probed anew", reloaded_unseen),
    ("evictions are charged to whoever faulted (580)", || evictions_charged(V580)),
    ("evictions are charged to whoever faulted (550)", || evictions_charged(V550)),
    ("spaces belong to the processes that began them, and go with them", ownership),
    ("a space older than the probes has a probable owner at most", older_space),
    ("nonsense and unreadable addresses are counted and harm nobody", nonsense),
    ("the fault thread is busy while it runs and not while it sleeps", fault_thread_busy),
];

fn migration(dst: Processor, src: Processor, bytes: u64, cause: MakeResidentCause) -> Event {
    Event::Migration { dst, src, address: 0x7f00_0000_0000, bytes, copy: false, cause }
}

fn without_the_module() {
    let mut bpf = attach();
    for _ in 0..2 {
        assert_unavailable(&bpf, SensorName::UvmKprobe, "the module nvidia_uvm is not loaded");
        assert_unavailable(&bpf, SensorName::FaultThread, "there is no fault-service thread");
        assert_eq!(bpf.read().uvm, None);
        bpf.refresh();
    }
}

fn counted_exactly(version: DriverVersion) {
    let mut bpf = attach();
    let module = Module::load(version);
    bpf.refresh();
    assert_attached(&bpf, version);
    count_exactly(&mut bpf, &module, version);
    module.unload();
}

/// One space of this process, one event of every kind, and what must be read of them.
fn count_exactly(bpf: &mut Bpf, module: &Module, version: DriverVersion) {
    let before = status(bpf, SensorName::UvmKprobe);
    let space = 0xffff_8880_0000_1008;
    let mut calls = 0;
    module.begin_space(space);
    module.service();
    calls += 2;
    for instances in [1, 3, 7] {
        module.gpu_fault(space, instances);
        calls += 1;
    }
    module.notify_here(space, Event::CpuFault { address: 0x7000, cpu: 1, write: true, pc: 0x40_0000 });
    calls += 1;
    for (index, cause) in (1..).zip(MakeResidentCause::ALL) {
        module.notify(space, migration(GPU_1, Processor::CPU, 4096 * index, cause));
        module.notify(space, migration(Processor::CPU, GPU_1, 65536 * index, cause));
        calls += 2;
    }
    // What is none of our business: other ids, and moves between CPUs.
    module.notify_nonsense(space, 0);
    module.notify_nonsense(space, module.layout().revocation_id);
    module.notify(space, migration(Processor::CPU, Processor::CPU, 4096, MakeResidentCause::ApiMigrate));
    calls += 3;

    let own = std::process::id();
    let reading = bpf.read().uvm.expect("the probes are attached");
    assert_eq!(reading.known, [own], "{version}");
    let totals = UvmTotals {
        gpu_faults: 3,
        gpu_fault_instances: 11,
        bytes_in: Bytes(4096 * 45),
        bytes_out: Bytes(65536 * 45),
        evicted: Bytes(65536 * 5),
        evicted_by_others: Bytes::ZERO,
        cpu_faults: 1,
    };
    assert_eq!(reading.clients, [((own, GPU), totals)].into(), "{version}");
    assert_eq!(reading.evictions, [((own, own, GPU), Bytes(65536 * 5))].into(), "{version}");

    module.end_space(space);
    calls += 1;
    // Totals outlive the space, as its process lives.
    let _retired = bpf.read();
    let reading = bpf.read().uvm.expect("the probes are attached");
    assert_eq!((reading.clients.len(), reading.known.len()), (1, 0), "{version}");
    assert_eq!(reading.clients.get(&(own, GPU)), Some(&totals), "{version}");
    let after = status(bpf, SensorName::UvmKprobe);
    // No call was missed and none seen twice.
    assert_eq!(after.run_count - before.run_count, calls, "{version}");
    assert!(after.run_time > before.run_time, "{version}");
    assert_eq!(after.lost, 0, "{version}");
}

fn unknown_driver() {
    let mut bpf = attach();
    stand_in::load_file("999.10");
    for _ in 0..2 {
        bpf.refresh();
        assert_unavailable(&bpf, SensorName::UvmKprobe, "the event layout of driver 999.10 is not known");
        assert_eq!(bpf.read().uvm, None);
    }
    // What needs no layout works.
    assert!(status(&bpf, SensorName::FaultThread).state.is_attached());
    kernel_module::unload("nvidia_uvm");
    let module = Module::load(V580);
    bpf.refresh();
    assert_attached(&bpf, V580);
    count_exactly(&mut bpf, &module, V580);
    module.unload();
}

fn required_function_missing() {
    let mut bpf = attach();
    for (name, function) in [("without-notify", symbol::NOTIFY), ("without-init", symbol::INIT)] {
        stand_in::load_file(name);
        for _ in 0..2 {
            bpf.refresh();
            let why = format!("nvidia_uvm does not have the function {function}");
            assert_unavailable(&bpf, SensorName::UvmKprobe, &why);
            assert_eq!(bpf.read().uvm, None);
        }
        assert!(status(&bpf, SensorName::FaultThread).state.is_attached());
        kernel_module::unload("nvidia_uvm");
    }
    let module = Module::load(V580);
    bpf.refresh();
    assert_attached(&bpf, V580);
    count_exactly(&mut bpf, &module, V580);
    module.unload();
}

fn service_function_missing() {
    let mut bpf = attach();
    stand_in::load_file("without-service");
    bpf.refresh();
    assert_attached(&bpf, V580);
    let module = Module::of_loaded(V580);
    let space = 0xffff_8880_0000_7008;
    module.begin_space(space);
    module.gpu_fault(space, 1);
    let reading = bpf.read().uvm.expect("the probes are attached");
    let faults = reading.clients.get(&(std::process::id(), GPU)).map(|totals| totals.gpu_faults);
    assert_eq!(faults, Some(1));
    module.unload();
}

fn another_version() {
    let mut bpf = attach();
    for version in [V580, V550, V580] {
        let module = Module::load(version);
        bpf.refresh();
        assert_attached(&bpf, version);
        count_exactly(&mut bpf, &module, version);
        module.unload();
        bpf.refresh();
        assert_unavailable(&bpf, SensorName::UvmKprobe, "not loaded");
        assert_unavailable(&bpf, SensorName::FaultThread, "no fault-service thread");
        let reading = bpf.read();
        assert_eq!((reading.uvm, reading.fault_busy.len()), (None, 0));
    }
}

fn reloaded_unseen() {
    let mut bpf = attach();
    let module = Module::load(V580);
    bpf.refresh();
    assert_attached(&bpf, V580);
    count_exactly(&mut bpf, &module, V580);
    module.unload();
    let module = Module::load(V580);
    bpf.refresh();
    assert_attached(&bpf, V580);
    count_exactly(&mut bpf, &module, V580);
    module.unload();
}

fn evictions_charged(version: DriverVersion) {
    let module = Module::load(version);
    let mut bpf = attach();
    assert_attached(&bpf, version);
    let (mut a, mut b) = (Tenant::begin(0xffff_8880_0000_3008), Tenant::begin(0xffff_8880_0000_4008));
    let eviction = migration(Processor::CPU, GPU_1, BLOCK_BYTES, MakeResidentCause::Eviction);
    module.service();
    module.gpu_fault(a.space, 1);
    module.notify(b.space, eviction);
    module.notify(b.space, eviction);
    module.notify(a.space, eviction);
    module.gpu_fault(b.space, 1);
    module.notify(a.space, eviction);
    // A new round begins: until its first fault nobody is known to have asked.
    module.service();
    module.notify(a.space, eviction);
    // What the access counters move is no answer to the fault before.
    module.gpu_fault(b.space, 1);
    module.access_counters();
    module.notify(a.space, eviction);
    // A process that asks the driver for memory does so for itself.
    module.notify_here(b.space, eviction);

    let reading = bpf.read().uvm.expect("the probes are attached");
    let of = |pid: u32| reading.clients[&(pid, GPU)];
    let (of_a, of_b) = (of(a.pid), of(b.pid));
    assert_eq!((of_a.evicted, of_a.evicted_by_others), (Bytes(4 * BLOCK_BYTES), Bytes(BLOCK_BYTES)));
    assert_eq!((of_b.evicted, of_b.evicted_by_others), (Bytes(3 * BLOCK_BYTES), Bytes(3 * BLOCK_BYTES)));
    let pairs = [
        ((a.pid, b.pid, GPU), Bytes(2 * BLOCK_BYTES)),
        ((a.pid, a.pid, GPU), Bytes(BLOCK_BYTES)),
        ((b.pid, a.pid, GPU), Bytes(BLOCK_BYTES)),
        ((std::process::id(), b.pid, GPU), Bytes(BLOCK_BYTES)),
    ];
    assert_eq!(reading.evictions, pairs.into(), "{version}");
    a.end();
    b.end();
    module.unload();
}

fn ownership() {
    let module = Module::load(V580);
    let mut bpf = attach();
    let mut first = Tenant::begin(0xffff_8880_0000_2008);
    module.gpu_fault(first.space, 1);
    first.end();
    // The address is used again, by another process.
    let second = Tenant::begin(0xffff_8880_0000_2008);
    module.gpu_fault(second.space, 1);
    module.gpu_fault(second.space, 1);
    let reading = bpf.read().uvm.expect("the probes are attached");
    let faults = |pid: u32| reading.clients.get(&(pid, GPU)).map(|totals| totals.gpu_faults);
    assert_eq!((faults(first.pid), faults(second.pid)), (Some(1), Some(2)));
    assert_eq!(reading.known, [second.pid]);

    let gone = first.pid;
    drop(first);
    let _retired = bpf.read();
    let reading = bpf.read().uvm.expect("the probes are attached");
    let left: Vec<u32> = reading.clients.keys().map(|&(pid, _)| pid).collect();
    assert_eq!(left, [second.pid], "{gone} is gone");
    drop(second);
    module.unload();
}

fn older_space() {
    let module = Module::load(V580);
    let space = 0xffff_8880_0000_5008;
    module.begin_space(space);
    let mut bpf = attach();
    module.gpu_fault(space, 1);
    let reading = bpf.read().uvm.expect("the probes are attached");
    assert_eq!((reading.clients.len(), reading.known.len()), (0, 0));
    module.notify_here(space, Event::CpuFault { address: 0x7000, cpu: 0, write: false, pc: 0 });
    let reading = bpf.read().uvm.expect("the probes are attached");
    let faults = reading.clients.get(&(std::process::id(), GPU)).map(|totals| totals.gpu_faults);
    assert_eq!((faults, reading.known.len()), (Some(1), 0));
    module.unload();
}

fn nonsense() {
    let module = Module::load(V580);
    let mut bpf = attach();
    let space = 0xffff_8880_0000_6008;
    module.begin_space(space);
    // Addresses of nothing: in the first page, between user and kernel, and in the kernel's half.
    for entry in [16, 0x8000_0000_0000_0000, 0xffff_ffff_ffff_f000] {
        let event = Event::GpuFault { processor: GPU_1, entry, batch: 0, duplicate: false };
        module.notify(space, event);
    }
    assert_eq!(status(&bpf, SensorName::UvmKprobe).lost, 3);
    assert_eq!(bpf.read().uvm.map(|reading| reading.clients), Some([].into()));
    for _ in 0..100 {
        module.notify_nonsense(space, module.layout().migration_id);
    }
    assert_eq!(bpf.read().uvm, None);
    assert_unavailable(
        &bpf,
        SensorName::UvmKprobe,
        "events of driver 580.126.20 do not have the expected layout",
    );
    // It stays away until the driver is another.
    bpf.refresh();
    assert_unavailable(&bpf, SensorName::UvmKprobe, "580.126.20");
    module.unload();
    let module = Module::load(V550);
    bpf.refresh();
    assert_attached(&bpf, V550);
    count_exactly(&mut bpf, &module, V550);
    module.unload();
}

fn fault_thread_busy() {
    let module = Module::load(V580);
    let mut bpf = attach();
    assert_attached(&bpf, V580);
    let mut before = settled(&mut bpf);
    for _ in 0..3 {
        let begin = clock::now();
        module.spin();
        // It counts up to the moment of the reading, not to the thread's next sleep.
        until("busy time grows while the thread runs", || busy(&mut bpf) > before);
        let running = clock::now();
        let first = busy(&mut bpf);
        until("it grows for as long as it runs", || busy(&mut bpf).since(first) >= Nanos::millis(100));
        let ran = clock::now().since(running);
        module.rest();
        let after = settled(&mut bpf);
        let (counted, elapsed) = (after.since(before), clock::now().since(begin));
        // It can wait for a CPU while it is busy, so it is busy at least as long as it ran.
        assert!(counted >= ran, "busy {counted}, ran {ran}");
        assert!(counted <= elapsed, "busy {counted} of {elapsed}");
        // Asleep: nothing is added, however long.
        sleep(Duration::from_millis(50));
        assert_eq!(busy(&mut bpf), after);
        before = after;
    }
    module.unload();
    bpf.refresh();
    assert_eq!(bpf.read().fault_busy.get(&GPU), None);
}

fn busy(bpf: &mut Bpf) -> Nanos {
    bpf.read().fault_busy.get(&GPU).copied().expect("the fault thread is known")
}

/// The busy time once the thread sleeps: while it runs, no two readings are alike.
fn settled(bpf: &mut Bpf) -> Nanos {
    let mut last = busy(bpf);
    until("the fault thread falls asleep", || {
        let before = std::mem::replace(&mut last, busy(bpf));
        before == last
    });
    last
}
