//! Ten times a second: reads every source, has fused what they say, and tells the engine.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, mpsc},
    time::Duration,
};

use nvshare_core::{Bytes, ClientId, ClientSample, GpuId, Input, ModeOrder, Nanos, Order};
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::{
    blocks::{self, Blocks},
    bpf::Bpf,
    fusion::{
        Fused, Raw,
        disagreement::{Comparer, Disagreement},
    },
    hazards::{Hangs, Verdict},
    nvml::NvmlSource,
    raw::{RawBin, RawClient, RawGpu},
    room::{self, Holding, Plain, Rooms},
    sensors::Sensors,
    source::{BlockTotals, BpfReading, UvmTotals},
    uvm_counters::CounterTotals,
    uvm_events::{EventSample, EventSampler, OfClient},
};
use crate::{
    clients::{client::Client, session::Hub},
    clock,
    driver::Command,
};

/// Length of a bin.
pub const PERIOD: Duration = Duration::from_millis(100);
/// Bins between two looks at slow things: NVML, the state of sensors.
const SLOW: u64 = 10;

/// The sampler, run by a thread of its own.
pub struct Sampler {
    hub: Arc<Hub>,
    bpf: Bpf,
    events: EventSampler,
    nvml: NvmlSource,
    sensors: Arc<Sensors>,
    comparer: Comparer,
    blocks: BTreeMap<(ClientId, GpuId), Blocks>,
    bins: u64,
    /// The last bin, until the engine has taken it in.
    pending: Option<oneshot::Receiver<()>>,
    last: Nanos,
    fault_busy: BTreeMap<GpuId, Nanos>,
    rooms: Rooms,
    hangs: Hangs,
    previous: BTreeMap<(ClientId, GpuId), Previous>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Previous {
    counters: CounterTotals,
    uvm: UvmTotals,
    blocks: BlockTotals,
    managed: Bytes,
    /// Of what is off the GPU by the probes, what may have been freed.
    freed: Bytes,
}

/// The running thread.
#[derive(Debug)]
pub struct Running {
    stop_tx: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Running {
    /// Ends the thread; the sensors are detached when this returns.
    pub fn stop(self) {
        let Self { stop_tx, thread } = self;
        drop(stop_tx);
        if thread.join().is_err() {
            tracing::error!("the sampler had ended by itself");
        }
    }
}

impl Sampler {
    /// A sampler of these sources.
    pub fn new(
        hub: Arc<Hub>,
        bpf: Bpf,
        events: EventSampler,
        nvml: NvmlSource,
        sensors: Arc<Sensors>,
    ) -> Self {
        Self {
            hub,
            bpf,
            events,
            nvml,
            sensors,
            comparer: Comparer::default(),
            blocks: BTreeMap::new(),
            bins: 0,
            pending: None,
            last: clock::now(),
            fault_busy: BTreeMap::new(),
            rooms: Rooms::default(),
            hangs: Hangs::default(),
            previous: BTreeMap::new(),
        }
    }

