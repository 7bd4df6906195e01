//! A real Prometheus that scrapes real agents, with the shipped rules, and `promtool`.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::process::{Guarded, tail, wait_until};

/// How long an alert must hold here, instead of what its rule says.
const HOLDS: &str = "2s";
const PATIENCE: Duration = Duration::from_secs(20);

/// Why Prometheus cannot be run here, if it cannot.
pub fn obstacle() -> Option<String> {
    ["prometheus", "promtool"].into_iter().find_map(|program| {
        let quiet =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        quiet
            .err()
            .map(|error| format!("{program} cannot be run ({error}): install the package `prometheus`"))
    })
}

/// Seconds since the epoch: the time that Prometheus knows.
pub fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// One series of an answer.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its labels.
    pub labels: Value,
    /// Time and value of each sample that is a number.
    pub samples: Vec<(f64, f64)>,
}

impl Series {
    /// A label's value, empty without it.
    pub fn label(&self, name: &str) -> &str {
        self.labels[name].as_str().unwrap_or_default()
    }
}

/// A running Prometheus. It scrapes and evaluates rules every second.
#[derive(Debug)]
pub struct Prometheus {
    process: Guarded,
    address: String,
    targets: PathBuf,
    scraped: Vec<Value>,
}

impl Prometheus {
    /// Starts one in `dir`, with the rules in `rules`. They are taken as they are, but for the time that an
    /// alert must hold, which is cut to [`HOLDS`].
    pub fn start(dir: &Path, rules: &Path) -> Result<Self> {
        let copies = dir.join("rules");
        fs::create_dir_all(&copies).with_context(|| format!("creating {}", copies.display()))?;
        for path in files(rules, "yaml")? {
            let text = fs::read_to_string(&path)?;
            let name = path.file_name().context("a rule file has a name")?;
            fs::write(copies.join(name), shortened(&text))?;
        }
        let targets = dir.join("targets.json");
        fs::write(&targets, "[]")?;
        let config = dir.join("prometheus.yaml");
        fs::write(
            &config,
            "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n\
             rule_files: [rules/*.yaml]\n\
             scrape_configs: [{job_name: nvshare, file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]}]\n",
        )?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={address}"));
        let mut process = Guarded::spawn("Prometheus", &mut command, &dir.join("prometheus.log"), false)?;
        wait_until("Prometheus to be ready", PATIENCE, || {
            if let Some(status) = process.finished()? {
                bail!("Prometheus ended with {status}:\n{}", tail(&process.log()));
            }
            Ok(get(&address, "/-/ready").is_ok().then_some(()))
        })?;
        Ok(Self { process, address, targets, scraped: Vec::new() })
    }

    /// Scrapes an agent from here on, under this name of its instance.
    pub fn scrape(&mut self, instance: &str, address: &str) -> Result<()> {
        self.scraped.push(json!({"targets": [address], "labels": {"instance": instance}}));
        // Prometheus must never read half a file.
        let part = self.targets.with_extension("part");
        fs::write(&part, serde_json::to_vec(&self.scraped)?)?;
        fs::rename(&part, &self.targets)?;
        self.wait_for_scrape(instance)
    }

    /// Waits until a scrape of this instance began after this call, and rules have seen it.
    pub fn wait_for_scrape(&mut self, instance: &str) -> Result<()> {
        let now = unix_s();
        // Rules are evaluated every second; the one after the scrape has seen it.
        let query = format!("timestamp(up{{instance=\"{instance}\"}} == 1) >= {now}");
        wait_until(&format!("a scrape of {instance}"), PATIENCE, || {
            if let Some(status) = self.process.finished()? {
                bail!("Prometheus ended with {status}:\n{}", tail(&self.process.log()));
            }
            Ok((!self.query(&query, unix_s())?.is_empty()).then_some(()))
        })
    }

