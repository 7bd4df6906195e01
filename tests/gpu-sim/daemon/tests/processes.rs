//! The simulator with real programs: processes that come, fault, get killed, and are observed from outside.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail by panicking")]

#[path = "processes/client.rs"]
mod client;
#[path = "processes/simulator.rs"]
mod simulator;
#[path = "processes/tracker.rs"]
mod tracker;

use client::Client;
use nvshare_abi::uvm::MigrationCause;
use simulator::{Simulator, wait_until};
use tracker::{Queue, Tracker};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
/// Fault entries that the simulator raises for each whole block.
const ENTRIES: u64 = 32;

#[test]
fn two_programs_that_fit_fault_once_and_never_again() {
    let simulator = Simulator::start(&["--memory", "128MiB"]);
    let mut clients = [Client::start(&simulator), Client::start(&simulator)];
    for client in &mut clients {
        client.ask("managed 24");
    }
    for _ in 0..3 {
        for client in &mut clients {
            client.ask("sweep 1000");
        }
    }
    for client in &clients {
        let counted = simulator.client(client.pid());
        assert_eq!((counted.faults, counted.bytes_in, counted.evictions), (24 * ENTRIES, 0, 0));
        assert_eq!(counted.resident_bytes, 24 * BLOCK);
    }
}

#[test]
fn a_tracker_counts_exactly_what_thrashing_moves() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    if simulator.lacks_device_files() {
        return;
    }
    let mut clients = [Client::start(&simulator), Client::start(&simulator)];
    let trackers = [Tracker::of(&simulator, clients[0].pid()), Tracker::of(&simulator, clients[1].pid())];
    for client in &mut clients {
        client.ask("managed 24");
    }
    // 48 blocks in 32 chunks, swept in turns: the first to become resident is always the next one needed.
    for _ in 0..3 {
        for client in &mut clients {
            client.ask("sweep 0");
        }
    }
    for (client, tracker) in clients.iter().zip(&trackers) {
        let counted = simulator.client(client.pid());
        let counters = tracker.counters();
        assert_eq!(counters[0], counted.bytes_in);
        assert_eq!(counters[1], counted.bytes_out);
        assert_eq!(counters[9], counted.faults);
        assert_eq!(counters[2], 0);
        assert_eq!(counted.bytes_in, 2 * 24 * BLOCK, "both later sweeps bring back every block");
        assert_eq!(counted.faults, 3 * 24 * ENTRIES);
    }
}

#[test]
fn an_event_queue_tells_each_move_with_its_cause_in_every_layout() {
    // Both layouts of entries, and the three ways of asking for a queue.
    for version in ["535.288.01", "550.163.01", "560.35.03", "580.126.20"] {
        let simulator = Simulator::start(&["--memory", "64MiB", "--driver-version", version]);
        if simulator.lacks_device_files() {
            return;
        }
        let mut client = Client::start(&simulator);
        let queue = Queue::of(&simulator, version.parse().unwrap(), client.pid(), 1024);
        client.ask("managed 8");
        client.ask("sweep 0");
        client.ask("push-out");
        assert_eq!(queue.drain(), [], "{version}: nothing was switched on");
        queue.switch(true);
        client.ask("sweep 0");
        client.ask("push-out");
        queue.flush();
        let moved = queue.drain();
        let of = |cause| {
            let moved = moved.iter().filter(|moved| moved.cause == cause);
            let mut found: Vec<_> = moved.map(|m| (m.src, m.dst, m.address, m.bytes)).collect();
            found.sort_unstable();
            found
        };
        let blocks = |src, dst| -> Vec<_> {
            (0..8).map(|block| (src, dst, 0x7000_0000_0000 + block * BLOCK, BLOCK)).collect()
        };
        // The first card is number 1 in both layouts.
        let back = [of(MigrationCause::Coherence), of(MigrationCause::Prefetch)].concat();
        assert_eq!(back, blocks(0, 1), "{version}");
        assert_eq!(of(MigrationCause::User), blocks(1, 0), "{version}");
        assert_eq!((moved.len(), queue.dropped()), (16, 0), "{version}");
        queue.switch(false);
        client.ask("sweep 0");
        queue.flush();
        assert_eq!(queue.drain(), [], "{version}: switched off");
    }
}

#[test]
fn a_full_ring_drops_what_is_new_and_counts_it() {
    for version in ["535.288.01", "550.163.01", "580.126.20"] {
        let simulator = Simulator::start(&["--memory", "64MiB", "--driver-version", version]);
        if simulator.lacks_device_files() {
            return;
        }
        let mut client = Client::start(&simulator);
        let queue = Queue::of(&simulator, version.parse().unwrap(), client.pid(), 8);
        queue.switch(true);
        client.ask("managed 20");
        client.ask("sweep 0");
        client.ask("push-out");
        queue.flush();
        let first = queue.drain();
        assert_eq!((first.len(), queue.dropped()), (7, 13), "{version}: one slot stays free");
        // After the observer has read, there is room again, across the ring's end.
        client.ask("sweep 0");
        queue.flush();
        assert_eq!((queue.drain().len(), queue.dropped()), (7, 26), "{version}");
    }
}

