//! Recordings: everything the engine was told and everything it answered, and their replay.
//!
//! A recording is a file of JSON lines. The first names the format and the engine's configuration, or its state if the
//! recording begins later; each other line is one [`Step`]. Replaying drives such an engine with the inputs and
//! compares its answers.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread::JoinHandle,
};

use nvshare_core::{Config, Engine, Input, Nanos, Output, Poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The format's name, in the first line.
const FORMAT: &str = "nvshare-recording-1";

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
        if self.format != FORMAT {
            return None;
        }
        match (self.config, self.engine) {
            (Some(config), None) => Some(Engine::new(config)),
            (None, Some(state)) => serde_json::from_value(state).ok(),
            (None, None) | (Some(_), Some(_)) => None,
        }
    }
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
    #[error("cannot use the recording {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is empty or begins with something else.
    #[error(
        "{0} is not a recording of `nvshare-agent --record` or `nvsharectl record`, or one of another version"
    )]
    Format(PathBuf),
    /// A line cannot be understood.
    #[error("{path}:{line}: {source}; the recording may be of another version of nvshare-agent")]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Why.
        source: serde_json::Error,
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
    step_tx: Option<mpsc::Sender<Step>>,
    writer: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Creates the file.
    pub fn create(path: &Path, config: &Config) -> Result<Self, RecordingError> {
        let failed = |source| RecordingError::File { path: path.to_owned(), source };
        let mut file = BufWriter::new(File::create(path).map_err(failed)?);
        write_line(&mut file, &Head::from_start(config)).map_err(failed)?;
        let (step_tx, step_rx) = mpsc::channel::<Step>();
        let path = path.to_owned();
        let writer = std::thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || {
                for step in &step_rx {
                    if let Err(error) = write_line(&mut file, &step) {
                        tracing::error!(path = %path.display(), %error, "the recording ends here");
                        return;
                    }
                }
                if let Err(error) = file.flush() {
                    tracing::error!(path = %path.display(), %error, "the end of the recording is lost");
                }
            })
            .map_err(failed)?;
        Ok(Self { step_tx: Some(step_tx), writer: Some(writer) })
    }

    /// Adds a step.
    pub fn record(&self, step: Step) {
        if let Some(step_tx) = &self.step_tx {
            // A failed writer has said so in the log; the agent goes on without a recording.
            step_tx.send(step).ok();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.step_tx.take());
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Inputs.
    pub inputs: usize,
    /// Decisions, all as recorded.
    pub outputs: usize,
}

/// Drives a fresh engine with the recorded inputs; every answer must be the recorded one.
///
/// A last line that is cut off, as a killed agent leaves it, ends the replay without an error.
pub fn replay(path: &Path) -> Result<Replayed, RecordingError> {
    let failed = |source| RecordingError::File { path: path.to_owned(), source };
    let mut lines = BufReader::new(File::open(path).map_err(failed)?).lines();
    let first = lines.next().ok_or_else(|| RecordingError::Format(path.to_owned()))?.map_err(failed)?;
    let head = serde_json::from_str::<Head>(&first).ok();
    let mut engine = head.and_then(Head::engine).ok_or_else(|| RecordingError::Format(path.to_owned()))?;
    let mut done = Replayed { inputs: 0, outputs: 0 };
    let mut lines = lines.enumerate().peekable();
    while let Some((index, text)) = lines.next() {
        let line = index + 2;
        let text = text.map_err(failed)?;
        let recorded: Step = match serde_json::from_str(&text) {
            Ok(step) => step,
            Err(error) if error.is_eof() && lines.peek().is_none() => break,
            Err(source) => return Err(RecordingError::Line { path: path.to_owned(), line, source }),
        };
        let (outputs, wait) = step(&mut engine, recorded.at, recorded.input.clone());
        done.inputs += 1;
        done.outputs += outputs.len();
        if outputs != recorded.outputs || wait != recorded.wait {
            return Err(RecordingError::Differs {
                path: path.to_owned(),
                line,
                recorded: format!("{:?}, wait {:?}", recorded.outputs, recorded.wait),
                replayed: format!("{outputs:?}, wait {wait:?}"),
            });
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording(dir: &Path) -> PathBuf {
        let path = dir.join("recording");
        let recorder = Recorder::create(&path, &Config::default()).unwrap();
        let mut engine = Engine::new(Config::default());
        for at in [1, 2, 3] {
            let (outputs, wait) = step(&mut engine, Nanos(at), Input::Tick);
            recorder.record(Step { at: Nanos(at), input: Input::Tick, outputs, wait });
        }
        drop(recorder);
        path
    }

    #[test]
    fn a_recording_replays_to_the_same_decisions() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(replay(&recording(dir.path())).unwrap().inputs, 3);
    }

    #[test]
    fn a_recording_that_begins_later_replays_from_the_state_then() {
        use nvshare_core::{Bytes, GpuId, ModeOrder, Order};
        let gpu = GpuId([1; 16]);
        let mut engine = Engine::new(Config::default());
        step(&mut engine, Nanos(1), Input::Gpu { gpu, capacity: Bytes::gib(1), link_rate: Bytes::gib(1) });
        let mut lines = serde_json::to_string(&Head::from_here(&engine).unwrap()).unwrap() + "\n";
        // It changes the plan only of a GPU that is known.
        let input = Input::Order(Order::Mode { gpu: Some(gpu), mode: ModeOrder::Exclusive });
        let (outputs, wait) = step(&mut engine, Nanos(2), input.clone());
        assert_eq!(outputs.len(), 1);
        lines += &serde_json::to_string(&Step { at: Nanos(2), input, outputs, wait }).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recording");
        std::fs::write(&path, &lines).unwrap();
        assert_eq!(replay(&path).unwrap(), Replayed { inputs: 1, outputs: 1 });
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
