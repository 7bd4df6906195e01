//! The driver's event queue on each client's VA space, in short samples while pressure is suspected: why memory moves,
//! and which blocks.
//!
//! **Problem.** Only the queue tells causes and addresses on a kernel without probes; but while it is open, a program
//! that lives on faults runs at half its speed, a ring that overflows loses events, and calls into the driver may hang.
//!
//! **Approach.** A [`schedule`] decides whose events are sampled in which bin. A thread of its own opens, flushes and
//! empties the queues ([`queue`]), so that the sampler never waits for the driver longer than [`PATIENCE`]. What a bin's
//! events say is put together by [`EventSample::of`], which is pure.
//!
//! **Invariants.** A queue belongs to its client and goes with it, at once. After a drop, totals of a sample are lower
//! bounds and say so.

pub mod queue;
pub mod schedule;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use nvshare_abi::{tools::queue::Migration, uvm::MigrationCause};
use nvshare_core::{Bytes, ClientId, GpuId, Nanos};
use serde::{Deserialize, Serialize};

use self::{
    queue::{Drained, EventQueue},
    schedule::Schedule,
};
use super::{
    blocks::{Blocks, Holding, Refault},
    source::{SensorName, SensorStatus},
    uvm_tools,
};
use crate::{
    clients::client::Client,
    clock,
    config::{DriverConfig, SamplingConfig},
};

/// The sampler waits this long for the thread that talks to the driver.
const PATIENCE: Duration = Duration::from_millis(40);
/// Bins without suspicion after which a client's queue is closed.
const CALM: u64 = 100;

/// Bytes by [`MigrationCause`], in the order of its values.
pub type ByCause = [Bytes; CAUSES];
const CAUSES: usize = MigrationCause::AccessCounters as usize + 1;

/// What the events of one bin say of one client on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventSample {
    /// Bytes that came to the GPU.
    pub bytes_in: ByCause,
    /// Bytes that left it.
    pub bytes_out: ByCause,
    /// Events of this client that are missing, on whichever GPU.
    pub dropped: u64,
    /// What came back that had been seen to be evicted.
    pub refaults: Refault,
}

impl EventSample {
    /// Puts a bin's events together. `gpu` names the GPU behind a processor's number; `blocks` is what is known of the
    /// client's blocks there, and `holding` what it can have there.
    pub fn of(
        drained: &Drained,
        gpu: impl Fn(u32) -> Option<GpuId>,
        this: GpuId,
        blocks: &mut Blocks,
        holding: Holding,
    ) -> Self {
        let mut sample =
            Self { dropped: drained.dropped.saturating_add(drained.nonsense), ..Self::default() };
        let here = |processor: u32| processor != 0 && gpu(processor) == Some(this);
        for &Migration { cause, src, dst, address, bytes, begin_ns: _, end_ns: _ } in &drained.migrations {
            let bytes = Bytes(bytes);
            if here(src) {
                add(&mut sample.bytes_out, cause, bytes);
                if cause == MigrationCause::Eviction {
                    blocks.evicted(address, bytes);
                }
            }
            if here(dst) {
                add(&mut sample.bytes_in, cause, bytes);
                match cause {
                    MigrationCause::Coherence | MigrationCause::Prefetch => {
                        let Refault { curable, own } = blocks.faulted(address, bytes, holding);
                        sample.refaults.curable += curable;
                        sample.refaults.own += own;
                    }
                    MigrationCause::Invalid
                    | MigrationCause::User
                    | MigrationCause::Eviction
                    | MigrationCause::AccessCounters => blocks.brought(address, bytes),
                }
            }
        }
        sample
    }

    /// All bytes in one direction.
    pub fn sum(by_cause: &ByCause) -> Bytes {
        by_cause.iter().copied().sum()
    }

    /// The bytes out that made room for something.
    pub fn evicted(&self) -> Bytes {
        self.bytes_out[MigrationCause::Eviction as usize]
    }
}

