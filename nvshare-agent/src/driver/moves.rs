//! Clients that move their own memory at hand-overs: who does, and what else moved it.
//!
//! **Problem.** A client knows where its memory lies as long as only it moves it. What the driver moves by itself it does not
//! see; the driver's counters do, but they count the client's own moves as well.
//!
//! **Approach.** Between an order and the client's report of its end nothing is judged, only counted. Once a report is in and the
//! counters have had time to show all of it, whatever they show beyond it was moved by others, and the client is told.
//! Where no counters can be read, it is told before each grant.

use std::collections::{BTreeMap, BTreeSet};

use nvshare_core::{Bytes, ClientId, ClientSample, GpuId};
use nvshare_wire::{AgentMessage, Mover};

/// What counters may show beyond the reports before it means anything: clients try the driver out on a little memory of
/// their own, and blocks of which they move a part are counted whole.
const SLACK: Bytes = Bytes::mib(64);
/// Bins after a report until the counters have shown all of it.
const SETTLED: u8 = 2;

/// One client on one GPU.
#[derive(Debug, Default)]
struct Account {
    /// An order is out whose end was not reported.
    open: bool,
    /// Bins since the last report.
    bins: u8,
    /// The last bin told the bytes.
    known: bool,
    reported: Flow,
    shown: Flow,
}

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    bytes_in: Bytes,
    bytes_out: Bytes,
}

/// All clients that move.
#[derive(Debug, Default)]
pub(super) struct Moves {
    movers: BTreeSet<ClientId>,
    /// Those whose processor touches managed memory: to write-protect that would be to end them.
    touching: BTreeSet<ClientId>,
    accounts: BTreeMap<(ClientId, GpuId), Account>,
}

impl Moves {
    /// A client says how it moves memory.
    pub(super) fn said(&mut self, client: ClientId, by: Mover) {
        match by {
            Mover::Demand => self.movers.remove(&client),
            Mover::Plain | Mover::Protected | Mover::Unproven => self.movers.insert(client),
        };
    }

    /// A client is gone.
    pub(super) fn forget(&mut self, client: ClientId) {
        self.movers.remove(&client);
        self.touching.remove(&client);
        self.accounts.retain(|(of, _), _| *of != client);
    }

    /// A client is ordered to move at most so much; what of it is asked of this one, who may not be able to.
    pub(super) fn ordered(&mut self, client: ClientId, gpu: GpuId, bytes: Bytes, is_out: bool) -> Bytes {
        if !self.movers.contains(&client) || (is_out && self.touching.contains(&client)) {
            return Bytes::ZERO;
        }
        self.accounts.entry((client, gpu)).or_default().open = true;
        bytes
    }

    /// What a client is told before it is granted a GPU.
    pub(super) fn before_grant(&self, client: ClientId, gpu: GpuId) -> Option<AgentMessage> {
        let is_known = self.accounts.get(&(client, gpu)).is_some_and(|account| account.known);
        let tells = self.movers.contains(&client) && !is_known;
        tells.then_some(AgentMessage::Displaced { gpu: gpu.0, brought: 1, pushed: 1 })
    }

    /// A client answered an order; if it moves nothing, that was all.
    pub(super) fn answered(&mut self, client: ClientId, gpu: GpuId, announced: Bytes) {
        if announced == Bytes::ZERO {
            self.moved(client, gpu, Bytes::ZERO, Bytes::ZERO);
        }
    }

    /// A client reports the end of a move.
    pub(super) fn moved(&mut self, client: ClientId, gpu: GpuId, bytes_in: Bytes, bytes_out: Bytes) {
        if let Some(account) = self.accounts.get_mut(&(client, gpu)) {
            account.open = false;
            account.bins = 0;
            account.reported.bytes_in += bytes_in;
            account.reported.bytes_out += bytes_out;
        }
    }