    /// Starts the thread.
    pub fn start(mut self) -> std::io::Result<Running> {
        let (stop_tx, stop_rx) = mpsc::channel();
        let thread = std::thread::Builder::new().name("sampler".to_owned()).spawn(move || {
            let mut due = clock::now();
            loop {
                due = (due + Nanos(PERIOD.as_nanos() as u64)).max(clock::now());
                let wait = Duration::from_nanos(due.since(clock::now()).0);
                match stop_rx.recv_timeout(wait) {
                    Err(mpsc::RecvTimeoutError::Timeout) => self.bin(),
                    Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
            }
        })?;
        Ok(Running { stop_tx, thread })
    }

    /// One round.
    fn bin(&mut self) {
        if self.is_behind() {
            return;
        }
        let begin = clock::now();
        let mut facts = Vec::new();
        if self.bins.is_multiple_of(SLOW) {
            self.slow(&mut facts);
        }
        self.bins += 1;
        let reading = self.bpf.read();
        self.note_xids(&reading);
        let now = clock::now();
        let interval = now.since(self.last);
        self.last = now;
        let clients = self.hub.registry.all();
        let found = self.events.bin(&clients, &self.suspects(&clients, &reading));
        let mut holdings = Vec::new();
        let mut room = BTreeMap::new();
        let mut raw = RawBin { at: now, gpus: Vec::new() };
        for (gpu, known) in self.hub.gpus.all() {
            let mut on_gpu = Vec::new();
            for client in clients.iter().filter(|client| client.is_on(gpu)) {
                let activity = client.activity(gpu, now, true);
                if let Some(activity) = activity {
                    holdings.push(Holding {
                        client: client.id,
                        gpu,
                        managed: activity.managed,
                        device: activity.device,
                        spilled: spilled(client, gpu),
                    });
                    facts.push(Input::Activity { client: client.id, gpu, activity });
                }
                let holding = blocks::Holding {
                    managed: activity.unwrap_or_default().managed,
                    capacity: known.capacity(),
                };
                let seen = reading.uvm.as_ref().and_then(|uvm| uvm.blocks_of(client.identity.pid, gpu));
                let freed = self.freed(client.id, gpu, holding.managed, seen);
                if let Some(capacity) = holding.capacity {
                    let beside = signed(capacity) - signed(holding.managed) - signed(freed);
                    room.insert((client.identity.pid, gpu), beside);
                }
                let found = found.by_client.get(&client.id);
                on_gpu.push(self.client(client, gpu, &reading, (seen, freed), found, holding));
            }
            let fault_busy = self.fault_busy(gpu, &reading);
            let said = RawGpu { gpu, interval, fault_busy, clients: on_gpu };
            let sample = said.sample();
            let verdict = self.hangs.bin(gpu, now, interval, fault_busy, &sample.clients);
            facts.extend(verdict.and_then(|verdict| self.note_hang(gpu, verdict)));
            facts.push(Input::Sample { gpu, sample });
            raw.gpus.push(said);
        }
        self.bpf.set_room(room);
        let alive: BTreeSet<ClientId> = clients.iter().map(|client| client.id).collect();
        self.previous.retain(|(client, _), _| alive.contains(client));
        self.blocks.retain(|(client, _), _| alive.contains(client));
        self.comparer.retain(|client| alive.contains(&client));
        self.hub.metrics.sampler_seconds.observe(clock::now().since(begin).as_secs_f64());
        let (done_tx, done_rx) = oneshot::channel();
        self.pending = Some(done_rx);
        self.hub.driver.send_blocking(Command::Bin(raw, facts, done_tx));
        let news = self.rooms.news(room::available(), &self.plain(), &holdings);
        if !news.is_empty() {
            self.hub.driver.send_blocking(Command::Tell(news));
        }
    }

    /// Makes known that a driver hangs, or does no longer. The order that goes with it stays until an operator gives
    /// another: nobody but him knows whether it was the over-commitment.
    fn note_hang(&self, gpu: GpuId, verdict: Verdict) -> Option<Input> {
        let hub = &self.hub;
        let since = match verdict {
            Verdict::Hangs(since) => Some(since),
            Verdict::Recovered => None,
        };
        hub.hazards.set_hanging(gpu, since);
        hub.metrics.emergency.with_label_values(&[&gpu.to_string()]).set(since.is_some().into());
        if since.is_none() {
            tracing::warn!(%gpu, "the driver serves faults again; clients are admitted, `nvsharectl set mode auto` ends exclusive mode");
            return None;
        }
        tracing::error!(%gpu, "the driver's fault-service thread runs without getting anything done: it hangs. This GPU goes to exclusive mode, nobody new is admitted. See `dmesg`; the machine may need a restart");
        Some(Input::Order(Order::Mode { gpu: Some(gpu), mode: ModeOrder::Exclusive }))
    }

    /// Whether the engine still works on the last bin. Then this one is left out, and the next is longer: bins that queue
    /// up would make clients' answers wait behind figures of the past.
    fn is_behind(&mut self) -> bool {
        let pending = self.pending.as_mut().map(oneshot::Receiver::try_recv);
        matches!(pending, Some(Err(TryRecvError::Empty)))
    }

    /// What each GPU holds that cannot be pushed out; a GPU that NVML does not describe is absent.
    fn plain(&self) -> BTreeMap<GpuId, Plain> {
        let described = self.hub.gpus.all().into_iter().filter_map(|(gpu, known)| Some((gpu, known.nvml?)));
        described
            .map(|(gpu, nvml)| {
                let held = nvml.reserved + nvml.process_memory.unwrap_or_default();
                (gpu, Plain { total: nvml.total, held })
            })
            .collect()
    }

    /// NVML's news, and the state of the sensors.
    fn slow(&mut self, facts: &mut Vec<Input>) {
        let clients = self.hub.registry.all();
        if let Some(reading) = self.nvml.reading() {
            let now = clock::now();
            let device = |gpu| {
                clients
                    .iter()
                    .filter_map(|client| client.activity(gpu, now, false))
                    .map(|a| a.device)
                    .sum::<Bytes>()
            };
            let products: Vec<&str> = reading.gpus.iter().map(|gpu| gpu.name.as_str()).collect();
            let hazards = self.hub.hazards.note_driver(&reading.driver, &products);
            self.hub.metrics.hazards.set(hazards as i64);
            facts.extend(self.hub.gpus.update(&reading, device));
            for gpu in &reading.gpus {
                self.hub.metrics.gpu_described(gpu.id, &gpu.name, &reading.driver);
                self.hub.metrics.gpu_memory(gpu.id, gpu.total.0, gpu.used.0);
            }
        }
        self.bpf.refresh();
        self.sensors.update(self.bpf.status());
        self.sensors.disagree(self.comparer.standing().cloned().collect());
    }

    /// Clients on GPUs where pressure is suspected, of whom no probe tells what moves and why.
    fn suspects(&self, clients: &[Arc<Client>], reading: &BpfReading) -> Vec<ClientId> {
        let suspected = self.hub.driver.suspected();
        let probed = |pid: u32| reading.uvm.as_ref().is_some_and(|uvm| uvm.known.contains(&pid));
        clients
            .iter()
            .filter(|client| !probed(client.identity.pid))
            .filter(|client| suspected.iter().any(|&gpu| client.is_on(gpu)))
            .map(|client| client.id)
            .collect()
    }

    fn fault_busy(&mut self, gpu: GpuId, reading: &BpfReading) -> Option<Nanos> {
        let total = *reading.fault_busy.get(&gpu)?;
        let before = self.fault_busy.insert(gpu, total)?;
        // A total that shrank belongs to a new thread.
        let busy = if total >= before { total.since(before) } else { total };
        self.hub
            .metrics
            .fault_service_seconds
            .with_label_values(&[&gpu.to_string()])
            .inc_by(busy.as_secs_f64());
        Some(busy)
    }

    /// What of a client's memory may have been freed while it was off the GPU.
    fn freed(&mut self, client: ClientId, gpu: GpuId, managed: Bytes, seen: Option<BlockTotals>) -> Bytes {
        let previous = self.previous.entry((client, gpu)).or_default();
        let freed = std::mem::replace(&mut previous.managed, managed).saturating_sub(managed);
        if let Some(blocks) = self.blocks.get_mut(&(client, gpu)) {
            blocks.freed(freed);
        }
        previous.freed = (previous.freed + freed).min(seen.map_or(Bytes::ZERO, |seen| seen.out()));
        previous.freed
    }

    /// What all sources say of a client on a GPU since the last bin.
    fn client(
        &mut self,
        client: &Client,
        gpu: GpuId,
        reading: &BpfReading,
        (seen, freed): (Option<BlockTotals>, Bytes),
        found: Option<&OfClient>,
        holding: blocks::Holding,
    ) -> RawClient {
        let previous = self.previous.entry((client.id, gpu)).or_default();
        let counters = self.hub.counters.timed(|| client.counters(gpu));
        let counters = counters.map(|total| {
            let before = std::mem::replace(&mut previous.counters, total);
            CounterTotals {
                bytes_in: rise(before.bytes_in, total.bytes_in),
                bytes_out: rise(before.bytes_out, total.bytes_out),
                cpu_faults: rise(before.cpu_faults, total.cpu_faults),
                gpu_faults: rise(before.gpu_faults, total.gpu_faults),
            }
        });
        let uvm = reading.uvm.as_ref().filter(|uvm| uvm.known.contains(&client.identity.pid)).map(|uvm| {
            let total = uvm.clients.get(&(client.identity.pid, gpu)).copied().unwrap_or_default();
            let before = std::mem::replace(&mut previous.uvm, total);
            let bytes = |before: Bytes, total: Bytes| Bytes(rise(before.0, total.0));
            UvmTotals {
                gpu_faults: rise(before.gpu_faults, total.gpu_faults),
                gpu_fault_instances: rise(before.gpu_fault_instances, total.gpu_fault_instances),
                bytes_in: bytes(before.bytes_in, total.bytes_in),
                bytes_out: bytes(before.bytes_out, total.bytes_out),
                evicted: bytes(before.evicted, total.evicted),
                evicted_by_others: bytes(before.evicted_by_others, total.evicted_by_others),
                cpu_faults: rise(before.cpu_faults, total.cpu_faults),
            }
        });
        if let Some(uvm) = uvm {
            let raw = self.hub.metrics.faults.with_label_values(&[gpu.to_string().as_str(), "gpu-raw"]);
            raw.inc_by(uvm.gpu_fault_instances);
        }
        let blocks = seen.map(|total| total.since(std::mem::replace(&mut previous.blocks, total)));
        let out = seen.map(|total| total.out().saturating_sub(freed));
        let events = self.sampled(client.id, gpu, counters, found, holding);
        let raw = Raw { counters, probes: uvm, blocks, out, events, managed: holding.managed };
        let of_client = RawClient { client: client.id, raw, spilled: spilled(client, gpu) };
        for Disagreement { sensor, with, figure, .. } in self.comparer.observe(client.id, gpu, &raw) {
            let labels = [sensor.as_str(), with.as_str(), figure.as_str()];
            self.hub.metrics.disagreements.with_label_values(&labels).inc();
        }
        self.note(client, gpu, &of_client.fuse());
        of_client
    }

    /// What sampled events say of a client on a GPU.
    fn sampled(
        &mut self,
        client: ClientId,
        gpu: GpuId,
        counters: Option<CounterTotals>,
        found: Option<&OfClient>,
        holding: blocks::Holding,
    ) -> Option<EventSample> {
        let out = Bytes(counters.map_or(0, |counters| counters.bytes_out));
        let Some(OfClient { drained, gpus }) = found else {
            if let Some(blocks) = self.blocks.get_mut(&(client, gpu)) {
                blocks.unseen(out);
            }
            return None;
        };
        let blocks = self.blocks.entry((client, gpu)).or_default();
        let name = |number: u32| gpus.get(&number).copied();
        let sample = EventSample::of(drained, name, gpu, blocks, holding);
        blocks.unseen(out.saturating_sub(EventSample::sum(&sample.bytes_out)));
        Some(sample)
    }

    /// Adds a sample to the totals and metrics.
    fn note(&self, client: &Client, gpu: GpuId, figures: &Fused) {
        let ClientSample { gpu_faults, cpu_faults, bytes_in, bytes_out, evicted, evicted_by_others, .. } =
            figures.sample();
        client.saw(gpu, *figures, |totals| {
            add(&mut totals.gpu_faults, gpu_faults);
            add(&mut totals.cpu_faults, cpu_faults);
            add_bytes(&mut totals.bytes_in, bytes_in);
            add_bytes(&mut totals.bytes_out, bytes_out);
            add_bytes(&mut totals.evicted, evicted);
            add_bytes(&mut totals.evicted_by_others, evicted_by_others);
        });
        let metrics = &self.hub.metrics;
        let label = gpu.to_string();
        let count = |family: &prometheus::IntCounterVec, kind: &str, by: Option<u64>| {
            if let Some(by) = by {
                family.with_label_values(&[label.as_str(), kind]).inc_by(by);
            }
        };
        count(&metrics.faults, "gpu", gpu_faults);
        count(&metrics.faults, "cpu", cpu_faults);
        count(&metrics.migrated, "in", bytes_in.map(|bytes| bytes.0));
        count(&metrics.migrated, "out", bytes_out.map(|bytes| bytes.0));
        count(&metrics.evicted, "others", evicted_by_others.map(|bytes| bytes.0));
        let own = evicted.map(|bytes| bytes.saturating_sub(evicted_by_others.unwrap_or_default()).0);
        count(&metrics.evicted, "own", own);
    }

    fn note_xids(&self, reading: &BpfReading) {
        for xid in &reading.xids {
            self.hub.metrics.xids.with_label_values(&[&xid.code.to_string()]).inc();
            tracing::warn!(device = xid.device, code = xid.code, message = xid.message, "Xid error");
        }
    }
}

/// Managed memory of a client that lies on the host, by the bytes that moved.
fn spilled(client: &Client, gpu: GpuId) -> Bytes {
    let totals = client.totals(gpu);
    totals.bytes_out.unwrap_or_default().saturating_sub(totals.bytes_in.unwrap_or_default())
}

/// For differences.
fn signed(bytes: Bytes) -> i64 {
    i64::try_from(bytes.0).unwrap_or(i64::MAX)
}

/// The rise of a counter; one that fell belongs to a new source and counts from zero.
fn rise(before: u64, total: u64) -> u64 {
    total.checked_sub(before).unwrap_or(total)
}

fn add(total: &mut Option<u64>, by: Option<u64>) {
    if let Some(by) = by {
        *total = Some(total.unwrap_or(0).saturating_add(by));
    }
}

fn add_bytes(total: &mut Option<Bytes>, by: Option<Bytes>) {
    if let Some(by) = by {
        *total = Some(total.unwrap_or_default() + by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_fell_counts_from_zero() {
        assert_eq!(rise(10, 15), 5);
        assert_eq!(rise(10, 3), 3);
    }
}
