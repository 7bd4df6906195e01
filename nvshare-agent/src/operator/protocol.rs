//! The control protocol: one JSON object per line in each direction.
//!
//! A request is `{"request": "status"}` and the like. The answer is `{"ok": …}` or `{"error": "…"}`; `events`
//! is answered with one `{"ok": …}` for each change of plan until the operator closes the connection.

use std::path::PathBuf;

use nvshare_core::{Bytes, ClientId, GpuId, ModeOrder, Nanos};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    clients::client::ClientTotals,
    config::overrides::Overrides,
    driver::PlanEvent,
    observe::{
        fusion::{Fused, disagreement::Disagreement},
        gaps::Gap,
        hazards::HazardReport,
        source::SensorStatus,
    },
};

/// The longest request, in bytes.
pub const REQUEST_MAX: usize = 64 * 1024;

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// GPUs, their plans and clients: [`StatusReport`].
    Status {},
    /// Clients and what was seen of them: [`ClientsReport`].
    Clients {},
    /// Why the plan is what it is: [`ExplainReport`].
    Explain {},
    /// Which sensors deliver: [`DoctorReport`].
    Doctor {},
    /// Force a mode, or stop forcing one.
    SetMode {
        /// On this GPU; all without one.
        #[serde(default)]
        gpu: Option<GpuId>,
        /// The mode.
        mode: ModeOrder,
        /// Also after a restart of the agent, as in every request that changes something.
        #[serde(default)]
        persist: bool,
    },
    /// Fix the quantum, or derive it again.
    SetQuantum {
        /// The quantum in nanoseconds; derived without one.
        #[serde(default)]
        quantum: Option<Nanos>,
        /// As in `set_mode`.
        #[serde(default)]
        persist: bool,
    },
    /// Bound the quantum, or go back to the configured bound.
    SetQuantumMax {
        /// The longest derived quantum in nanoseconds; the configured one without it.
        #[serde(default)]
        quantum_max: Option<Nanos>,
        /// As in `set_mode`.
        #[serde(default)]
        persist: bool,
    },
    /// Set the share of GPU time that hand-overs may cost, or go back to the configured one.
    SetOverhead {
        /// Thousandths; the configured share without it.
        #[serde(default)]
        overhead_milli: Option<u32>,
        /// As in `set_mode`.
        #[serde(default)]
        persist: bool,
    },
    /// Set the share of a client, or of a user's clients.
    SetWeight {
        /// Whose.
        who: Who,
        /// Thousandths of the default; what would hold without this order if absent.
        #[serde(default)]
        weight_milli: Option<u32>,
        /// As in `set_mode`; for users only.
        #[serde(default)]
        persist: bool,
    },
    /// Set the class of a client, or of a user's clients.
    SetPriority {
        /// Whose.
        who: Who,
        /// A higher class runs first; what would hold without this order if absent.
        #[serde(default)]
        priority: Option<i32>,
        /// As in `set_mode`; for users only.
        #[serde(default)]
        persist: bool,
    },
    /// Limit the memory of a client, or of each of a user's clients.
    SetLimit {
        /// Whose.
        who: Who,
        /// Bytes on each GPU; what would hold without this order if absent.
        #[serde(default)]
        bytes: Option<Bytes>,
        /// As in `set_mode`; for users only.
        #[serde(default)]
        persist: bool,
    },
    /// What operators changed: [`SettingsReport`].
    Settings {},
    /// `status` with what came before: [`super::overview::OverviewReport`].
    Overview {},
    /// Everything that the engine is told and answers, as lines of a recording, until the operator closes the
    /// connection.
    Record {},
    /// Changes of plan as they happen: [`PlanEvent`]s.
    Events {
        /// Begin with those after this time (CLOCK_MONOTONIC milliseconds); without it, from here on.
        #[serde(default)]
        since_ms: Option<f64>,
    },
}

impl Request {
    /// The names of all requests.
    pub const NAMES: [&str; 15] = [
        "status",
        "clients",
        "explain",
        "doctor",
        "set_mode",
        "set_quantum",
        "set_quantum_max",
        "set_overhead",
        "set_weight",
        "set_priority",
        "set_limit",
        "settings",
        "overview",
        "record",
        "events",
    ];

