//! What the engine is told. Everything is serialisable, so that a recorded run can be replayed.

use serde::{Deserialize, Serialize};

use crate::{
    id::{ClientId, Epoch, GpuId, JobId},
    units::{Bytes, Nanos},
};

/// One fact. It becomes known at the time that is handed to [`crate::Engine::handle`] with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// A GPU exists, or its usable capacity changed.
    Gpu {
        /// Which one.
        gpu: GpuId,
        /// What managed memory can use: total less the driver's reserve and all plain allocations.
        capacity: Bytes,
        /// Bytes per second of the link in one direction, as an upper bound.
        link_rate: Bytes,
    },
    /// The GPU is gone.
    GpuGone {
        /// Which one.
        gpu: GpuId,
    },
    /// A client has a session.
    ClientJoined {
        /// Which client.
        client: ClientId,
        /// The job it belongs to.
        job: JobId,
        /// Its share in thousandths of the default, at least 1.
        weight_milli: u32,
        /// Its class; a higher class runs first.
        priority: i32,
    },
    /// The client has a context on this GPU. From here on it runs until it is revoked.
    ClientUses {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
    },
    /// The client is gone; all it held is free.
    ClientLeft {
        /// Which client.
        client: ClientId,
    },
    /// What a client does on one GPU, by its own page. Comes before the [`Input::Sample`] of the same bin.
    Activity {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The figures.
        activity: Activity,
    },
    /// Closes one bin: what the driver's sensors say about a GPU and each client on it.
    Sample {
        /// Which GPU.
        gpu: GpuId,
        /// The figures.
        sample: GpuSample,
    },
    /// A client answered a revocation.
    Revoked {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The epoch it answers.
        epoch: Epoch,
        /// What came of it.
        drain: Drain,
        /// Bytes the shim has moved off the card or is moving.
        moved: Bytes,
    },
    /// A client's gate is open again after a grant.
    Resumed {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The epoch it answers.
        epoch: Epoch,
        /// Bytes the shim has brought back or is bringing back.
        moved: Bytes,
        /// How long the gate stayed closed for it.
        took: Nanos,
    },
    /// What a client's shim moved for a grant or a revocation has all been moved.
    Moved {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The epoch of the grant or the revocation.
        epoch: Epoch,
        /// Bytes brought to the GPU.
        bytes_in: Bytes,
        /// Bytes moved off it.
        bytes_out: Bytes,
        /// From the first to the last of them.
        took: Nanos,
    },
    /// A client gives its turn away.
    Yielded {
        /// Which client.
        client: ClientId,
        /// Which GPU.
        gpu: GpuId,
        /// The epoch of the grant it gives back.
        epoch: Epoch,
    },
    /// The operator wants something.
    Order(Order),
    /// Nothing but the time: a deadline named by [`crate::Poll::Wait`] has come.
    Tick,
}

/// A client's own account of one GPU over one bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Managed memory allocated.
    pub managed: Bytes,
    /// Plain device memory allocated (not evictable).
    pub device: Bytes,
    /// Work-submitting calls in this bin.
    pub calls: u64,
    /// Threads waiting at the closed gate.
    pub waiting: u32,
    /// Threads inside a work-submitting or synchronising call.
    pub busy_threads: u32,
    /// How long the client has shown no sign of using the GPU.
    pub idle_for: Nanos,
}

/// What the driver's sensors say about one GPU over one bin. `None`: no sensor says it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuSample {
    /// Length of the bin.
    pub interval: Nanos,
    /// Wake-to-sleep time of the fault-service thread in this bin (a cold start also shows it).
    pub fault_busy: Option<Nanos>,
    /// Each client on this GPU.
    pub clients: Vec<(ClientId, ClientSample)>,
}

/// What the driver's sensors say about one client on one GPU over one bin. `None`: no sensor says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientSample {
    /// GPU fault entries.
    pub gpu_faults: Option<u64>,
    /// CPU faults on managed memory: above 0, bytes in need not be refaults.
    pub cpu_faults: Option<u64>,
    /// Bytes UVM brought in; for memory that the program takes for device memory, refaults.
    pub bytes_in: Option<Bytes>,
    /// Bytes UVM pushed out.
    pub bytes_out: Option<Bytes>,
    /// Of the bytes out, those evicted to make room.
    pub evicted: Option<Bytes>,
    /// Of the evicted bytes, those evicted while another client's fault was served.
    pub evicted_by_others: Option<Bytes>,
    /// Refaulted bytes that the client, alone on the GPU, would have kept: its own eviction distance and what
    /// it held then fit into the capacity together. Only a sensor that sees blocks can say.
    pub curable: Option<Bytes>,
    /// Refaulted bytes that it would have lost alone as well. Only a sensor that sees blocks can say.
    pub self_refaulted: Option<Bytes>,
    /// Managed memory of it that lies on the GPU at the end of the bin, at most: what was never touched may count. Only a
    /// sensor that sees blocks can say.
    pub resident: Option<Bytes>,
}

/// How a revocation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Drain {
    /// Gate closed and all work done, in this time.
    Done {
        /// From the revocation to the end of the drain.
        took: Nanos,
    },
    /// The client's work did not end in time; its gate is open again.
    TimedOut,
    /// A stream capture is open; its gate is open again.
    Capturing,
}

/// The mode an operator may force on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeOrder {
    /// Let the engine decide.
    Auto,
    /// Everybody at once, whatever happens.
    Shared,
    /// One job at a time, whatever happens.
    Exclusive,
}

/// What an operator wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Force a mode, or stop forcing one, on one GPU or all.
    Mode {
        /// Which GPU; `None` is every GPU, also those that come later.
        gpu: Option<GpuId>,
        /// The mode.
        mode: ModeOrder,
    },
    /// Fix the quantum on every GPU, or let it be derived again.
    Quantum {
        /// The quantum; `None` derives it from the hand-over cost.
        quantum: Option<Nanos>,
    },
    /// Set a client's share.
    Weight {
        /// Which client.
        client: ClientId,
        /// Thousandths of the default, at least 1.
        weight_milli: u32,
    },
    /// Set a client's class.
    Priority {
        /// Which client.
        client: ClientId,
        /// A higher class runs first.
        priority: i32,
    },
    /// Change [`crate::Config::overhead_milli`].
    Overhead {
        /// Thousandths of GPU time, at least 1.
        milli: u32,
    },
    /// Change [`crate::Config::quantum_max`].
    QuantumMax {
        /// The longest quantum.
        quantum_max: Nanos,
    },
}
