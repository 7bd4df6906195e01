//! The engine on a small model of a GPU, from fit to thrash to cure and back.

mod world;

use nvshare_core::{
    Bytes, Config, Engine, Epoch, Input, Mode, ModeOrder, Nanos, Order, Output, Poll, Reason,
};
use world::{Access, CAPACITY_BLOCKS, Client, Manner, World, gpu};

const A_MINUTE: Nanos = Nanos::seconds(60);
/// Three clients have had their turn within this time, also where nobody is in a hurry and turns are long.
const ROUND: Nanos = Nanos::seconds(200);

fn cyclic(blocks: u64) -> Client {
    Client::new(gpu(0), Access::Cyclic(blocks), blocks)
}

fn modes(world: &World) -> Vec<(Mode, Mode)> {
    world.changes.iter().map(|change| (change.from, change.to)).collect()
}

#[test]
fn two_that_fit_stay_shared_through_cold_start_and_work() {
    let mut world = World::new(1);
    world.join(cyclic(220));
    world.join(cyclic(220));
    world.run_for(A_MINUTE);
    assert_eq!(modes(&world), []);
    assert!(world.outputs.is_empty());
}

#[test]
fn three_that_do_not_fit_take_turns_within_half_a_second_and_share_again_when_one_leaves() {
    let mut world = World::new(1);
    world.join(cyclic(220));
    world.join(cyclic(220));
    world.run_for(Nanos::seconds(3));
    let third = world.join(cyclic(220));
    world.run_until(A_MINUTE, |world| !world.changes.is_empty());
    let refault = world.first_refault(gpu(0)).expect("three times 220 blocks on 512 must refault");
    let change = world.changes.first().expect("no switch within a minute");
    // Two of the three fit together.
    assert_eq!((change.to, change.sets.len()), (Mode::Sets, 2));
    assert!(change.at.since(refault) <= Nanos::millis(500), "took {}", change.at.since(refault));
    let Reason::Thrash { first_refault, provisional: true, .. } = change.reason else {
        panic!("{:?}", change.reason)
    };
    assert!(change.at.since(first_refault) <= Nanos::millis(500));
    assert!(refault.since(first_refault) <= Nanos::millis(100));

    world.run_for(Nanos::seconds(30));
    assert!(
        matches!(world.changes.last().map(|change| &change.reason), Some(Reason::ThrashConfirmed { .. })),
        "{:?}",
        world.changes
    );
    world.leave(third);
    assert!(matches!(world.changes.last().map(|change| &change.reason), Some(Reason::Fits { .. })));
    world.run_for(A_MINUTE);
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Shared);
    assert_eq!(world.changes.len(), 3, "{:?}", world.changes);
}

#[test]
fn taking_turns_gets_far_more_done_than_thrashing() {
    let progress = |mode: ModeOrder| {
        let mut world = World::new(1);
        world.tell(Input::Order(Order::Mode { gpu: None, mode }));
        for _ in 0..2 {
            world.join(cyclic(480));
        }
        world.run_for(A_MINUTE);
        world.clients.values().map(|client| client.progress).sum::<u64>()
    };
    let (auto, shared) = (progress(ModeOrder::Auto), progress(ModeOrder::Shared));
    assert!(auto > 3 * shared, "auto {auto}, shared {shared}");
}

#[test]
fn one_client_larger_than_the_card_is_left_alone_and_counted() {
    let mut world = World::new(1);
    world.join(cyclic(CAPACITY_BLOCKS * 12 / 10));
    world.run_for(A_MINUTE);
    assert_eq!(modes(&world), []);
    let view = world.engine.view(world.now);
    assert!(view.gpus[0].self_refaults > Bytes::gib(1));
    assert_eq!(view.gpus[0].curable_refaults, Bytes::ZERO);
}

#[test]
fn two_clients_larger_than_the_card_are_left_alone_for_turns_cure_nothing() {
    let mut world = World::new(1);
    world.join(cyclic(CAPACITY_BLOCKS * 12 / 10));
    world.join(cyclic(CAPACITY_BLOCKS * 12 / 10));
    world.run_for(A_MINUTE);
    assert_eq!(modes(&world), []);
}

