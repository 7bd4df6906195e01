//! The agent's configuration: a TOML file in which every key is optional and no other key is accepted.

pub mod driver;
pub mod quantity;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use nvshare_core::{Bytes, Nanos};
use serde::{Deserialize, Serialize};

pub use driver::DriverConfig;

use self::quantity::nearest;

/// The documented configuration file, whose values are the defaults.
pub const EXAMPLE: &str = include_str!("../nvshare.toml");

/// The whole configuration, validated.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the driver lives.
    pub driver: DriverConfig,
    /// How GPUs are shared.
    pub engine: EngineConfig,
    /// Which sources of observations are used.
    pub sensors: SensorsConfig,
    /// How the driver's event queue is sampled.
    pub sampling: SamplingConfig,
    /// What is known about the GPUs beyond what the driver says.
    pub gpu: GpuConfig,
    /// Where the agent is reached.
    pub listen: ListenConfig,
}

/// The `[engine]` table.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Share of GPU time that hand-overs may cost.
    #[serde(deserialize_with = "quantity::ratio_milli")]
    pub overhead: u32,
    /// The longest quantum.
    #[serde(deserialize_with = "quantity::duration")]
    pub quantum_max: Nanos,
    /// How long a revoked client may take to stop.
    #[serde(deserialize_with = "quantity::duration")]
    pub drain_within: Nanos,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let core = nvshare_core::Config::default();
        Self { overhead: core.overhead_milli, quantum_max: core.quantum_max, drain_within: core.drain_within }
    }
}

impl EngineConfig {
    /// The engine's own form.
    pub fn to_core(&self) -> nvshare_core::Config {
        let Self { overhead, quantum_max, drain_within } = *self;
        nvshare_core::Config {
            overhead_milli: overhead,
            quantum_max,
            drain_within,
            ..nvshare_core::Config::default()
        }
    }
}

/// The `[sensors]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[expect(clippy::struct_excessive_bools, reason = "one switch for each sensor is what the table is")]
pub struct SensorsConfig {
    /// Probes on nvidia-uvm.
    pub uvm_kprobe: bool,
    /// The driver's counters on each client's VA space.
    pub uvm_counters: bool,
    /// The driver's event queue on each client's VA space.
    pub uvm_events: bool,
    /// Run time of the fault-service threads.
    pub fault_thread: bool,
    /// Xid errors.
    pub xid: bool,
    /// Rare calls of libcuda.
    pub cuda_uprobe: bool,
    /// The management library.
    pub nvml: bool,
}

impl Default for SensorsConfig {
    fn default() -> Self {
        Self {
            uvm_kprobe: true,
            uvm_counters: true,
            uvm_events: true,
            fault_thread: true,
            xid: true,
            cuda_uprobe: true,
            nvml: true,
        }
    }
}

/// The `[sampling]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    /// How long a sample of a client's events is.
    #[serde(deserialize_with = "quantity::duration")]
    pub length: Nanos,
    /// The share of time, in thousandths, in which a client's events are sampled while pressure is suspected.
    #[serde(deserialize_with = "quantity::ratio_milli")]
    pub duty: u32,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { length: Nanos::millis(100), duty: 100 }
    }
}

/// The `[gpu]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuConfig {
    /// Memory that managed allocations can use on each GPU.
    #[serde(deserialize_with = "quantity::optional_size")]
    pub usable_memory: Option<Bytes>,
}

/// The `[listen]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListenConfig {
    /// Directory of the sockets.
    pub run_dir: PathBuf,
    /// Address of the HTTP server.
    pub metrics: MetricsListen,
    /// Clients at one time.
    pub max_clients: usize,
    /// Clients of one user at one time.
    pub max_clients_per_uid: usize,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            run_dir: "/run/nvshare".into(),
            metrics: MetricsListen::At(SocketAddr::from(([127, 0, 0, 1], 9464))),
            max_clients: 1024,
            max_clients_per_uid: 512,
        }
    }
}

/// Where the HTTP server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MetricsListen {
    /// Nowhere.
    Off,
    /// At this address.
    At(SocketAddr),
}

/// A text that is no address to listen at.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not an address to listen at; expected IP:PORT, as in 127.0.0.1:9464, or off")]
pub struct InvalidListen {
    text: String,
    source: std::net::AddrParseError,
}

impl FromStr for MetricsListen {
    type Err = InvalidListen;