    /// One bin of the driver's counters; what the client is told of it.
    pub(super) fn bin(
        &mut self,
        client: ClientId,
        gpu: GpuId,
        sample: &ClientSample,
    ) -> Option<AgentMessage> {
        if !self.movers.contains(&client) {
            return None;
        }
        if sample.cpu_faults.is_some_and(|faults| faults > 0) && self.touching.insert(client) {
            tracing::info!(%client, "its processor touches managed memory: it is not asked to move memory out");
        }
        let account = self.accounts.entry((client, gpu)).or_default();
        let (Some(bytes_in), Some(bytes_out)) = (sample.bytes_in, sample.bytes_out) else {
            account.known = false;
            return None;
        };
        account.known = true;
        account.shown.bytes_in += bytes_in;
        account.shown.bytes_out += bytes_out;
        account.bins = account.bins.saturating_add(1);
        if account.open || account.bins < SETTLED {
            return None;
        }
        let (shown, reported) = (std::mem::take(&mut account.shown), std::mem::take(&mut account.reported));
        let brought = shown.bytes_in > reported.bytes_in + SLACK;
        let pushed = shown.bytes_out > reported.bytes_out + SLACK;
        (brought || pushed).then_some(AgentMessage::Displaced {
            gpu: gpu.0,
            brought: brought.into(),
            pushed: pushed.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: ClientId = ClientId(1);
    const GPU: GpuId = GpuId([3; 16]);

    fn mover() -> Moves {
        let mut moves = Moves::default();
        moves.said(CLIENT, Mover::Unproven);
        moves
    }

    fn bin(moves: &mut Moves, bytes_in: u64, bytes_out: u64) -> Option<(u32, u32)> {
        let sample = ClientSample {
            bytes_in: Some(Bytes::mib(bytes_in)),
            bytes_out: Some(Bytes::mib(bytes_out)),
            ..ClientSample::default()
        };
        match moves.bin(CLIENT, GPU, &sample) {
            Some(AgentMessage::Displaced { gpu, brought, pushed }) => {
                assert_eq!(gpu, GPU.0);
                Some((brought, pushed))
            }
            Some(other) => panic!("{other:?}?"),
            None => None,
        }
    }

    #[test]
    fn nothing_is_asked_of_who_does_not_move() {
        let mut moves = Moves::default();
        assert_eq!(moves.ordered(CLIENT, GPU, Bytes::gib(1), true), Bytes::ZERO);
        assert!(moves.before_grant(CLIENT, GPU).is_none());
        moves.said(CLIENT, Mover::Protected);
        assert_eq!(moves.ordered(CLIENT, GPU, Bytes::gib(1), true), Bytes::gib(1));
        moves.said(CLIENT, Mover::Demand);
        assert_eq!(moves.ordered(CLIENT, GPU, Bytes::gib(1), false), Bytes::ZERO);
        moves.said(CLIENT, Mover::Plain);
        moves.forget(CLIENT);
        assert_eq!(moves.ordered(CLIENT, GPU, Bytes::gib(1), true), Bytes::ZERO);
    }

    #[test]
    fn a_clients_own_moves_are_not_told_to_it_however_late_the_counters_show_them() {
        let mut moves = mover();
        moves.ordered(CLIENT, GPU, Bytes::gib(1), true);
        assert_eq!(bin(&mut moves, 0, 400), None);
        moves.answered(CLIENT, GPU, Bytes::gib(1));
        assert_eq!(bin(&mut moves, 0, 300), None);
        assert_eq!(bin(&mut moves, 0, 100), None);
        moves.moved(CLIENT, GPU, Bytes::ZERO, Bytes::gib(1));
        assert_eq!(bin(&mut moves, 0, 224), None);
        assert_eq!(bin(&mut moves, 0, 0), None);
        moves.ordered(CLIENT, GPU, Bytes::gib(1), false);
        moves.answered(CLIENT, GPU, Bytes::ZERO);
        assert_eq!(bin(&mut moves, 0, 0), None);
        assert_eq!(bin(&mut moves, 0, 65), Some((0, 1)), "nothing was reported this time");
    }

    #[test]
    fn what_others_moved_is_told_by_direction() {
        let mut moves = mover();
        assert_eq!(bin(&mut moves, 100, 0), None);
        assert_eq!(bin(&mut moves, 0, 0), Some((1, 0)));
        assert_eq!(bin(&mut moves, 10, 100), Some((0, 1)));
        assert_eq!(bin(&mut moves, 60, 60), None, "as little as that may be the client trying things out");
        moves.ordered(CLIENT, GPU, Bytes::mib(100), true);
        moves.answered(CLIENT, GPU, Bytes::mib(100));
        moves.moved(CLIENT, GPU, Bytes::ZERO, Bytes::mib(100));
        assert_eq!(bin(&mut moves, 0, 300), None);
        assert_eq!(bin(&mut moves, 0, 0), Some((0, 1)), "more than it reported");
    }

    #[test]
    fn without_counters_nothing_is_known_at_any_grant() {
        let mut moves = mover();
        assert!(moves.before_grant(CLIENT, GPU).is_some(), "nothing was read yet");
        assert_eq!(bin(&mut moves, 0, 0), None);
        assert!(moves.before_grant(CLIENT, GPU).is_none());
        assert!(moves.bin(CLIENT, GPU, &ClientSample::default()).is_none());
        assert!(moves.before_grant(CLIENT, GPU).is_some());
    }

    #[test]
    fn who_touches_managed_memory_with_its_processor_is_not_asked_to_push_it_out() {
        let mut moves = mover();
        moves.bin(CLIENT, GPU, &ClientSample { cpu_faults: Some(1), ..ClientSample::default() });
        assert_eq!(moves.ordered(CLIENT, GPU, Bytes::gib(1), true), Bytes::ZERO);
        assert_eq!(moves.ordered(CLIENT, GPU, Bytes::gib(1), false), Bytes::gib(1));
    }
}