#[test]
fn streams_that_never_look_back_stay_shared() {
    let mut world = World::new(1);
    for _ in 0..2 {
        world.join(Client::new(gpu(0), Access::Stream, CAPACITY_BLOCKS - 10));
    }
    world.run_for(A_MINUTE);
    assert!(world.clients.values().all(|client| !client.busy), "the streams did not end");
    assert_eq!(modes(&world), []);
}

#[test]
fn processes_of_one_job_are_not_set_against_each_other() {
    let mut world = World::new(1);
    for _ in 0..2 {
        world.join(Client { job: nvshare_core::JobId(7), ..cyclic(300) });
    }
    world.run_for(A_MINUTE);
    assert_eq!(modes(&world), []);
}

#[test]
fn an_ordered_exclusive_mode_makes_clients_alternate_without_any_pressure() {
    let mut world = World::new(1);
    let first = world.join(cyclic(100));
    let second = world.join(cyclic(100));
    world.tell(Input::Order(Order::Quantum { quantum: Some(Nanos::SECOND) }));
    world.run_for(Nanos::SECOND);
    world.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
    let mut runs = Vec::new();
    for _ in 0..2000 {
        world.run_for(Nanos::millis(10));
        let running: Vec<_> = world.clients.iter().filter(|(_, c)| c.runs()).map(|(&id, _)| id).collect();
        assert!(running.len() <= 1 || world.now < Nanos::millis(1050), "{running:?} at {}", world.now);
        if let [id] = running[..]
            && runs.last() != Some(&id)
        {
            runs.push(id);
        }
    }
    assert!(runs.len() >= 15, "{runs:?}");
    assert!(
        runs.windows(2).all(|pair| pair[0] != pair[1]) && runs.contains(&first) && runs.contains(&second)
    );
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Exclusive);
    world.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Auto }));
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Shared);
}

#[test]
fn a_client_without_work_costs_the_others_nothing_and_gets_its_turn_when_it_has_some() {
    let mut world = World::new(1);
    let ids: Vec<_> = (0..3).map(|_| world.join(cyclic(300))).collect();
    world.run_for(Nanos::seconds(20));
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Exclusive);
    world.clients.get_mut(&ids[1]).expect("joined").busy = false;
    world.run_for(Nanos::seconds(10));
    let grants = |world: &World| world.engine.view(world.now).gpus[0].clients[1].grants;
    let before = grants(&world);
    world.run_for(Nanos::seconds(20));
    assert_eq!(grants(&world), before);
    let progress = world.clients[&ids[1]].progress;
    world.clients.get_mut(&ids[1]).expect("joined").busy = true;
    world.run_for(Nanos::seconds(30));
    assert!(world.clients[&ids[1]].progress > progress);
}

#[test]
fn a_client_that_hangs_is_reported_and_the_others_go_on() {
    let mut world = World::new(1);
    let ids: Vec<_> = (0..3).map(|_| world.join(cyclic(300))).collect();
    world.run_until(A_MINUTE, |world| !world.changes.is_empty());
    world.clients.get_mut(&ids[0]).expect("joined").manner = Manner::Silent;
    world.run_for(Nanos::seconds(60));
    let unresponsive =
        |output: &Output| matches!(output, Output::Unresponsive { client, .. } if *client == ids[0]);
    assert!(world.outputs.iter().any(unresponsive));
    let before: Vec<u64> = ids.iter().map(|id| world.clients[id].progress).collect();
    world.run_for(ROUND);
    assert!(ids[1..].iter().zip(&before[1..]).all(|(id, before)| world.clients[id].progress > *before));
    world.clients.get_mut(&ids[0]).expect("joined").manner = Manner::Prompt;
    world.run_for(ROUND);
    let late = world.clients[&ids[0]].progress;
    world.run_for(ROUND);
    assert!(world.clients[&ids[0]].progress > late, "an answer that came late was not accepted");
}

#[test]
fn two_gpus_decide_for_themselves() {
    let mut world = World::new(2);
    for _ in 0..3 {
        world.join(cyclic(300));
        world.join(Client::new(gpu(1), Access::Cyclic(100), 100));
    }
    world.run_for(Nanos::seconds(20));
    let view = world.engine.view(world.now);
    assert_eq!((view.gpus[0].mode, view.gpus[1].mode), (Mode::Exclusive, Mode::Shared));
}

