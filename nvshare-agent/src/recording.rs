//! Recordings: what the sensors said, everything the engine was told and everything it answered, and their replay.
//!
//! A recording is a file of JSON lines. The first names the format and the engine's configuration, or its state if the
//! recording begins later; each other line is one [`Line`]. Replaying fuses what the sensors said again, which must give
//! the samples that the engine was told, and drives such an engine with its inputs, which must give the recorded answers.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread::JoinHandle,
};

use nvshare_core::{Config, Engine, GpuId, GpuSample, Input, Nanos, Output, Poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::observe::{fusion::disagreement::Comparer, raw::RawBin};

/// The format's name, in the first line.
const FORMAT: &str = "nvshare-recording-2";

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    format: String,
    /// The configuration of an engine that was recorded from its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<Config>,
    /// The state of an engine that was recorded from later on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    engine: Option<Value>,
}

impl Head {
    /// A recording of a new engine.
    fn from_start(config: &Config) -> Self {
        Self { format: FORMAT.to_owned(), config: Some(config.clone()), engine: None }
    }

    /// A recording of this engine from here on.
    pub fn from_here(engine: &Engine) -> serde_json::Result<Self> {
        Ok(Self { format: FORMAT.to_owned(), config: None, engine: Some(serde_json::to_value(engine)?) })
    }

    /// The engine before its first step.
    fn engine(self) -> Option<Engine> {
        match (self.config, self.engine) {
            (Some(config), None) => Some(Engine::new(config)),
            (None, Some(state)) => serde_json::from_value(state).ok(),
            (None, None) | (Some(_), Some(_)) => None,
        }
    }
}

/// One line after the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// A bin of the sensors; the samples that follow from it come in the next steps.
    Bin(RawBin),
    /// A step of the engine.
    Step(Step),
}

/// One input and what the engine answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// When.
    pub at: Nanos,
    /// What the engine was told.
    pub input: Input,
    /// What it decided.
    pub outputs: Vec<Output>,
    /// The deadline it named.
    pub wait: Option<Nanos>,
}

/// Why a recording cannot be written or replayed.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// The file.
    #[error("cannot use the recording {path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// The file is empty or begins with something else.
    #[error(
        "{0} is not a recording of `nvshare-agent --record` or `nvsharectl record`, or one of another version"
    )]
    Format(PathBuf),
    /// It is a recording, but of another version.
    #[error("{path} is a recording in the format {format}; this agent replays {FORMAT}")]
    Version {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: String,
    },
    /// A line cannot be understood.
    #[error("{path}:{line}: {why}; the recording may be of another version of nvshare-agent")]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Why.
        why: serde_json::Error,
    },
    /// What the sensors said does not give what the engine was told.
    #[error(
        "{path}:{line}: fusing what the sensors said gives another sample\nrecorded: {recorded}\nreplayed: {replayed}"
    )]
    Fused {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What the recording says.
        recorded: String,
        /// What fusing gives.
        replayed: String,
    },
    /// The engine decided otherwise.
    #[error("{path}:{line}: the engine decided otherwise\nrecorded: {recorded}\nreplayed: {replayed}")]
    Differs {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What the recording says.
        recorded: String,
        /// What the engine says.
        replayed: String,
    },
}

/// Hands one fact to the engine and drains it.
pub fn step(engine: &mut Engine, at: Nanos, input: Input) -> (Vec<Output>, Option<Nanos>) {
    engine.handle(at, input);
    let mut outputs = Vec::new();
    loop {
        match engine.poll() {
            Poll::Emit(output) => outputs.push(output),
            Poll::Wait(until) => return (outputs, until),
        }
    }
}

