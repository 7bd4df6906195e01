//! The protocol between the shim (`libnvshare.so`) and the agent.
//!
//! **Problem.** The shim lives in other people's processes and the agent serves all of them: a frame from
//! either side may be cut, wrong, hostile, or from another version.
//!
//! **Approach.** A stream of frames over the unix socket `clients.sock`: a 16-byte [`Header`] and at most
//! [`MAX_PAYLOAD`] bytes, little-endian, each message with one fixed layout ([`ClientMessage`],
//! [`AgentMessage`]). Descriptors travel beside the frame that names them (SCM_RIGHTS). What changes all the
//! time (calls, bytes) is not sent at all: it lies in a page that both sides map ([`page`]).
//!
//! **Invariants.** Decoding never panics and never allocates; it accepts exactly what encoding produces.
//! A frame of another version is recognisable as such ([`FrameError::Version`]); an unknown message kind is
//! skippable, because its length is known. Identity is never taken from a payload.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod codec;
mod frame;
mod message;
pub mod page;

pub use frame::{FRAME_MAX, FrameError, HEADER_LEN, Header, MAGIC, MAX_PAYLOAD, VERSION};
pub use message::{
    AgentMessage, ClientMessage, Direction, DrainOutcome, Encoded, GpuUuid, Label, MessageError, Mover,
    RefusalCode,
};
