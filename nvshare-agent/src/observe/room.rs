//! What is left for each client: of the host's memory, which evicted memory goes to, and of a GPU.
//!
//! **The host.** All managed memory of all clients may have to lie in host memory one day, so the sum is kept below what the
//! host can take: what it has available plus what is spilled there already, of which the clients' counters tell (more bytes
//! moved out than in). Each client is told that less what the others hold. A client asks nobody when it allocates; what two
//! of them allocate between two messages, a tenth of a second, is seen late. What a client claims to hold counts up to the
//! size of its GPU, so that a false claim takes no more from the others than one honest client could.

use std::collections::BTreeMap;

use nvshare_core::{Bytes, ClientId, GpuId};
use nvshare_wire::AgentMessage;

/// The share of the host's available memory that managed memory may need, in percent. The shim's own is the same.
const SHARE_PERCENT: u64 = 90;
/// What a context takes of a GPU, at most; a sixteenth of a small GPU. As in what the shim tells its program.
const CONTEXT: Bytes = Bytes::mib(512);
/// A change of less than this part of the figure is not told.
const NOTICEABLE: u64 = 64;

/// What a client holds on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Whose.
    pub client: ClientId,
    /// Where.
    pub gpu: GpuId,
    /// Managed memory.
    pub managed: Bytes,
    /// Plain device memory.
    pub device: Bytes,
    /// Managed memory that lies on the host, as far as counters tell.
    pub spilled: Bytes,
}

/// What a GPU holds that cannot be pushed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain {
    /// The GPU's memory.
    pub total: Bytes,
    /// Contexts and plain allocations of all processes.
    pub held: Bytes,
}

/// What was last told.
#[derive(Debug, Default)]
pub struct Rooms {
    told: BTreeMap<(ClientId, GpuId), (u64, u64)>,
}

impl Rooms {
    /// What there is to tell now. `available` is what the host says that it has left.
    pub fn news(
        &mut self,
        available: Option<Bytes>,
        plain: &BTreeMap<GpuId, Plain>,
        holdings: &[Holding],
    ) -> Vec<(ClientId, AgentMessage)> {
        self.told.retain(|key, _| holdings.iter().any(|held| (held.client, held.gpu) == *key));
        let managed = |held: &Holding| match plain.get(&held.gpu) {
            Some(gpu) => held.managed.min(gpu.total),
            None => held.managed,
        };
        let sum: Bytes = holdings.iter().map(managed).sum();
        let spilled: Bytes = holdings.iter().map(|held| held.spilled.min(managed(held))).sum();
        let capacity = available.map(|available| Bytes((available + spilled).0 / 100 * SHARE_PERCENT));
        let mut news = Vec::new();
        for held in holdings {
            let own: Bytes = holdings.iter().filter(|other| other.client == held.client).map(managed).sum();
            let host =
                capacity.map_or(Bytes(u64::MAX), |capacity| capacity.saturating_sub(sum.saturating_sub(own)));
            let unevictable = plain.get(&held.gpu).map_or(Bytes::ZERO, |gpu| {
                let own = held.device + CONTEXT.min(Bytes(gpu.total.0 / 16));
                gpu.held.saturating_sub(own)
            });
            let now = (unevictable.0, host.0);
            let before = self.told.get(&(held.client, held.gpu));
            if before.is_none_or(|before| differs(before.0, now.0) || differs(before.1, now.1)) {
                self.told.insert((held.client, held.gpu), now);
                let room = AgentMessage::Room { gpu: held.gpu.0, unevictable: unevictable.0, host: host.0 };
                news.push((held.client, room));
            }
        }
        news
    }
}

fn differs(before: u64, now: u64) -> bool {
    before.abs_diff(now) > before.max(now) / NOTICEABLE
}

