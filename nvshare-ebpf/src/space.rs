//! VA spaces: who owns which events structure.
//!
//! The fault service runs in a kernel thread, so the current process says nothing about the tenant. A space's
//! beginning does: it runs in the owner's own call, and hands out the address that every later event carries.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_smp_processor_id,
        generated::{bpf_get_current_cgroup_id, bpf_ktime_get_boot_ns, bpf_ktime_get_ns},
    },
};
use nvshare_abi::maps::{Ownership, Space, SpaceId};

use crate::{
    health,
    maps::{EVENTS, GENERATION, SPACES},
};

/// The process that runs here.
#[inline(always)]
pub(crate) fn current_process() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// The thread that runs here.
#[inline(always)]
pub(crate) fn current_thread() -> u32 {
    bpf_get_current_pid_tgid() as u32
}

/// The space of an events structure; one that is older than the programs gets a number and no owner.
#[inline(always)]
pub(crate) fn of(events: u64) -> Option<SpaceId> {
    // SAFETY: the value is copied out at once; a stale copy names a space that has just ended.
    if let Some(id) = unsafe { EVENTS.get(events) } {
        return Some(*id);
    }
    register(events, 0, Ownership::Unknown)
}

/// A space begins in its owner's context.
#[inline(always)]
pub(crate) fn begin(events: u64, va_space: u64) -> Option<SpaceId> {
    end(events);
    register(events, va_space, Ownership::Certain)
}

/// A space ends, in any context.
#[inline(always)]
pub(crate) fn end(events: u64) -> Option<SpaceId> {
    // SAFETY: copied out at once.
    let id = *unsafe { EVENTS.get(events) }?;
    if let Some(space) = SPACES.get_ptr_mut(id) {
        // SAFETY: a word in a map value; the only writer of this word for this space.
        unsafe { (*space).ended_ns = bpf_ktime_get_boot_ns() };
    }
    let _gone = EVENTS.remove(events);
    turn_generation();
    Some(id)
}

/// Changes whenever the space of some events structure may have changed.
#[inline(always)]
pub(crate) fn generation() -> u64 {
    GENERATION.get(0).copied().unwrap_or_default()
}

#[inline(always)]
fn turn_generation() {
    if let Some(generation) = GENERATION.get_ptr_mut(0) {
        // SAFETY: a map value.
        unsafe { health::add(generation, 1) };
    }
}

/// The owner of a space, 0 if unknown.
#[inline(always)]
pub(crate) fn owner(id: SpaceId) -> u32 {
    // SAFETY: one word is copied out at once.
    unsafe { SPACES.get(id) }.map_or(0, |space| space.tgid)
}

/// Something happened to a space that normally happens only in its owner's context.
#[inline(always)]
pub(crate) fn suspect_owner(id: SpaceId) {
    let Some(space) = SPACES.get_ptr_mut(id) else {
        return;
    };
    // SAFETY: a map value; racing writers write the same process, or one of two that are equally probable.
    let space = unsafe { &mut *space };
    if space.ownership == Ownership::Unknown as u32 {
        space.tgid = current_process();
        // SAFETY: a helper without arguments.
        space.cgroup = unsafe { bpf_get_current_cgroup_id() };
        space.comm = bpf_get_current_comm().unwrap_or_default();
        space.ownership = Ownership::Probable as u32;
    }
}

#[inline(always)]
fn register(events: u64, va_space: u64, ownership: Ownership) -> Option<SpaceId> {
    // SAFETY: helpers without arguments.
    let (now, cpu) = unsafe { (bpf_ktime_get_ns(), bpf_get_smp_processor_id()) };
    // Unique as long as one CPU does not begin two spaces in one nanosecond.
    let id = SpaceId(now ^ (u64::from(cpu) << 52));
    let mut space = Space {
        events,
        va_space,
        // SAFETY: a helper without arguments.
        began_ns: unsafe { bpf_ktime_get_boot_ns() },
        ownership: ownership as u32,
        ..Space::default()
    };
    if let Ownership::Certain = ownership {
        space.tgid = current_process();
        // SAFETY: a helper without arguments.
        space.cgroup = unsafe { bpf_get_current_cgroup_id() };
        space.comm = bpf_get_current_comm().unwrap_or_default();
    }
    if SPACES.insert(id, space, u64::from(BPF_ANY)).is_err() {
        health::lost();
        return None;
    }
    if EVENTS.insert(events, id, u64::from(BPF_NOEXIST)).is_err() {
        let _unused = SPACES.remove(id);
        // Another CPU saw the same events structure first, or the map is full.
        // SAFETY: copied out at once.
        let other = unsafe { EVENTS.get(events) }.copied();
        if other.is_none() {
            health::lost();
        }
        return other;
    }
    turn_generation();
    Some(id)
}
