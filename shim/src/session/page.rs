//! Publishing the page: often while the GPU is used, rarely while it is not.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::atomic::Ordering,
    time::Duration,
};

use nvshare_wire::page::{PAGE_LEN, PAGE_MAGIC, Page, SLOTS};

use super::held::{Held, Shown};
use crate::{
    gate::{self, thread},
    state::State,
    sys,
};

/// Pause between publications while the GPU is used; the agent samples ten times a second.
const ACTIVE: Duration = Duration::from_millis(50);
/// The longest pause: an idle process wakes up once a second.
const IDLE: Duration = Duration::from_secs(1);

/// The page and when it was last written.
#[derive(Debug)]
pub(super) struct Publication {
    memory: Held,
    page: &'static Page,
    interval: Duration,
    last_ns: u64,
    calls: [u64; SLOTS],
}

impl Publication {
    /// Makes an empty page.
    pub(super) fn new() -> io::Result<Self> {
        let memory = sys::sealed_memory(PAGE_LEN)?;
        // SAFETY: a fresh shared mapping of a file of this very size; it is never unmapped.
        let page = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let at =
                libc::mmap(std::ptr::null_mut(), PAGE_LEN, access, libc::MAP_SHARED, memory.as_raw_fd(), 0);
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            &*at.cast::<Page>()
        };
        page.magic.store(PAGE_MAGIC, Ordering::Release);
        let memory = Held::new(memory)?;
        Ok(Self { memory, page, interval: ACTIVE, last_ns: 0, calls: [0; SLOTS] })
    }

    /// The memory file, for the agent, if it still is ours.
    pub(super) fn number(&self) -> Option<RawFd> {
        self.memory.number()
    }

    /// Shows the memory file.
    pub(super) fn show(&self, shown: &Shown) {
        shown.show(Some(&self.memory));
    }

    /// Time until the next publication is due.
    pub(super) fn interval(&self) -> Duration {
        let passed = Duration::from_nanos(sys::now_ns().saturating_sub(self.last_ns));
        self.interval.saturating_sub(passed)
    }

    /// Whether the page should be written now.
    pub(super) fn is_due(&self) -> bool {
        self.interval().is_zero()
    }

    /// Writes the page.
    pub(super) fn publish(&mut self, state: &State) {
        let now = sys::now_ns();
        let mut active = false;
        let mut slots = 0;
        for (slot, device) in state.devices.iter() {
            let sum = thread::sum(slot);
            let waiting = gate::waiting(slot);
            let place = &self.page.gpu[slot];
            if sum.calls != self.calls[slot] || sum.inside > 0 || sum.syncing > 0 || waiting > 0 {
                active = true;
                place.active_ns.store(now, Ordering::Relaxed);
            }
            self.calls[slot] = sum.calls;
            place.calls.store(sum.calls, Ordering::Relaxed);
            place.inside.store(sum.inside, Ordering::Relaxed);
            place.syncing.store(sum.syncing, Ordering::Relaxed);
            place.waiting.store(waiting, Ordering::Relaxed);
            place.contexts.store(device.contexts.count() as u32, Ordering::Relaxed);
            let usage = state.memory.usage(slot);
            place.managed.store(usage.managed(), Ordering::Relaxed);
            place.device.store(usage.device(), Ordering::Relaxed);
            slots = slot + 1;
        }
        self.page.pinned_host.store(state.memory.pinned_bytes(), Ordering::Relaxed);
        self.page.slots.store(slots as u32, Ordering::Release);
        self.page.beat.fetch_add(1, Ordering::Release);
        self.interval = if active { ACTIVE } else { (self.interval * 2).min(IDLE) };
        self.last_ns = now;
    }
}