#[test]
fn the_last_move_is_held_back_until_the_observer_asks() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    if simulator.lacks_device_files() {
        return;
    }
    let mut client = Client::start(&simulator);
    let queue = Queue::of(&simulator, "580.126.20".parse().unwrap(), client.pid(), 64);
    client.ask("managed 1");
    client.ask("sweep 0");
    queue.switch(true);
    client.ask("push-out");
    assert_eq!(queue.drain(), []);
    queue.flush();
    assert_eq!(queue.drain().len(), 1);
    // A dead program's space is held by its queue, as by counters.
    let pid = client.pid();
    client.kill();
    wait_until("the program to be gone", || !simulator.client(pid).connected);
    assert!(!simulator.client(pid).ended);
    drop(queue);
    wait_until("its space to end", || simulator.client(pid).ended);
}

#[test]
fn memory_pushed_out_on_request_comes_back_with_its_bytes_and_the_program_announces_the_move() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    let mut client = Client::start(&simulator);
    client.ask("managed 20");
    client.ask("sweep 0");
    assert_eq!(client.ask("push-out"), "20 migrations 0 faults");
    let counted = simulator.client(client.pid());
    assert_eq!((counted.bytes_in, counted.bytes_out, counted.evictions), (0, 20 * BLOCK, 0));
    client.ask("sweep 0");
    assert_eq!(simulator.client(client.pid()).bytes_in, 20 * BLOCK);
    // Each block takes six CPU faults to come back.
    assert_eq!(client.ask("touch"), "40 migrations 120 faults");
    assert_eq!(simulator.client(client.pid()).cpu_faults, 120);
}

#[test]
fn a_program_killed_in_the_middle_of_a_kernel_leaves_the_others_running_and_its_memory_free() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    let mut victim = Client::start(&simulator);
    let mut other = Client::start(&simulator);
    for client in [&mut victim, &mut other] {
        client.ask("managed 24");
        client.ask("sweep 0");
    }
    victim.say("loop 2000");
    let before = simulator.client(victim.pid()).faults;
    wait_until("the victim to thrash", || simulator.client(victim.pid()).faults > before);
    let pid = victim.pid();
    victim.kill();
    for _ in 0..3 {
        other.ask("sweep 4000");
    }
    wait_until("the victim's memory to be free", || simulator.client(pid).ended);
    assert_eq!(simulator.client(other.pid()).resident_bytes, 24 * BLOCK);
}

#[test]
fn a_stopped_program_does_not_keep_the_compute_engine() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    let mut stopped = Client::start(&simulator);
    let mut other = Client::start(&simulator);
    stopped.say("loop 50000");
    wait_until("the first program to compute", || simulator.busy_ns() > 5_000_000);
    stopped.stop();
    // Would wait for ever if the engine were held by a program that does not run.
    other.ask("sweep 5000");
    stopped.kill();
}

#[test]
fn a_tracker_keeps_a_dead_programs_memory_until_it_is_closed() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    if simulator.lacks_device_files() {
        return;
    }
    let mut client = Client::start(&simulator);
    client.ask("managed 8");
    client.ask("sweep 0");
    let tracker = Tracker::of(&simulator, client.pid());
    let pid = client.pid();
    client.kill();
    wait_until("the program to be gone", || !simulator.client(pid).connected);
    assert_eq!(simulator.client(pid).resident_bytes, 8 * BLOCK);
    drop(tracker);
    wait_until("its memory to be free", || simulator.client(pid).ended);
}

#[test]
fn only_the_va_space_descriptor_of_a_program_takes_a_tracker() {
    let simulator = Simulator::start(&["--memory", "64MiB"]);
    if simulator.lacks_device_files() {
        return;
    }
    let client = Client::start(&simulator);
    let mut answers: Vec<_> = tracker::device_descriptors(client.pid())
        .into_iter()
        .map(|descriptor| Tracker::attach(&simulator, client.pid(), descriptor).map(drop))
        .collect();
    answers.sort();
    assert_eq!(answers, [Ok(()), Err(0x16)]);
}

#[test]
fn the_simulator_runs_a_command_and_ends_with_its_exit_code_and_leaves_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("sim");
    let status = simulator::command(&dir)
        .args(["--", "sh", "-c", "test -S \"$NVSHARE_SIM_DIR/sim.sock\" && exit 7"])
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(7));
    assert!(!dir.exists());
}

#[test]
fn the_place_of_a_killed_simulator_can_be_used_again() {
    let simulator = Simulator::start(&[]);
    let (dir, _temporary) = simulator.kill_and_keep_files();
    let again = Simulator::start_in(&dir, &[]);
    let mut client = Client::start(&again);
    client.ask("managed 4");
    client.ask("sweep 0");
}
