//! Every order in which two clients, the agent and the messages between them can act, up to a depth.
//!
//! **Problem.** The tests of leases follow stories that somebody thought of. A grant that crosses an answer, a client
//! that dies between two messages, an agent that starts anew while one is on its way: nobody thinks of all.
//!
//! **Approach.** The real engine, two clients that act as the shim's session does (epochs, phases, what opens a gate), and
//! between them streams that keep their order and lose everything when a session ends, as sockets do. From a state with
//! two busy clients in exclusive mode, every possible next action is taken, breadth first; states that were seen are not
//! explored again.
//!
//! **Promises checked in each state.** While the engine counts a client's gate as closed, it is closed. A client never
//! acts on an epoch older than one it has heard. From each state, once everybody behaves, each client gets its turn.

use std::collections::{HashSet, VecDeque, hash_map::DefaultHasher};
use std::hash::{Hash as _, Hasher as _};

use nvshare_core::{
    Activity, Bytes, ClientId, Config, Drain, Engine, Epoch, GpuId, Input, JobId, ModeOrder, Nanos, Order,
    Output, Poll, output::ClientState,
};

const GPU: GpuId = GpuId([1; 16]);
const CLIENTS: usize = 2;
/// States that are explored; each costs its whole history anew, as the engine cannot be copied.
const STATES: usize = 15_000;
/// Rounds in which everybody behaves, after which both must have had a turn: some quanta, and the longest patience.
const ROUNDS: usize = 60;

/// What the agent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Grant(Epoch),
    Revoke(Epoch),
}

/// One thing that can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The client takes the agent's next message.
    Hear(usize),
    /// The agent takes the client's next message.
    Tell(usize),
    /// The client's drain ends.
    Drained(usize),
    /// It does not end in time, and the client goes on.
    Failed(usize),
    /// The client dies, or its session ends, with all that was on its way; a successor begins.
    Replace(usize),
    /// Another agent begins; every session is new.
    Restart,
    /// The operator orders another mode.
    Order(ModeOrder),
    /// The engine's next deadline comes.
    Tick,
}

/// The phases of the shim's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Granted,
    Draining(Epoch),
    Closed,
}

#[derive(Debug)]
struct Client {
    id: ClientId,
    phase: Phase,
    heard: Epoch,
    from_agent: VecDeque<Said>,
    to_agent: VecDeque<Input>,
}

#[derive(Debug)]
struct World {
    engine: Engine,
    now: Nanos,
    deadline: Option<Nanos>,
    clients: [Client; CLIENTS],
    next_id: u64,
    /// How often the rare things may still happen.
    replacements: u32,
    restarts: u32,
    failures: u32,
    ticks: u32,
    orders: u32,
}

impl Client {
    fn new(id: u64) -> Self {
        Self {
            id: ClientId(id),
            phase: Phase::Granted,
            heard: Epoch::default(),
            from_agent: VecDeque::new(),
            to_agent: VecDeque::new(),
        }
    }

    fn is_open(&self) -> bool {
        self.phase == Phase::Granted
    }

    /// Something is on its way to or from it, or to be done by it.
    fn is_busy(&self) -> bool {
        !self.from_agent.is_empty() || !self.to_agent.is_empty() || matches!(self.phase, Phase::Draining(_))
    }

    fn hear(&mut self) {
        let Some(said) = self.from_agent.pop_front() else { return };
        let client = self.id;
        match said {
            Said::Grant(epoch) => {
                if epoch < self.heard {
                    return;
                }
                self.heard = epoch;
                self.phase = Phase::Granted;
                let (moved, took) = (Bytes::ZERO, Nanos::ZERO);
                self.to_agent.push_back(Input::Resumed { client, gpu: GPU, epoch, moved, took });
            }
            Said::Revoke(epoch) => {
                if epoch > self.heard {
                    self.heard = epoch;
                    self.phase = Phase::Draining(epoch);
                }
            }
        }
    }

