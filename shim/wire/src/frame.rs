//! The frame header: what lets two versions recognise each other and skip what they do not know.

use core::fmt;

/// `NVSH` in memory order; a peer that speaks something else is told so at its first four bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NVSH");
/// The protocol version. It changes when an existing message changes; new kinds do not change it.
pub const VERSION: u16 = 1;
/// Bytes of a [`Header`].
pub const HEADER_LEN: usize = 16;
/// The largest payload a peer may announce, in bytes.
pub const MAX_PAYLOAD: usize = 512;
/// The largest whole frame, in bytes.
pub const FRAME_MAX: usize = HEADER_LEN + MAX_PAYLOAD;

/// A decoded frame header. Layout: magic u32, version u16, kind u16, payload length u32, zero u32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The message kind; its meaning depends on the direction.
    pub kind: u16,
    /// Payload bytes that follow the header, at most [`MAX_PAYLOAD`].
    pub len: u32,
}

/// Why a header was refused. The stream cannot be trusted after any of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The first four bytes are not [`MAGIC`].
    Magic(u32),
    /// The peer speaks another protocol version.
    Version(u16),
    /// The announced payload is larger than [`MAX_PAYLOAD`].
    Length(u32),
    /// The reserved field is not zero.
    Reserved(u32),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(magic) => write!(f, "not an nvshare frame (starts with {magic:#010x})"),
            Self::Version(version) => {
                write!(f, "peer speaks protocol version {version}, this side speaks {VERSION}")
            }
            Self::Length(len) => write!(f, "announced payload of {len} bytes, at most {MAX_PAYLOAD} allowed"),
            Self::Reserved(value) => write!(f, "reserved header field is {value:#x}, must be 0"),
        }
    }
}

impl core::error::Error for FrameError {}

impl Header {
    /// The header as it goes onto the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads a header, checking everything but the kind.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, r0, r1, r2, r3] = *bytes;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        let version = u16::from_le_bytes([v0, v1]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let reserved = u32::from_le_bytes([r0, r1, r2, r3]);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if len as usize > MAX_PAYLOAD {
            return Err(FrameError::Length(len));
        }
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        Ok(Self { kind: u16::from_le_bytes([k0, k1]), len })
    }
}
