//! What the driver does in the program's own context, announced as the driver announces it.

use std::ffi::c_void;

use nvshare_abi::uvm::{Event, EventLayout, MakeResidentCause, Processor};

use super::EntryPoints;
use crate::wire::Record;

/// Calls the program's `uvm_perf_event_notify` for each record.
pub(super) fn announce(entry: &EntryPoints, layout: &EventLayout, records: &[Record]) {
    for record in records {
        let event = if record.cpu_fault {
            Event::CpuFault { address: record.address, cpu: 0, write: true, pc: 0 }
        } else {
            Event::Migration {
                dst: Processor(record.dst),
                src: Processor(record.src),
                address: record.address,
                bytes: record.bytes,
                copy: false,
                cause: MakeResidentCause::from_value(record.cause).unwrap_or(MakeResidentCause::ApiMigrate),
            }
        };
        let data = event.data(layout);
        let events = record.events as usize as *const c_void;
        // SAFETY: the function is the program's own and reads nothing; probes on it read `data`, which lives until it
        // returns, and use `events` as a number.
        unsafe { (entry.event_notify)(events, event.id(layout), (&raw const data).cast()) };
    }
}