    /// Reads a request; the error says what would be right.
    pub fn parse(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|error| {
            format!("not a JSON object: {error}; a request looks like {{\"request\": \"status\"}}")
        })?;
        let Some(name) = value.get("request").and_then(Value::as_str) else {
            return Err(format!("no `request` in the object; known requests: {}", Self::NAMES.join(", ")));
        };
        if !Self::NAMES.contains(&name) {
            return Err(format!("unknown request `{name}`; known requests: {}", Self::NAMES.join(", ")));
        }
        let name = name.to_owned();
        serde_json::from_value(value).map_err(|error| format!("request `{name}`: {error}"))
    }
}

/// Whom an order is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// A client, by its number.
    Client(ClientId),
    /// The client that is this process.
    Pid(u32),
    /// Every client of this user, also those to come.
    Uid(u32),
}

/// The answer to a request that changes something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// What holds from here on, for people.
    pub said: String,
    /// The clients that it concerns at once, if it is about clients.
    pub clients: Vec<ClientId>,
    /// The file that keeps it over a restart; absent if nothing does.
    pub persisted: Option<PathBuf>,
}

/// The answer to `settings`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SettingsReport {
    /// What differs from the configuration.
    pub in_force: Overrides,
    /// What of it will hold after a restart.
    pub persisted: Overrides,
    /// Where that is kept; absent if nothing can be.
    pub file: Option<PathBuf>,
    /// Share of GPU time that hand-overs may cost, with everything.
    pub overhead: f64,
    /// The longest derived quantum, with everything.
    pub quantum_max_s: f64,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The result.
    Ok(Value),
    /// Why there is none.
    Error(String),
}

/// The answer to `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The agent's version.
    pub version: String,
    /// The agent's process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// Where the HTTP server listens.
    pub metrics: Option<String>,
    /// Each GPU, by UUID.
    pub gpus: Vec<GpuReport>,
    /// Each sensor, best first.
    pub sensors: Vec<SensorStatus>,
    /// What none of them tells.
    pub gaps: Vec<Gap>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuReport {
    /// Its UUID.
    pub gpu: GpuId,
    /// The product, if NVML says.
    pub name: Option<String>,
    /// `shared`, `sets` or `exclusive`.
    pub mode: String,
    /// `auto`, or the mode that an operator forces.
    pub order: ModeOrder,
    /// Why the mode is what it is; absent before the first change.
    pub reason: Option<String>,
    /// For how long its driver has hung; absent if it does not.
    #[serde(default)]
    pub hangs_s: Option<f64>,
    /// Memory of the card.
    pub total_bytes: Option<u64>,
    /// Memory in use, as NVML sees it.
    pub used_bytes: Option<u64>,
    /// What managed memory can use; absent if nobody knows.
    pub capacity_bytes: Option<u64>,
    /// Managed memory of all clients.
    pub committed_bytes: u64,
    /// The quantum in force; absent while shared.
    pub quantum_s: Option<f64>,
    /// Measured cost of a hand-over.
    pub handover_s: Option<f64>,
    /// The detector's evidence; 1 is the threshold.
    pub score: f64,
    /// Share of the detector's window in which faults were being served.
    pub stall: Option<f64>,
    /// Bytes brought back that taking turns would have avoided, since the start.
    pub curable_refaulted_bytes: u64,
    /// Bytes brought back otherwise.
    pub own_refaulted_bytes: u64,
    /// Clients on this GPU.
    pub clients: Vec<GpuClientReport>,
}

/// A client on one GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuClientReport {
    /// Its number.
    pub client: ClientId,
    /// What it calls itself.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// `running`, `idle`, `draining`, `waiting` or `parked`.
    pub state: String,
    /// Managed memory.
    pub managed_bytes: u64,
    /// Plain device memory.
    pub device_bytes: u64,
    /// Share in thousandths of the default.
    pub weight_milli: u32,
    /// Its class; a higher class runs first.
    pub priority: i32,
    /// The most it may hold on this GPU, by its own or the operator's word.
    pub limit_bytes: Option<u64>,
    /// Time it had the GPU while it had work.
    pub granted_s: f64,
    /// Time it had work and no turn.
    pub waited_s: f64,
    /// Grants so far.
    pub grants: u64,
    /// What it uses of its managed memory: at least, and at most.
    pub working_set_bytes: (u64, u64),
    /// Bytes that came back to it and would not have to if clients took turns.
    pub refaulted_bytes: u64,
    /// What the driver did for it on this GPU.
    pub seen: ClientTotals,
    /// The last bin's figures, each with who says it and how sure it is.
    pub figures: Fused,
}