#[test]
fn a_client_on_two_gpus_gets_both_or_neither_and_nobody_deadlocks() {
    let mut world = World::new(2);
    world.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
    world.tell(Input::Order(Order::Quantum { quantum: Some(Nanos::millis(500)) }));
    let both = |swap: bool| {
        let mut client = cyclic(100);
        client.gpus = if swap { vec![gpu(1), gpu(0)] } else { vec![gpu(0), gpu(1)] };
        client
    };
    let ids = [
        world.join(both(false)),
        world.join(both(true)),
        world.join(cyclic(100)),
        world.join(Client::new(gpu(1), Access::Cyclic(100), 100)),
    ];
    world.run_for(Nanos::seconds(2));
    for round in 0..4 {
        let before: Vec<u64> = ids.iter().map(|id| world.clients[id].progress).collect();
        for _ in 0..1000 {
            world.run_for(Nanos::millis(10));
            for id in &ids[..2] {
                let client = &world.clients[id];
                assert_eq!(client.open(gpu(0)), client.open(gpu(1)), "{id} has one of two at {}", world.now);
            }
        }
        for (id, before) in ids.iter().zip(before) {
            assert!(world.clients[id].progress > before, "{id} did not run in round {round}");
        }
    }
}

#[test]
fn weights_are_shares_of_gpu_time() {
    let mut world = World::new(1);
    world.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
    world.tell(Input::Order(Order::Quantum { quantum: Some(Nanos::SECOND) }));
    world.join(Client { weight_milli: 1000, ..cyclic(100) });
    world.join(Client { weight_milli: 250, ..cyclic(100) });
    world.run_for(Nanos::seconds(300));
    let view = world.engine.view(world.now);
    let granted: Vec<u64> = view.gpus[0].clients.iter().map(|client| client.granted.as_millis()).collect();
    let ratio_milli = granted[0] * 1000 / granted[1].max(1);
    assert!((3500..=4500).contains(&ratio_milli), "{granted:?}");
}

#[test]
fn a_recorded_run_replays_to_the_same_outputs_even_through_json() {
    let mut world = World::new(1);
    for _ in 0..3 {
        world.join(cyclic(300));
    }
    world.run_for(Nanos::seconds(20));
    assert!(world.outputs.len() > 10);
    let json = serde_json::to_string(&world.inputs).expect("inputs are serialisable");
    let inputs: Vec<(Nanos, Input)> = serde_json::from_str(&json).expect("and readable again");
    let mut engine = Engine::new(Config::default());
    let mut outputs = Vec::new();
    for (at, input) in inputs {
        engine.handle(at, input);
        while let Poll::Emit(output) = engine.poll() {
            outputs.push(output);
        }
    }
    assert_eq!(outputs, world.outputs);
    assert_eq!(engine.view(world.now), world.engine.view(world.now));
}

#[test]
fn without_the_fault_thread_the_share_of_the_link_stands_in() {
    let mut world = World::new(1);
    world.fault_thread = false;
    for _ in 0..3 {
        world.join(cyclic(300));
    }
    world.run_until(A_MINUTE, |world| !world.changes.is_empty());
    let Some(Reason::Thrash { stall_milli: None, .. }) = world.changes.first().map(|change| &change.reason)
    else {
        panic!("{:?}", world.changes)
    };
    assert!(world.now <= Nanos::seconds(5));
}

#[test]
fn without_counters_nothing_is_concluded_and_turns_end_when_they_are_lost() {
    let mut world = World::new(1);
    world.counters = false;
    for _ in 0..3 {
        world.join(cyclic(300));
    }
    world.run_for(Nanos::seconds(20));
    assert_eq!(modes(&world), []);
    world.counters = true;
    world.run_for(Nanos::seconds(5));
    assert_eq!(modes(&world).first(), Some(&(Mode::Shared, Mode::Exclusive)));
    world.counters = false;
    let lost = world.now;
    world.run_until(A_MINUTE, |world| world.changes.last().is_some_and(|change| change.to == Mode::Shared));
    assert_eq!(world.changes.last().map(|change| &change.reason), Some(&Reason::Blind));
    assert_eq!(world.now.since(lost), Nanos::seconds(10));
}

