//! When the agent was last heard. A closed gate is a promise of the agent to open it; an agent that says
//! nothing for as long as it announced itself has broken the promise, and every gate opens.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys;

static HEARD_NS: AtomicU64 = AtomicU64::new(0);
static LIMIT_NS: AtomicU64 = AtomicU64::new(0);

/// Waiting threads give the session this much longer than the limit before they help themselves: it says why.
const BACKSTOP_NS: u64 = 1_000_000_000;

/// Sets the longest silence, in milliseconds.
pub(crate) fn allow(silence_ms: u32) {
    LIMIT_NS.store(u64::from(silence_ms) * 1_000_000, Ordering::Relaxed);
}

/// Something came from the agent.
pub(crate) fn heard() {
    HEARD_NS.store(sys::now_ns(), Ordering::Relaxed);
}

fn quiet_ns() -> u64 {
    sys::now_ns().saturating_sub(HEARD_NS.load(Ordering::Relaxed))
}

/// Whether the agent has been silent for longer than it may.
pub(crate) fn is_too_long() -> bool {
    quiet_ns() > LIMIT_NS.load(Ordering::Relaxed)
}

/// The same with some slack, for threads that wait while the session does not act.
pub(crate) fn is_broken() -> bool {
    quiet_ns() > LIMIT_NS.load(Ordering::Relaxed) + BACKSTOP_NS
}
