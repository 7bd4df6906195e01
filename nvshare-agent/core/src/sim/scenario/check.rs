//! From what is written to what is meant: defaults filled in, clones counted out, contradictions refused.

use toml::Spanned;

use super::{
    Access, Act, ClientSpec, Event, Pause, Phase, Scenario,
    file::{self, ActName, File},
};
use crate::{
    quantity::nearest,
    sim::preset::GpuModel,
    units::{Bytes, Nanos},
};

const PRESET: &str = "h100-pcie5";
const BURST: Nanos = Nanos::millis(200);
const CLIENTS_MAX: usize = 4096;
const GPUS_MAX: usize = 64;

/// What is wrong, and with the bytes at which place.
pub(super) struct Problem {
    pub(super) at: usize,
    pub(super) message: String,
}

fn problem<T>(at: usize, message: impl Into<String>) -> Result<T, Problem> {
    Err(Problem { at, message: message.into() })
}

pub(super) fn scenario(file: File) -> Result<Scenario, Problem> {
    let mut gpus = file.gpu.0.into_iter().map(gpu).collect::<Result<Vec<_>, _>>()?;
    if gpus.is_empty() {
        gpus.extend(GpuModel::preset(PRESET));
    }
    if gpus.len() > GPUS_MAX {
        return problem(0, format!("{} GPUs; at most {GPUS_MAX} can be simulated", gpus.len()));
    }
    if file.client.is_empty() {
        return problem(0, "no [[client]]; a scenario needs at least one");
    }
    let mut clients = Vec::new();
    let mut groups = Vec::new();
    for written in file.client {
        let at = written.span().start;
        let name = written.get_ref().name.clone();
        let first = clients.len();
        clients.extend(clones(written, &gpus)?);
        if clients.len() > CLIENTS_MAX {
            return problem(at, format!("more than {CLIENTS_MAX} clients"));
        }
        groups.push((name, first..clients.len(), at));
    }
    let mut names: Vec<(&str, usize)> = Vec::new();
    for (name, range, at) in &groups {
        names.push((name, *at));
        names.extend(
            clients[range.clone()].iter().filter(|c| c.name != *name).map(|c| (c.name.as_str(), *at)),
        );
    }
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return problem(pair[1].1, format!("two clients are named `{}`; names must differ", pair[0].0));
    }
    for (index, gpu) in gpus.iter().enumerate() {
        let plain = clients.iter().filter(|c| !c.shim && c.gpus.contains(&index));
        let plain: Bytes = plain.map(|c| c.allocated).sum();
        if plain >= gpu.memory {
            let message = format!(
                "the clients without the shim allocate {plain} on GPU {index}, which has {}; plain memory must fit",
                gpu.memory
            );
            return problem(0, message);
        }
    }
    let find = |wanted: &str| -> Option<Vec<usize>> {
        if let Some((_, range, _)) = groups.iter().find(|(name, _, _)| name == wanted) {
            return Some(range.clone().collect());
        }
        clients.iter().position(|client| client.name == wanted).map(|index| vec![index])
    };
    let known: Vec<&str> = names.iter().map(|&(name, _)| name).collect();
    let mut events = Vec::new();
    for written in file.event {
        events.push(event(written, &find, &known)?);
    }
    events.sort_by_key(|event| event.at);
    Ok(Scenario { title: file.title, gpus, clients, events })
}

fn gpu(written: Spanned<file::Gpu>) -> Result<GpuModel, Problem> {
    let at = written.span().start;
    let gpu = written.into_inner();
    let preset = gpu.preset.as_deref().unwrap_or(PRESET);
    let Some(mut model) = GpuModel::preset(preset) else {
        let known = GpuModel::PRESETS.join(", ");
        return problem(at, format!("there is no preset `{preset}`; expected one of {known}"));
    };
    if let Some(memory) = gpu.memory {
        model.memory = memory.0;
    }
    if model.memory < Bytes::BLOCK {
        return problem(at, "a GPU needs at least one block of 2 MiB");
    }
    let rates = [
        (gpu.link, &mut model.link),
        (gpu.fault_in, &mut model.fault_in),
        (gpu.first_touch, &mut model.first_touch),
        (gpu.evict, &mut model.evict),
        (gpu.first_out, &mut model.first_out),
        (gpu.prefetch_in, &mut model.prefetch_in),
        (gpu.prefetch_out, &mut model.prefetch_out),
        (gpu.protected_out, &mut model.protected_out),
    ];
    for (written, rate) in rates {
        if let Some(written) = written {
            *rate = written.0;
        }
    }
    if let Some(duplex) = gpu.duplex {
        if !(0.1..=1.0).contains(&duplex) {
            return problem(at, format!("duplex = {duplex}; expected a share between 0.1 and 1"));
        }
        model.duplex_milli = (duplex * 1000.0).round() as u32;
    }
    if let Some(in_flight) = gpu.in_flight {
        model.in_flight = in_flight.0;
    }
    Ok(model)
}

