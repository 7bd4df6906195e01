//! The sensors on this machine's kernel, with this test program in the place of the driver: it exports functions
//! of the driver's names, lays out event data as each driver version does, and is probed with uprobes.

mod driver;

use std::{
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    time::Duration,
};

use nvshare_abi::{
    maps::CudaCall,
    uvm::{DriverVersion, Epoch, Event, MakeResidentCause, Processor},
};
use nvshare_core::{Bytes, GpuId, Nanos};

use self::driver::{BLOCK, FakeDriver, Tenant, cuda, thread_cpu_time};
use super::Bpf;
use crate::{
    clock,
    observe::{
        blocks::{Blocks, Holding, Refault},
        source::{BlockTotals, SensorName, SensorState, UvmTotals},
    },
};

const GPU: GpuId = GpuId([0x11; 16]);

/// Uprobes see every call in this program, so tests that make calls take turns. `None`: not possible here.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    if !rustix::process::geteuid().is_root() {
        let why = "loading BPF programs needs root";
        assert!(std::env::var_os("NVSHARE_REQUIRE_ALL").is_none_or(|all| all != "1"), "{why}");
        eprintln!("SKIPPED: {why}; run as root, or set NVSHARE_REQUIRE_ALL=1 to make this a failure");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn state(bpf: &Bpf, sensor: SensorName) -> SensorState {
    bpf.status().into_iter().find(|status| status.sensor == sensor).unwrap().state
}

fn migration(dst: Processor, src: Processor, bytes: u64, cause: MakeResidentCause) -> Event {
    Event::Migration { dst, src, address: 0x7f00_0000_0000, bytes, copy: false, cause }
}

#[test]
fn counts_are_exact_in_every_driver_layout() {
    let Some(_turn) = turn() else { return };
    // The first version of every epoch, and the one inside an epoch where a field moves.
    let versions = Epoch::ALL.map(Epoch::first).into_iter().chain([DriverVersion::new(560, 35, 3)]);
    for version in versions {
        let driver = FakeDriver::new(version);
        driver.add_gpu(1, GPU);
        let mut bpf = Bpf::attach(&driver.options());
        assert!(state(&bpf, SensorName::UvmKprobe).is_attached(), "{:?}", state(&bpf, SensorName::UvmKprobe));
        let space = driver.begin_space(0x1000, 0x1008);
        let gpu = Processor(1);
        for instances in [1, 3, 7] {
            driver.gpu_fault(space, gpu, instances);
        }
        driver.notify(space, Event::CpuFault { address: 0x7000, cpu: 1, write: true, pc: 0x400_000 });
        for (index, cause) in MakeResidentCause::ALL.into_iter().enumerate() {
            driver.notify(space, migration(gpu, Processor::CPU, 4096 * (index as u64 + 1), cause));
            driver.notify(space, migration(Processor::CPU, gpu, 65536 * (index as u64 + 1), cause));
        }
        // What is none of our business: other ids, and moves between CPUs.
        driver.raw_event(space, 0);
        driver.raw_event(space, driver.layout().revocation_id);
        driver.notify(space, migration(Processor::CPU, Processor::CPU, 4096, MakeResidentCause::ApiMigrate));

        let own = std::process::id();
        let reading = bpf.read().uvm.unwrap();
        assert_eq!(reading.known, [own], "{version}");
        assert_eq!(
            reading.clients.get(&(own, GPU)),
            Some(&UvmTotals {
                gpu_faults: 3,
                gpu_fault_instances: 11,
                bytes_in: Bytes(4096 * 45),
                bytes_out: Bytes(65536 * 45),
                evicted: Bytes(65536 * 5),
                evicted_by_others: Bytes::ZERO,
                cpu_faults: 1,
            }),
            "{version}"
        );
        let loaded = bpf.loaded.as_ref().ok().unwrap();
        let counters = loaded.maps.counters();
        let (_, on_gpu) = counters.iter().find(|(key, _)| key.processor == 1).unwrap();
        assert_eq!(on_gpu.bytes_in, std::array::from_fn(|index| 4096 * (index as u64 + 1)), "{version}");
        assert_eq!(on_gpu.bytes_out, std::array::from_fn(|index| 65536 * (index as u64 + 1)), "{version}");
        assert!(on_gpu.first_ns > 0 && on_gpu.first_ns <= on_gpu.last_ns);
        let health = loaded.maps.health();
        assert_eq!(
            (health.notifications, health.insane, health.unreadable, health.lost),
            (23, 0, 0, 0),
            "{version}"
        );
        driver.end_space(space);
    }
}

