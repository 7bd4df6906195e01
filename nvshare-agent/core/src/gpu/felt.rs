//! What the clients of a GPU felt of paging in one bin, for the books ([`crate::account`]).

use super::Gpu;
use crate::{
    account,
    detector::{Totals, stall::Stall},
    id::ClientId,
    member::Member,
    units::Bytes,
};

/// What paging did to a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Felt {
    pub(super) client: ClientId,
    pub(super) curable: Bytes,
    pub(super) own: Bytes,
    pub(super) faulted: bool,
}

impl Gpu {
    /// Books what paging cost in this bin, and whom.
    pub(super) fn book(
        &mut self,
        totals: &Totals,
        making_room: bool,
        (returned, evicted): (Bytes, Bytes),
        all: &mut Vec<Felt>,
    ) {
        let turns = self.plan.takes_turns();
        let moved = totals.known.then(|| totals.bytes_in + totals.bytes_out);
        let stall = Stall::of(totals.interval, totals.fault_busy, moved, totals.link_rate);
        all.sort_unstable_by_key(|felt| felt.client);
        all.dedup_by_key(|felt| felt.client);
        let felt =
            |client: &ClientId| all.binary_search_by_key(client, |felt| felt.client).ok().map(|at| all[at]);
        let seen = |(client, member): (&ClientId, &Member)| {
            let stalled = felt(client)
                .is_some_and(|felt| felt.curable + felt.own > Bytes::ZERO || felt.faulted && making_room);
            account::Seen {
                client: *client,
                demand: member.demand() || stalled,
                working: member.demand() && member.lease.is_open() || stalled,
                stalled,
                calls: member.spent.calls,
            }
        };
        let bin = account::Bin {
            at: totals.at,
            interval: totals.interval,
            stall_milli: stall.milli().map(|milli| milli.min(1000)),
            turns,
            returned,
            evicted,
            clients: self.members.iter().map(seen).collect(),
        };
        let lost = self.account.bin(&bin);
        for seen in bin.clients.iter().filter(|seen| seen.stalled) {
            if let Some(member) = self.members.get_mut(&seen.client) {
                member.spent.stalled += lost;
            }
        }
        for felt in &*all {
            let Some(member) = self.members.get_mut(&felt.client) else { continue };
            // As the detector counts: what comes back during turns is a hand-over, alone nothing is curable.
            member.spent.own += felt.own;
            if !turns && totals.contended {
                member.spent.curable += felt.curable;
            } else if !turns {
                member.spent.own += felt.curable;
            }
        }
    }
}
