//! `nvsharectl record`: the agent sends its recording, and this writes it, with the rights of whoever asks.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nvshare_core::Nanos;
use serde::Serialize;

use super::{
    cli::RecordArgs,
    connection::{Connection, CtlError, Next},
};
use crate::{clock, operator::protocol::Request};

/// How soon an interruption is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recorded {
    /// Where.
    pub file: PathBuf,
    /// Lines after the first: bins of the sensors and steps of the engine.
    pub lines: u64,
    /// For how long.
    pub seconds: f64,
}

/// Why there is no recording, or only a part of one.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The connection, or the agent's refusal.
    #[error(transparent)]
    Ctl(#[from] CtlError),
    /// Something is there already.
    #[error("{0} exists already; give another name, or --force to overwrite it")]
    Exists(PathBuf),
    /// The file.
    #[error("cannot write {path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// The agent has gone.
    #[error("the agent ended the recording; {} holds what came until then", .0.display())]
    Cut(PathBuf),
}

fn create(path: &Path, force: bool) -> Result<BufWriter<File>, RecordError> {
    let mut options = OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true)
    } else {
        options.create_new(true)
    };
    options.open(path).map(BufWriter::new).map_err(|why| match why.kind() {
        io::ErrorKind::AlreadyExists => RecordError::Exists(path.to_owned()),
        _ => RecordError::File { path: path.to_owned(), why },
    })
}

/// Records until the time is over, `stop` is set, or the agent ends.
pub fn record(agent: &mut Connection, args: &RecordArgs, stop: &AtomicBool) -> Result<Recorded, RecordError> {
    let mut file = create(&args.file, args.force)?;
    let failed = |why| RecordError::File { path: args.file.clone(), why };
    agent.send(&Request::Record {})?;
    let begin = clock::now();
    let over = |now: Nanos| args.length.is_some_and(|length| now.since(begin) >= length);
    let mut lines = 0u64;
    while !stop.load(Ordering::Relaxed) && !over(clock::now()) {
        match agent.receive_within(LOOK_EVERY)? {
            Next::Nothing => {}
            Next::Answer(line) => {
                writeln!(file, "{line}").map_err(failed)?;
                lines += 1;
            }
            Next::End => {
                file.flush().map_err(failed)?;
                return Err(RecordError::Cut(args.file.clone()));
            }
        }
    }
    file.flush().map_err(failed)?;
    let seconds = clock::now().since(begin).as_secs_f64();
    Ok(Recorded { file: args.file.clone(), lines: lines.saturating_sub(1), seconds })
}

/// For people.
pub fn show(recorded: &Recorded) -> String {
    let Recorded { file, lines, seconds } = recorded;
    let file = file.display();
    format!("recorded {lines} lines in {seconds:.1} s; replay them with `nvshare-agent replay {file}`\n")
}