    /// The value of an expression at a time; series without a number are left out.
    pub fn query(&self, expression: &str, at: f64) -> Result<Vec<Series>> {
        let answer =
            self.ask(&format!("/api/v1/query?time={at:.3}&query={}", escaped(expression)), expression)?;
        Ok(read_series(&answer, "value"))
    }

    /// The value of an expression at every second of a span.
    pub fn query_range(&self, expression: &str, (from, to): (f64, f64)) -> Result<Vec<Series>> {
        let path =
            format!("/api/v1/query_range?start={from:.3}&end={to:.3}&step=1&query={}", escaped(expression));
        Ok(read_series(&self.ask(&path, expression)?, "values"))
    }

    /// Every rule as Prometheus has it.
    pub fn rules(&self) -> Result<Vec<Value>> {
        let answer = self.ask("/api/v1/rules", "the rules")?;
        let groups = answer["groups"].as_array().context("Prometheus names no groups of rules")?;
        Ok(groups.iter().filter_map(|group| group["rules"].as_array()).flatten().cloned().collect())
    }

    fn ask(&self, path: &str, what: &str) -> Result<Value> {
        let body = get(&self.address, path).with_context(|| format!("asking Prometheus for {what}"))?;
        let mut answer: Value = serde_json::from_str(&body)?;
        ensure!(answer["status"] == "success", "Prometheus refused {what}: {answer}");
        Ok(answer["data"].take())
    }
}

/// Runs `promtool` and gives what it printed; not succeeding is an error.
pub fn promtool(arguments: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting promtool")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).context("writing to promtool")?;
    }
    let output = child.wait_with_output()?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "promtool {arguments:?} ended with {}:\n{said}", output.status);
    Ok(said)
}

/// The body of a page served over HTTP; any status but 200 is an error that shows it.
pub fn get(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Version 1.0: the answer ends with the connection and comes in one piece.
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200 "), "{address}{path} answered {status}: {body}");
    Ok(body.to_owned())
}

/// The files of a folder with this extension, in order.
pub fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort();
    ensure!(!paths.is_empty(), "{} holds no .{extension} files", folder.display());
    Ok(paths)
}

/// A rule file with every `for` cut to [`HOLDS`].
fn shortened(rules: &str) -> String {
    let shorten = |line: &str| {
        let indent = line.len() - line.trim_start().len();
        let holds = line.trim_start().starts_with("for: ");
        if holds { format!("{}for: {HOLDS}\n", &line[..indent]) } else { format!("{line}\n") }
    };
    rules.lines().map(shorten).collect()
}

fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
        escaped
    })
}

fn read_series(data: &Value, field: &str) -> Vec<Series> {
    let sample = |pair: &Value| {
        let value: f64 = pair[1].as_str()?.parse().ok()?;
        value.is_finite().then_some((pair[0].as_f64()?, value))
    };
    let series = |one: &Value| {
        let samples: Vec<(f64, f64)> = match &one[field] {
            Value::Array(pairs) if field == "values" => pairs.iter().filter_map(sample).collect(),
            pair => sample(pair).into_iter().collect(),
        };
        (!samples.is_empty()).then(|| Series { labels: one["metric"].clone(), samples })
    };
    data["result"].as_array().map(|all| all.iter().filter_map(series).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_that_an_alert_must_hold_is_changed() {
        let rules = "  - alert: A\n    expr: x > 1\n    for: 30s\n    labels: {for: me}\n";
        assert_eq!(shortened(rules), "  - alert: A\n    expr: x > 1\n    for: 2s\n    labels: {for: me}\n");
    }

    #[test]
    fn samples_that_are_no_numbers_are_no_data() {
        let data = json!({"result": [
            {"metric": {"a": "1"}, "values": [[1, "NaN"], [2, "3.5"], [3, "+Inf"]]},
            {"metric": {"a": "2"}, "values": [[1, "NaN"]]},
        ]});
        let series = read_series(&data, "values");
        assert_eq!(series.len(), 1);
        assert_eq!((series[0].label("a"), series[0].samples.as_slice()), ("1", [(2.0, 3.5)].as_slice()));
    }
}
