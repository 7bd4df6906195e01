//! Carries out what operators order, or says why not.

use std::sync::Arc;

use nvshare_core::{Bytes, ModeOrder, Nanos, Order};
use nvshare_wire::AgentMessage;

use super::{
    protocol::{Done, Request, Who},
    report::Desk,
};
use crate::{
    clients::client::Client,
    config::overrides::{Change, RuleChange, Uid},
    driver::Command,
};

/// Quanta that make sense.
const QUANTUM: std::ops::RangeInclusive<Nanos> = Nanos::millis(10)..=Nanos::seconds(86_400);
/// Shares of time that hand-overs may cost, in thousandths.
const OVERHEAD: std::ops::RangeInclusive<u32> = 1..=900;
/// Weights, in thousandths.
const WEIGHT: std::ops::RangeInclusive<u32> = 1..=1_000_000;
/// Classes.
const PRIORITY: std::ops::RangeInclusive<i32> = -1000..=1000;
/// Less than this is no memory to work with.
const LIMIT_MIN: Bytes = Bytes::MIB;

/// A request that changes something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    change: What,
    persist: bool,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Host(Change),
    Clients(Who, RuleChange),
}

fn within<T: PartialOrd>(
    value: Option<&T>,
    range: &std::ops::RangeInclusive<T>,
    said: &str,
) -> Result<(), String> {
    match value.filter(|value| !range.contains(value)) {
        Some(_) => Err(said.to_owned()),
        None => Ok(()),
    }
}

impl Wanted {
    /// What a request wants changed; `None` if it only asks.
    pub(super) fn of(request: &Request) -> Result<Option<Self>, String> {
        let (change, persist) = match *request {
            Request::SetMode { gpu, mode, persist } => (What::Host(Change::Mode(gpu, mode)), persist),
            Request::SetQuantum { quantum, persist } => {
                within(quantum.as_ref(), &QUANTUM, "the quantum is out of range; expected 10 ms to 24 h")?;
                (What::Host(Change::Quantum(quantum)), persist)
            }
            Request::SetQuantumMax { quantum_max, persist } => {
                let said = "the longest quantum is out of range; expected 10 ms to 24 h";
                within(quantum_max.as_ref(), &QUANTUM, said)?;
                (What::Host(Change::QuantumMax(quantum_max)), persist)
            }
            Request::SetOverhead { overhead_milli, persist } => {
                let said = "the overhead is out of range; expected a share between 0.001 and 0.9";
                within(overhead_milli.as_ref(), &OVERHEAD, said)?;
                (What::Host(Change::Overhead(overhead_milli)), persist)
            }
            Request::SetWeight { who, weight_milli, persist } => {
                within(weight_milli.as_ref(), &WEIGHT, "the weight is out of range; expected 0.001 to 1000")?;
                (What::Clients(who, RuleChange::Weight(weight_milli)), persist)
            }
            Request::SetPriority { who, priority, persist } => {
                within(priority.as_ref(), &PRIORITY, "the priority is out of range; expected -1000 to 1000")?;
                (What::Clients(who, RuleChange::Priority(priority)), persist)
            }
            Request::SetLimit { who, bytes, persist } => {
                let range = LIMIT_MIN..=Bytes(u64::MAX);
                within(bytes.as_ref(), &range, "the limit is out of range; expected 1 MiB or more")?;
                (What::Clients(who, RuleChange::Limit(bytes)), persist)
            }
            Request::Status {}
            | Request::Clients {}
            | Request::Explain {}
            | Request::Doctor {}
            | Request::Settings {}
            | Request::Overview {}
            | Request::Record {}
            | Request::Events { .. } => return Ok(None),
        };
        Ok(Some(Self { change, persist }))
    }
}

/// Carries it out.
pub(super) async fn carry_out(desk: &Desk, wanted: Wanted) -> Result<Done, String> {
    match wanted.change {
        What::Host(change) => on_host(desk, change, wanted.persist).await,
        What::Clients(who, change) => on_clients(desk, who, change, wanted.persist).await,
    }
}

async fn remember(desk: &Desk, change: Change, persist: bool) -> Result<(), String> {
    desk.hub.settings.change(change, persist).await.map_err(|error| error.to_string())
}

fn done(desk: &Desk, said: String, clients: &[Arc<Client>], persist: bool) -> Done {
    let persisted = desk.hub.settings.file().filter(|_| persist).map(ToOwned::to_owned);
    Done { said, clients: clients.iter().map(|client| client.id).collect(), persisted }
}