/// `MemAvailable` of `/proc/meminfo`.
pub fn available() -> Option<Bytes> {
    parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuId = GpuId([1; 16]);
    const A: ClientId = ClientId(1);
    const B: ClientId = ClientId(2);

    fn held(client: ClientId, managed: u64) -> Holding {
        Holding { client, gpu: GPU, managed: Bytes::gib(managed), device: Bytes::ZERO, spilled: Bytes::ZERO }
    }

    fn plain(total: u64, held: u64) -> BTreeMap<GpuId, Plain> {
        BTreeMap::from([(GPU, Plain { total: Bytes::gib(total), held: Bytes::gib(held) })])
    }

    /// (client, GiB unevictable, GiB of host) of each message.
    fn told(news: &[(ClientId, AgentMessage)]) -> Vec<(ClientId, u64, u64)> {
        news.iter()
            .map(|(client, message)| match message {
                AgentMessage::Room { unevictable, host, .. } => (*client, unevictable >> 30, host >> 30),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn each_client_is_told_what_the_others_leave_of_the_host() {
        let news = Rooms::default().news(Some(Bytes::gib(100)), &plain(80, 0), &[held(A, 60), held(B, 10)]);
        assert_eq!(told(&news), [(A, 0, 80), (B, 0, 30)]);
    }

    #[test]
    fn what_is_spilled_already_does_not_count_twice() {
        let spilled = Holding { spilled: Bytes::gib(50), ..held(A, 60) };
        let news = Rooms::default().news(Some(Bytes::gib(50)), &plain(80, 0), &[spilled, held(B, 10)]);
        assert_eq!(told(&news), [(A, 0, 80), (B, 0, 30)]);
    }

    #[test]
    fn a_false_claim_takes_no_more_than_a_gpu() {
        let news = Rooms::default().news(
            Some(Bytes::gib(190)),
            &plain(80, 0),
            &[held(A, 1 << 20), Holding { spilled: Bytes::gib(1 << 20), ..held(B, 10) }],
        );
        assert_eq!(told(&news), [(A, 0, 170), (B, 0, 100)], "90 % of 190 and 10, less 10 and less 80");
    }

    #[test]
    fn a_client_on_two_gpus_is_one_client_on_the_host() {
        let other = GpuId([2; 16]);
        let second = Holding { gpu: other, ..held(A, 20) };
        let news = Rooms::default().news(Some(Bytes::gib(100)), &plain(80, 0), &[held(A, 30), second]);
        assert_eq!(told(&news), [(A, 0, 90), (A, 0, 90)]);
    }

    #[test]
    fn what_others_hold_for_good_is_all_that_is_held_less_the_clients_own() {
        let with_device = Holding { device: Bytes::gib(4), ..held(A, 0) };
        let news = Rooms::default().news(None, &plain(80, 10), &[with_device]);
        // Its own context counts with half a GiB.
        assert_eq!(told(&news), [(A, 5, u64::MAX >> 30)]);
        let AgentMessage::Room { host, .. } = news[0].1 else { panic!() };
        assert_eq!(host, u64::MAX, "a host that does not say is no limit");
    }

    #[test]
    fn only_a_noticeable_change_is_told() {
        let mut rooms = Rooms::default();
        let mut tell =
            |managed: u64| rooms.news(Some(Bytes::gib(100)), &plain(80, 0), &[held(A, managed)]).len();
        assert_eq!((tell(10), tell(10), tell(11)), (1, 0, 0), "its own growth leaves it what it had");
        let mut rooms = Rooms::default();
        let mut tell =
            |available| rooms.news(Some(Bytes::mib(available)), &BTreeMap::new(), &[held(A, 1)]).len();
        assert_eq!((tell(102_400), tell(102_300), tell(90_000), tell(90_100)), (1, 0, 1, 0));
    }

    #[test]
    fn the_hosts_word_is_read() {
        assert_eq!(parse("MemTotal: 10 kB\nMemAvailable:    2048 kB\n"), Some(Bytes::mib(2)));
        assert_eq!(parse("MemTotal: 10 kB\n"), None);
    }
}
