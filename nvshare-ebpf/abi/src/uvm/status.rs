//! The driver's own status words, the `rmStatus` of its ioctls.

/// A status word. A bare ioctl that returns 0 has still failed unless this is [`Status::OK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u32);

impl Status {
    /// Success.
    pub const OK: Self = Self(0);
    /// The descriptor is one of nvidia-uvm but holds no VA space (`NV_ERR_ILLEGAL_ACTION`).
    pub const NOT_A_VA_SPACE: Self = Self(0x16);
    /// An argument is refused (`NV_ERR_INVALID_ARGUMENT`).
    pub const INVALID_ARGUMENT: Self = Self(0x1f);
    /// Not supported (`NV_ERR_NOT_SUPPORTED`).
    pub const NOT_SUPPORTED: Self = Self(0x56);
}
