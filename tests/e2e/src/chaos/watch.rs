//! What the agent must keep to, seen from outside.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// An agent that lives answers within this time, whatever others do to it.
pub const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// A dead client is forgotten within this time.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(5);

/// One request on the control socket.
pub fn ask(run_dir: &Path, request: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(run_dir.join("control.sock")).context("connecting")?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    writeln!(stream, "{{\"request\":\"{request}\"}}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("waiting for the answer")?;
    let mut answer: Value = serde_json::from_str(&line).with_context(|| format!("the answer {line:?}"))?;
    ensure!(answer.get("ok").is_some(), "the agent answered {answer}");
    Ok(answer["ok"].take())
}

/// The text of `/metrics`.
pub fn metrics(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    Ok(body.to_owned())
}

/// The sum of a metric over all its series.
pub fn sum_of(metrics: &str, name: &str) -> f64 {
    let series = metrics.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
    });
    series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Series, and how many of them are of one client.
pub fn series(metrics: &str) -> (usize, usize) {
    let lines = metrics.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let of_clients = lines.clone().filter(|line| line.contains("client=\"")).count();
    (lines.count(), of_clients)
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Resident memory of a process, KiB.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Follows the clients of one agent after the other.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    seen: BTreeMap<u64, Instant>,
}

impl Ghosts {
    /// Clients that the agent has for too long after their process ended.
    pub(super) fn look(&mut self, run_dir: &Path) -> Result<Vec<String>> {
        let clients = ask(run_dir, "clients")?;
        let clients = clients["clients"].as_array().context("no list of clients")?;
        let dead: Vec<(u64, u32)> = clients
            .iter()
            .filter_map(|client| Some((client["client"].as_u64()?, client["pid"].as_u64()? as u32)))
            .filter(|&(_, pid)| pid != 0 && !is_alive(pid))
            .collect();
        self.seen.retain(|id, _| dead.iter().any(|(dead, _)| dead == id));
        let mut ghosts = Vec::new();
        for (id, pid) in dead {
            let since = *self.seen.entry(id).or_insert_with(Instant::now);
            if since.elapsed() > FORGOTTEN_WITHIN {
                ghosts.push(format!("client c{id} is still there, its process {pid} ended long ago"));
                self.seen.remove(&id);
            }
        }
        Ok(ghosts)
    }

    /// Another agent has begun: its numbers mean other clients.
    pub(super) fn forget(&mut self) {
        self.seen.clear();
    }
}
