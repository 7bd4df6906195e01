//! NVML, on a thread that can be abandoned: a wedged driver makes its calls hang for ever.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use nvml_wrapper::{Device, Nvml, enums::device::UsedGpuMemory, error::NvmlError};
use nvshare_core::{Bytes, GpuId, Nanos};
use tokio::sync::watch;

use super::source::{SensorName, SensorStatus};
use crate::clock;

/// Time between readings.
const PERIOD: Duration = Duration::from_secs(1);
/// Time before another attempt after a failure; the driver may be loaded in the meantime.
const RETRY: Duration = Duration::from_secs(10);
/// A reading older than this means that NVML hangs.
const STALE: Nanos = Nanos::seconds(5);

/// One reading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NvmlReading {
    /// The driver's version.
    pub driver: String,
    /// Every GPU that could be read.
    pub gpus: Vec<NvmlGpu>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmlGpu {
    /// Its UUID.
    pub id: GpuId,
    /// The product name.
    pub name: String,
    /// Memory.
    pub total: Bytes,
    /// Memory in use.
    pub used: Bytes,
    /// Memory that the driver keeps for itself.
    pub reserved: Bytes,
    /// Plain allocations and contexts of all processes; `None` if NVML does not say.
    pub process_memory: Option<Bytes>,
    /// Bytes per second of the link in one direction.
    pub link_rate: Option<Bytes>,
}

/// What the thread last said.
#[derive(Clone, Debug)]
enum Word {
    Starting(Nanos),
    Reading(Nanos, u64, Nanos, NvmlReading),
    Failed(String),
}

/// The source.
#[derive(Clone, Debug)]
pub struct NvmlSource {
    word_rx: Option<watch::Receiver<Word>>,
}

impl NvmlSource {
    /// Starts reading. `library` overrides the loader's choice.
    pub fn start(library: Option<PathBuf>, enabled: bool) -> Self {
        if !enabled {
            return Self { word_rx: None };
        }
        let (word_tx, word_rx) = watch::channel(Word::Starting(clock::now()));
        let spawned = std::thread::Builder::new().name("nvml".to_owned()).spawn({
            let word_tx = word_tx.clone();
            move || read_for_ever(library.as_deref(), &word_tx)
        });
        if let Err(error) = spawned {
            word_tx.send_replace(Word::Failed(format!("no thread for NVML: {error}")));
        }
        Self { word_rx: Some(word_rx) }
    }

    /// Waits until the first reading is there or has failed, at most this long.
    pub async fn first(&self, within: Duration) {
        if let Some(word_rx) = &self.word_rx {
            let mut word_rx = word_rx.clone();
            let said = word_rx.wait_for(|word| !matches!(word, Word::Starting(_)));
            // Late or never: the status says which.
            tokio::time::timeout(within, said).await.ok();
        }
    }

    /// The last reading, unless it is too old to be believed.
    pub fn reading(&self) -> Option<NvmlReading> {
        match &*self.word_rx.as_ref()?.borrow() {
            Word::Reading(at, _, _, reading) if clock::now().since(*at) < STALE => Some(reading.clone()),
            Word::Reading(..) | Word::Starting(_) | Word::Failed(_) => None,
        }
    }

    /// The state of the source.
    pub fn status(&self) -> SensorStatus {
        let name = SensorName::Nvml;
        let Some(word_rx) = &self.word_rx else {
            return SensorStatus::unavailable(name, "switched off in the configuration ([sensors] nvml)");
        };
        match &*word_rx.borrow() {
            Word::Starting(since) if clock::now().since(*since) < STALE => {
                SensorStatus::unavailable(name, "starting")
            }
            Word::Starting(_) => SensorStatus::unavailable(name, "NVML does not answer"),
            Word::Failed(reason) => SensorStatus::unavailable(name, reason.clone()),
            Word::Reading(at, count, took, reading) => {
                let age = clock::now().since(*at);
                if age >= STALE {
                    return SensorStatus::unavailable(name, format!("NVML has not answered for {age}"));
                }
                SensorStatus {
                    run_count: *count,
                    run_time: Some(*took),
                    ..SensorStatus::attached(
                        name,
                        format!("driver {}, {} GPUs, read once a second", reading.driver, reading.gpus.len()),
                    )
                }
            }
        }
    }
}

