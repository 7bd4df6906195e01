//! Identities. None of them is taken from what a client says of itself.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A client: one process with a session (or one observed without a session). Never reused by one agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClientId(pub u64);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}", self.0)
    }
}

/// A job: processes that wait for each other on the GPU; granted and revoked together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub u64);

/// Counts the grants and revocations of one client on one GPU; an answer that names an older one is stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The one after this.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A GPU or MIG instance, by UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuId(pub [u8; 16]);

/// A text that is not a GPU UUID.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{0}` is not a GPU UUID; expected GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx as printed by `nvidia-smi -L`"
)]
pub struct InvalidGpuId(String);

impl fmt::Display for GpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU-")?;
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for GpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for GpuId {
    type Err = InvalidGpuId;

    fn from_str(text: &str) -> Result<Self, InvalidGpuId> {
        let invalid = || InvalidGpuId(text.to_owned());
        let body = text.strip_prefix("GPU-").or_else(|| text.strip_prefix("MIG-")).ok_or_else(invalid)?;
        let digits: Vec<u8> = body
            .bytes()
            .filter(|&b| b != b'-')
            .map(|b| char::from(b).to_digit(16).map(|digit| digit as u8))
            .collect::<Option<_>>()
            .ok_or_else(invalid)?;
        let mut uuid = [0; 16];
        if digits.len() != 32 {
            return Err(invalid());
        }
        for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(uuid))
    }
}

impl Serialize for GpuId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GpuId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_uuid_survives_its_text_form() {
        let id = GpuId(std::array::from_fn(|i| i as u8 * 17));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("GPU-123".parse::<GpuId>().is_err());
        assert!("00112233-4455-6677-8899-aabbccddeeff".parse::<GpuId>().is_err());
    }
}
