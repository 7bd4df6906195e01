//! The messages of both directions. Layouts are fixed per kind; all integers little-endian.

use core::fmt;

use crate::{
    codec::{Reader, Writer},
    frame::{FRAME_MAX, HEADER_LEN, Header},
};

/// The UUID of a GPU or MIG instance, 16 raw bytes as `cuDeviceGetUuid` gives them.
pub type GpuUuid = [u8; 16];

/// A short text for people (a program name, an explanation): UTF-8, zero-padded. Never an identity.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Label([u8; Self::CAPACITY]);

impl Label {
    /// The most bytes a label carries.
    pub const CAPACITY: usize = 128;

    /// A label of at most [`Self::CAPACITY`] bytes of `text`, cut at a character boundary; control
    /// characters become `?`, so that a label can be printed anywhere.
    pub fn new(text: &str) -> Self {
        let mut bytes = [0; Self::CAPACITY];
        let mut at = 0;
        for c in text.chars() {
            let c = if c.is_control() { '?' } else { c };
            let Some(room) = bytes.get_mut(at..at + c.len_utf8()) else { break };
            c.encode_utf8(room);
            at += c.len_utf8();
        }
        Self(bytes)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(Self::CAPACITY);
        core::str::from_utf8(&self.0[..end]).unwrap_or_default()
    }

    fn decode(bytes: [u8; Self::CAPACITY]) -> Result<Self, MessageError> {
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(Self::CAPACITY);
        let text = core::str::from_utf8(&bytes[..end]).or(Err(MessageError::Text))?;
        if text.chars().any(char::is_control) || bytes[end..].iter().any(|&b| b != 0) {
            return Err(MessageError::Text);
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// Why a payload was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageError {
    /// No message of this kind exists in this direction. The frame can be skipped.
    UnknownKind(u16),
    /// The payload ends before the message does.
    Short,
    /// The payload goes on after the message.
    TrailingBytes(usize),
    /// A text is not UTF-8, holds control characters, or is not zero-padded.
    Text,
    /// A field holds a value that has no meaning.
    Value(&'static str, u64),
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKind(kind) => write!(f, "unknown message kind {kind}"),
            Self::Short => f.write_str("message is cut short"),
            Self::TrailingBytes(count) => write!(f, "{count} bytes follow the message"),
            Self::Text => f.write_str("text is not clean UTF-8"),
            Self::Value(field, value) => write!(f, "field {field} cannot be {value}"),
        }
    }
}

impl core::error::Error for MessageError {}

/// How a client answered a revocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DrainOutcome {
    /// The gate is closed, nobody is inside, every context is idle.
    Drained = 0,
    /// The work did not end in time; the gate is open again and the client keeps running.
    TimedOut = 1,
    /// A stream capture is open; the gate is open again and the client keeps running.
    Capturing = 2,
}

impl DrainOutcome {
    fn decode(value: u32) -> Result<Self, MessageError> {
        match value {
            0 => Ok(Self::Drained),
            1 => Ok(Self::TimedOut),
            2 => Ok(Self::Capturing),
            other => Err(MessageError::Value("outcome", other.into())),
        }
    }
}

/// How a client moves its memory at hand-overs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mover {
    /// It does not; the driver does, when memory is needed.
    Demand = 0,
    /// By prefetches.
    Plain = 1,
    /// By prefetches, out of memory that is write-protected meanwhile.
    Protected = 2,
    /// It will; what the driver does best is not known yet.
    Unproven = 3,
}

impl Mover {
    fn decode(value: u32) -> Result<Self, MessageError> {
        match value {
            0 => Ok(Self::Demand),
            1 => Ok(Self::Plain),
            2 => Ok(Self::Protected),
            3 => Ok(Self::Unproven),
            other => Err(MessageError::Value("mover", other.into())),
        }
    }
}

/// Which way memory moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// To the GPU.
    In = 0,
    /// To the host.
    Out = 1,
}

impl Direction {
    fn decode(value: u32) -> Result<Self, MessageError> {
        match value {
            0 => Ok(Self::In),
            1 => Ok(Self::Out),
            other => Err(MessageError::Value("direction", other.into())),
        }
    }
}

