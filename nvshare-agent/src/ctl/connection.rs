//! The connection to the agent's control socket.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use crate::operator::protocol::{Answer, Request};

/// The agent answers within this time, or something is wrong with it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// No agent listens there.
    #[error(
        "no agent is running at {0}; start one with `nvshare-agent`, or name its directory with --run-dir or NVSHARE_RUN_DIR"
    )]
    NotRunning(PathBuf),
    /// The user may not.
    #[error("not allowed to use {0}; run nvsharectl as root (sudo) or as a member of the group nvshare")]
    Forbidden(PathBuf),
    /// The connection broke.
    #[error("the connection to the agent at {path} broke: {why}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// The agent said no.
    #[error("{0}")]
    Refused(String),
}

/// An open connection.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    /// The beginning of a line whose end has not come yet.
    begun: Vec<u8>,
}

/// What came within a time.
#[derive(Debug)]
pub enum Next {
    /// An answer.
    Answer(Value),
    /// Nothing yet.
    Nothing,
    /// The agent has closed the connection.
    End,
}

impl Connection {
    /// Connects to the agent that serves `run_dir`.
    pub fn open(run_dir: &Path) -> Result<Self, CtlError> {
        let path = run_dir.join("control.sock");
        let stream = UnixStream::connect(&path).map_err(|why| match why.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CtlError::NotRunning(path.clone()),
            io::ErrorKind::PermissionDenied => CtlError::Forbidden(path.clone()),
            _ => CtlError::Broken { path: path.clone(), why },
        })?;
        let timeouts =
            stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        timeouts.map_err(|why| CtlError::Broken { path: path.clone(), why })?;
        Ok(Self { path, stream: BufReader::new(stream), begun: Vec::new() })
    }

    fn broken(&self, why: io::Error) -> CtlError {
        CtlError::Broken { path: self.path.clone(), why }
    }

    /// Sends a request.
    pub fn send(&mut self, request: &Request) -> Result<(), CtlError> {
        let sent = serde_json::to_vec(request).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.stream.get_mut().write_all(&line)
        });
        sent.map_err(|why| self.broken(why))
    }

    /// The next answer; `None` when the agent has closed the connection.
    pub fn receive(&mut self) -> Result<Option<Value>, CtlError> {
        match self.stream.read_until(b'\n', &mut self.begun) {
            Ok(_) if self.begun.is_empty() => return Ok(None),
            Ok(_) => {}
            Err(why) => return Err(self.broken(why)),
        }
        let line = std::mem::take(&mut self.begun);
        match serde_json::from_slice(&line).map_err(|error| self.broken(error.into()))? {
            Answer::Ok(value) => Ok(Some(value)),
            Answer::Error(reason) => Err(CtlError::Refused(reason)),
        }
    }

    /// The next answer, if it comes within this time.
    pub fn receive_within(&mut self, time: Duration) -> Result<Next, CtlError> {
        self.stream.get_ref().set_read_timeout(Some(time)).map_err(|why| self.broken(why))?;
        match self.receive() {
            Ok(Some(answer)) => Ok(Next::Answer(answer)),
            Ok(None) => Ok(Next::End),
            Err(CtlError::Broken { why, .. }) if why.kind() == io::ErrorKind::WouldBlock => Ok(Next::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Sends a request that has one answer, and waits for it.
    pub fn ask(&mut self, request: &Request) -> Result<Value, CtlError> {
        self.send(request)?;
        self.receive()?.ok_or_else(|| self.broken(io::ErrorKind::UnexpectedEof.into()))
    }

    /// From here on answers may take any time.
    pub fn wait_for_ever(&self) -> Result<(), CtlError> {
        self.stream.get_ref().set_read_timeout(None).map_err(|why| self.broken(why))
    }
}