#[test]
fn a_conflict_that_goes_away_ends_after_quiet_rotations_and_stays_away() {
    let mut world = World::new(1);
    let ids: Vec<_> = (0..3).map(|_| world.join(cyclic(300))).collect();
    world.run_for(Nanos::seconds(10));
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Exclusive);
    for id in &ids {
        // The allocations stay, so that only the hand-overs tell.
        world.clients.get_mut(id).expect("joined").access = Access::Cyclic(100);
    }
    world.run_for(Nanos::seconds(120));
    let last = world.changes.last().expect("changes");
    let shown = |reason: &Reason| {
        matches!(
            reason,
            Reason::EvictionFree { rotations: 2.., .. }
                | Reason::WorkingSetsFit { .. }
                | Reason::ProbeHeld { .. }
        )
    };
    assert!(shown(&last.reason), "{last:?}");
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Shared);
}

#[test]
fn a_client_whose_drains_fail_is_packed_around_and_asked_again_when_idle() {
    let mut world = World::new(1);
    let ids: Vec<_> = (0..3).map(|_| world.join(cyclic(300))).collect();
    world.clients.get_mut(&ids[0]).expect("joined").manner = Manner::TimesOut;
    world.run_for(Nanos::seconds(20));
    let given_up = world
        .outputs
        .iter()
        .filter(|output| matches!(output, Output::NotRevocable { client, .. } if *client == ids[0]))
        .count();
    assert_eq!(given_up, 1);
    let before: Vec<u64> = ids.iter().map(|id| world.clients[id].progress).collect();
    world.run_for(Nanos::seconds(30));
    for (id, before) in ids.iter().zip(before) {
        assert!(world.clients[id].progress > before, "{id} does not run");
    }
    let stubborn = world.clients.get_mut(&ids[0]).expect("joined");
    stubborn.manner = Manner::Prompt;
    stubborn.busy = false;
    world.run_for(Nanos::seconds(5));
    assert!(!world.clients[&ids[0]].open(gpu(0)), "an idle client that can be revoked is");
}

#[test]
fn a_newcomer_is_revoked_at_once_while_others_take_turns() {
    let mut world = World::new(1);
    for _ in 0..2 {
        world.join(cyclic(480));
    }
    world.run_for(Nanos::seconds(10));
    let outputs = world.outputs.len();
    let third = world.join(cyclic(480));
    let revoked = |output: &Output| matches!(output, Output::Revoke { client, epoch: Epoch(1), .. } if *client == third);
    assert!(world.outputs[outputs..].iter().any(revoked));
}

#[test]
fn a_yield_with_a_stale_epoch_is_ignored_and_a_true_one_hands_over() {
    let mut world = World::new(1);
    for _ in 0..2 {
        world.join(cyclic(480));
    }
    world.run_for(Nanos::seconds(10));
    // A turn has just begun, far from its end.
    let turns = world.outputs.len();
    world.run_until(A_MINUTE, |world| matches!(world.outputs[turns..].last(), Some(Output::Grant { .. })));
    let Some(Output::Grant { client, gpu, epoch, .. }) = world.outputs.last().cloned() else {
        panic!("no grant")
    };
    let outputs = world.outputs.len();
    world.tell(Input::Yielded { client, gpu, epoch: Epoch(epoch.0 - 1) });
    assert_eq!(world.outputs.len(), outputs);
    world.tell(Input::Yielded { client, gpu, epoch });
    assert!(
        matches!(world.outputs.last(), Some(Output::Revoke { client: revoked, .. }) if *revoked == client)
    );
}

#[test]
fn a_holder_that_vanishes_is_replaced_at_once() {
    let mut world = World::new(1);
    let ids: Vec<_> = (0..3).map(|_| world.join(cyclic(300))).collect();
    world.run_for(Nanos::seconds(10));
    let holder = *ids.iter().find(|id| world.clients[id].runs()).expect("somebody runs");
    let outputs = world.outputs.len();
    world.leave(holder);
    let granted = |output: &Output| matches!(output, Output::Grant { client, .. } if *client != holder);
    assert!(world.outputs[outputs..].iter().any(granted));
}

