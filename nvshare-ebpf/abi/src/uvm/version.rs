//! Driver versions: `580.126.20`, `565.77`.

use core::{fmt, str::FromStr};

/// A driver version. Ordered as releases are: by branch, then number, then patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DriverVersion {
    /// The branch, as in 580.
    pub branch: u16,
    /// The number within the branch.
    pub minor: u16,
    /// The third part, 0 where the version has two.
    pub patch: u16,
}

/// A text that is not a driver version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidDriverVersion;

impl DriverVersion {
    /// A version from its three parts.
    pub const fn new(branch: u16, minor: u16, patch: u16) -> Self {
        Self { branch, minor, patch }
    }

    /// The first version in the text of `/proc/driver/nvidia/version` or `/sys/module/nvidia_uvm/version`.
    pub fn find_in(text: &str) -> Option<Self> {
        text.split_ascii_whitespace().find_map(|word| word.parse().ok())
    }

    /// The name under `nvidia-uvm/gpus/` in procfs of the GPU that an event calls `processor`.
    ///
    /// Up to branch 545 events carry the number of the parent GPU and the name counts eight slots for each;
    /// later both are the same.
    pub const fn procfs_gpu(self, processor: u32) -> Option<u32> {
        if processor == 0 || processor >= super::PROCESSORS {
            return None;
        }
        Some(if self.branch <= 545 { (processor - 1) * 8 + 1 } else { processor })
    }

    /// The name under `nvidia-uvm/gpus/` in procfs of the GPU with this parent id (the number in the name of its
    /// fault-service thread, from 1). The same in every branch.
    pub const fn procfs_gpu_of_parent(parent: u32) -> Option<u32> {
        if parent == 0 || parent > 32 { None } else { Some((parent - 1) * 8 + 1) }
    }
}

impl FromStr for DriverVersion {
    type Err = InvalidDriverVersion;

    fn from_str(text: &str) -> Result<Self, InvalidDriverVersion> {
        let mut parts = text.split('.').map(|part| {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            if digits { part.parse::<u16>().ok() } else { None }
        });
        let (Some(Some(branch)), Some(Some(minor))) = (parts.next(), parts.next()) else {
            return Err(InvalidDriverVersion);
        };
        let patch = match parts.next() {
            None => 0,
            Some(patch) => patch.ok_or(InvalidDriverVersion)?,
        };
        if parts.next().is_some() {
            return Err(InvalidDriverVersion);
        }
        Ok(Self { branch, minor, patch })
    }
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { branch, minor, patch } = *self;
        if patch == 0 {
            write!(f, "{branch}.{minor:02}")
        } else {
            write!(f, "{branch}.{minor:02}.{patch:02}")
        }
    }
}

impl fmt::Display for InvalidDriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a driver version; expected a form such as 580.126.20")
    }
}

impl core::error::Error for InvalidDriverVersion {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_as_releases_do() {
        let parse = |text: &str| text.parse::<DriverVersion>();
        assert_eq!(parse("580.126.20"), Ok(DriverVersion::new(580, 126, 20)));
        assert_eq!(parse("565.77"), Ok(DriverVersion::new(565, 77, 0)));
        assert!(parse("550.40.07").unwrap() < parse("550.163.01").unwrap());
        for bad in ["", "580", "580.", "x86_64", "580.1.2.3", "580.+1", "99999.1"] {
            assert_eq!(parse(bad), Err(InvalidDriverVersion), "{bad}");
        }
    }

    #[test]
    fn the_version_is_found_in_what_the_driver_prints() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.20  Release Build  (a@b)\nGCC version: gcc version 12.2.0";
        assert_eq!(DriverVersion::find_in(open), Some(DriverVersion::new(580, 126, 20)));
        assert_eq!(DriverVersion::find_in("565.77\n"), Some(DriverVersion::new(565, 77, 0)));
        assert_eq!(DriverVersion::find_in("nothing here"), None);
    }

    #[test]
    fn gpu_numbers_follow_the_branch() {
        let (old, new) = (DriverVersion::new(535, 288, 1), DriverVersion::new(580, 126, 20));
        // The second GPU of a host.
        assert_eq!(old.procfs_gpu(2), Some(9));
        assert_eq!(new.procfs_gpu(9), Some(9));
        assert_eq!(DriverVersion::procfs_gpu_of_parent(2), Some(9));
        assert_eq!(DriverVersion::procfs_gpu_of_parent(0), None);
        assert_eq!(new.procfs_gpu(0), None);
        assert_eq!(new.procfs_gpu(257), None);
    }
}
