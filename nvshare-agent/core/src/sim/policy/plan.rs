//! The plans there are, and what each would come to: cloned worlds, rolled out.

use crate::{
    input::Input,
    output::{Mode, Output},
    sim::{
        fault::transfer,
        policy::lock::{Lock, Release},
        process::Process,
        world::{Engine, World, gpu_of, process_of},
    },
    units::{Bytes, Nanos},
};

/// Quanta to choose from, in seconds.
const QUANTA: [u64; 6] = [1, 2, 5, 10, 20, 30];
/// Plans are compared over this much time, if nothing changes before.
const HORIZON: Nanos = Nanos::seconds(240);
/// A set may use this share of the memory, in thousandths.
const SET_MILLI: u64 = 980;
/// A gap at least this long is worth giving the GPU away for, where nothing has to be moved.
const GAP: Nanos = Nanos::millis(20);

/// Who runs with whom, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) mode: Mode,
    pub(crate) sets: Vec<Vec<usize>>,
    pub(crate) quantum: Nanos,
}

/// The plan that does most GPU work until `change`, the next change that is known.
pub(crate) fn best(world: &World, change: Option<Nanos>) -> Plan {
    let clients: Vec<usize> =
        world.alive.iter().copied().filter(|&index| world.processes[index].spec.shim).collect();
    let shared = Plan { mode: Mode::Shared, sets: vec![clients.clone()], quantum: Nanos::seconds(30) };
    if clients.len() < 2 || fits(world, &clients) {
        return shared;
    }
    let until = (world.now + HORIZON).min(change.unwrap_or(Nanos(u64::MAX)));
    let singles: Vec<Vec<usize>> = clients.iter().map(|&client| vec![client]).collect();
    let sets = first_fit(world, &clients);
    let mut plans = vec![shared];
    for seconds in QUANTA {
        let quantum = Nanos::seconds(seconds);
        plans.push(Plan { mode: Mode::Exclusive, sets: singles.clone(), quantum });
        if sets.len() > 1 && sets.len() < clients.len() {
            plans.push(Plan { mode: Mode::Sets, sets: sets.clone(), quantum });
        }
    }
    let mut best: Option<(f64, Plan)> = None;
    for plan in plans {
        let rate = roll_out(world, &plan, until);
        if best.as_ref().is_none_or(|(most, _)| rate > *most) {
            best = Some((rate, plan));
        }
    }
    best.map_or_else(
        || Plan { mode: Mode::Shared, sets: vec![clients], quantum: Nanos::seconds(30) },
        |best| best.1,
    )
}

/// What of a client has to be on a GPU.
fn needs(process: &Process, gpu: usize) -> Bytes {
    if process.seats.iter().any(|seat| seat.gpu == gpu) { process.working_set() } else { Bytes::ZERO }
}

/// Their working sets fit together.
fn fits(world: &World, clients: &[usize]) -> bool {
    world.cards.iter().enumerate().all(|(gpu, card)| {
        let needed: Bytes = clients.iter().map(|&index| needs(&world.processes[index], gpu)).sum();
        needed <= Bytes(u64::from(card.capacity()) * Bytes::BLOCK.0).per_mille(SET_MILLI)
    })
}

/// Largest first, each into the first set that has room for it.
fn first_fit(world: &World, clients: &[usize]) -> Vec<Vec<usize>> {
    let mut order = clients.to_vec();
    order.sort_by_key(|&index| (std::cmp::Reverse(world.processes[index].working_set()), index));
    let mut sets: Vec<Vec<usize>> = Vec::new();
    for client in order {
        let place = sets.iter().position(|set| {
            let mut with = set.clone();
            with.push(client);
            fits(world, &with)
        });
        match place {
            Some(place) => sets[place].push(client),
            None => sets.push(vec![client]),
        }
    }
    sets
}

