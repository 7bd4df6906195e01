//! The names of the policies.

use std::{fmt, str::FromStr};

use crate::{quantity::parse_time, units::Nanos};

/// A policy, as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// nvshare's engine.
    Auto,
    /// Everybody at once.
    Shared,
    /// Stock nvshare's lock with a fixed quantum.
    Exclusive(Nanos),
    /// XPUShare's rule.
    AllocationSum,
    /// Nixie's rules.
    Nixie,
    /// What could be had with full knowledge.
    Oracle,
}

/// A text that names no policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{0}` is no policy; expected auto, shared, exclusive:SECONDS (as in exclusive:30), allocation-sum, nixie or oracle"
)]
pub struct UnknownPolicy(String);

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        let unknown = || UnknownPolicy(text.to_owned());
        match text {
            "auto" => Ok(Self::Auto),
            "shared" => Ok(Self::Shared),
            "allocation-sum" => Ok(Self::AllocationSum),
            "nixie" => Ok(Self::Nixie),
            "oracle" => Ok(Self::Oracle),
            _ => {
                let seconds = text.strip_prefix("exclusive:").ok_or_else(unknown)?;
                match parse_time(&format!("{seconds} s")) {
                    Ok(quantum) if quantum >= Nanos::MILLI => Ok(Self::Exclusive(quantum)),
                    _ => Err(unknown()),
                }
            }
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Shared => f.write_str("shared"),
            Self::Exclusive(quantum) => write!(f, "exclusive:{}", quantum.as_secs_f64()),
            Self::AllocationSum => f.write_str("allocation-sum"),
            Self::Nixie => f.write_str("nixie"),
            Self::Oracle => f.write_str("oracle"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_being_read_and_written_and_others_are_refused() {
        for name in ["auto", "shared", "exclusive:30", "exclusive:2.5", "allocation-sum", "nixie", "oracle"] {
            assert_eq!(name.parse::<PolicyKind>().unwrap().to_string(), name);
        }
        for name in ["", "exclusive", "exclusive:", "exclusive:0", "exclusive:-1", "exclusive:x s", "best"] {
            assert!(name.parse::<PolicyKind>().is_err(), "{name}");
        }
    }
}