#[test]
fn a_space_belongs_to_the_process_that_began_it_until_it_ends() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    driver.add_gpu(1, GPU);
    let mut bpf = Bpf::attach(&driver.options());
    let mut first = Tenant::begin(&driver, 0x2000);
    driver.gpu_fault(first.space, Processor(1), 1);
    first.end();
    // The address is used again by another process.
    let mut second = Tenant::begin(&driver, 0x2000);
    driver.gpu_fault(second.space, Processor(1), 1);
    driver.gpu_fault(second.space, Processor(1), 1);

    let reading = bpf.read().uvm.unwrap();
    let faults = |pid: u32| reading.clients.get(&(pid, GPU)).map(|totals| totals.gpu_faults);
    assert_eq!((faults(first.pid), faults(second.pid)), (Some(1), Some(2)));
    assert_eq!(reading.known, [second.pid]);

    // Totals outlive the space as long as the process does, and go with it.
    let reading = bpf.read().uvm.unwrap();
    assert_eq!(reading.clients.get(&(first.pid, GPU)).map(|totals| totals.gpu_faults), Some(1));
    let gone = first.pid;
    drop(first);
    second.end();
    let _last = bpf.read();
    let reading = bpf.read().uvm.unwrap();
    assert_eq!(reading.clients.get(&(gone, GPU)), None);
    assert!(reading.known.is_empty(), "{:?}", reading.known);
    let maps = &bpf.loaded.as_ref().ok().unwrap().maps;
    assert_eq!((maps.spaces().len(), maps.counters().len()), (0, 0));
}

#[test]
fn a_space_older_than_the_probes_has_a_probable_owner_at_most() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    driver.add_gpu(1, GPU);
    let space = driver.begin_space(0x2100, 0x2108);
    let mut bpf = Bpf::attach(&driver.options());
    driver.gpu_fault(space, Processor(1), 1);
    let reading = bpf.read().uvm.unwrap();
    assert_eq!((reading.clients.len(), reading.known.len()), (0, 0));
    driver.notify(space, Event::CpuFault { address: 0x7000, cpu: 0, write: false, pc: 0 });
    let reading = bpf.read().uvm.unwrap();
    assert_eq!(reading.clients.get(&(std::process::id(), GPU)).map(|totals| totals.gpu_faults), Some(1));
    assert!(reading.known.is_empty(), "{:?}", reading.known);
}

#[test]
fn evictions_are_charged_to_whoever_faulted() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(550, 163, 1));
    driver.add_gpu(1, GPU);
    let mut bpf = Bpf::attach(&driver.options());
    let (mut a, mut b) = (Tenant::begin(&driver, 0x3000), Tenant::begin(&driver, 0x4000));
    let gpu = Processor(1);
    let evict =
        |space| driver.notify(space, migration(Processor::CPU, gpu, BLOCK, MakeResidentCause::Eviction));
    driver.service();
    driver.gpu_fault(a.space, gpu, 1);
    evict(b.space);
    evict(b.space);
    evict(a.space);
    driver.gpu_fault(b.space, gpu, 1);
    evict(a.space);
    // A new round begins: until its first fault nobody is known to have asked.
    driver.service();
    evict(a.space);
    // Another thread that serves no faults: its process asks for itself.
    std::thread::scope(|scope| {
        scope.spawn(|| evict(b.space));
    });

    let reading = bpf.read().uvm.unwrap();
    let of = |pid: u32| reading.clients[&(pid, GPU)];
    assert_eq!((of(a.pid).evicted, of(a.pid).evicted_by_others), (Bytes(3 * BLOCK), Bytes(BLOCK)));
    assert_eq!((of(b.pid).evicted, of(b.pid).evicted_by_others), (Bytes(3 * BLOCK), Bytes(3 * BLOCK)));
    let pairs = [
        ((a.pid, b.pid, GPU), Bytes(2 * BLOCK)),
        ((a.pid, a.pid, GPU), Bytes(BLOCK)),
        ((b.pid, a.pid, GPU), Bytes(BLOCK)),
        ((std::process::id(), b.pid, GPU), Bytes(BLOCK)),
    ];
    assert_eq!(reading.evictions, pairs.into());

    // An evictor that has ended is still named, and its pairs are not lost.
    a.end();
    let _first = bpf.read();
    assert_eq!(bpf.read().uvm.unwrap().evictions, pairs.into());
    b.end();
}

