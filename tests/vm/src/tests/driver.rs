//! What must hold with the driver's own nvidia-uvm.

use std::{fs, os::fd::OwnedFd};

use nvshare_abi::{
    tools::{
        Counter,
        queue::{Migration, QueueLayout},
    },
    uvm::{BLOCK_BYTES, MakeResidentCause, MigrationCause, PAGE_BYTES, Processor},
};
use nvshare_agent::{
    config::DriverConfig,
    observe::{
        bpf::Bpf,
        source::{SensorName, UvmReading, UvmTotals},
        uvm_counters::{CounterTotals, UvmCounters},
        uvm_events::queue::EventQueue,
        uvm_tools,
    },
};
use nvshare_core::Bytes;

use super::{Test, assert_attached, assert_unavailable, attach, status};
use crate::{
    driver::{self, Driver, Space},
    kernel_module::until,
    stand_in::{GPU, GPU_1},
    tenant::Tenant,
};

/// Every test, in the order in which they run.
pub(super) const ALL: &[Test] = &[
    ("the driver's own module: GPU faults and moves are counted exactly, by cause", counted_exactly),
    ("the driver's own module: CPU faults are counted exactly", cpu_faults),
    ("the driver's own module: moves between the CPU's nodes are understood and not counted", cpu_moves),
    ("the driver's own module: evictions are charged to whoever faulted", evictions_charged),
    ("the driver's own module: spaces belong to processes, and go with them", ownership),
    ("the driver's own module: a space older than the probes has a probable owner at most", older_space),
    ("the driver's own module: it comes late, goes and comes back while probed", reloaded),
    ("the driver's own counters are read as it writes them", counters),
    ("the driver's own event queue is read as it writes it, in its own layout", event_queue),
];

#[track_caller]
fn reading(bpf: &mut Bpf) -> UvmReading {
    bpf.read().uvm.expect("the probes are attached")
}

fn counted_exactly() {
    let driver = Driver::load();
    let mut bpf = attach();
    assert_attached(&bpf, driver.version);
    let space = Space::begin();
    count_exactly(&mut bpf, &driver, &space);
    drop(space);
    driver.unload();
}

/// GPU faults, and moves of every cause in both directions.
fn count_exactly(bpf: &mut Bpf, driver: &Driver, space: &Space) {
    let before = status(bpf, SensorName::UvmKprobe).run_count;
    driver.service();
    for instances in [1, 3, 700] {
        driver.gpu_fault(space.events(), instances);
    }
    for (index, cause) in (1..).zip(MakeResidentCause::ALL) {
        driver.migrate(space.events(), GPU_1, Processor::CPU, 4096 * index, cause);
        driver.migrate(space.events(), Processor::CPU, GPU_1, 65536 * index, cause);
    }
    let own = std::process::id();
    let seen = reading(bpf);
    assert_eq!(seen.known, [own]);
    let totals = UvmTotals {
        gpu_faults: 3,
        gpu_fault_instances: 704,
        bytes_in: Bytes(4096 * 45),
        bytes_out: Bytes(65536 * 45),
        evicted: Bytes(65536 * 5),
        evicted_by_others: Bytes::ZERO,
        cpu_faults: 0,
    };
    assert_eq!(seen.clients, [((own, GPU), totals)].into());
    assert_eq!(seen.evictions, [((own, own, GPU), Bytes(65536 * 5))].into());
    let after = status(bpf, SensorName::UvmKprobe);
    // One round, three faults, nine causes in two directions: no call was missed, none seen twice.
    assert_eq!((after.run_count - before, after.lost), (1 + 3 + 18, 0));
}

fn cpu_faults() {
    let driver = Driver::load();
    let mut bpf = attach();
    let space = Space::begin();
    // CPU faults are shown beside what happens on a GPU.
    driver.gpu_fault(space.events(), 1);
    let managed = space.allocate(3 * BLOCK_BYTES as usize);
    let mut faults = managed.touch(600);
    // What is there does not fault again.
    managed.touch(600);
    space.test_events();
    faults += 1;
    let totals = reading(&mut bpf).clients[&(std::process::id(), GPU)];
    let one = UvmTotals { gpu_faults: 1, gpu_fault_instances: 1, ..UvmTotals::default() };
    assert_eq!(totals, UvmTotals { cpu_faults: faults, ..one });
    // The driver's own counters agree.
    let source = UvmCounters::new(DriverConfig::default(), true);
    let tracker = source.open(&space.descriptor(), GPU).expect("the driver accepts the tracker");
    let again = space.allocate(BLOCK_BYTES as usize);
    faults += again.touch(5);
    assert_eq!(reading(&mut bpf).clients[&(std::process::id(), GPU)].cpu_faults, faults);
    assert_eq!(tracker.read(), CounterTotals { cpu_faults: 5, ..CounterTotals::default() });
    drop((tracker, again));
    assert_eq!(status(&bpf, SensorName::UvmKprobe).lost, 0);
    drop(managed);
    drop(space);
    driver.unload();
}

