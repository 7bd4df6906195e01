//! What really happened, for tests to compare the agent's findings with.

use nvshare_gpu_sim_model::{
    ids::{CardId, SpaceId},
    memory::Usage,
};
use serde::{Deserialize, Serialize};

use crate::{
    files::uuid_text,
    world::{Account, Space, World},
};

#[derive(Deserialize, Serialize)]
struct Report {
    gpus: Vec<Gpu>,
}

#[derive(Deserialize, Serialize)]
struct Gpu {
    index: usize,
    uuid: String,
    total_bytes: u64,
    managed_bytes: u64,
    plain_bytes: u64,
    kept_bytes: u64,
    busy_ns: u64,
    service_ns: u64,
    clients: Vec<Client>,
}

#[derive(Deserialize, Serialize)]
struct Client {
    pid: u32,
    connected: bool,
    ended: bool,
    resident_bytes: u64,
    plain_bytes: u64,
    cpu_faults: u64,
    #[serde(flatten)]
    account: Account,
}

/// One JSON object; clients in the order in which they began, ended ones first.
pub(crate) fn json(world: &World) -> String {
    let gpus = (0..world.processors.len()).map(|index| gpu(world, index)).collect();
    serde_json::to_string(&Report { gpus }).unwrap_or_default()
}

fn gpu(world: &World, index: usize) -> Gpu {
    let card = CardId(index);
    let Usage { total, plain, managed, kept } = world.memory.usage(card);
    let client = |id: SpaceId, space: &Space, ended: bool| Client {
        pid: space.pid,
        connected: space.client.is_some(),
        ended,
        resident_bytes: world.memory.resident_of(id, card),
        plain_bytes: world.memory.plain_of(id, card),
        cpu_faults: space.cpu_faults,
        account: space.accounts.get(index).copied().unwrap_or_default(),
    };
    let ended = world.ended.iter().map(|(id, space)| client(*id, space, true));
    let clients = ended.chain(world.spaces.iter().map(|(&id, space)| client(id, space, false))).collect();
    Gpu {
        index,
        uuid: uuid_text(&world.uuids[index]),
        total_bytes: total,
        managed_bytes: managed,
        plain_bytes: plain,
        kept_bytes: kept,
        busy_ns: world.state.cards[index].busy_ns.load(std::sync::atomic::Ordering::Relaxed),
        service_ns: world.service_ns[index],
        clients,
    }
}

/// A short table of the same.
pub(crate) fn table(json: &str) -> anyhow::Result<String> {
    use std::fmt::Write as _;
    let report: Report = serde_json::from_str(json)?;
    let mib = |bytes: u64| bytes >> 20;
    let mut text = String::new();
    for gpu in report.gpus {
        writeln!(
            text,
            "GPU {} {}: {} MiB, managed {}, plain {}, kept by UVM {}; computed {} ms, served faults {} ms",
            gpu.index,
            gpu.uuid,
            mib(gpu.total_bytes),
            mib(gpu.managed_bytes),
            mib(gpu.plain_bytes),
            mib(gpu.kept_bytes),
            gpu.busy_ns / 1_000_000,
            gpu.service_ns / 1_000_000,
        )?;
        for client in gpu.clients {
            let account = client.account;
            writeln!(
                text,
                "  process {}{}: resident {} MiB, plain {}, faults {}, in {} MiB, out {} MiB, evictions {} ({} for others), \
                 service {} ms",
                client.pid,
                if client.ended { " (ended)" } else { "" },
                mib(client.resident_bytes),
                mib(client.plain_bytes),
                account.faults,
                mib(account.bytes_in),
                mib(account.bytes_out),
                account.evictions,
                account.evicted_by_others,
                account.service_ns / 1_000_000,
            )?;
        }
    }
    Ok(text)
}