/// Writes a recording from a thread of its own, so that a slow disk does not hold up decisions.
#[derive(Debug)]
pub struct Recorder {
    line_tx: Option<mpsc::Sender<Line>>,
    writer: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Creates the file.
    pub fn create(path: &Path, config: &Config) -> Result<Self, RecordingError> {
        let failed = |why| RecordingError::File { path: path.to_owned(), why };
        let mut file = BufWriter::new(File::create(path).map_err(failed)?);
        write_line(&mut file, &Head::from_start(config)).map_err(failed)?;
        let (line_tx, line_rx) = mpsc::channel::<Line>();
        let path = path.to_owned();
        let writer = std::thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || {
                for line in &line_rx {
                    if let Err(error) = write_line(&mut file, &line) {
                        tracing::error!(path = %path.display(), %error, "the recording ends here");
                        return;
                    }
                }
                if let Err(error) = file.flush() {
                    tracing::error!(path = %path.display(), %error, "the end of the recording is lost");
                }
            })
            .map_err(failed)?;
        Ok(Self { line_tx: Some(line_tx), writer: Some(writer) })
    }

    /// Adds a line.
    pub fn record(&self, line: Line) {
        if let Some(line_tx) = &self.line_tx {
            // A failed writer has said so in the log; the agent goes on without a recording.
            line_tx.send(line).ok();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.line_tx.take());
        if let Some(writer) = self.writer.take() {
            writer.join().ok();
        }
    }
}

fn write_line(file: &mut impl std::io::Write, value: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *file, value)?;
    file.write_all(b"\n")
}

/// What a replay went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Bins of the sensors, all fused as recorded.
    pub bins: usize,
    /// Windows in which two sensors lastingly disagreed.
    pub disagreements: usize,
    /// Inputs.
    pub inputs: usize,
    /// Decisions, all as recorded.
    pub outputs: usize,
}

/// A replay under way.
struct Replay {
    engine: Engine,
    comparer: Comparer,
    /// Samples that follow from the last bin and were not told to the engine yet.
    fused: BTreeMap<GpuId, GpuSample>,
    done: Replayed,
}

/// Fuses what the recorded sensors said and drives a fresh engine with the recorded inputs; everything must come out as
/// recorded.
///
/// A last line that is cut off, as a killed agent leaves it, ends the replay without an error.
pub fn replay(path: &Path) -> Result<Replayed, RecordingError> {
    let failed = |why| RecordingError::File { path: path.to_owned(), why };
    let mut lines = BufReader::new(File::open(path).map_err(failed)?).lines();
    let first = lines.next().ok_or_else(|| RecordingError::Format(path.to_owned()))?.map_err(failed)?;
    let engine = first_engine(path, &first)?;
    let mut replay =
        Replay { engine, comparer: Comparer::default(), fused: BTreeMap::new(), done: Replayed::default() };
    let mut lines = lines.enumerate().peekable();
    while let Some((index, text)) = lines.next() {
        let line = index + 2;
        let text = text.map_err(failed)?;
        match serde_json::from_str(&text) {
            Ok(Line::Bin(bin)) => replay.bin(&bin),
            Ok(Line::Step(recorded)) => replay.step(path, line, &recorded)?,
            Err(error) if error.is_eof() && lines.peek().is_none() => break,
            Err(why) => return Err(RecordingError::Line { path: path.to_owned(), line, why }),
        }
    }
    Ok(replay.done)
}

/// The engine before the first step, from the first line.
fn first_engine(path: &Path, first: &str) -> Result<Engine, RecordingError> {
    #[derive(Deserialize)]
    struct Format {
        format: String,
    }
    let other = || RecordingError::Format(path.to_owned());
    let Format { format } = serde_json::from_str(first).map_err(|_other| other())?;
    if !format.starts_with("nvshare-recording-") {
        return Err(other());
    }
    if format != FORMAT {
        return Err(RecordingError::Version { path: path.to_owned(), format });
    }
    serde_json::from_str::<Head>(first).ok().and_then(Head::engine).ok_or_else(other)
}

impl Replay {
    fn bin(&mut self, bin: &RawBin) {
        self.done.bins += 1;
        self.fused.clear();
        for gpu in &bin.gpus {
            for client in &gpu.clients {
                self.done.disagreements += self.comparer.observe(client.client, gpu.gpu, &client.raw).len();
            }
            self.fused.insert(gpu.gpu, gpu.sample());
        }
    }