async fn on_host(desk: &Desk, change: Change, persist: bool) -> Result<Done, String> {
    if let Change::Mode(Some(gpu), _) = change
        && !desk.hub.gpus.all().contains_key(&gpu)
    {
        let known: Vec<String> = desk.hub.gpus.all().keys().map(ToString::to_string).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(format!("no GPU {gpu} is known; known: {known}"));
    }
    remember(desk, change, persist).await?;
    let engine = desk.hub.settings.engine();
    let (order, said) = match change {
        Change::Mode(gpu, mode) => {
            let whose = gpu.map_or_else(|| "all GPUs".to_owned(), |gpu| gpu.to_string());
            let said = match mode {
                ModeOrder::Auto => format!("the agent decides the mode of {whose}"),
                ModeOrder::Shared => format!("the mode of {whose} is shared, whatever happens"),
                ModeOrder::Exclusive => format!("the mode of {whose} is exclusive, whatever happens"),
            };
            (Order::Mode { gpu, mode }, said)
        }
        Change::Quantum(quantum) => {
            let said = quantum.map_or_else(
                || "the quantum follows from what a hand-over costs".to_owned(),
                |quantum| format!("the quantum is {quantum}"),
            );
            (Order::Quantum { quantum }, said)
        }
        Change::QuantumMax(_) => {
            let quantum_max = engine.quantum_max;
            (Order::QuantumMax { quantum_max }, format!("the longest derived quantum is {quantum_max}"))
        }
        Change::Overhead(_) => {
            let milli = engine.overhead;
            let said = format!("hand-overs may cost {} % of the time", f64::from(milli) / 10.0);
            (Order::Overhead { milli }, said)
        }
        Change::User(..) => return Err("a user's rule is no change of the host".to_owned()),
    };
    desk.hub.driver.order(order).await.map_err(|gone| gone.to_string())?;
    Ok(done(desk, said, &[], persist))
}

async fn on_clients(desk: &Desk, who: Who, change: RuleChange, persist: bool) -> Result<Done, String> {
    let all = desk.hub.registry.all();
    let meant: Vec<Arc<Client>> = all
        .iter()
        .filter(|client| match who {
            Who::Client(id) => client.id == id,
            Who::Pid(pid) => client.identity.pid == pid,
            Who::Uid(uid) => client.identity.uid == uid,
        })
        .cloned()
        .collect();
    let whose = match who {
        Who::Uid(uid) => {
            remember(desk, Change::User(Uid(uid), change), persist).await?;
            format!("user {uid}")
        }
        Who::Client(_) | Who::Pid(_) => {
            let Some(client) = meant.first() else { return Err(unknown(who, &all)) };
            if persist {
                return Err(format!(
                    "{} is gone for good when its program ends; to keep this over a restart name its user: --user {}",
                    client.id, client.identity.uid
                ));
            }
            for client in &meant {
                client.change_rule(change);
            }
            let named = |client: &Arc<Client>| {
                format!("{} ({}, pid {})", client.id, client.name, client.identity.pid)
            };
            meant.iter().map(named).collect::<Vec<_>>().join(", ")
        }
    };
    for client in &meant {
        let rule = desk.hub.settings.rule(client);
        let id = client.id;
        let order = match change {
            RuleChange::Weight(_) => {
                Order::Weight { client: id, weight_milli: rule.weight_milli(client.wish.weight_milli) }
            }
            RuleChange::Priority(_) => {
                Order::Priority { client: id, priority: rule.priority(client.wish.priority) }
            }
            RuleChange::Limit(_) => {
                let bytes = rule.memory_limit.map_or(0, |limit| limit.0);
                desk.hub.driver.send(Command::Tell(vec![(id, AgentMessage::Limit { bytes })])).await;
                continue;
            }
        };
        desk.hub.driver.order(order).await.map_err(|gone| gone.to_string())?;
    }
    let each = match who {
        Who::Uid(_) => format!("each program of {whose}"),
        Who::Client(_) | Who::Pid(_) => whose.clone(),
    };
    let said = match change {
        RuleChange::Weight(Some(milli)) => format!("the weight of {whose} is {}", f64::from(milli) / 1e3),
        RuleChange::Weight(None) => format!("the weight of {whose} is the default again"),
        RuleChange::Priority(Some(priority)) => format!("the priority of {whose} is {priority}"),
        RuleChange::Priority(None) => format!("the priority of {whose} is the default again"),
        RuleChange::Limit(Some(limit)) => {
            format!("{each} may hold at most {limit} on each GPU; what is held already stays")
        }
        RuleChange::Limit(None) => format!("{each} has no limit of memory"),
    };
    Ok(done(desk, said, &meant, persist))
}

fn unknown(who: Who, all: &[Arc<Client>]) -> String {
    let wanted = match who {
        Who::Client(id) => format!("no client {id}"),
        Who::Pid(pid) => format!("no client has the pid {pid}"),
        Who::Uid(uid) => format!("user {uid} has no client"),
    };
    if all.is_empty() {
        return format!("{wanted}; there are no clients");
    }
    let known = |client: &Arc<Client>| format!("{} (pid {})", client.id, client.identity.pid);
    format!("{wanted}; there are {}", all.iter().map(known).collect::<Vec<_>>().join(", "))
}
