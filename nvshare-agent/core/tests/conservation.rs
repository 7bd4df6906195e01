//! GPU time is handed out once, to everybody by weight, whatever the number of clients and their weights.
#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

use std::collections::BTreeMap;

use nvshare_core::{
    Activity, Bytes, ClientId, Config, Drain, Engine, GpuId, GpuView, Input, JobId, ModeOrder, Nanos, Order,
    Output, Poll,
};
use proptest::prelude::*;

const GPU: GpuId = GpuId([1; 16]);
const STEP: Nanos = Nanos::millis(10);
const QUANTUM: Nanos = Nanos::seconds(2);
const TOLD: Nanos = Nanos::SECOND;

/// Clients of one GPU that always have work and answer a revocation after `drain`.
struct Host {
    engine: Engine,
    now: Nanos,
    drain: Nanos,
    open: BTreeMap<ClientId, bool>,
    /// Answers that are due.
    due: Vec<(Nanos, Input)>,
    /// The longest that somebody's gate stayed closed.
    longest: Nanos,
    closed_at: BTreeMap<ClientId, Nanos>,
}

impl Host {
    fn new(weights: &[u32], drain: Nanos) -> Self {
        let mut host = Self {
            engine: Engine::new(Config::default()),
            now: Nanos::ZERO,
            drain,
            open: BTreeMap::new(),
            due: Vec::new(),
            longest: Nanos::ZERO,
            closed_at: BTreeMap::new(),
        };
        host.tell(Input::Gpu { gpu: GPU, capacity: Bytes::gib(1), link_rate: Bytes::gib(50) });
        for (number, &weight_milli) in (0..).zip(weights) {
            let client = ClientId(number);
            host.open.insert(client, true);
            host.tell(Input::ClientJoined { client, job: JobId(number), weight_milli, priority: 0 });
            host.tell(Input::ClientUses { client, gpu: GPU });
        }
        host
    }

    fn tell(&mut self, input: Input) {
        self.engine.handle(self.now, input);
        while let Poll::Emit(output) = self.engine.poll() {
            match output {
                Output::Grant { client, .. } => {
                    self.open.insert(client, true);
                    if let Some(closed) = self.closed_at.remove(&client) {
                        self.longest = self.longest.max(self.now.since(closed));
                    }
                }
                Output::Revoke { client, gpu, epoch, .. } => {
                    self.open.insert(client, false);
                    self.closed_at.insert(client, self.now);
                    let drain = Drain::Done { took: self.drain };
                    let answer = Input::Revoked { client, gpu, epoch, drain, moved: Bytes::ZERO };
                    self.due.push((self.now + self.drain, answer));
                }
                _ => {}
            }
        }
    }

    fn run(&mut self, until: Nanos) {
        while self.now < until {
            self.now += STEP;
            let now = self.now;
            let (due, later) = std::mem::take(&mut self.due).into_iter().partition(|(at, _)| *at <= now);
            self.due = later;
            let due: Vec<(Nanos, Input)> = due;
            for (_, answer) in due {
                self.tell(answer);
            }
            for (client, open) in self.open.clone() {
                let inside = u32::from(open);
                let activity = Activity {
                    managed: Bytes::mib(800),
                    busy_threads: inside,
                    waiting: 1 - inside,
                    ..Activity::default()
                };
                self.tell(Input::Activity { client, gpu: GPU, activity });
            }
            self.tell(Input::Tick);
        }
    }

    fn view(&self) -> GpuView {
        self.engine.view(self.now).gpus.remove(0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn gpu_time_is_handed_out_once_by_weight_and_nobody_waits_longer_than_his_share_demands(
        weights in prop::collection::vec(prop::sample::select(vec![1000u32, 3000, 9000]), 2..5),
        drain in 0u64..20,
    ) {
        let drain = Nanos::millis(drain);
        let mut host = Host::new(&weights, drain);
        host.run(TOLD);
        host.tell(Input::Order(Order::Quantum { quantum: Some(QUANTUM) }));
        host.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
        host.run(TOLD + Nanos::seconds(20));
        let before = host.view();
        let began = host.now;
        host.run(began + Nanos::seconds(400));
        let (after, elapsed) = (host.view(), host.now.since(began));
        let granted: Vec<Nanos> = before.clients.iter().zip(&after.clients)
            .map(|(before, after)| after.granted.since(before.granted)).collect();
        let waited = before.clients.iter().zip(&after.clients)
            .map(|(before, after)| after.waited.since(before.waited));
        // What nobody had is hand-overs: at most a drain and a step of this test for each half of a quantum, which
        // is the shortest turn.
        let total: Nanos = granted.iter().copied().sum();
        let turns = elapsed.0 / (QUANTUM.0 / 2) + 1;
        prop_assert!(total <= elapsed, "{total} of {elapsed} was handed out");
        prop_assert!(total.0 + turns * (drain.0 + 2 * STEP.0) >= elapsed.0, "{total} of {elapsed} was handed out");
        for (granted, waited) in granted.iter().zip(waited) {
            let drained = Nanos(turns * (drain.0 + STEP.0));
            prop_assert!(*granted + waited <= elapsed && *granted + waited + drained >= elapsed);
        }
        // The drain of whoever leaves is his as well.
        let all: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
        for (granted, &weight) in granted.iter().zip(&weights) {
            let share = total.0 * u64::from(weight) / all;
            let error = granted.0.abs_diff(share);
            prop_assert!(error <= share / 20 + 2 * QUANTUM.0, "{granted} of {total} at {weight} of {all}");
        }
        let lightest = u64::from(*weights.iter().min().unwrap());
        let round = (QUANTUM + drain + STEP + STEP).0 * (all / lightest) * 2;
        prop_assert!(host.longest.0 <= round, "somebody waited {} of {}", host.longest, Nanos(round));
    }
}