/// Why the agent ended a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum RefusalCode {
    /// The client speaks another protocol version.
    Version = 1,
    /// A frame or message could not be understood.
    Malformed = 2,
    /// The first message was not `Hello`, or a message came out of order.
    Order = 3,
    /// A message came without its descriptor, or with one that is not what it must be.
    Descriptor = 4,
    /// Too many clients, GPUs or messages.
    Limit = 5,
    /// The client said nothing in time.
    Timeout = 6,
}

impl RefusalCode {
    fn decode(value: u16) -> Result<Self, MessageError> {
        match value {
            1 => Ok(Self::Version),
            2 => Ok(Self::Malformed),
            3 => Ok(Self::Order),
            4 => Ok(Self::Descriptor),
            5 => Ok(Self::Limit),
            6 => Ok(Self::Timeout),
            other => Err(MessageError::Value("code", other.into())),
        }
    }
}

/// What a client tells the agent. It is trusted for nothing but its own demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientMessage {
    /// Kind 1, the first message, with one descriptor: the memfd of the client's [`crate::page`].
    Hello {
        /// Share of GPU time, in thousandths of the default; may only lower it (≤ 1000).
        weight_milli: u32,
        /// Scheduling class; may only lower it (≤ 0).
        priority: i32,
        /// The client's own memory limit in bytes, 0 for none.
        memory_limit: u64,
        /// The program's name, for people.
        name: Label,
    },
    /// Kind 2: the client has a context on this GPU; `slot` is its index in the page. The client may run
    /// until it is revoked.
    UseGpu {
        /// Index into the page's GPU slots.
        slot: u32,
        /// Which GPU.
        gpu: GpuUuid,
    },
    /// Kind 3, with one descriptor: the client's VA-space descriptor of `/dev/nvidia-uvm`.
    UvmDescriptor,
    /// Kind 4: threads are waiting at the closed gate, or none is any more.
    Waiting {
        /// Which GPU.
        gpu: GpuUuid,
        /// Threads at the gate.
        threads: u32,
    },
    /// Kind 5: the answer to a `Revoke`.
    Revoked {
        /// Which GPU.
        gpu: GpuUuid,
        /// The epoch of the `Revoke` that this answers.
        epoch: u64,
        /// What came of it.
        outcome: DrainOutcome,
        /// Nanoseconds from the `Revoke` to the end of the drain.
        drain_ns: u64,
        /// Bytes the shim has moved off the card or is moving; if it falls short, [`Self::Moved`] says so.
        moved: u64,
    },
    /// Kind 6: a `Grant` took effect and the gate is open.
    Resumed {
        /// Which GPU.
        gpu: GpuUuid,
        /// The epoch of the `Grant`.
        epoch: u64,
        /// Bytes the shim has brought back or is bringing back; if it falls short, [`Self::Moved`] says so.
        moved: u64,
        /// Nanoseconds for which the gate stayed closed for it.
        moved_ns: u64,
    },
    /// Kind 7: the client has nothing more to do for now and gives its turn away.
    Yield {
        /// Which GPU.
        gpu: GpuUuid,
        /// The epoch of the grant that is given back.
        epoch: u64,
    },
    /// Kind 8: what the shim moved for a `Grant` or a `Revoke` has all been moved. Follows the answer to it, and only where
    /// there was something to move.
    Moved {
        /// Which GPU.
        gpu: GpuUuid,
        /// The epoch of the `Grant` or `Revoke`.
        epoch: u64,
        /// Which way.
        direction: Direction,
        /// Bytes in all.
        moved: u64,
        /// Nanoseconds from the first to the last of them.
        moved_ns: u64,
    },
    /// Kind 9: how the client moves memory; an agent that does not hear this asks for nothing to be moved.
    Moves {
        /// By what means.
        by: Mover,
    },
}

