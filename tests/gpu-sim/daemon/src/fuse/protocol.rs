//! The FUSE kernel protocol, as far as two device-like files in one directory need it (version 7.31).

/// Bytes of a request's head.
pub(super) const HEAD: usize = 40;
/// The largest request: the kernel wants room for its smallest write buffer.
pub(super) const BUFFER: usize = 64 << 10;

/// Operations that are answered; all others are "not implemented".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Lookup,
    Forget,
    GetAttr,
    Open,
    Read,
    StatFs,
    Release,
    Init,
    OpenDir,
    ReadDir,
    ReleaseDir,
    Interrupt,
    Destroy,
    Ioctl,
    BatchForget,
    Other,
}

impl Opcode {
    fn of(value: u32) -> Self {
        match value {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::GetAttr,
            14 => Self::Open,
            15 => Self::Read,
            17 => Self::StatFs,
            18 => Self::Release,
            26 => Self::Init,
            27 => Self::OpenDir,
            28 => Self::ReadDir,
            29 => Self::ReleaseDir,
            36 => Self::Interrupt,
            38 => Self::Destroy,
            39 => Self::Ioctl,
            42 => Self::BatchForget,
            _ => Self::Other,
        }
    }
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub(super) opcode: Opcode,
    pub(super) unique: u64,
    pub(super) node: u64,
    /// The calling thread; 0 if it is in a process-id namespace that this process does not see.
    pub(super) tid: u32,
    pub(super) body: &'a [u8],
}

impl<'a> Request<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let body = bytes.get(HEAD..)?;
        Some(Self {
            opcode: Opcode::of(u32_at(bytes, 4)),
            unique: u64_at(bytes, 8),
            node: u64_at(bytes, 16),
            tid: u32_at(bytes, 32),
            body,
        })
    }

    pub(super) fn u32(&self, offset: usize) -> u32 {
        u32_at(self.body, offset)
    }

    pub(super) fn u64(&self, offset: usize) -> u64 {
        u64_at(self.body, offset)
    }

    /// The name in a lookup.
    pub(super) fn name(&self) -> &'a [u8] {
        self.body.split(|&byte| byte == 0).next().unwrap_or_default()
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).map_or(0, bytemuck::pod_read_unaligned)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).map_or(0, bytemuck::pod_read_unaligned)
}

/// A reply's bytes, head included. `error` is 0 or negative.
pub(super) fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(&error.to_ne_bytes());
    bytes.extend_from_slice(&unique.to_ne_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Puts numbers of different widths one after the other.
#[derive(Debug, Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend_from_slice(value);
        self
    }
}

/// `fuse_init_out`: no optional features.
pub(super) fn init() -> Vec<u8> {
    Body::default()
        .u32(7)
        .u32(31)
        .u32(0)
        .u32(0)
        .u16(16)
        .u16(12)
        .u32(4096)
        .u32(1)
        .u16(1)
        .u16(0)
        .bytes(&[0; 32])
        .0
}

/// `fuse_attr`.
pub(super) fn attributes(node: u64, mode: u32, owner: (u32, u32)) -> Vec<u8> {
    Body::default()
        .u64(node)
        .bytes(&[0; 5 * 8])
        .bytes(&[0; 3 * 4])
        .u32(mode)
        .u32(1)
        .u32(owner.0)
        .u32(owner.1)
        .u32(0)
        .u32(4096)
        .u32(0)
        .0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(init().len(), 64);
        assert_eq!(attributes(1, 0, (0, 0)).len(), 88);
        assert_eq!(reply(1, 0, &[0; 8]).len(), 24);
    }

    #[test]
    fn a_request_that_is_too_short_is_no_request() {
        assert!(Request::parse(&[0; HEAD - 1]).is_none());
        assert!(Request::parse(&[0; HEAD]).is_some_and(|request| request.u64(0) == 0));
    }
}