fn clones(written: Spanned<file::Client>, gpus: &[GpuModel]) -> Result<Vec<ClientSpec>, Problem> {
    let at = written.span().start;
    let client = written.into_inner();
    let name = client.name;
    let wrong = |message: String| problem(at, format!("client `{name}`: {message}"));
    if name.is_empty() {
        return problem(at, "a client's name must not be empty");
    }
    let count = client.count.unwrap_or(1);
    if count == 0 {
        return wrong("count = 0; leave the client out instead".into());
    }
    let (allocated, working_set) = match (client.allocated, client.working_set) {
        (Some(allocated), working_set) => (allocated.0, working_set.map_or(allocated.0, |size| size.0)),
        (None, Some(working_set)) => (working_set.0, working_set.0),
        (None, None) => return wrong("needs `allocated`, as in allocated = \"10 GiB\"".into()),
    };
    let duty = client.duty.unwrap_or(1.0);
    if !(duty > 0.0 && duty <= 1.0) {
        return wrong(format!("duty = {duty}; expected a share above 0 and at most 1"));
    }
    let weight = client.weight.unwrap_or(1.0);
    let Some(weight_milli) = weight_milli(weight) else {
        return wrong(format!("weight = {weight}; expected a number from 0.001 to 1000000"));
    };
    let burst = client.burst.map_or(BURST, |time| time.0);
    let sweep = client.sweep.map_or(burst, |time| time.0);
    if client.gpu_work.0 == Nanos::ZERO || burst == Nanos::ZERO || sweep == Nanos::ZERO {
        return wrong("gpu_work, burst and sweep must be longer than 0".into());
    }
    let pause = match (client.pause, client.pause_every) {
        (None, None) => None,
        (Some(length), Some(every)) if every.0 > Nanos::ZERO => {
            let pause = Pause { length: length.0, every: every.0 };
            let cpu = client.gpu_work.0.0 as f64 * (1.0 - duty) / duty;
            let pauses = pause.count(client.gpu_work.0) as f64 * pause.length.0 as f64;
            if pauses > cpu {
                return wrong(format!(
                    "its pauses take {:.1} s in all, but duty leaves {:.1} s to the CPU",
                    pauses / 1e9,
                    cpu / 1e9
                ));
            }
            Some(pause)
        }
        _ => return wrong("pause and pause_every go together, and pause_every must be longer than 0".into()),
    };
    let used = client.gpus.unwrap_or_else(|| vec![0]);
    let mut sorted = used.clone();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() != used.len() || sorted.is_empty() {
        return wrong(format!("gpus = {used:?}; expected each GPU at most once, and at least one"));
    }
    if let Some(unknown) = sorted.iter().find(|&&index| index >= gpus.len()) {
        let last = gpus.len() - 1;
        return wrong(format!(
            "gpus names GPU {unknown}, but the last one is GPU {last} (they count from 0)"
        ));
    }
    let first = Phase {
        after: Nanos::ZERO,
        working_set,
        sweep,
        access: client.access.map_or(Access::Cyclic, Access::from),
    };
    let phases = phases(first, client.phase, allocated, &name, at)?;
    let one = |name: String| ClientSpec {
        name,
        start: client.start.map_or(Nanos::ZERO, |time| time.0),
        allocated,
        gpu_work: client.gpu_work.0,
        duty,
        burst,
        pause,
        weight_milli,
        priority: client.priority.unwrap_or(0),
        gpus: sorted.clone(),
        shim: client.shim.unwrap_or(true),
        phases: phases.clone(),
    };
    if count == 1 {
        return Ok(vec![one(name)]);
    }
    Ok((0..count).map(|index| one(format!("{name}-{index}"))).collect())
}

fn phases(
    first: Phase,
    written: Vec<Spanned<file::Phase>>,
    allocated: Bytes,
    name: &str,
    at: usize,
) -> Result<Vec<Phase>, Problem> {
    let mut phases = vec![first];
    let mut places = vec![at];
    for written in written {
        let at = written.span().start;
        let phase = written.into_inner();
        let Some(before) = phases.last() else { continue };
        if phase.after.0 < before.after {
            let message = format!("client `{name}`: its phases must be in the order of `after`");
            return problem(at, message);
        }
        let sweep = phase.sweep.map_or(before.sweep, |time| time.0);
        if sweep == Nanos::ZERO {
            return problem(at, format!("client `{name}`: sweep must be longer than 0"));
        }
        let next = Phase {
            after: phase.after.0,
            working_set: phase.working_set.map_or(before.working_set, |size| size.0),
            sweep,
            access: phase.access.map_or(before.access, Access::from),
        };
        phases.push(next);
        places.push(at);
    }
    for (phase, at) in phases.iter().zip(places) {
        if phase.working_set > allocated {
            let message = format!(
                "client `{name}`: working_set ({}) is larger than allocated ({allocated})",
                phase.working_set
            );
            return problem(at, message);
        }
    }
    Ok(phases)
}

fn event(
    written: Spanned<file::Event>,
    find: &impl Fn(&str) -> Option<Vec<usize>>,
    known: &[&str],
) -> Result<Event, Problem> {
    let at = written.span().start;
    let event = written.into_inner();
    let needs_client = matches!(event.act, ActName::Kill | ActName::SetWeight);
    let clients = match (&event.client, needs_client) {
        (Some(name), true) => {
            let Some(clients) = find(name) else {
                let guess =
                    nearest(name, known).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
                return problem(at, format!("there is no client `{name}`{guess}"));
            };
            clients
        }
        (None, true) => return problem(at, "this event needs `client`, the name of the one it hits"),
        (Some(_), false) => {
            return problem(at, "stop-agent and start-agent hit no client; leave `client` out");
        }
        (None, false) => Vec::new(),
    };
    if event.act != ActName::SetWeight && event.value.is_some() {
        return problem(at, "only set-weight takes a value");
    }
    let act = match event.act {
        ActName::Kill => Act::Kill(clients),
        ActName::StopAgent => Act::StopAgent,
        ActName::StartAgent => Act::StartAgent,
        ActName::SetWeight => match event.value.map(weight_milli) {
            Some(Some(weight)) => Act::SetWeight(clients, weight),
            Some(None) => return problem(at, "value is no weight; expected a number from 0.001 to 1000000"),
            None => return problem(at, "set-weight needs a value, as in value = 3"),
        },
    };
    Ok(Event { at: event.at.0, act })
}

fn weight_milli(weight: f64) -> Option<u32> {
    (0.001..=1e6).contains(&weight).then(|| (weight * 1000.0).round() as u32)
}
