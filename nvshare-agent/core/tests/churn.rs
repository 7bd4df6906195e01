//! Clients that come and go do not keep those who stay from their turns.

use std::collections::BTreeMap;

use nvshare_core::{
    Activity, Bytes, ClientId, Config, Drain, Engine, Epoch, GpuId, Input, JobId, ModeOrder, Nanos, Order,
    Output, Poll,
};

const GPU: GpuId = GpuId([1; 16]);
const QUANTUM: Nanos = Nanos::millis(200);

/// Clients that answer everything at once and always have work.
struct Host {
    engine: Engine,
    now: Nanos,
    /// Each client's gate.
    open: BTreeMap<ClientId, bool>,
    turns: BTreeMap<ClientId, u32>,
}

impl Host {
    fn new() -> Self {
        let engine = Engine::new(Config { quantum_max: QUANTUM, ..Config::default() });
        let mut host = Self { engine, now: Nanos::SECOND, open: BTreeMap::new(), turns: BTreeMap::new() };
        host.tell(Input::Gpu { gpu: GPU, capacity: Bytes::gib(1), link_rate: Bytes(50_000_000_000) });
        host.tell(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
        host.tell(Input::Order(Order::Quantum { quantum: Some(QUANTUM) }));
        host
    }

    fn join(&mut self, number: u64) {
        let client = ClientId(number);
        self.open.insert(client, true);
        self.tell(Input::ClientJoined { client, job: JobId(number), weight_milli: 1000, priority: 0 });
        self.tell(Input::ClientUses { client, gpu: GPU });
        self.report();
    }

    fn leave(&mut self, number: u64) {
        self.open.remove(&ClientId(number));
        self.tell(Input::ClientLeft { client: ClientId(number) });
    }

    fn tell(&mut self, input: Input) {
        let mut inputs = vec![input];
        while !inputs.is_empty() {
            for input in std::mem::take(&mut inputs) {
                self.engine.handle(self.now, input);
                while let Poll::Emit(output) = self.engine.poll() {
                    inputs.extend(self.answer(&output));
                }
            }
        }
    }

    fn answer(&mut self, output: &Output) -> Vec<Input> {
        match *output {
            Output::Grant { client, gpu, epoch, .. } => {
                self.open.insert(client, true);
                *self.turns.entry(client).or_default() += 1;
                vec![
                    Input::Resumed { client, gpu, epoch, moved: Bytes::ZERO, took: Nanos::ZERO },
                    self.page(client),
                ]
            }
            Output::Revoke { client, gpu, epoch, .. } => {
                vec![self.drained(client, gpu, epoch), self.page(client)]
            }
            _ => Vec::new(),
        }
    }

    fn drained(&mut self, client: ClientId, gpu: GpuId, epoch: Epoch) -> Input {
        self.open.insert(client, false);
        Input::Revoked { client, gpu, epoch, drain: Drain::Done { took: Nanos::MILLI }, moved: Bytes::ZERO }
    }

    fn page(&self, client: ClientId) -> Input {
        let open = u32::from(self.open.get(&client).copied().unwrap_or_default());
        let activity = Activity {
            managed: Bytes::mib(800),
            busy_threads: open,
            waiting: 1 - open,
            ..Activity::default()
        };
        Input::Activity { client, gpu: GPU, activity }
    }

    fn report(&mut self) {
        let clients: Vec<ClientId> = self.open.keys().copied().collect();
        for client in clients {
            self.tell(self.page(client));
        }
    }

    fn wait(&mut self, time: Nanos) {
        let until = self.now + time;
        while self.now < until {
            self.now += Nanos::millis(10);
            self.report();
            self.tell(Input::Tick);
        }
    }
}

#[test]
fn whoever_comes_anew_stands_behind_those_who_wait() {
    let mut host = Host::new();
    let mut newest = 10;
    (1..=newest).for_each(|number| host.join(number));
    // Two stay. The eight others go once they have had a turn, and another comes in the place of each.
    for _ in 0..300 {
        host.wait(Nanos::millis(100));
        for number in (3..=newest).collect::<Vec<u64>>() {
            let client = ClientId(number);
            if host.open.contains_key(&client) && host.turns.contains_key(&client) {
                host.leave(number);
                newest += 1;
                host.join(newest);
            }
        }
    }
    let turns = |number| host.turns.get(&ClientId(number)).copied().unwrap_or_default();
    // 30 s hold 150 turns of 200 ms or more that are cut short, for ten clients at a time.
    assert!(turns(1) >= 10 && turns(2) >= 10, "{} and {} turns while {newest} came", turns(1), turns(2));
}