fn add(by_cause: &mut ByCause, cause: MigrationCause, bytes: Bytes) {
    by_cause[cause as usize] += bytes;
}

/// The source.
#[derive(Debug)]
pub struct UvmEvents {
    driver: DriverConfig,
    enabled: bool,
    stuck: AtomicBool,
    sampling: AtomicU64,
    samples: AtomicU64,
    nanos: AtomicU64,
    lost: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl UvmEvents {
    /// The source for the driver at these paths.
    pub fn new(driver: DriverConfig, enabled: bool) -> Self {
        Self {
            driver,
            enabled,
            stuck: AtomicBool::new(false),
            sampling: AtomicU64::new(0),
            samples: AtomicU64::new(0),
            nanos: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            last_error: Mutex::new(None),
        }
    }

    /// The state of the source.
    pub fn status(&self) -> SensorStatus {
        let name = SensorName::UvmEvents;
        if !self.enabled {
            return SensorStatus::unavailable(
                name,
                "switched off in the configuration ([sensors] uvm-events)",
            );
        }
        let tools = self.driver.uvm_tools_device();
        if let Err(error) = std::fs::metadata(&tools) {
            let reason = format!("{}: {error}; is the NVIDIA driver loaded?", tools.display());
            return SensorStatus::unavailable(name, reason);
        }
        if let Err(reason) = uvm_tools::driver_version(&self.driver) {
            return SensorStatus::unavailable(name, reason);
        }
        if self.stuck.load(Ordering::Relaxed) {
            return SensorStatus::unavailable(name, "the driver does not answer a call on an event queue");
        }
        let samples = self.samples.load(Ordering::Relaxed);
        let error = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let (0, Some(error)) = (samples, error) {
            return SensorStatus::unavailable(name, format!("no event queue could be opened; last: {error}"));
        }
        let detail = match self.sampling.load(Ordering::Relaxed) {
            0 => "resting: no pressure is suspected, or better is known".to_owned(),
            count => format!("sampling {count} client(s)"),
        };
        SensorStatus {
            run_count: samples,
            run_time: Some(Nanos(self.nanos.load(Ordering::Relaxed))),
            lost: self.lost.load(Ordering::Relaxed),
            ..SensorStatus::attached(name, detail)
        }
    }

    /// What is done in one bin; runs on the thread that may block.
    fn work(&self, work: &Work) -> Found {
        let begin = clock::now();
        let mut found = Found::default();
        for client in &work.drain {
            let drained = client.queue(|queue, descriptor| {
                uvm_tools::flush(descriptor)?;
                if !work.goes_on.contains(&client.id) {
                    queue.switch(false)?;
                }
                let drained = queue.drain();
                let numbers: BTreeSet<u32> =
                    drained.migrations.iter().flat_map(|moved| [moved.src, moved.dst]).collect();
                let gpu = |number: u32| Some((number, self.driver.gpu_named(queue.procfs_gpu(number)?)?));
                Ok((drained, numbers.into_iter().filter_map(gpu).collect()))
            });
            match drained {
                Some(Ok((drained, gpus))) => {
                    self.samples.fetch_add(1, Ordering::Relaxed);
                    self.lost.fetch_add(drained.dropped + drained.nonsense, Ordering::Relaxed);
                    found.by_client.insert(client.id, OfClient { drained, gpus });
                }
                Some(Err(error)) => self.failed(&error),
                None => {}
            }
        }
        for client in &work.begin {
            client.open_queue(|descriptor| {
                EventQueue::open(&self.driver, descriptor).inspect_err(|error| self.failed(error)).ok()
            });
            let switched = client.queue(|queue, _| {
                queue.switch(true)?;
                // What an earlier sample left belongs to nobody's bin.
                queue.drain();
                Ok(())
            });
            if let Some(Err(error)) = switched {
                self.failed(&error);
            }
        }
        work.close.iter().for_each(|client| client.close_queue());
        self.nanos.fetch_add(clock::now().since(begin).0, Ordering::Relaxed);
        found
    }

    fn failed(&self, error: &uvm_tools::OpenError) {
        tracing::debug!(%error, "an event queue");
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
}

/// What to do at the end of a bin.
#[derive(Debug, Default)]
struct Work {
    /// Whose queue was on.
    drain: Vec<Arc<Client>>,
    /// Whose stays on.
    goes_on: BTreeSet<ClientId>,
    /// Whose is switched on.
    begin: Vec<Arc<Client>>,
    /// Whose is not needed for the time being.
    close: Vec<Arc<Client>>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// For each client whose queue was on.
    pub by_client: BTreeMap<ClientId, OfClient>,
}

/// What one client's queue held.
#[derive(Debug, Default)]
pub struct OfClient {
    /// The events.
    pub drained: Drained,
    /// The GPUs behind the numbers in them.
    pub gpus: BTreeMap<u32, GpuId>,
}

/// Takes the samples, bin by bin.
#[derive(Debug)]
pub struct EventSampler {
    source: Arc<UvmEvents>,
    schedule: Schedule,
    work_tx: Option<mpsc::Sender<Work>>,
    found_rx: mpsc::Receiver<Found>,
    /// The thread has not answered yet.
    waiting: bool,
    on: BTreeSet<ClientId>,
    /// Bins since each client with a queue was last a suspect.
    calm: BTreeMap<ClientId, u64>,
}

impl EventSampler {
    /// Starts the thread that talks to the driver, if the source is wanted.
    pub fn start(source: Arc<UvmEvents>, sampling: &SamplingConfig, bin: Duration) -> std::io::Result<Self> {
        let bin = (bin.as_nanos() as u64).max(1);
        let schedule = Schedule::new(sampling.length.0.div_ceil(bin), sampling.duty);
        let (found_tx, found_rx) = mpsc::channel();
        let mut work_tx = None;
        if source.enabled {
            let (tx, work_rx) = mpsc::channel::<Work>();
            let source = Arc::clone(&source);
            std::thread::Builder::new().name("uvm-events".to_owned()).spawn(move || {
                for work in &work_rx {
                    if found_tx.send(source.work(&work)).is_err() {
                        return;
                    }
                }
            })?;
            work_tx = Some(tx);
        }
        Ok(Self {
            source,
            schedule,
            work_tx,
            found_rx,
            waiting: false,
            on: BTreeSet::new(),
            calm: BTreeMap::new(),
        })
    }

    /// A bin ends and the next begins: what the events of the one say, and whose are sampled in the other.
    pub fn bin(&mut self, clients: &[Arc<Client>], suspects: &[ClientId]) -> Found {
        let Some(work_tx) = &self.work_tx else { return Found::default() };
        if self.waiting {
            // Late events would be put into the wrong bin.
            self.waiting = self.found_rx.try_recv().is_err();
            self.source.stuck.store(self.waiting, Ordering::Relaxed);
            if self.waiting {
                return Found::default();
            }
            self.on.clear();
        }
        let alive: Vec<ClientId> = clients.iter().map(|client| client.id).collect();
        let next: BTreeSet<ClientId> = self.schedule.next(suspects, &alive).into_iter().collect();
        let with = |wanted: &dyn Fn(&ClientId) -> bool| -> Vec<Arc<Client>> {
            clients.iter().filter(|client| wanted(&client.id)).map(Arc::clone).collect()
        };
        let mut work = Work {
            drain: with(&|client| self.on.contains(client)),
            goes_on: next.clone(),
            begin: with(&|client| next.contains(client) && !self.on.contains(client)),
            close: Vec::new(),
        };
        self.calm.retain(|client, _| alive.contains(client));
        for (client, bins) in &mut self.calm {
            *bins = if suspects.contains(client) || next.contains(client) { 0 } else { *bins + 1 };
        }
        let calm: Vec<ClientId> =
            self.calm.iter().filter(|(_, bins)| **bins >= CALM).map(|(&client, _)| client).collect();
        work.close = with(&|client| calm.contains(client));
        self.calm.retain(|client, _| !calm.contains(client));
        self.calm.extend(next.iter().map(|&client| (client, 0)));
        self.on = next;
        self.source.sampling.store(self.on.len() as u64, Ordering::Relaxed);
        if work.drain.is_empty() && work.begin.is_empty() && work.close.is_empty() {
            return Found::default();
        }
        if work_tx.send(work).is_err() {
            return Found::default();
        }
        match self.found_rx.recv_timeout(PATIENCE) {
            Ok(found) => found,
            Err(_late) => {
                self.waiting = true;
                Found::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuId = GpuId([1; 16]);
    const OTHER: GpuId = GpuId([2; 16]);
    const MIB: u64 = 1 << 20;

    fn gpu(processor: u32) -> Option<GpuId> {
        [(1, GPU), (9, OTHER)].into_iter().find(|(number, _)| *number == processor).map(|(_, gpu)| gpu)
    }

    fn moved(cause: MigrationCause, src: u32, dst: u32, block: u64, bytes: u64) -> Migration {
        Migration { cause, src, dst, address: block * 2 * MIB, bytes, begin_ns: 0, end_ns: 0 }
    }

    #[test]
    fn bytes_are_told_by_cause_direction_and_gpu() {
        let drained = Drained {
            migrations: vec![
                moved(MigrationCause::User, 0, 1, 0, MIB),
                moved(MigrationCause::Coherence, 0, 1, 1, 2 * MIB),
                moved(MigrationCause::Prefetch, 0, 1, 2, 3 * MIB),
                moved(MigrationCause::Eviction, 1, 0, 3, 2 * MIB),
                moved(MigrationCause::User, 1, 0, 4, MIB),
                moved(MigrationCause::Coherence, 0, 9, 5, 7 * MIB),
                // A GPU that the driver does not show, and a move between nodes of the CPU.
                moved(MigrationCause::Coherence, 0, 17, 6, 9 * MIB),
                moved(MigrationCause::User, 0, 0, 7, MIB),
            ],
            dropped: 2,
            nonsense: 1,
        };
        let mut blocks = Blocks::default();
        let sample = EventSample::of(&drained, gpu, GPU, &mut blocks, Holding::default());
        let bytes = |mib: [u64; CAUSES]| mib.map(Bytes::mib);
        assert_eq!(sample.bytes_in, bytes([0, 1, 2, 3, 0, 0]));
        assert_eq!(sample.bytes_out, bytes([0, 1, 0, 0, 2, 0]));
        assert_eq!((sample.evicted(), sample.dropped), (Bytes::mib(2), 3));
        assert_eq!(sample.refaults, Refault::default(), "nothing had gone out before");
        let other = EventSample::of(&drained, gpu, OTHER, &mut Blocks::default(), Holding::default());
        assert_eq!(EventSample::sum(&other.bytes_in), Bytes::mib(7));
    }

    #[test]
    fn what_was_evicted_and_faulted_back_is_a_refault_and_what_was_prefetched_is_not() {
        let drained = Drained {
            migrations: vec![
                moved(MigrationCause::Eviction, 1, 0, 0, 2 * MIB),
                moved(MigrationCause::Eviction, 1, 0, 1, 2 * MIB),
                moved(MigrationCause::Coherence, 0, 1, 0, 2 * MIB),
                moved(MigrationCause::User, 0, 1, 1, 2 * MIB),
            ],
            ..Drained::default()
        };
        let holding = Holding { managed: Bytes::mib(4), capacity: Some(Bytes::mib(100)) };
        let sample = EventSample::of(&drained, gpu, GPU, &mut Blocks::default(), holding);
        assert_eq!(sample.refaults, Refault { curable: Bytes::mib(2), own: Bytes::ZERO });
    }
}