/// What the agent tells a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentMessage {
    /// Kind 1: the session stands.
    Welcome {
        /// The client's number, for logs and `nvsharectl`.
        client: u64,
        /// A client that hears nothing for this long opens its gates (milliseconds).
        silence_ms: u32,
    },
    /// Kind 2: the gate of this GPU may open and stay open until a `Revoke`.
    Grant {
        /// Which GPU.
        gpu: GpuUuid,
        /// Rises with every grant and revocation of this client and GPU.
        epoch: u64,
        /// Whether the shim may bring memory back ahead of need (0 leaves it to the driver), in bytes.
        prefetch: u64,
    },
    /// Kind 3: close the gate, drain, free the shortfall, answer `Revoked`.
    Revoke {
        /// Which GPU.
        gpu: GpuUuid,
        /// Rises with every grant and revocation of this client and GPU.
        epoch: u64,
        /// The drain must end within this time (milliseconds), else the gate opens again.
        drain_ms: u32,
        /// At most this much is to be moved off the card, 0 leaves it to the driver, in bytes.
        shortfall: u64,
    },
    /// Kind 4: still here; sent while a client is gated.
    Alive,
    /// Kind 6: what is left for this client, whenever it has changed noticeably. Advice: a client that does not know it
    /// goes by what it sees itself.
    Room {
        /// Which GPU `unevictable` is about.
        gpu: GpuUuid,
        /// Bytes of this GPU that others hold and that cannot be pushed out.
        unevictable: u64,
        /// Bytes of managed memory that this client may hold, on all GPUs together: what the host could take
        /// in, less what the other clients hold.
        host: u64,
    },
    /// Kind 7: the administrator limits what this client may hold on each GPU, from here on; what it holds stays.
    Limit {
        /// Bytes on each GPU, 0 for no limit.
        bytes: u64,
    },
    /// Kind 8: memory of this client was moved by others than its shim, so that where it lies is not known.
    Displaced {
        /// Which GPU.
        gpu: GpuUuid,
        /// Some was brought to the GPU (not 0).
        brought: u32,
        /// Some was pushed out (not 0).
        pushed: u32,
    },
    /// Kind 5: the session ends.
    Refused {
        /// Why.
        code: RefusalCode,
        /// The same for people.
        detail: Label,
    },
}

/// A frame ready to be written.
#[derive(Clone, Copy)]
pub struct Encoded {
    bytes: [u8; FRAME_MAX],
    len: usize,
}

impl Encoded {
    fn new(kind: u16, fill: impl FnOnce(&mut Writer<'_>)) -> Self {
        let mut bytes = [0; FRAME_MAX];
        let (header, payload) = bytes.split_at_mut(HEADER_LEN);
        let mut writer = Writer::new(payload);
        fill(&mut writer);
        let len = writer.written();
        header.copy_from_slice(&Header { kind, len: len as u32 }.encode());
        Self { bytes, len: HEADER_LEN + len }
    }

    /// The whole frame.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Debug for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().fmt(f)
    }
}

impl ClientMessage {
    /// Whether exactly one descriptor travels with this message.
    pub fn carries_descriptor(&self) -> bool {
        match self {
            Self::Hello { .. } | Self::UvmDescriptor => true,
            Self::UseGpu { .. }
            | Self::Waiting { .. }
            | Self::Revoked { .. }
            | Self::Resumed { .. }
            | Self::Yield { .. }
            | Self::Moved { .. }
            | Self::Moves { .. } => false,
        }
    }

    /// The frame of this message.
    pub fn encode(&self) -> Encoded {
        match self {
            Self::Hello { weight_milli, priority, memory_limit, name } => Encoded::new(1, |w| {
                w.u32(*weight_milli).i32(*priority).u64(*memory_limit).bytes(&name.0);
            }),
            Self::UseGpu { slot, gpu } => Encoded::new(2, |w| {
                w.u32(*slot).bytes(gpu);
            }),
            Self::UvmDescriptor => Encoded::new(3, |_| {}),
            Self::Waiting { gpu, threads } => Encoded::new(4, |w| {
                w.bytes(gpu).u32(*threads);
            }),
            Self::Revoked { gpu, epoch, outcome, drain_ns, moved } => Encoded::new(5, |w| {
                w.bytes(gpu).u64(*epoch).u32(*outcome as u32).u64(*drain_ns).u64(*moved);
            }),
            Self::Resumed { gpu, epoch, moved, moved_ns } => Encoded::new(6, |w| {
                w.bytes(gpu).u64(*epoch).u64(*moved).u64(*moved_ns);
            }),
            Self::Yield { gpu, epoch } => Encoded::new(7, |w| {
                w.bytes(gpu).u64(*epoch);
            }),
            Self::Moved { gpu, epoch, direction, moved, moved_ns } => Encoded::new(8, |w| {
                w.bytes(gpu).u64(*epoch).u32(*direction as u32).u64(*moved).u64(*moved_ns);
            }),
            Self::Moves { by } => Encoded::new(9, |w| {
                w.u32(*by as u32);
            }),
        }
    }

