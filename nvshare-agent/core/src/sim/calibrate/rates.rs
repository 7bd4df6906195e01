//! Hand-over rates of the simulated H100, taken the way they were taken on the real one.

use crate::{
    id::Epoch,
    sim::{
        process::State,
        scenario::Scenario,
        world::{Engine, World},
    },
    units::{Bytes, Nanos},
};

/// A rate that was measured and what the model makes of it, in GB/s.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasuredRate {
    /// What moves, and how.
    pub path: &'static str,
    /// The range that was measured.
    pub measured: (f64, f64),
    /// The model's.
    pub simulated: f64,
}

impl MeasuredRate {
    /// Distance from the measured range, as a share of its nearer end.
    pub fn error(&self) -> f64 {
        let (low, high) = self.measured;
        if self.simulated < low {
            self.simulated / low - 1.0
        } else if self.simulated > high {
            self.simulated / high - 1.0
        } else {
            0.0
        }
    }
}

const SIZE: &str = "24 GiB";
const BYTES: Bytes = Bytes::gib(24);

/// Two clients of 24 GiB each, one after the other or both at once.
struct Bench {
    world: World,
    epoch: Epoch,
}

impl Bench {
    fn new(engine: Engine) -> Option<Self> {
        let text = format!(
            "[[client]]\nname = \"a\"\ncount = 2\nallocated = \"{SIZE}\"\ngpu_work = \"1000 s\"\nburst = \"10 ms\"\n"
        );
        let scenario = Scenario::parse("rates", &text).ok()?;
        let mut bench = Self { world: World::new(&scenario, engine, 1), epoch: Epoch(0) };
        for client in 0..2 {
            bench.world.start(client);
            bench.back(client);
        }
        Some(bench)
    }

    /// Lets time pass until it is so; how long that took.
    fn until(&mut self, mut so: impl FnMut(&World) -> bool) -> Nanos {
        let began = self.world.now;
        for _ in 0..1_000_000 {
            if so(&self.world) {
                break;
            }
            let Some(next) = self.world.next_event() else { break };
            self.world.advance(next);
            self.world.settle();
            self.world.news.clear();
        }
        self.world.now.since(began)
    }

    fn resident(world: &World, client: usize) -> u32 {
        world.processes[client].seats.first().map_or(0, |seat| seat.resident.count())
    }

    fn close(&mut self, client: usize, shortfall: Bytes) {
        self.epoch = self.epoch.next();
        self.world.revoke(client, 0, self.epoch, Nanos::seconds(1000), shortfall);
        self.until(|world| world.processes[client].state == State::Gated);
    }

    fn out(&mut self, client: usize) -> Nanos {
        self.until(|world| Self::resident(world, client) == 0)
    }

    fn open(&mut self, client: usize, prefetch: Bytes) {
        self.epoch = self.epoch.next();
        self.world.grant(client, 0, self.epoch, prefetch);
    }

    fn back(&mut self, client: usize) -> Nanos {
        self.until(|world| u64::from(Self::resident(world, client)) * Bytes::BLOCK.0 >= BYTES.0)
    }
}

fn rate(took: Nanos) -> f64 {
    BYTES.0 as f64 / 1e9 / took.as_secs_f64().max(1e-9)
}

/// The rates of `docs/measurements` and of the model's H100.
pub fn handover_rates() -> Vec<MeasuredRate> {
    let mut rates = Vec::new();
    let mut add = |path, measured, simulated| rates.push(MeasuredRate { path, measured, simulated });
    let all = Bytes(u64::MAX);
    for (engine, out_name, out_range, both_out, both_in) in [
        (
            Engine::Prefetch,
            "push-out",
            (13.9, 14.6),
            ("push-out while the other comes", (8.7, 13.7)),
            (38.0, 41.0),
        ),
        (
            Engine::Protected,
            "protected push-out",
            (43.0, 52.0),
            ("protected push-out while the other comes", (42.0, 44.0)),
            (41.0, 42.0),
        ),
    ] {
        let Some(mut bench) = Bench::new(engine) else { return rates };
        bench.close(1, Bytes::ZERO);
        bench.close(0, all);
        add("first push-out", (3.7, 4.8), rate(bench.out(0)));
        bench.open(0, all);
        add("bringing back", (48.5, 50.1), rate(bench.back(0)));
        bench.close(0, all);
        add(out_name, out_range, rate(bench.out(0)));
        // Now the other's first push-out, so that both have host pages; then one comes while the other goes.
        bench.open(1, Bytes::ZERO);
        bench.close(1, all);
        bench.out(1);
        bench.open(1, all);
        bench.back(1);
        bench.world.revoke(1, 0, Epoch(1000), Nanos::seconds(1000), all);
        bench.until(|world| world.processes[1].state == State::Gated);
        bench.open(0, all);
        let came = bench.back(0);
        let rest = if Bench::resident(&bench.world, 1) > 0 { bench.out(1) } else { Nanos::ZERO };
        add("bringing back while the other goes", both_in, rate(came));
        let gone = f64::from(Bench::resident(&bench.world, 1));
        add(both_out.0, both_out.1, if gone > 0.0 { 0.0 } else { rate(came + rest) });
    }
    if let Some(mut bench) = Bench::new(Engine::Protected) {
        bench.close(0, all);
        bench.out(0);
        bench.close(1, Bytes::ZERO);
        bench.open(0, Bytes::ZERO);
        let began = bench.world.processes[0].stalled;
        bench.back(0);
        add("demand faults", (7.3, 11.2), rate(bench.world.processes[0].stalled.since(began)));
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_simulated_h100_hands_over_within_a_tenth_of_what_was_measured() {
        let rates = handover_rates();
        assert_eq!(rates.len(), 11);
        for rate in rates {
            assert!(rate.error().abs() <= 0.1, "{rate:?}");
        }
    }
}
