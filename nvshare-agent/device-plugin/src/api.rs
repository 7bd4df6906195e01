//! The kubelet's interface, generated from `proto/deviceplugin.proto` (`tests/generated.rs` holds them together).
#![expect(
    missing_docs,
    unused_qualifications,
    clippy::allow_attributes_without_reason,
    clippy::pedantic,
    reason = "generated; the description has the comments"
)]

include!("api/v1beta1.rs");

/// The version of the interface, as the kubelet compares it.
pub const VERSION: &str = "v1beta1";
/// The kubelet's socket in its directory of device plugins.
pub const KUBELET_SOCKET: &str = "kubelet.sock";
/// A device that can be given away.
pub const HEALTHY: &str = "Healthy";
/// A device that must not be given away.
pub const UNHEALTHY: &str = "Unhealthy";
