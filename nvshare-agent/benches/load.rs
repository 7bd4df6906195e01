//! How fast the agent hands a GPU on while it serves many: 1,000 clients with sessions on 16 GPUs, 64 of them contending
//! for one, over real sockets.
//!
//! All clients are one thread of one process, so that the agent has a processor to itself on a machine with two. A *grant
//! round trip* is the time from the moment at which the last client that had to stop says that it has, to the arrival of
//! the grant at the next one: one message in, one decision, one message out. Contenders give their turn away as soon as
//! they have it, so that turns follow each other as fast as the agent arranges them.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, and fails where it cannot measure"
)]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

#[path = "../tests/agent/client.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod client;
#[path = "../tests/agent/process.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod process;

use std::{
    io::Read as _,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use nvshare_wire::{AgentMessage, ClientMessage, DrainOutcome, GpuUuid, HEADER_LEN, Header};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use client::ScriptedClient;
use process::Agent;

const CONTENDED: &str = "GPU-20202020-2020-2020-2020-202020202020";
const CLIENTS: usize = 1000;
const CONTENDERS: usize = 64;
const GPUS: usize = 16;
/// Turns before measuring begins, and turns measured.
const WARM_UP: usize = 100;
const TURNS: usize = 10_000;
/// How long the clients are watched doing nothing.
const IDLE: Duration = Duration::from_secs(5);
/// No more measuring after this, whatever was reached.
const LIMIT: Duration = Duration::from_secs(40);
const CONFIG: &str = "[listen]\nmax_clients = 2000\nmax_clients_per_uid = 2000\nmax_clients_per_cgroup = 2000\n\
                      connections_per_second = 100000\n";

fn gpu(index: usize) -> GpuUuid {
    [0x20 + index as u8; 16]
}

/// Seconds of processor time that a process has used.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let ticks: Vec<f64> = rest.split(' ').skip(11).take(2).map(|field| field.parse().unwrap()).collect();
    (ticks[0] + ticks[1]) / rustix::param::clock_ticks_per_second() as f64
}

struct Contender {
    client: ScriptedClient,
    inbound: Vec<u8>,
    epoch: u64,
}

/// Counts of what contenders were told, to compare with what the agent says it told them.
#[derive(Default)]
struct Heard {
    grants: u64,
    revocations: u64,
    out_of_order: u64,
}

impl Contender {
    fn take_in(&mut self) {
        let mut buffer = [0; 4096];
        let count = self.client.stream().read(&mut buffer).unwrap();
        assert!(count > 0, "the agent ended a session");
        self.inbound.extend_from_slice(&buffer[..count]);
    }

    fn next(&mut self) -> Option<AgentMessage> {
        let (header, rest) = self.inbound.split_first_chunk::<HEADER_LEN>()?;
        let header = Header::decode(header).unwrap();
        let message = AgentMessage::decode(header.kind, rest.get(..header.len as usize)?).unwrap();
        self.inbound.drain(..HEADER_LEN + header.len as usize);
        Some(message)
    }
}

/// Plays all contenders until so many turns were measured; the round trips, and what was heard.
fn play(contenders: &mut [Contender], heard: &mut Heard) -> Vec<Duration> {
    let poller = epoll::create(CreateFlags::CLOEXEC).unwrap();
    for (index, contender) in contenders.iter().enumerate() {
        let data = EventData::new_u64(index as u64);
        epoll::add(&poller, contender.client.stream(), data, EventFlags::IN).unwrap();
    }
    let mut events = Vec::with_capacity(CONTENDERS);
    let mut round_trips = Vec::with_capacity(TURNS);
    let mut stopped: Option<Instant> = None;
    let (begun, mut turns) = (Instant::now(), 0);
    while round_trips.len() < TURNS && begun.elapsed() < LIMIT {
        events.clear();
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        epoll::wait(&poller, rustix::buffer::spare_capacity(&mut events), Some(&second)).unwrap();
        for event in &events {
            let contender = &mut contenders[event.data.u64() as usize];
            contender.take_in();
            while let Some(message) = contender.next() {
                match message {
                    AgentMessage::Grant { gpu, epoch, .. } => {
                        let now = Instant::now();
                        heard.grants += 1;
                        heard.out_of_order +=
                            u64::from(epoch <= std::mem::replace(&mut contender.epoch, epoch));
                        turns += 1;
                        if let Some(stopped) = stopped.take().filter(|_| turns > WARM_UP) {
                            round_trips.push(now - stopped);
                        }
                        let slot = contender.client.page.gpu();
                        slot.waiting.store(0, Ordering::Relaxed);
                        contender.client.say(&ClientMessage::Resumed { gpu, epoch, moved: 0, moved_ns: 0 });
                        contender.client.say(&ClientMessage::Yield { gpu, epoch });
                    }
                    AgentMessage::Revoke { gpu, epoch, .. } => {
                        heard.revocations += 1;
                        heard.out_of_order +=
                            u64::from(epoch <= std::mem::replace(&mut contender.epoch, epoch));
                        // It has more to do, so it is in the queue again when it has stopped.
                        contender.client.page.gpu().waiting.store(1, Ordering::Relaxed);
                        let outcome = DrainOutcome::Drained;
                        let answer = ClientMessage::Revoked { gpu, epoch, outcome, drain_ns: 1000, moved: 0 };
                        stopped = Some(Instant::now());
                        contender.client.say(&answer);
                        contender.client.say(&ClientMessage::Waiting { gpu, threads: 1 });
                    }
                    _ => {}
                }
            }
        }
    }
    round_trips
}

fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let index = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[index].as_secs_f64() * 1e6
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    // Every client needs a socket here; the agent raises its own limit.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();

    let agent = Agent::start_quietly(CONFIG);
    let begun = Instant::now();
    let mut clients: Vec<ScriptedClient> = (0..CLIENTS).map(|_| ScriptedClient::join(&agent)).collect();
    let connecting = begun.elapsed();
    let contenders = clients.split_off(CLIENTS - CONTENDERS);
    for (index, client) in clients.iter().enumerate() {
        client.say(&ClientMessage::UseGpu { slot: 0, gpu: gpu(1 + index % (GPUS - 1)) });
    }
    process::wait_for("every GPU", || (agent.status()["gpus"].as_array()?.len() == GPUS - 1).then_some(()));
    let (cpu, begun) = (cpu_seconds(agent.id()), Instant::now());
    std::thread::sleep(IDLE);
    let idle_cpu = (cpu_seconds(agent.id()) - cpu) / begun.elapsed().as_secs_f64();

    let mut contenders: Vec<Contender> =
        contenders.into_iter().map(|client| Contender { client, inbound: Vec::new(), epoch: 0 }).collect();
    for contender in &contenders {
        contender.client.page.gpu().inside.store(1, Ordering::Relaxed);
        contender.client.say(&ClientMessage::UseGpu { slot: 0, gpu: gpu(0) });
    }
    process::wait_for("the contenders' GPU", || {
        (agent.status()["gpus"].as_array()?.len() == GPUS).then_some(())
    });
    for setting in [&["set", "quantum", "10ms"][..], &["set", "mode", "exclusive", "--gpu", CONTENDED]] {
        let output = agent.ctl(setting);
        assert!(output.status.success(), "{output:?}");
    }
    for contender in &contenders {
        contender.client.page.gpu().inside.store(0, Ordering::Relaxed);
    }
    let mut heard = Heard::default();
    let (cpu, begun) = (cpu_seconds(agent.id()), Instant::now());
    let mut round_trips = play(&mut contenders, &mut heard);
    let seconds = begun.elapsed().as_secs_f64();
    let busy_cpu = (cpu_seconds(agent.id()) - cpu) / seconds;
    assert!(!round_trips.is_empty(), "no turn was measured: {} grants in {seconds:.1} s", heard.grants);
    round_trips.sort_unstable();

    let told = |metric: &str| {
        let series = format!("{metric}{{gpu=\"{CONTENDED}\"}}");
        agent.metric(&series) as u64
    };
    // No more turns; what was told until then arrives, or is lost.
    assert!(agent.ctl(&["set", "mode", "shared", "--gpu", CONTENDED]).status.success());
    let patience = Instant::now() + Duration::from_secs(10);
    let lost = loop {
        for contender in &mut contenders {
            contender.client.stream().set_nonblocking(true).unwrap();
            // Ends with what is there now.
            contender.client.stream().read_to_end(&mut contender.inbound).ok();
            while let Some(message) = contender.next() {
                heard.grants += u64::from(matches!(message, AgentMessage::Grant { .. }));
                heard.revocations += u64::from(matches!(message, AgentMessage::Revoke { .. }));
            }
        }
        let lost = told("nvshare_scheduler_grants_total").abs_diff(heard.grants)
            + told("nvshare_scheduler_revocations_total").abs_diff(heard.revocations);
        if lost == 0 || Instant::now() > patience {
            break lost;
        }
    };
    let figures = serde_json::json!({
        "bench": "load",
        "clients": CLIENTS,
        "contenders": CONTENDERS,
        "gpus": GPUS,
        "connect_s": connecting.as_secs_f64(),
        "round_trips": round_trips.len(),
        "p50_us": quantile(&round_trips, 0.5),
        "p90_us": quantile(&round_trips, 0.9),
        "p99_us": quantile(&round_trips, 0.99),
        "max_us": quantile(&round_trips, 1.0),
        "turns_per_s": round_trips.len() as f64 / seconds,
        "grants": heard.grants,
        "revocations": heard.revocations,
        "lost": lost,
        "out_of_order": heard.out_of_order,
        "agent_cpu_idle": idle_cpu,
        "agent_cpu_busy": busy_cpu,
    });
    if json {
        println!("{figures}");
    } else {
        println!("{figures:#}");
    }
    assert_eq!((lost, heard.out_of_order), (0, 0), "messages were lost or came out of order");
}