/// The programs and the model of them see the same events, those of a client beside others that push it out.
#[test]
fn refaults_are_judged_by_the_owners_own_distance_as_the_model_does() {
    const BLOCKS: u64 = 40;
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    driver.add_gpu(1, GPU);
    let mut bpf = Bpf::attach(&driver.options());
    let space = driver.begin_space(0x4000, 0x4008);
    let own = std::process::id();
    let (managed, capacity) = (Bytes(BLOCKS * BLOCK), Bytes(44 * BLOCK));
    let holding = Holding { managed, capacity: Some(capacity) };
    let mut model = Blocks::default();
    let mut expected = BlockTotals::default();
    let seed = u64::from(own) ^ clock::now().0;
    eprintln!("seed {seed}");
    let mut state = seed | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let gpu = Processor(1);
    // Before anything is said about room, nothing is judged.
    let moved = |dst, src, block: u64, part: u64, cause| Event::Migration {
        dst,
        src,
        address: 0x7000_0000_0000 + block * BLOCK + part * (BLOCK / 2),
        bytes: BLOCK / 2,
        copy: false,
        cause,
    };
    driver.notify(space, moved(Processor::CPU, gpu, 99, 0, MakeResidentCause::Eviction));
    driver.notify(space, moved(gpu, Processor::CPU, 99, 0, MakeResidentCause::ReplayableFault));
    model.evicted(99 * BLOCK, Bytes(BLOCK / 2));
    model.brought(99 * BLOCK, Bytes(BLOCK / 2));
    expected.unjudged += Bytes(BLOCK / 2);
    bpf.set_room([((own, GPU), (capacity.0 - managed.0) as i64)].into());
    assert_eq!(bpf.read().uvm.unwrap().blocks[&(own, GPU)].unjudged, expected.unjudged);

    for _ in 0..4000 {
        let (block, part) = (random(BLOCKS), random(2));
        let at = 0x7000_0000_0000 + block * BLOCK + part * (BLOCK / 2);
        let half = Bytes(BLOCK / 2);
        match random(8) {
            0..=3 => {
                driver.notify(space, moved(Processor::CPU, gpu, block, part, MakeResidentCause::Eviction));
                model.evicted(at, half);
            }
            4 => {
                driver.notify(space, moved(gpu, Processor::CPU, block, part, MakeResidentCause::ApiMigrate));
                model.brought(at, half);
            }
            cause => {
                let cause =
                    [MakeResidentCause::ReplayableFault, MakeResidentCause::Prefetch][cause as usize % 2];
                driver.notify(space, moved(gpu, Processor::CPU, block, part, cause));
                let Refault { curable, own } = model.faulted(at, half, holding);
                expected.curable += curable;
                expected.own += own;
            }
        }
    }
    let found = bpf.read().uvm.unwrap().blocks[&(own, GPU)];
    assert_eq!(
        (found.curable, found.own, found.unjudged),
        (expected.curable, expected.own, expected.unjudged)
    );
    assert!(found.curable > Bytes::ZERO && found.own > Bytes::ZERO, "{found:?}");
    driver.end_space(space);
    // The figures of a space that has ended stay with its process.
    let _retired = bpf.read();
    assert_eq!(bpf.read().uvm.unwrap().blocks[&(own, GPU)], found);
}

#[test]
fn events_that_make_no_sense_are_counted_and_then_end_the_sensor() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    driver.add_gpu(1, GPU);
    let mut bpf = Bpf::attach(&driver.options());
    let space = driver.begin_space(0x5000, 0x5008);
    let garbage = [
        migration(Processor(1), Processor::CPU, 4095, MakeResidentCause::Prefetch),
        migration(Processor(1), Processor::CPU, 0, MakeResidentCause::Prefetch),
        migration(Processor(300), Processor::CPU, 4096, MakeResidentCause::Prefetch),
    ];
    for event in garbage {
        driver.notify(space, event);
    }
    driver.gpu_fault(space, Processor(257), 1);
    driver.gpu_fault(space, Processor(1), 0);
    driver.raw_event(space, driver.layout().event_count);
    driver.notify(space, Event::GpuFault { processor: Processor(1), entry: 16, batch: 0, duplicate: false });
    let health = bpf.loaded.as_ref().ok().unwrap().maps.health();
    assert_eq!((health.notifications, health.insane, health.unreadable), (7, 6, 1));
    assert_eq!(bpf.read().uvm.unwrap().clients, [].into());

    for _ in 0..100 {
        driver.raw_event(space, 77);
    }
    assert_eq!(bpf.read().uvm, None);
    let SensorState::Unavailable(reason) = state(&bpf, SensorName::UvmKprobe) else {
        panic!("still attached")
    };
    assert!(reason.contains("580.126.20"), "{reason}");
    // It stays away until the driver is another.
    bpf.refresh();
    assert!(!state(&bpf, SensorName::UvmKprobe).is_attached());
}