fn cpu_moves() {
    const BLOCKS: u64 = 26;
    let driver = Driver::load();
    let mut bpf = attach();
    let space = Space::begin();
    let managed = space.allocate((BLOCKS * BLOCK_BYTES) as usize);
    managed.touch(BLOCKS * BLOCK_BYTES / PAGE_BYTES);
    managed.migrate(0);
    let before = status(&bpf, SensorName::UvmKprobe).run_count;
    for node in [1, 0, 1, 0] {
        managed.migrate(node);
    }
    let seen = status(&bpf, SensorName::UvmKprobe).run_count - before;
    // Before branch 550 the driver did not tell the nodes of the CPU apart, so that nothing moves.
    let moves = if driver.version.branch < 550 { 0 } else { 4 * BLOCKS };
    assert_eq!(seen, moves);
    // Had one in a hundred made no sense, the probes would be gone.
    let seen = reading(&mut bpf);
    assert_eq!((seen.clients.len(), seen.known), (0, vec![std::process::id()]));
    drop(managed);
    drop(space);
    driver.unload();
}

fn evictions_charged() {
    let driver = Driver::load();
    let mut bpf = attach();
    let (mut a, mut b) = (Tenant::begin_driver(), Tenant::begin_driver());
    let evict = |space: u64| {
        driver.migrate(space, Processor::CPU, GPU_1, BLOCK_BYTES, MakeResidentCause::Eviction);
    };
    driver.service();
    driver.gpu_fault(a.space, 1);
    evict(b.space);
    evict(b.space);
    evict(a.space);
    driver.gpu_fault(b.space, 1);
    evict(a.space);
    // A new round begins: until its first fault nobody is known to have asked.
    driver.service();
    evict(a.space);
    // What the access counters move is no answer to the fault before.
    driver.gpu_fault(b.space, 1);
    driver.access_counters();
    evict(a.space);
    // A process that asks the driver for memory does so for itself.
    let cause = MakeResidentCause::Eviction;
    driver.migrate_here(b.space, Processor::CPU, GPU_1, BLOCK_BYTES, cause);

    let seen = reading(&mut bpf);
    let of = |pid: u32| seen.clients[&(pid, GPU)];
    let (of_a, of_b) = (of(a.pid), of(b.pid));
    assert_eq!((of_a.evicted, of_a.evicted_by_others), (Bytes(4 * BLOCK_BYTES), Bytes(BLOCK_BYTES)));
    assert_eq!((of_b.evicted, of_b.evicted_by_others), (Bytes(3 * BLOCK_BYTES), Bytes(3 * BLOCK_BYTES)));
    let pairs = [
        ((a.pid, b.pid, GPU), Bytes(2 * BLOCK_BYTES)),
        ((a.pid, a.pid, GPU), Bytes(BLOCK_BYTES)),
        ((b.pid, a.pid, GPU), Bytes(BLOCK_BYTES)),
        ((std::process::id(), b.pid, GPU), Bytes(BLOCK_BYTES)),
    ];
    assert_eq!(seen.evictions, pairs.into());
    a.end();
    b.end();
    drop((a, b));
    driver.unload();
}

fn ownership() {
    let driver = Driver::load();
    let mut bpf = attach();
    let mut ends = Tenant::begin_driver();
    let dies = Tenant::begin_driver();
    driver.gpu_fault(ends.space, 1);
    driver.gpu_fault(dies.space, 1);
    driver.gpu_fault(dies.space, 1);
    let seen = reading(&mut bpf);
    let faults = |seen: &UvmReading, pid: u32| seen.clients.get(&(pid, GPU)).map(|totals| totals.gpu_faults);
    assert_eq!((faults(&seen, ends.pid), faults(&seen, dies.pid)), (Some(1), Some(2)));
    let mut both = vec![ends.pid, dies.pid];
    both.sort_unstable();
    assert_eq!(seen.known, both);

    // The driver ends a space in a thread of its own, after the last descriptor is closed.
    ends.end();
    until("the space that was closed is gone", || reading(&mut bpf).known == [dies.pid]);
    // Its counts are kept as long as its process.
    assert_eq!(faults(&reading(&mut bpf), ends.pid), Some(1));
    let (killed, left) = (dies.pid, ends.pid);
    drop(dies);
    until("the space of the process that was killed is gone", || reading(&mut bpf).known.is_empty());
    until("so are its counts", || faults(&reading(&mut bpf), killed).is_none());
    drop(ends);
    until("the counts of the other go with it", || faults(&reading(&mut bpf), left).is_none());
    driver.unload();
}

fn older_space() {
    let driver = Driver::load();
    let space = Space::begin();
    let managed = space.allocate(BLOCK_BYTES as usize);
    let mut bpf = attach();
    driver.gpu_fault(space.events(), 1);
    let seen = reading(&mut bpf);
    assert_eq!((seen.clients.len(), seen.known.len()), (0, 0));
    managed.touch(1);
    let seen = reading(&mut bpf);
    let totals = seen.clients.get(&(std::process::id(), GPU));
    assert_eq!(totals.map(|totals| (totals.gpu_faults, totals.cpu_faults)), Some((1, 1)));
    assert!(seen.known.is_empty());
    drop(managed);
    drop(space);
    driver.unload();
}