    fn finish(&mut self, drain: Drain) {
        let Phase::Draining(epoch) = self.phase else { return };
        self.phase = if matches!(drain, Drain::Done { .. }) { Phase::Closed } else { Phase::Granted };
        let client = self.id;
        self.to_agent.push_back(Input::Revoked { client, gpu: GPU, epoch, drain, moved: Bytes::ZERO });
    }
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            engine: Engine::new(Config::default()),
            now: Nanos::SECOND,
            deadline: None,
            clients: [Client::new(1), Client::new(2)],
            next_id: 3,
            replacements: 1,
            restarts: 1,
            failures: 2,
            ticks: 3,
            orders: 2,
        };
        world.begin();
        world
    }

    /// A fresh engine is told what there is.
    fn begin(&mut self) {
        self.handle(Input::Gpu { gpu: GPU, capacity: Bytes::gib(1), link_rate: Bytes(50_000_000_000) });
        for index in 0..CLIENTS {
            self.join(index);
        }
        self.handle(Input::Order(Order::Mode { gpu: None, mode: ModeOrder::Exclusive }));
    }

    fn join(&mut self, index: usize) {
        let client = self.clients[index].id;
        let job = JobId(client.0);
        self.handle(Input::ClientJoined { client, job, weight_milli: 1000, priority: 0 });
        self.handle(Input::ClientUses { client, gpu: GPU });
        self.look_at_page(index);
    }

    /// The agent reads what the client's page says, which needs no message.
    fn look_at_page(&mut self, index: usize) {
        let Client { id: client, phase, .. } = self.clients[index];
        let closed = u32::from(phase == Phase::Closed);
        let activity = Activity {
            managed: Bytes::mib(800),
            waiting: closed,
            busy_threads: 1 - closed,
            ..Activity::default()
        };
        self.handle(Input::Activity { client, gpu: GPU, activity });
    }

    fn handle(&mut self, input: Input) {
        self.engine.handle(self.now, input);
        loop {
            let (client, said) = match self.engine.poll() {
                Poll::Wait(deadline) => break self.deadline = deadline,
                Poll::Emit(Output::Grant { client, epoch, .. }) => (client, Said::Grant(epoch)),
                Poll::Emit(Output::Revoke { client, epoch, .. }) => (client, Said::Revoke(epoch)),
                Poll::Emit(_) => continue,
            };
            if let Some(client) = self.clients.iter_mut().find(|known| known.id == client) {
                client.from_agent.push_back(said);
            }
        }
    }

    fn possible(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        for (index, client) in self.clients.iter().enumerate() {
            if !client.from_agent.is_empty() {
                actions.push(Action::Hear(index));
            }
            if !client.to_agent.is_empty() {
                actions.push(Action::Tell(index));
            }
            if matches!(client.phase, Phase::Draining(_)) {
                actions.push(Action::Drained(index));
                if self.failures > 0 {
                    actions.push(Action::Failed(index));
                }
            }
            if self.replacements > 0 {
                actions.push(Action::Replace(index));
            }
        }
        if self.restarts > 0 {
            actions.push(Action::Restart);
        }
        if self.orders > 0 {
            // From exclusive to shared and back: whoever drains is granted meanwhile.
            let mode = if self.orders.is_multiple_of(2) { ModeOrder::Shared } else { ModeOrder::Exclusive };
            actions.push(Action::Order(mode));
        }
        if self.deadline.is_some() && self.ticks > 0 {
            actions.push(Action::Tick);
        }
        actions
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Hear(index) => self.clients[index].hear(),
            Action::Tell(index) => {
                if let Some(input) = self.clients[index].to_agent.pop_front() {
                    self.handle(input);
                    self.look_at_page(index);
                }
            }
            Action::Drained(index) => self.clients[index].finish(Drain::Done { took: Nanos::MILLI }),
            Action::Failed(index) => {
                self.failures -= 1;
                self.clients[index].finish(Drain::TimedOut);
            }
            Action::Replace(index) => {
                self.replacements -= 1;
                let gone = std::mem::replace(&mut self.clients[index], Client::new(self.next_id));
                self.next_id += 1;
                self.handle(Input::ClientLeft { client: gone.id });
                self.join(index);
            }
            Action::Restart => {
                self.restarts -= 1;
                self.engine = Engine::new(Config::default());
                for client in &mut self.clients {
                    *client = Client::new(self.next_id);
                    self.next_id += 1;
                }
                self.begin();
            }
            Action::Order(mode) => {
                self.orders -= 1;
                self.handle(Input::Order(Order::Mode { gpu: None, mode }));
            }
            Action::Tick => {
                self.ticks = self.ticks.saturating_sub(1);
                self.tick();
            }
        }
    }

    fn tick(&mut self) {
        if let Some(deadline) = self.deadline {
            self.now = self.now.max(deadline);
            self.handle(Input::Tick);
            for index in 0..CLIENTS {
                self.look_at_page(index);
            }
        }
    }

    /// The clients whose gate is open.
    fn open(&self) -> Vec<usize> {
        (0..CLIENTS).filter(|&index| self.clients[index].is_open()).collect()
    }

    /// What must hold at any time.
    fn check(&self, path: &[Action]) {
        let view = self.engine.view(self.now);
        for client in &self.clients {
            let known = view.gpus[0].clients.iter().find(|known| known.client == client.id);
            let state = known.unwrap_or_else(|| panic!("{} is unknown after {path:?}", client.id)).state;
            let counted_as_closed = matches!(state, ClientState::Waiting | ClientState::Parked);
            assert!(
                !(counted_as_closed && client.is_open()),
                "{} runs while it counts as {state:?} after {path:?}\n{self:#?}",
                client.id
            );
        }
    }

    /// Once everybody behaves, each client has its turn.
    fn check_progress(&mut self, path: &[Action]) {
        if self.orders == 1 {
            self.act(Action::Order(ModeOrder::Exclusive));
        }
        let mut had_turn = [false; CLIENTS];
        for _ in 0..ROUNDS {
            while let Some(index) = (0..CLIENTS).find(|&index| self.clients[index].is_busy()) {
                let client = &mut self.clients[index];
                client.hear();
                client.finish(Drain::Done { took: Nanos::MILLI });
                if let Some(input) = client.to_agent.pop_front() {
                    self.handle(input);
                    self.look_at_page(index);
                }
                if let [open] = self.open()[..] {
                    had_turn[open] = true;
                }
            }
            if had_turn == [true; CLIENTS] {
                return;
            }
            self.tick();
        }
        panic!("no turn for everybody ({had_turn:?}) after {path:?}\n{self:#?}");
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{self:?}").hash(&mut hasher);
        hasher.finish()
    }
}

fn replay(path: &[Action]) -> World {
    let mut world = World::new();
    for &action in path {
        world.act(action);
    }
    world
}

#[test]
fn no_order_of_events_opens_two_gates_unknown_to_the_engine_or_leaves_a_client_without_a_turn() {
    let mut seen = HashSet::from([World::new().fingerprint()]);
    let mut frontier: VecDeque<Vec<Action>> = VecDeque::from([Vec::new()]);
    let (mut explored, mut transitions, mut depth) = (0, 0_u64, 0);
    while let Some(path) = frontier.pop_front()
        && explored < STATES
    {
        explored += 1;
        depth = path.len();
        let actions = replay(&path).possible();
        replay(&path).check_progress(&path);
        for action in actions {
            transitions += 1;
            let mut world = replay(&path);
            world.act(action);
            let path: Vec<Action> = path.iter().copied().chain([action]).collect();
            world.check(&path);
            if seen.insert(world.fingerprint()) {
                frontier.push_back(path);
            }
        }
    }
    println!(
        "lease protocol: {explored} states explored to depth {depth}, {transitions} transitions, {} states seen",
        seen.len()
    );
    assert!(explored == STATES || frontier.is_empty());
    assert!(depth >= 6, "too shallow to say anything: {depth}");
}