    /// Reads the payload of a frame of this kind.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, MessageError> {
        let mut r = Reader::new(payload);
        let message = match kind {
            1 => Self::Hello {
                weight_milli: r.u32()?,
                priority: r.i32()?,
                memory_limit: r.u64()?,
                name: Label::decode(r.array()?)?,
            },
            2 => Self::UseGpu { slot: r.u32()?, gpu: r.array()? },
            3 => Self::UvmDescriptor,
            4 => Self::Waiting { gpu: r.array()?, threads: r.u32()? },
            5 => Self::Revoked {
                gpu: r.array()?,
                epoch: r.u64()?,
                outcome: DrainOutcome::decode(r.u32()?)?,
                drain_ns: r.u64()?,
                moved: r.u64()?,
            },
            6 => Self::Resumed { gpu: r.array()?, epoch: r.u64()?, moved: r.u64()?, moved_ns: r.u64()? },
            7 => Self::Yield { gpu: r.array()?, epoch: r.u64()? },
            8 => Self::Moved {
                gpu: r.array()?,
                epoch: r.u64()?,
                direction: Direction::decode(r.u32()?)?,
                moved: r.u64()?,
                moved_ns: r.u64()?,
            },
            9 => Self::Moves { by: Mover::decode(r.u32()?)? },
            other => return Err(MessageError::UnknownKind(other)),
        };
        r.finish()?;
        Ok(message)
    }
}

impl AgentMessage {
    /// The frame of this message.
    pub fn encode(&self) -> Encoded {
        match self {
            Self::Welcome { client, silence_ms } => Encoded::new(1, |w| {
                w.u64(*client).u32(*silence_ms);
            }),
            Self::Grant { gpu, epoch, prefetch } => Encoded::new(2, |w| {
                w.bytes(gpu).u64(*epoch).u64(*prefetch);
            }),
            Self::Revoke { gpu, epoch, drain_ms, shortfall } => Encoded::new(3, |w| {
                w.bytes(gpu).u64(*epoch).u32(*drain_ms).u64(*shortfall);
            }),
            Self::Alive => Encoded::new(4, |_| {}),
            Self::Refused { code, detail } => Encoded::new(5, |w| {
                w.u16(*code as u16).bytes(&detail.0);
            }),
            Self::Room { gpu, unevictable, host } => Encoded::new(6, |w| {
                w.bytes(gpu).u64(*unevictable).u64(*host);
            }),
            Self::Limit { bytes } => Encoded::new(7, |w| {
                w.u64(*bytes);
            }),
            Self::Displaced { gpu, brought, pushed } => Encoded::new(8, |w| {
                w.bytes(gpu).u32(*brought).u32(*pushed);
            }),
        }
    }

    /// Reads the payload of a frame of this kind.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, MessageError> {
        let mut r = Reader::new(payload);
        let message = match kind {
            1 => Self::Welcome { client: r.u64()?, silence_ms: r.u32()? },
            2 => Self::Grant { gpu: r.array()?, epoch: r.u64()?, prefetch: r.u64()? },
            3 => Self::Revoke { gpu: r.array()?, epoch: r.u64()?, drain_ms: r.u32()?, shortfall: r.u64()? },
            4 => Self::Alive,
            5 => Self::Refused { code: RefusalCode::decode(r.u16()?)?, detail: Label::decode(r.array()?)? },
            6 => Self::Room { gpu: r.array()?, unevictable: r.u64()?, host: r.u64()? },
            7 => Self::Limit { bytes: r.u64()? },
            8 => Self::Displaced { gpu: r.array()?, brought: r.u32()?, pushed: r.u32()? },
            other => return Err(MessageError::UnknownKind(other)),
        };
        r.finish()?;
        Ok(message)
    }
}
