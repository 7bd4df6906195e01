//! The compute engine of a card: one process at a time, in slices, in round robin.
//!
//! Approach: one word holds who computes and who waits, so that every change is one compare-and-swap and a process that
//! dies leaves it consistent. Waiting is bounded: a missed wake-up (the previous holder died between its store and its
//! wake-up call) costs one period, and a holder far beyond its slice (killed, stopped) is passed over.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::shared::MAX_CLIENTS;

const OWNER_SHIFT: u32 = MAX_CLIENTS as u32;
const WAITERS: u64 = (1 << OWNER_SHIFT) - 1;

/// Owner (index + 1, or 0) in the upper bits, a waiting bit for each client below.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct EngineWord(AtomicU64);

fn owner(word: u64) -> Option<usize> {
    (word >> OWNER_SHIFT).checked_sub(1).map(|index| index as usize)
}

fn with_owner(waiters: u64, client: Option<usize>) -> u64 {
    waiters | client.map_or(0, |index| index as u64 + 1) << OWNER_SHIFT
}

/// The waiting client after `from`, cyclically.
fn next_after(waiters: u64, from: usize) -> Option<usize> {
    let later = waiters & (!0 << (from + 1)) & WAITERS;
    let pick = if later == 0 { waiters } else { later };
    (pick != 0).then(|| pick.trailing_zeros() as usize)
}

impl EngineWord {
    /// Whether `client` computes.
    pub fn is_held_by(&self, client: usize) -> bool {
        owner(self.0.load(Ordering::Acquire)) == Some(client)
    }

    /// Takes the engine if it is free, else queues up. True if `client` now computes.
    pub fn request(&self, client: usize) -> bool {
        self.change(|word| match owner(word) {
            Some(holder) if holder == client => word,
            Some(_) => word | 1 << client,
            None => with_owner(word & WAITERS & !(1 << client), Some(client)),
        });
        self.is_held_by(client)
    }

    /// Ends `client`'s turn; it queues up again if `again`. Returns who is next, who must be woken.
    pub fn pass_on(&self, client: usize, again: bool) -> Option<usize> {
        let after = self.change(|word| {
            if owner(word) != Some(client) {
                return if again { word | 1 << client } else { word & !(1 << client) };
            }
            let waiters = word & WAITERS & !(1 << client);
            match next_after(waiters, client) {
                Some(next) => {
                    let queue = waiters & !(1 << next) | u64::from(again) << client;
                    with_owner(queue, Some(next))
                }
                None => with_owner(0, again.then_some(client)),
            }
        });
        owner(after).filter(|&next| next != client)
    }

    /// `client` takes the engine from `holder`, who overran. False if the holder has changed meanwhile.
    pub fn take_from(&self, holder: usize, client: usize) -> bool {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                (owner(word) == Some(holder))
                    .then(|| with_owner(word & WAITERS & !(1 << client), Some(client)))
            })
            .is_ok()
    }

    /// Who computes.
    pub fn holder(&self) -> Option<usize> {
        owner(self.0.load(Ordering::Acquire))
    }

    fn change(&self, step: impl Fn(u64) -> u64) -> u64 {
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            let next = step(seen);
            match self.0.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return next,
                Err(other) => seen = other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_go_round() {
        let engine = EngineWord::default();
        assert!(engine.request(3));
        assert!(!engine.request(55));
        assert!(!engine.request(0));
        assert_eq!(engine.pass_on(3, true), Some(55));
        assert_eq!(engine.pass_on(55, true), Some(0));
        assert_eq!(engine.pass_on(0, true), Some(3));
        assert_eq!(engine.pass_on(3, false), Some(55));
        assert_eq!(engine.pass_on(55, false), Some(0));
        assert_eq!(engine.pass_on(0, false), None);
        assert_eq!(engine.holder(), None);
    }

    #[test]
    fn alone_a_client_keeps_the_engine() {
        let engine = EngineWord::default();
        assert!(engine.request(1));
        assert_eq!(engine.pass_on(1, true), None);
        assert!(engine.is_held_by(1));
    }

    #[test]
    fn a_dead_waiter_is_forgotten_and_a_dead_holder_replaced() {
        let engine = EngineWord::default();
        engine.request(0);
        engine.request(1);
        engine.request(2);
        engine.pass_on(1, false);
        assert_eq!(engine.pass_on(0, false), Some(2));
        engine.request(4);
        assert!(engine.take_from(2, 4));
        assert!(!engine.take_from(2, 5));
        assert!(engine.is_held_by(4));
        // The overrunning holder finds out when its slice ends, and queues up.
        assert_eq!(engine.pass_on(2, true), Some(4));
        assert!(!engine.is_held_by(2));
    }
}
