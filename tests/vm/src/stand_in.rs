//! The module that stands in for the driver's: loading, unloading, and telling it what to call.

use std::{
    fs::File,
    io::{self, Write as _},
};

use anyhow::{Context as _, Result};
use nvshare_abi::uvm::{
    DriverVersion, EVENT_DATA_BYTES, Event, EventLayout, FAULT_ENTRY_BYTES, FaultEntry, Processor,
};
use nvshare_core::GpuId;

use crate::kernel_module;

/// The GPU that the module names in procfs, number 1.
pub(crate) const GPU: GpuId = GpuId([0x11; 16]);
/// Its number in events and in the name of its thread.
pub(crate) const GPU_1: Processor = Processor(1);

const COMMANDS: &str = "/proc/driver/nvidia-uvm/test";
const NO_ENTRY: u32 = u32::MAX;

/// What goes with an operation.
struct Arguments {
    event_id: u32,
    events: u64,
    va_space: u64,
    entry_at: u32,
    data: [u8; EVENT_DATA_BYTES],
    entry: [u8; FAULT_ENTRY_BYTES],
}

impl Arguments {
    /// The module's `struct command`.
    fn command(&self, operation: Operation) -> Vec<u8> {
        let Self { event_id, events, va_space, entry_at, data, entry } = self;
        let words = [(operation as u32).to_ne_bytes(), event_id.to_ne_bytes()].concat();
        let addresses = [events.to_ne_bytes(), va_space.to_ne_bytes()].concat();
        let reserved = 0u32;
        let place = [entry_at.to_ne_bytes(), reserved.to_ne_bytes()].concat();
        [&words[..], &addresses, &place, data, entry].concat()
    }
}

/// What the module can be told; mirrors its `enum operation`.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Operation {
    Init = 1,
    Destroy = 2,
    NotifyHere = 3,
    Notify = 4,
    Service = 5,
    Spin = 6,
    Rest = 7,
    Counters = 8,
}

/// A stand-in that is loaded.
pub(crate) struct Module {
    commands: File,
    layout: EventLayout,
}

impl Module {
    /// Loads the module that says it is of this version.
    pub(crate) fn load(version: DriverVersion) -> Self {
        load_file(&version.to_string());
        Self::of_loaded(version)
    }

    /// One that is loaded already.
    pub(crate) fn of_loaded(version: DriverVersion) -> Self {
        let commands = commands().unwrap();
        Self { commands, layout: EventLayout::of(version).expect("a known driver version") }
    }

    /// Unloads it, which must not need anybody to let go of it first.
    pub(crate) fn unload(self) {
        drop(self.commands);
        kernel_module::unload("nvidia_uvm");
    }

    pub(crate) fn layout(&self) -> &EventLayout {
        &self.layout
    }

    /// A space begins in this process.
    pub(crate) fn begin_space(&self, events: u64) {
        begin_space(&self.commands, events).unwrap();
    }

    /// A space ends in this process.
    pub(crate) fn end_space(&self, events: u64) {
        end_space(&self.commands, events).unwrap();
    }

    /// The fault-service thread begins a round.
    pub(crate) fn service(&self) {
        self.obey(Operation::Service, |_| {});
    }

    /// The fault-service thread turns to the access counters.
    pub(crate) fn access_counters(&self) {
        self.obey(Operation::Counters, |_| {});
    }

    /// The fault-service thread is kept busy until [`Self::rest`].
    pub(crate) fn spin(&self) {
        self.obey(Operation::Spin, |_| {});
    }

    /// The fault-service thread goes to sleep.
    pub(crate) fn rest(&self) {
        self.obey(Operation::Rest, |_| {});
    }

    /// The fault-service thread notifies of an event.
    pub(crate) fn notify(&self, events: u64, event: Event) {
        self.send_event(Operation::Notify, events, event);
    }

    /// This process notifies of an event.
    pub(crate) fn notify_here(&self, events: u64, event: Event) {
        self.send_event(Operation::NotifyHere, events, event);
    }

    /// The fault-service thread notifies of an event with nonsense for its data.
    pub(crate) fn notify_nonsense(&self, events: u64, event_id: u32) {
        self.obey(Operation::Notify, |with| {
            with.events = events;
            with.event_id = event_id;
            with.data = [0xff; EVENT_DATA_BYTES];
        });
    }

    /// The fault-service thread notifies of a GPU fault.
    pub(crate) fn gpu_fault(&self, events: u64, instances: u16) {
        let entry = FaultEntry { address: 0x7f00_0000_0000, timestamp: 1, va_space: events - 8, instances };
        self.obey(Operation::Notify, |with| {
            let event = Event::GpuFault { processor: GPU_1, entry: 0, batch: 1, duplicate: false };
            with.events = events;
            with.event_id = event.id(&self.layout);
            with.data = event.data(&self.layout).0;
            // The module puts in the address of its copy, which nobody else knows.
            with.entry_at = self.layout.fault_gpu_entry;
            with.entry = entry.data(&self.layout).0;
        });
    }

    fn send_event(&self, operation: Operation, events: u64, event: Event) {
        self.obey(operation, |with| {
            with.events = events;
            with.event_id = event.id(&self.layout);
            with.data = event.data(&self.layout).0;
        });
    }

    fn obey(&self, operation: Operation, fill: impl FnOnce(&mut Arguments)) {
        send(&self.commands, operation, fill).unwrap();
    }
}

/// Loads a stand-in by its file's name, which is its version or what it lacks.
pub(crate) fn load_file(name: &str) {
    kernel_module::load(&format!("stand-in/{name}"), &format!("gpu={GPU}"));
}

/// The file through which the loaded module is told what to do.
pub(crate) fn commands() -> Result<File> {
    File::options().write(true).open(COMMANDS).with_context(|| format!("opening {COMMANDS}"))
}

pub(crate) fn begin_space(commands: &File, events: u64) -> io::Result<()> {
    send(commands, Operation::Init, |with| {
        with.events = events;
        with.va_space = events - 8;
    })
}

pub(crate) fn end_space(commands: &File, events: u64) -> io::Result<()> {
    send(commands, Operation::Destroy, |with| with.events = events)
}

fn send(mut commands: &File, operation: Operation, fill: impl FnOnce(&mut Arguments)) -> io::Result<()> {
    let mut arguments = Arguments {
        event_id: 0,
        events: 0,
        va_space: 0,
        entry_at: NO_ENTRY,
        data: [0; EVENT_DATA_BYTES],
        entry: [0; FAULT_ENTRY_BYTES],
    };
    fill(&mut arguments);
    commands.write_all(&arguments.command(operation))
}
