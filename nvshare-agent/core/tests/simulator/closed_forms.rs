//! Cases small enough to work out by hand.

use super::run;

/// A card of 100 blocks, whose rates make a block's way in cost 2 ms, a first touch 1 ms and an eviction 1 ms.
const CARD: &str = r#"
[gpu]
memory = "200 MiB"
link = "10 GB/s"
fault_in = "1.048576 GB/s"
first_touch = "2.097152 GB/s"
evict = "2.097152 GB/s"
first_out = "2.097152 GB/s"
prefetch_in = "2.097152 GB/s"
protected_out = "2.097152 GB/s"
duplex = 1.0
in_flight = "0 s"
"#;

fn near(value: f64, expected: f64, tolerance: f64) {
    assert!((value - expected).abs() <= tolerance * expected, "{value}, expected {expected}");
}

fn client(lines: &str) -> String {
    format!("{CARD}\n[[client]]\nname = \"a\"\n{lines}")
}

#[test]
fn alone_and_resident_a_client_takes_its_work_by_its_duty_and_one_first_touch() {
    let text = client("allocated = \"100 MiB\"\ngpu_work = \"20 s\"\nduty = 0.5\nburst = \"100 ms\"");
    for policy in ["auto", "shared", "exclusive:5", "allocation-sum", "nixie", "oracle"] {
        let report = run(&text, policy);
        near(report.makespan_s.unwrap(), 40.05, 0.0005);
        near(report.clients[0].gpu_s, 20.0, 1e-6);
        near(report.clients[0].stall_s, 0.05, 0.01);
        assert!(report.clients[0].wait_s <= 0.0, "{policy}");
        assert_eq!(report.handover_bytes, 0, "{policy}");
    }
}

#[test]
fn two_that_fit_share_the_gpu_evenly_and_nothing_moves() {
    let text = client("count = 2\nallocated = \"90 MiB\"\ngpu_work = \"10 s\"");
    let report = run(&text, "shared");
    near(report.makespan_s.unwrap(), 20.0, 0.01);
    near(report.clients[0].finish_s.unwrap(), report.clients[1].finish_s.unwrap(), 0.01);
}

#[test]
fn one_larger_than_the_card_misses_every_block_of_every_sweep() {
    // 150 blocks in use on 100: each sweep of 1 s brings 150 in (2 ms) and pushes as many out (1 ms).
    let text = client("allocated = \"300 MiB\"\ngpu_work = \"100 s\"\nsweep = \"1 s\"");
    let report = run(&text, "shared");
    near(report.clients[0].stall_s, 100.0 * 150.0 * 0.003, 0.02);
    near(report.makespan_s.unwrap(), 145.0, 0.02);
    assert_eq!(run(&text, "auto").mode_switches, []);
}

#[test]
fn sharing_two_that_do_not_fit_is_bound_by_the_fault_service() {
    // Two jobs of 200 sweeps over 80 blocks each, and every block of them is served one after the other.
    let text = client("count = 2\nallocated = \"160 MiB\"\ngpu_work = \"2 s\"\nsweep = \"10 ms\"");
    let report = run(&text, "shared");
    near(report.makespan_s.unwrap(), 400.0 * 80.0 * 0.003, 0.05);
    let turns = run(&text, "exclusive:30");
    assert!(turns.makespan_s.unwrap() < 6.0, "{turns:?}");
}

#[test]
fn a_hand_over_by_the_driver_moves_everything_and_one_by_the_shim_only_the_shortfall() {
    let text = client("count = 2\nallocated = \"110 MiB\"\ngpu_work = \"60 s\"\nsweep = \"100 ms\"");
    // 55 blocks each on 100: the shortfall is 10. Two jobs of 60 s in turns of 10 s are about eleven hand-overs.
    let options = |handover| {
        let mut options = nvshare_core::sim::Options::new("exclusive:10".parse().unwrap());
        options.handover = Some(handover);
        options
    };
    let moved = |handover| {
        let report = nvshare_core::sim::run(&super::scenario(&text), &options(handover), &mut |_| {});
        report.handover_bytes / (2 << 20)
    };
    let (demand, shim) = (
        moved(nvshare_core::sim::HandoverEngine::Demand),
        moved(nvshare_core::sim::HandoverEngine::Protected),
    );
    assert!((900..=1300).contains(&demand), "{demand} blocks by the driver");
    assert!((180..=260).contains(&shim), "{shim} blocks by the shim");
}

#[test]
fn a_stream_touches_each_block_once_and_brings_nothing_back() {
    let text = client("allocated = \"2 GiB\"\ngpu_work = \"10 s\"\naccess = \"stream\"");
    let report = run(&text, "auto");
    // 1024 first touches, 924 of them with an eviction.
    near(report.clients[0].stall_s, 1.024 + 0.924, 0.01);
    assert_eq!(report.mode_switches, []);
}

#[test]
fn plain_memory_leaves_less_room_and_its_owner_is_never_gated() {
    let text = format!(
        "{CARD}\n[[client]]\nname = \"a\"\nallocated = \"150 MiB\"\ngpu_work = \"10 s\"\nsweep = \"1 s\"\n\
         [[client]]\nname = \"plain\"\nallocated = \"100 MiB\"\ngpu_work = \"50 s\"\nshim = false\n"
    );
    let report = run(&text, "exclusive:5");
    assert!(report.clients[0].stall_s > 1.0, "75 blocks on 50 page: {report:?}");
    assert!(report.clients[1].wait_s <= 0.0 && report.clients[1].stall_s <= 0.0, "{report:?}");
}