/// Has a lock carry a plan out. A gap is worth a hand-over if it is longer than what that takes.
pub(crate) fn carry_out(lock: &mut Lock, plan: &Plan, now: Nanos, world: &World) {
    lock.release = Release::Known(GAP.max(handover_cost(world, &plan.sets)));
    let groups = plan.sets.iter().map(|set| (set.clone(), plan.quantum)).collect();
    lock.regroup(now, groups, world);
}

/// What going from one set to another and back moves, as time.
fn handover_cost(world: &World, sets: &[Vec<usize>]) -> Nanos {
    let mut longest = Nanos::ZERO;
    for (gpu, card) in world.cards.iter().enumerate() {
        let need = |set: &Vec<usize>| -> Bytes {
            set.iter().map(|&index| needs(&world.processes[index], gpu)).sum()
        };
        let mut needed: Vec<Bytes> = sets.iter().map(need).collect();
        needed.sort_unstable_by(|a, b| b.cmp(a));
        let two: Bytes = needed.iter().take(2).copied().sum();
        let blocks = two.0.div_ceil(Bytes::BLOCK.0).saturating_sub(u64::from(card.capacity()));
        let model = &card.model;
        let cost = match world.handover {
            // First in, first out: what comes displaces what is left of itself, and so all of it moves.
            Engine::Demand if blocks > 0 => {
                let all = needed.first().map_or(0, |most| most.0.div_ceil(Bytes::BLOCK.0));
                transfer(all, model.fault_in) + transfer(all, model.evict)
            }
            Engine::Demand => Nanos::ZERO,
            Engine::Prefetch => transfer(blocks, model.prefetch_out.min(model.prefetch_in)),
            Engine::Protected => transfer(blocks, model.protected_out.min(model.prefetch_in)),
        };
        longest = longest.max(Nanos(cost.0 * 2));
    }
    longest
}

/// The lock of somebody who knows how long a client will idle.
pub(crate) fn knowing_lock(world: &World) -> Lock {
    Lock::observing(world, Release::Known(GAP), world.handover != Engine::Demand)
}

/// GPU work per nanosecond under a plan.
fn roll_out(world: &World, plan: &Plan, until: Nanos) -> f64 {
    let mut world = world.clone();
    world.news.clear();
    world.requests.clear();
    for card in &mut world.cards {
        card.shadow = None;
    }
    let (began, work) = (world.now, world.gpu_time());
    let mut lock = knowing_lock(&world);
    carry_out(&mut lock, plan, world.now, &world);
    loop {
        tell(&mut world, &mut lock);
        if world.now >= until || world.alive.is_empty() {
            break;
        }
        let mut next = until;
        for at in [world.next_event(), lock.deadline(world.now, &world)].into_iter().flatten() {
            next = next.min(at);
        }
        world.advance(next);
        world.settle();
        tell(&mut world, &mut lock);
        lock.schedule(world.now, &world);
    }
    (world.gpu_time() - work) / world.now.since(began).0.max(1) as f64
}

fn tell(world: &mut World, lock: &mut Lock) {
    loop {
        while let Some(output) = lock.next_output() {
            match output {
                Output::Grant { client, gpu, epoch, prefetch } => {
                    world.grant(process_of(client), gpu_of(gpu), epoch, prefetch);
                }
                Output::Revoke { client, gpu, epoch, drain_within, shortfall } => {
                    world.revoke(process_of(client), gpu_of(gpu), epoch, drain_within, shortfall);
                }
                Output::Plan(_) | Output::Unresponsive { .. } | Output::NotRevocable { .. } => {}
            }
        }
        if let Some(input) = world.news.pop_front() {
            match input {
                Input::ClientLeft { client } => lock.left(process_of(client), world.now, world),
                Input::Revoked { .. } => lock.answered(world.now, &input, world),
                _ => {}
            }
        } else if let Some(index) = world.requests.pop() {
            lock.requested(index, world.now, world);
        } else {
            return;
        }
    }
}