#[test]
fn a_driver_of_an_unknown_branch_is_refused_by_name_and_a_known_one_that_follows_is_taken() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(700, 1, 0));
    driver.add_gpu(1, GPU);
    let mut bpf = Bpf::attach(&driver.options());
    let SensorState::Unavailable(reason) = state(&bpf, SensorName::UvmKprobe) else { panic!("attached") };
    assert!(reason.contains("700.01"), "{reason}");
    // Where its own types tell the layout, it is taken.
    let mut options = driver.options();
    options.driver.btf_dir = driver.write_types();
    let mut by_types = Bpf::attach(&options);
    let SensorState::Attached(detail) = state(&by_types, SensorName::UvmKprobe) else {
        panic!("not attached: {:?}", state(&by_types, SensorName::UvmKprobe))
    };
    assert!(detail.contains("the module itself tells"), "{detail}");
    let space = driver.begin_space(0x6000, 0x6008);
    driver.notify(space, migration(Processor(1), Processor::CPU, 4096, MakeResidentCause::Prefetch));
    let seen = by_types.read().uvm.unwrap().clients[&(std::process::id(), GPU)];
    assert_eq!(seen.bytes_in, Bytes(4096));
    driver.end_space(space);
    drop(by_types);
    driver.replace(DriverVersion::new(535, 288, 1));
    bpf.refresh();
    let SensorState::Attached(detail) = state(&bpf, SensorName::UvmKprobe) else { panic!("not attached") };
    assert!(detail.contains("535.288.01"), "{detail}");
    let space = driver.begin_space(0x6000, 0x6008);
    driver.gpu_fault(space, Processor(1), 1);
    assert_eq!(bpf.read().uvm.unwrap().clients.len(), 1);
    driver.end_space(space);
}

#[test]
fn without_a_module_the_reason_says_so() {
    if std::path::Path::new("/sys/module/nvidia_uvm").exists() {
        eprintln!("SKIPPED: this machine has the module");
        return;
    }
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    let mut options = driver.options();
    options.driver.uvm_objects.clear();
    options.driver.module_dir = "/sys/module/nvidia_uvm".into();
    options.driver.fault_threads = None;
    let bpf = Bpf::attach(&options);
    let SensorState::Unavailable(reason) = state(&bpf, SensorName::UvmKprobe) else { panic!("attached") };
    assert!(reason.contains("not loaded"), "{reason}");
    let SensorState::Unavailable(reason) = state(&bpf, SensorName::FaultThread) else { panic!("attached") };
    assert!(reason.contains("no fault-service thread"), "{reason}");
}

#[test]
fn a_fault_thread_is_busy_while_it_runs_and_not_while_it_sleeps() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    let (work_tx, work_rx) = mpsc::channel::<Duration>();
    let (done_tx, done_rx) = mpsc::channel::<Duration>();
    let (tid_tx, tid_rx) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        tid_tx.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
        for work in work_rx {
            let begin = thread_cpu_time();
            while thread_cpu_time().saturating_sub(begin) < work {}
            done_tx.send(thread_cpu_time().saturating_sub(begin)).unwrap();
        }
    });
    let tid = tid_rx.recv().unwrap();
    driver.list_fault_thread(tid, GPU);
    driver::until_asleep(tid);
    let mut bpf = Bpf::attach(&driver.options());
    assert!(state(&bpf, SensorName::FaultThread).is_attached(), "{:?}", state(&bpf, SensorName::FaultThread));
    let mut before = bpf.read().fault_busy[&GPU];
    for _ in 0..3 {
        let begin = clock::now();
        work_tx.send(Duration::from_millis(60)).unwrap();
        let spun = done_rx.recv().unwrap();
        driver::until_asleep(tid);
        let elapsed = clock::now().since(begin);
        let after = bpf.read().fault_busy[&GPU];
        let busy = after.since(before);
        // The thread can wait for a CPU while it is busy, so it is busy at least as long as it ran.
        assert!(busy.0 >= spun.as_nanos() as u64, "busy {busy}, ran {spun:?}");
        assert!(busy <= elapsed, "busy {busy} of {elapsed}");
        // Asleep: nothing is added, however long.
        assert_eq!(bpf.read().fault_busy[&GPU], after);
        before = after;
    }
    drop(work_tx);
    worker.join().unwrap();
    bpf.refresh();
    assert_eq!(bpf.read().fault_busy.get(&GPU), None);
}

