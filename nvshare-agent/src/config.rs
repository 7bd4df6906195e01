//! The agent's configuration: a TOML file in which every key is optional and no other key is accepted.

pub mod driver;
pub mod overrides;
mod text;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use nvshare_core::{Bytes, Handover, Nanos, quantity, toml_text};
use serde::{Deserialize, Serialize};

pub use driver::DriverConfig;

use crate::pods::annotations::Bounds;

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
    /// What pods may say of themselves.
    pub pods: PodsConfig,
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
    /// Who moves memory at a hand-over.
    pub handover: Handover,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let core = nvshare_core::Config::default();
        Self {
            overhead: core.overhead_milli,
            quantum_max: core.quantum_max,
            drain_within: core.drain_within,
            handover: core.handover,
        }
    }
}

impl EngineConfig {
    /// The engine's own form.
    pub fn to_core(&self) -> nvshare_core::Config {
        let Self { overhead, quantum_max, drain_within, handover } = *self;
        nvshare_core::Config { overhead_milli: overhead, quantum_max, drain_within, handover }
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
        Self { length: Nanos::millis(100), duty: 50 }
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
    /// Directory of the clients' socket.
    pub run_dir: PathBuf,
    /// Directory of the control socket; the same without it.
    pub control_dir: Option<PathBuf>,
    /// Address of the HTTP server.
    pub metrics: MetricsListen,
    /// Clients at one time.
    pub max_clients: usize,
    /// Clients of one user at one time.
    pub max_clients_per_uid: usize,
    /// Clients of one container at one time.
    pub max_clients_per_cgroup: usize,
    /// Connections per second that one container may make in the long run, and half of what one user may.
    pub connections_per_second: u32,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            run_dir: "/run/nvshare".into(),
            control_dir: None,
            metrics: MetricsListen::At(SocketAddr::from(([127, 0, 0, 1], 9464))),
            max_clients: 1024,
            max_clients_per_uid: 512,
            max_clients_per_cgroup: 256,
            connections_per_second: 50,
        }
    }
}

/// The `[pods]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodsConfig {
    /// Whether annotations of pods are read.
    pub annotations: bool,
    /// The largest weight that an annotation may ask for, in thousandths.
    #[serde(deserialize_with = "quantity::weight_milli")]
    pub weight_max: u32,
    /// The highest class that an annotation may ask for.
    pub priority_max: i32,
}

impl Default for PodsConfig {
    fn default() -> Self {
        Self { annotations: false, weight_max: 1000, priority_max: 0 }
    }
}

impl PodsConfig {
    /// How far annotations may raise a share.
    pub fn bounds(&self) -> Bounds {
        let Self { annotations: _, weight_max, priority_max } = *self;
        Bounds { weight_milli: weight_max, priority: priority_max }
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
        "cannot read the configuration file {path}: {why}; give another with --config, or leave it out to use the defaults"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
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
        let text =
            std::fs::read_to_string(path).map_err(|why| ConfigError::Read { path: path.to_owned(), why })?;
        Self::parse(path, &text)
    }

    /// Checks a text; `path` is for messages only.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = read_toml(path, text)?;
        let ListenConfig { max_clients, max_clients_per_uid, max_clients_per_cgroup, .. } = config.listen;
        if [max_clients, max_clients_per_uid, max_clients_per_cgroup].contains(&0) {
            let at = text.find("max_clients").unwrap_or(0);
            return Err(invalid(path, text, at, "a limit of 0 clients would refuse everybody".to_owned()));
        }
        if config.listen.connections_per_second == 0 {
            let at = text.find("connections_per_second").unwrap_or(0);
            return Err(invalid(
                path,
                text,
                at,
                "0 connections per second would refuse everybody".to_owned(),
            ));
        }
        Ok(config)
    }
}

/// Reads a text whose mistakes are named with their place.
fn read_toml<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        invalid(path, text, at, toml_text::explain(text, at, error.message()))
    })
}

fn invalid(path: &Path, text: &str, at: usize, message: String) -> ConfigError {
    let (line, column) = toml_text::place(text, at);
    ConfigError::Invalid { path: path.to_owned(), line, column, message }
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
        for table in ["driver", "engine", "sensors", "sampling", "gpu", "listen", "pods"] {
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
        assert!(message("[engine]\nhandover = \"magic\"\n").contains("`demand` or `shim`"));
        assert!(message("[gpu]\nusable_memory = \"many\"\n").contains("many"));
        assert!(message("[listen]\nmetrics = \"somewhere\"\n").contains("127.0.0.1:9464"));
        assert!(message("[listen]\nmax_clients = 0\n").contains("refuse everybody"));
    }
}