    fn from_str(text: &str) -> Result<Self, InvalidListen> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::At).map_err(|source| InvalidListen { text: text.to_owned(), source })
    }
}

impl TryFrom<String> for MetricsListen {
    type Error = InvalidListen;

    fn try_from(text: String) -> Result<Self, InvalidListen> {
        text.parse()
    }
}

impl From<MetricsListen> for String {
    fn from(listen: MetricsListen) -> Self {
        listen.to_string()
    }
}

impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::At(address) => address.fmt(f),
        }
    }
}

/// Why a configuration was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read the configuration file {path}: {source}; give another with --config, or leave it out to use the defaults"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not a valid configuration.
    #[error("{path}:{line}:{column}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong and what would be right.
        message: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Checks a text; `path` is for messages only.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            invalid(path, text, at, explain(error.message(), table_at(text, at)))
        })?;
        if config.listen.max_clients == 0 || config.listen.max_clients_per_uid == 0 {
            let at = text.find("max_clients").unwrap_or(0);
            return Err(invalid(path, text, at, "a limit of 0 clients would refuse everybody".to_owned()));
        }
        Ok(config)
    }
}

fn invalid(path: &Path, text: &str, at: usize, message: String) -> ConfigError {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |rest| rest.chars().count()) + 1;
    ConfigError::Invalid { path: path.to_owned(), line, column, message }
}

/// The table header above `at`, for the message.
fn table_at(text: &str, at: usize) -> Option<&str> {
    text.get(..at)?
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| line.starts_with('[') && !line.starts_with("[["))
        .map(|line| line.split('#').next().unwrap_or(line).trim())
}

/// Says which key was meant, if the message is about an unknown one.
fn explain(message: &str, table: Option<&str>) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(unknown) = message.starts_with("unknown field").then(|| quoted.next()).flatten() else {
        return message.to_owned();
    };
    let known: Vec<&str> = quoted.collect();
    let place = table.map(|table| format!(" in {table}")).unwrap_or_default();
    let guess = nearest(unknown, &known).map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
    format!("unknown key `{unknown}`{place}{guess} (known: {})", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        Config::parse(Path::new("nvshare.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn the_shipped_file_holds_exactly_the_defaults() {
        assert_eq!(Config::parse(Path::new("nvshare.toml"), EXAMPLE).unwrap(), Config::default());
    }

    #[test]
    fn an_empty_file_is_the_default_configuration() {
        assert_eq!(Config::parse(Path::new("x"), "").unwrap(), Config::default());
        assert_eq!(EngineConfig::default().to_core(), nvshare_core::Config::default());
    }

    #[test]
    fn every_key_is_shown_in_the_shipped_file() {
        let message = |table: &str| {
            let text = format!("[{table}]\nno_such_key = 1\n");
            Config::parse(Path::new("x"), &text).unwrap_err().to_string()
        };
        for table in ["driver", "engine", "sensors", "sampling", "gpu", "listen"] {
            let message = message(table);
            let known = message.split("(known: ").nth(1).unwrap().trim_end_matches(')');
            for key in known.split(", ") {
                let shown = EXAMPLE.lines().any(|line| {
                    line.trim_start_matches("# ").strip_prefix(key).is_some_and(|rest| rest.starts_with(" ="))
                });
                assert!(shown, "[{table}] {key} is missing from nvshare.toml");
            }
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_the_nearest_known_one() {
        let message = message("[engine]\noverhead = 0.1\nquantun_max = \"3 s\"\n");
        assert!(message.starts_with("nvshare.toml:3:1: unknown key `quantun_max` in [engine]"), "{message}");
        assert!(message.contains("did you mean `quantum_max`?"), "{message}");
    }

    #[test]
    fn values_out_of_range_are_refused_with_the_reason() {
        assert!(message("[engine]\noverhead = 1.5\n").contains("between 0.001 and 0.9"));
        assert!(message("[engine]\nquantum_max = \"5\"\n").contains("unit"));
        assert!(message("[engine]\nquantum_max = \"-5 s\"\n").contains("-5 s"));
        assert!(message("[gpu]\nusable_memory = \"many\"\n").contains("many"));
        assert!(message("[listen]\nmetrics = \"somewhere\"\n").contains("127.0.0.1:9464"));
        assert!(message("[listen]\nmax_clients = 0\n").contains("refuse everybody"));
    }
}