fn read_for_ever(library: Option<&Path>, word_tx: &watch::Sender<Word>) {
    while !word_tx.is_closed() {
        let mut builder = Nvml::builder();
        if let Some(library) = library {
            builder.lib_path(library.as_os_str());
        }
        match builder.init() {
            Ok(nvml) => read_each_second(&nvml, word_tx),
            Err(error) => {
                let place = library.map(|path| format!(" ({})", path.display())).unwrap_or_default();
                let reason = format!("the NVIDIA management library{place}: {error}");
                word_tx.send_replace(Word::Failed(reason));
            }
        }
        std::thread::sleep(RETRY);
    }
}

/// Reads until a reading fails.
fn read_each_second(nvml: &Nvml, word_tx: &watch::Sender<Word>) {
    let (mut count, mut spent) = (0, Nanos::ZERO);
    while !word_tx.is_closed() {
        let begin = clock::now();
        match read(nvml) {
            Ok(reading) => {
                count += 1;
                spent += clock::now().since(begin);
                word_tx.send_replace(Word::Reading(clock::now(), count, spent, reading));
            }
            Err(error) => {
                word_tx.send_replace(Word::Failed(format!("reading the GPUs: {error}")));
                return;
            }
        }
        std::thread::sleep(PERIOD);
    }
}

fn read(nvml: &Nvml) -> Result<NvmlReading, NvmlError> {
    let driver = nvml.sys_driver_version().unwrap_or_else(|_| "unknown".to_owned());
    let mut gpus = Vec::new();
    for index in 0..nvml.device_count()? {
        match read_gpu(nvml, index) {
            Ok(gpu) => gpus.extend(gpu),
            // The others go on; this one counts as gone until it answers again.
            Err(NvmlError::GpuLost) => tracing::debug!(index, "NVML says that this GPU is lost"),
            Err(error) => return Err(error),
        }
    }
    Ok(NvmlReading { driver, gpus })
}

/// One GPU, unless its UUID is none.
fn read_gpu(nvml: &Nvml, index: u32) -> Result<Option<NvmlGpu>, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let Ok(id) = device.uuid()?.parse() else { return Ok(None) };
    let memory = device.memory_info()?;
    Ok(Some(NvmlGpu {
        id,
        name: device.name().unwrap_or_else(|_| "unknown".to_owned()),
        total: Bytes(memory.total),
        used: Bytes(memory.used),
        reserved: Bytes(memory.reserved),
        process_memory: process_memory(&device),
        link_rate: link_rate(&device),
    }))
}

/// What processes hold in plain memory and contexts. Managed memory is never in it.
fn process_memory(device: &Device<'_>) -> Option<Bytes> {
    let processes = device.running_compute_processes().ok()?;
    let mut sum = Bytes::ZERO;
    for process in processes {
        match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => sum += Bytes(bytes),
            UsedGpuMemory::Unavailable => return None,
        }
    }
    Some(sum)
}

/// The link's payload rate in one direction, from its generation and width.
fn link_rate(device: &Device<'_>) -> Option<Bytes> {
    // Bytes per second and lane by generation, after line coding.
    let lane = match device.max_pcie_link_gen().ok()? {
        1 => 250_000_000,
        2 => 500_000_000,
        3 => 984_600_000,
        4 => 1_969_000_000,
        5 => 3_938_000_000,
        6 => 7_563_000_000,
        _ => return None,
    };
    let width = device.max_pcie_link_width().ok()?;
    Some(Bytes(lane * u64::from(width)))
}