    fn step(&mut self, path: &Path, line: usize, recorded: &Step) -> Result<(), RecordingError> {
        if let Input::Sample { gpu, sample } = &recorded.input {
            let fused = self.fused.remove(gpu);
            if fused.as_ref() != Some(sample) {
                return Err(RecordingError::Fused {
                    path: path.to_owned(),
                    line,
                    recorded: format!("{sample:?}"),
                    replayed: format!("{fused:?}"),
                });
            }
        }
        let (outputs, wait) = step(&mut self.engine, recorded.at, recorded.input.clone());
        self.done.inputs += 1;
        self.done.outputs += outputs.len();
        if outputs != recorded.outputs || wait != recorded.wait {
            return Err(RecordingError::Differs {
                path: path.to_owned(),
                line,
                recorded: format!("{:?}, wait {:?}", recorded.outputs, recorded.wait),
                replayed: format!("{outputs:?}, wait {wait:?}"),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nvshare_core::{Bytes, ClientId};

    use super::*;
    use crate::observe::{
        fusion::{Raw, disagreement},
        raw::{RawClient, RawGpu},
        source::UvmTotals,
        uvm_counters::CounterTotals,
    };

    const GPU: GpuId = GpuId([1; 16]);

    /// A bin in which a client faulted, of two GPUs.
    fn bin(at: u64) -> RawBin {
        let counters = CounterTotals { bytes_in: 4096 * at, bytes_out: 8192, cpu_faults: 0, gpu_faults: 5 };
        let raw = Raw { counters: Some(counters), managed: Bytes::mib(1), ..Raw::default() };
        let client = RawClient { client: ClientId(1), raw, spilled: Bytes::ZERO };
        let gpu = |gpu, clients| RawGpu { gpu, interval: Nanos::millis(100), fault_busy: None, clients };
        RawBin { at: Nanos(at), gpus: vec![gpu(GPU, vec![client]), gpu(GpuId([2; 16]), Vec::new())] }
    }

    fn recording(dir: &Path) -> PathBuf {
        let path = dir.join("recording");
        let recorder = Recorder::create(&path, &Config::default()).unwrap();
        let mut engine = Engine::new(Config::default());
        for at in [1, 2, 3] {
            let (outputs, wait) = step(&mut engine, Nanos(at), Input::Tick);
            recorder.record(Line::Step(Step { at: Nanos(at), input: Input::Tick, outputs, wait }));
        }
        drop(recorder);
        path
    }

    /// A recording with what the sensors said.
    fn with_bins(dir: &Path) -> PathBuf {
        let path = dir.join("bins");
        let recorder = Recorder::create(&path, &Config::default()).unwrap();
        let mut engine = Engine::new(Config::default());
        for at in 1..=u64::from(2 * disagreement::WINDOW) {
            let bin = bin(at);
            recorder.record(Line::Bin(bin.clone()));
            for of_gpu in &bin.gpus {
                let input = Input::Sample { gpu: of_gpu.gpu, sample: of_gpu.sample() };
                let (outputs, wait) = step(&mut engine, Nanos(at), input.clone());
                recorder.record(Line::Step(Step { at: Nanos(at), input, outputs, wait }));
            }
        }
        drop(recorder);
        path
    }

    /// The same file with something replaced in its lines.
    fn edited(path: &Path, from: &str, to: &str) -> PathBuf {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{from} in {}", &text[..500]);
        let edited = path.with_extension("edited");
        std::fs::write(&edited, text.replacen(from, to, 1)).unwrap();
        edited
    }

    #[test]
    fn what_the_sensors_said_replays_to_the_same_samples() {
        let dir = tempfile::tempdir().unwrap();
        let done = replay(&with_bins(dir.path())).unwrap();
        assert_eq!((done.bins, done.inputs, done.disagreements), (100, 200, 0));
    }

    #[test]
    fn a_sample_that_does_not_follow_from_what_the_sensors_said_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = edited(&with_bins(dir.path()), "\"gpu_faults\":5}", "\"gpu_faults\":6}");
        assert!(matches!(replay(&path), Err(RecordingError::Fused { line: 3, .. })));
        // A sample without what it follows from.
        let text = std::fs::read_to_string(with_bins(dir.path())).unwrap();
        let path = dir.path().join("cut");
        let without: Vec<&str> = text.lines().filter(|line| !line.starts_with("{\"bin\"")).collect();
        std::fs::write(&path, without.join("\n")).unwrap();
        assert!(matches!(replay(&path), Err(RecordingError::Fused { line: 2, .. })));
    }

    #[test]
    fn sensors_that_disagreed_disagree_again_in_a_replay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recording");
        let recorder = Recorder::create(&path, &Config::default()).unwrap();
        for at in 1..=u64::from(2 * disagreement::WINDOW) {
            let mut bin = bin(at);
            bin.gpus[0].clients[0].raw.counters =
                Some(CounterTotals { bytes_in: 10 << 20, ..CounterTotals::default() });
            bin.gpus[0].clients[0].raw.probes = Some(UvmTotals::default());
            recorder.record(Line::Bin(bin));
        }
        drop(recorder);
        assert_eq!(replay(&path).unwrap().disagreements, 1);
    }

    #[test]
    fn a_recording_of_another_format_is_refused_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = edited(&recording(dir.path()), FORMAT, "nvshare-recording-9");
        let error = replay(&path).unwrap_err();
        assert!(matches!(error, RecordingError::Version { .. }), "{error}");
        assert!(error.to_string().contains("nvshare-recording-9"), "{error}");
    }

    #[test]
    fn a_recording_replays_to_the_same_decisions() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(replay(&recording(dir.path())).unwrap().inputs, 3);
    }

