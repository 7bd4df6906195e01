//! The name of one share of a GPU, which is what the kubelet calls a device.

use std::{fmt, str::FromStr};

use nvshare_core::GpuId;

/// Between the GPU and the number. The name is kept in the kubelet's checkpoint, so its form does not change.
const SEPARATOR: &str = "::";

/// One share of one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share {
    /// Of which GPU.
    pub gpu: GpuId,
    /// Which one, from 0.
    pub number: u32,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{SEPARATOR}{}", self.gpu, self.number)
    }
}

/// A text that names no share.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a device of this plugin; its devices are named GPU-<uuid>::<number>")]
pub struct InvalidShare(String);

impl FromStr for Share {
    type Err = InvalidShare;

    fn from_str(text: &str) -> Result<Self, InvalidShare> {
        let invalid = || InvalidShare(text.to_owned());
        let (gpu, number) = text.split_once(SEPARATOR).ok_or_else(invalid)?;
        let (Ok(gpu), Ok(number)) = (gpu.parse(), number.parse()) else { return Err(invalid()) };
        let share = Self { gpu, number };
        // Only the form that the kubelet was given; the same share under two names could be given away twice.
        if share.to_string() == text { Ok(share) } else { Err(invalid()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_survives_its_name_and_the_name_is_short_enough_for_the_kubelet() {
        let share = Share { gpu: GpuId([0xab; 16]), number: u32::MAX };
        assert_eq!(share.to_string().parse(), Ok(share));
        assert!(share.to_string().len() <= 63);
    }

    #[test]
    fn a_share_has_one_name_only() {
        let name = Share { gpu: GpuId([0xab; 16]), number: 3 }.to_string();
        for other in [
            name.to_uppercase(),
            name.replace("::3", "::03"),
            name.replace("::3", "::+3"),
            name.replace("::3", ""),
            name.replace("GPU-", "MIG-"),
            format!("{name} "),
            "::".to_owned(),
            String::new(),
        ] {
            assert!(other.parse::<Share>().is_err(), "{other}");
        }
    }
}