/// The answer to `clients`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientsReport {
    /// Every client with a session.
    pub clients: Vec<ClientReport>,
}

/// One client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientReport {
    /// Its number.
    pub client: ClientId,
    /// What it calls itself.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Seconds since its session began.
    pub age_s: f64,
    /// The GPUs it uses.
    pub gpus: Vec<GpuId>,
    /// Managed memory on all GPUs.
    pub managed_bytes: u64,
    /// Plain device memory on all GPUs.
    pub device_bytes: u64,
    /// What the driver did for it on all GPUs.
    #[serde(flatten)]
    pub seen: ClientTotals,
}

/// The answer to `explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainReport {
    /// Each GPU as in `status`.
    pub gpus: Vec<GpuReport>,
    /// What the plan of each of them rests on, in the same order.
    #[serde(default)]
    pub grounds: Vec<GroundsReport>,
    /// The last changes of plan, oldest first.
    pub changes: Vec<PlanEvent>,
    /// What no sensor tells, and what the agent does instead.
    pub gaps: Vec<Gap>,
}

/// What the plan of a GPU rests on, and what may change it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroundsReport {
    /// What a hand-over is taken to cost.
    pub expected_handover_s: Option<f64>,
    /// Who takes turns with whom, in the order of turns.
    pub sets: Vec<Vec<ClientId>>,
    /// Whose turn it is.
    pub holders: Vec<ClientId>,
    /// What all clients use of their managed memory together: at least, and at most.
    pub working_set_bytes: (u64, u64),
    /// Share of its time that the GPU was last reckoned to be of use: side by side, and in turns.
    pub reckoned: Option<(f64, f64)>,
    /// Share of the time lost to waiting for memory before the last turns, and in them; with the progress of
    /// clients as a multiple of what it was, if enough was seen.
    pub effect: Option<(f64, f64, Option<f64>)>,
    /// What may change the plan next.
    pub next: String,
}

/// The answer to `doctor`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// Each sensor, best first.
    pub sensors: Vec<SensorAdvice>,
    /// What none of them tells.
    pub gaps: Vec<Gap>,
    /// Sensors that say different things of the same.
    pub disagreements: Vec<Disagreement>,
    /// What the agent can do with them.
    pub verdict: String,
    /// Published hangs of the driver in use.
    #[serde(default)]
    pub hazards: Vec<HazardReport>,
}

/// A sensor and how to get it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SensorAdvice {
    /// Its state.
    #[serde(flatten)]
    pub status: SensorStatus,
    /// What it sees.
    pub sees: String,
    /// How to get it, if it is missing.
    pub advice: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_name_is_a_request() {
        for name in Request::NAMES {
            let line = match name {
                "set_mode" => r#"{"request":"set_mode","mode":"auto"}"#.to_owned(),
                "set_weight" | "set_priority" | "set_limit" => {
                    format!("{{\"request\":\"{name}\",\"who\":{{\"uid\":0}}}}")
                }
                other => format!("{{\"request\":\"{other}\"}}"),
            };
            Request::parse(&line).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    #[test]
    fn an_unknown_request_is_told_which_are_known() {
        let error = Request::parse(r#"{"request":"reboot"}"#).unwrap_err();
        assert!(error.contains("`reboot`") && error.contains("set_quantum"), "{error}");
        assert!(Request::parse("hello").unwrap_err().contains("not a JSON object"));
        assert!(Request::parse("{}").unwrap_err().contains("known requests"));
        let error = Request::parse(r#"{"request":"set_mode","mode":"turbo"}"#).unwrap_err();
        assert!(error.contains("exclusive"), "{error}");
        assert!(Request::parse(r#"{"request":"status","extra":1}"#).unwrap_err().contains("extra"));
    }
}
