//! An event queue on one VA space, in the observer's memory.
//!
//! As in the driver: a full ring drops what is new and counts it; positions in the observer's memory are taken modulo the
//! ring's size, whatever the observer wrote; a migration is queued only when the next one has ended, or when the observer asks
//! for what is held back.

use std::io;

use nvshare_abi::{
    tools::queue::{
        ENTRY_BYTES_MAX, GET_BEHIND, MIGRATION, Migration, PUT_AHEAD, PUT_BEHIND, QueueVersion, waiting,
    },
    uvm::DriverVersion,
};
use nvshare_gpu_sim_model::ids::SpaceId;

use crate::remote;

/// A queue.
#[derive(Debug)]
pub(crate) struct Queue {
    /// The observed space.
    pub(crate) space: SpaceId,
    pub(super) observer: u32,
    pub(super) version: QueueVersion,
    pub(super) ring: u64,
    pub(super) entries: u32,
    pub(super) control: u64,
    /// Offset in the control block of the counts of dropped events.
    pub(super) dropped: u64,
    /// One bit for each type.
    pub(super) enabled: u64,
    /// What is held back.
    pub(super) held: Vec<[u8; ENTRY_BYTES_MAX]>,
}

/// Offset of the counts of dropped events.
pub(super) fn dropped_at(driver: DriverVersion, version: QueueVersion) -> u64 {
    if driver.branch == 550 && version == QueueVersion::V2 { 24 } else { 16 }
}

impl Queue {
    /// The version of this queue's entries.
    pub(crate) fn version(&self) -> QueueVersion {
        self.version
    }

    /// Takes in moves that have just ended; what was held back is queued.
    pub(crate) fn moved(&mut self, migrations: impl IntoIterator<Item = Migration>) {
        let wanted = self.enabled & (1 << MIGRATION) != 0;
        let mut news = migrations.into_iter().filter(|_| wanted).peekable();
        if news.peek().is_none() {
            return;
        }
        self.flush();
        let version = self.version;
        self.held.extend(news.map(|migration| migration.entry(version)));
    }

    /// Queues all that is held back. An observer that has gone closes its file soon.
    pub(crate) fn flush(&mut self) {
        for entry in std::mem::take(&mut self.held) {
            drop(self.push(&entry));
        }
    }

    fn push(&self, entry: &[u8; ENTRY_BYTES_MAX]) -> io::Result<()> {
        let mut control = [0; 16];
        remote::read(self.observer, self.control, &mut control)?;
        let position =
            |at: usize| control.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |w| u32::from_ne_bytes(*w));
        let put = position(PUT_BEHIND) & (self.entries - 1);
        if waiting(position(GET_BEHIND), put, self.entries) == self.entries - 1 {
            let at = self.control + self.dropped + 8 * u64::from(MIGRATION);
            let mut count = [0; 8];
            remote::read(self.observer, at, &mut count)?;
            return remote::write(self.observer, at, &(u64::from_ne_bytes(count) + 1).to_ne_bytes());
        }
        let bytes = self.version.entry_bytes();
        remote::write(self.observer, self.ring + u64::from(put) * bytes as u64, &entry[..bytes])?;
        let next = ((put + 1) & (self.entries - 1)).to_ne_bytes();
        remote::write(self.observer, self.control + PUT_AHEAD as u64, &next)?;
        remote::write(self.observer, self.control + PUT_BEHIND as u64, &next)
    }
}