#[test]
fn orders_for_all_gpus_hold_for_later_ones_and_a_lost_gpu_opens_its_gates() {
    let mut world = World::new(1);
    world.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
    let late = gpu(9);
    let mut both = cyclic(10);
    both.gpus = vec![late];
    let ids = [world.join(both), world.join(Client { gpus: vec![late], ..cyclic(10) })];
    world.tell(Input::Gpu { gpu: late, capacity: Bytes::gib(1), link_rate: Bytes::gib(1) });
    let view = world.engine.view(world.now);
    assert_eq!((view.gpus[1].mode, view.gpus[1].order), (Mode::Exclusive, ModeOrder::Exclusive));
    assert_eq!(view.gpus[1].clients.len(), 2, "clients that came before their GPU were lost");
    world.run_for(Nanos::seconds(1));
    assert!(ids.iter().any(|id| !world.clients[id].open(late)));
    world.tell(Input::GpuGone { gpu: late });
    assert!(ids.iter().all(|id| world.clients[id].open(late)));
    // Epochs go on where they were, so that no answer from before can pass for a new one.
    let last = |world: &World| {
        let epoch = |output: &Output| match output {
            Output::Grant { gpu, epoch, .. } | Output::Revoke { gpu, epoch, .. } if *gpu == late => {
                Some(epoch.0)
            }
            _ => None,
        };
        world.outputs.iter().filter_map(epoch).next_back()
    };
    let before = last(&world);
    world.tell(Input::Gpu { gpu: late, capacity: Bytes::gib(1), link_rate: Bytes::gib(1) });
    world.run_for(Nanos::seconds(1));
    assert!(last(&world) > before, "{before:?}");
}

#[test]
fn a_late_starter_beside_stale_allocations_costs_a_short_trial_at_most() {
    let mut world = World::new(1);
    let first = world.join(Client { allocated_blocks: 400, ..cyclic(400) });
    world.run_for(Nanos::seconds(2));
    world.clients.get_mut(&first).expect("joined").access = Access::Cyclic(200);
    world.join(Client { allocated_blocks: 400, ..cyclic(200) });
    world.run_for(A_MINUTE);
    assert_eq!(world.engine.view(world.now).gpus[0].mode, Mode::Shared);
    assert!(world.changes.len() <= 2, "{:?}", world.changes);
    assert!(!world.changes.iter().any(|change| matches!(change.reason, Reason::ThrashConfirmed { .. })));
}

#[test]
fn clients_that_come_and_go_do_not_make_the_mode_swing() {
    for period in [Nanos::millis(300), Nanos::seconds(1), Nanos::seconds(5)] {
        let mut world = World::new(1);
        let ids: Vec<_> = (0..3).map(|_| world.join(cyclic(300))).collect();
        let rounds = Nanos::seconds(120).0 / period.0;
        for round in 0..rounds {
            for (index, id) in ids.iter().enumerate() {
                world.clients.get_mut(id).expect("joined").busy = !(round + index as u64).is_multiple_of(3);
            }
            world.run_for(period);
        }
        let switches = world.changes.iter().filter(|change| change.from != change.to).count();
        assert!(switches <= 9, "{switches} switches in two minutes at {period}: {:?}", world.changes);
        let least = ids.iter().map(|id| world.clients[id].progress).min();
        assert!(least.is_some_and(|progress| progress > 10_000), "{least:?} at {period}");
    }
}

#[test]
fn a_client_cannot_talk_thrash_away_with_bytes_that_nobody_asked_it_to_move() {
    let mut world = World::new(1);
    let ids = [world.join(cyclic(480)), world.join(cyclic(480))];
    world.run_until(A_MINUTE, |world| {
        for client in ids {
            for epoch in [Epoch(0), Epoch(7)] {
                let (moved, took) = (Bytes::gib(1), Nanos::ZERO);
                world.tell(Input::Resumed { client, gpu: gpu(0), epoch, moved, took });
            }
        }
        !world.changes.is_empty()
    });
    assert_eq!(modes(&world), [(Mode::Shared, Mode::Exclusive)]);
}