    #[test]
    fn a_recording_that_begins_later_replays_from_the_state_then() {
        use nvshare_core::{ModeOrder, Order};
        let gpu = GPU;
        let mut engine = Engine::new(Config::default());
        step(&mut engine, Nanos(1), Input::Gpu { gpu, capacity: Bytes::gib(1), link_rate: Bytes::gib(1) });
        let mut lines = serde_json::to_string(&Head::from_here(&engine).unwrap()).unwrap() + "\n";
        // It changes the plan only of a GPU that is known.
        let input = Input::Order(Order::Mode { gpu: Some(gpu), mode: ModeOrder::Exclusive });
        let (outputs, wait) = step(&mut engine, Nanos(2), input.clone());
        assert_eq!(outputs.len(), 1);
        lines += &serde_json::to_string(&Line::Step(Step { at: Nanos(2), input, outputs, wait })).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recording");
        std::fs::write(&path, &lines).unwrap();
        assert_eq!(replay(&path).unwrap(), Replayed { inputs: 1, outputs: 1, ..Replayed::default() });
        let fresh = serde_json::to_string(&Head::from_start(&Config::default())).unwrap();
        let other = lines.replacen(lines.lines().next().unwrap(), &fresh, 1);
        std::fs::write(&path, other).unwrap();
        assert!(matches!(replay(&path), Err(RecordingError::Differs { line: 2, .. })));
    }

    #[test]
    fn a_changed_decision_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = recording(dir.path());
        let text = std::fs::read_to_string(&path).unwrap().replacen("\"wait\":null", "\"wait\":77", 1);
        std::fs::write(&path, text).unwrap();
        assert!(matches!(replay(&path), Err(RecordingError::Differs { line: 2, .. })));
    }

    #[test]
    fn a_recording_cut_in_its_last_line_replays_up_to_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = recording(dir.path());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 10]).unwrap();
        assert_eq!(replay(&path).unwrap().inputs, 2);
    }

    #[test]
    fn another_file_is_not_taken_for_a_recording() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other");
        std::fs::write(&path, "{\"hello\":1}\n").unwrap();
        assert!(matches!(replay(&path), Err(RecordingError::Format(_))));
    }
}