#[test]
fn a_thread_that_only_bears_the_name_is_no_fault_thread() {
    let (name_tx, name_rx) = mpsc::channel();
    let (end_tx, end_rx) = mpsc::channel::<()>();
    let forger = std::thread::Builder::new().name("UVM GPU1 BH".to_owned()).spawn(move || {
        name_tx.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
        let _closed = end_rx.recv();
    });
    let tid = name_rx.recv().unwrap();
    let name = std::fs::read_to_string(format!("/proc/{tid}/comm")).unwrap();
    assert_eq!(name.trim_end(), "UVM GPU1 BH");
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    driver.add_gpu(1, GPU);
    let mut options = driver.options();
    options.driver.fault_threads = None;
    if let Some(_turn) = turn() {
        let mut bpf = Bpf::attach(&options);
        let busy = bpf.read().fault_busy;
        assert_eq!(busy.get(&GPU), None);
    }
    drop(end_tx);
    forger.unwrap().join().unwrap();
}

#[test]
fn rare_cuda_calls_are_counted_per_process() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    let mut bpf = Bpf::attach(&driver.options());
    let SensorState::Attached(detail) = state(&bpf, SensorName::CudaUprobe) else { panic!("not attached") };
    assert!(detail.starts_with('5'), "this program exports five of the calls: {detail}");
    cuda::cuInit(0);
    cuda::cuDevicePrimaryCtxRetain(std::ptr::null_mut(), 0);
    cuda::cuMemAllocManaged(std::ptr::null_mut(), 4096, 1);
    cuda::cuMemAlloc_v2(std::ptr::null_mut(), 1 << 20);
    cuda::cuMemFree_v2(0);
    let own = std::process::id();
    let process = bpf.read().cuda[&own];
    assert_eq!((process.contexts, process.allocations, process.allocated), (1, 2, Bytes(4096 + (1 << 20))));
    let calls = bpf.loaded.as_ref().ok().unwrap().maps.cuda_calls()[&own];
    assert_eq!((calls.inits, calls.frees, calls.contexts_ended), (1, 1, 0));
    assert!(CudaCall::SYMBOLS.iter().all(|(name, _)| !name.contains("Launch")));
    let status = bpf.status().into_iter().find(|status| status.sensor == SensorName::CudaUprobe).unwrap();
    assert_eq!(status.run_count, 5);
    assert!(status.run_time.is_some_and(|time| time > Nanos::ZERO));
}

#[test]
fn the_programs_messages_reach_the_log() {
    let Some(_turn) = turn() else { return };
    let messages = driver::record_log();
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    let mut bpf = Bpf::attach(&driver.options());
    let space = driver.begin_space(0x7000, 0x7008);
    let _reading = bpf.read();
    driver.end_space(space);
    let expected = format!("process {} has a UVM address space", std::process::id());
    let messages = messages.lock().unwrap();
    assert!(messages.iter().any(|message| message.contains(&expected)), "{messages:?}");
}

#[test]
fn a_full_map_is_told_as_lost_observations() {
    let Some(_turn) = turn() else { return };
    let driver = FakeDriver::new(DriverVersion::new(580, 126, 20));
    driver.add_gpu(1, GPU);
    let mut bpf = Bpf::attach(&driver.options());
    let space = driver.begin_space(0x8000, 0x8008);
    // More processors per space than there are entries, over several spaces.
    let spaces: Vec<u64> =
        (0..5).map(|index| driver.begin_space(0x9000 + index * 16, 0x9008 + index * 16)).collect();
    for &space in &spaces {
        for processor in 1..257 {
            driver.gpu_fault(space, Processor(processor), 1);
        }
    }
    driver.gpu_fault(space, Processor(1), 1);
    let status = bpf.status().into_iter().find(|status| status.sensor == SensorName::UvmKprobe).unwrap();
    assert_eq!(status.lost, 5 * 256 + 1 - 1024);
    let _reading = bpf.read();
    for &space in spaces.iter().chain([&space]) {
        driver.end_space(space);
    }
}