fn reloaded() {
    let mut bpf = attach();
    assert_unavailable(&bpf, SensorName::UvmKprobe, "not loaded");
    for _ in 0..2 {
        let driver = Driver::load();
        bpf.refresh();
        assert_attached(&bpf, driver.version);
        let space = Space::begin();
        count_exactly(&mut bpf, &driver, &space);
        drop(space);
        driver.unload();
        bpf.refresh();
        assert_unavailable(&bpf, SensorName::UvmKprobe, "not loaded");
        assert_eq!(bpf.read().uvm, None);
    }
    // Gone and back between two looks.
    let driver = Driver::load();
    bpf.refresh();
    assert_attached(&bpf, driver.version);
    driver.unload();
    let driver = Driver::load();
    bpf.refresh();
    assert_attached(&bpf, driver.version);
    let space = Space::begin();
    count_exactly(&mut bpf, &driver, &space);
    drop(space);
    driver.unload();
}

fn counters() {
    let driver = Driver::load();
    let source = UvmCounters::new(DriverConfig::default(), true);
    let space = Space::begin();
    let descriptor = space.descriptor();
    source.verify(&descriptor).unwrap();
    // A descriptor of the same file that is no VA space is refused by the driver, another file by us.
    let other: OwnedFd = fs::File::open("/dev/nvidia-uvm").unwrap().into();
    assert!(source.open(&other, GPU).is_none());
    drop(other);
    assert!(source.verify(&fs::File::open("/dev/null").unwrap().into()).is_err());
    let tracker = source.open(&descriptor, GPU).expect("the driver accepts the tracker");
    assert_eq!(tracker.read(), CounterTotals::default());
    let gpu = driver::UUID_OF_GPU;
    for (counter, amount) in [(Counter::BytesIn, 1 << 32), (Counter::BytesOut, 4096), (Counter::GpuFaults, 5)]
    {
        space.count(counter, amount, gpu);
        space.count(counter, 1, gpu);
    }
    space.count(Counter::CpuFaults, 4, driver::UUID_OF_CPU);
    // Another GPU's are none of ours.
    space.count(Counter::BytesIn, 8, [0x22; 16]);
    let expected = CounterTotals { bytes_in: (1 << 32) + 1, bytes_out: 4097, cpu_faults: 4, gpu_faults: 6 };
    assert_eq!(tracker.read(), expected);
    // A second tracker on the space counts from its own beginning.
    let second = source.open(&descriptor, GPU).expect("the driver accepts a second tracker");
    space.count(Counter::GpuFaults, 7, gpu);
    assert_eq!((second.read().gpu_faults, tracker.read().gpu_faults), (7, 13));
    drop((tracker, second, descriptor));
    drop(space);
    driver.unload();
}

fn event_queue() {
    let driver = Driver::load();
    let version = QueueLayout::of(driver.version).expect("a known driver").version;
    let space = Space::begin();
    let descriptor = space.descriptor();
    let open = || EventQueue::open_with(&DriverConfig::default(), &descriptor, 64);
    let mut queue = open().expect("the driver accepts the queue");
    let moved = |cause, block: u64| Migration {
        cause,
        src: 0,
        dst: 1,
        address: 0x7f00_0000_0000 + block * BLOCK_BYTES,
        bytes: BLOCK_BYTES,
        begin_ns: 5 + block,
        end_ns: 7 + block,
    };
    let eviction = Migration { src: 1, dst: 0, ..moved(MigrationCause::Eviction, 3) };
    space.queue(version, &eviction, 1);
    assert_eq!(queue.drain().migrations, [], "nothing was switched on");
    queue.switch(true).unwrap();
    let all = [eviction, moved(MigrationCause::Coherence, 3), moved(MigrationCause::User, 4)];
    for migration in &all {
        space.queue(version, migration, 1);
    }
    uvm_tools::flush(&descriptor).unwrap();
    let drained = queue.drain();
    assert_eq!((drained.migrations.as_slice(), drained.dropped, drained.nonsense), (&all[..], 0, 0));
    // Across the end of the ring, and beyond what it holds: one slot stays free.
    space.queue(version, &eviction, 100);
    let drained = queue.drain();
    assert_eq!((drained.migrations, drained.dropped, drained.nonsense), (vec![eviction; 63], 37, 0));
    space.queue(version, &eviction, 5);
    let drained = queue.drain();
    assert_eq!((drained.migrations.len(), drained.dropped), (5, 0), "drops are told once");
    queue.switch(false).unwrap();
    space.queue(version, &eviction, 1);
    assert_eq!(queue.drain().migrations, []);
    drop((queue, descriptor));
    drop(space);
    driver.unload();
}
