//! `nvsharectl set`: orders as they are typed, and the requests they become.

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use nvshare_core::{
    Bytes, ClientId, GpuId, ModeOrder, Nanos,
    quantity::{milli, parse_duration, parse_size, ratio},
};

use super::cli::Format;
use crate::operator::protocol::{Request, Who};

/// What to change.
#[derive(Debug, Subcommand)]
pub enum Order {
    /// Force a mode on all GPUs or one, or let the agent decide.
    Mode {
        /// auto: the agent decides; shared: everybody at once; exclusive: one at a time.
        mode: Mode,
        /// Only on this GPU [default: all].
        #[arg(long, value_name = "UUID")]
        gpu: Option<GpuId>,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
    /// Fix the length of turns, or let it follow from what a hand-over costs.
    Quantum {
        /// A duration such as 2s or 500ms (10 ms to 24 h), or auto.
        #[arg(value_parser = quantum)]
        quantum: Setting<Nanos>,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
    /// Bound the length of turns that follows from what a hand-over costs.
    QuantumMax {
        /// A duration such as 20s (10 ms to 24 h), or default for what the configuration says.
        #[arg(value_parser = quantum_max)]
        quantum_max: Setting<Nanos>,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
    /// Set the share of GPU time that hand-overs may cost: less makes turns longer.
    Overhead {
        /// A share such as 0.05 (0.001 to 0.9), or default for what the configuration says.
        #[arg(value_parser = overhead)]
        overhead: Setting<u32>,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
    /// Give clients a larger or smaller share of the GPU while they take turns.
    Weight {
        /// 2 is twice the usual share, 0.5 half of it (0.001 to 1000); or default.
        #[arg(value_parser = weight)]
        weight: Setting<u32>,
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
    /// Put clients into a class: while they take turns, a higher class runs first.
    ///
    /// Whoever has waited for a minute runs whatever its class, so that nobody starves.
    Priority {
        /// A whole number (-1000 to 1000; usual is 0), or default.
        #[arg(value_parser = priority, allow_hyphen_values = true)]
        priority: Setting<i32>,
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
    /// Limit what clients may hold on each GPU.
    ///
    /// An allocation beyond it fails as on a smaller GPU. What a program holds already stays. A program's own
    /// NVSHARE_MEMORY_LIMIT holds as well, whichever is smaller.
    Limit {
        /// A size such as 8GiB or 500MiB, or none.
        #[arg(value_parser = limit)]
        limit: Setting<Bytes>,
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// For how long.
        #[command(flatten)]
        lasting: Lasting,
    },
}

/// For how long a change holds, and how its answer is printed.
#[derive(Clone, Copy, Debug, Args)]
pub struct Lasting {
    /// Keep it over a restart of the agent, in the file that `nvsharectl settings` names; not for single clients, which
    /// do not outlive their program.
    #[arg(long)]
    pub persist: bool,
    /// Format of the answer.
    #[command(flatten)]
    pub format: Format,
}

/// Whom a change is about.
#[derive(Clone, Debug, Args)]
#[command(group = ArgGroup::new("whose").required(true).args(["client", "user"]))]
pub struct Whose {
    /// A client by its number (c3) or process id, as in `nvsharectl clients`.
    #[arg(long, value_name = "ID|PID", value_parser = client)]
    pub client: Option<Who>,
    /// All clients of a user, also those that come later; by name or number.
    #[arg(long, value_name = "NAME|UID", value_parser = user)]
    pub user: Option<Who>,
}

/// A mode.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[expect(missing_docs, reason = "the argument's help says what they are")]
pub enum Mode {
    Auto,
    Shared,
    Exclusive,
}

/// A value, or what holds without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting<T>(Option<T>);

fn setting<T>(
    text: &str,
    without: &str,
    read: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Setting<T>, String> {
    if text == without {
        return Ok(Setting(None));
    }
    read(text).map(|value| Setting(Some(value))).map_err(|error| format!("{error}, or {without}"))
}

fn duration(text: &str) -> Result<Nanos, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

fn number(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_invalid: std::num::ParseFloatError| format!("`{text}` is not a number"))
}

fn quantum(text: &str) -> Result<Setting<Nanos>, String> {
    setting(text, "auto", duration)
}

fn quantum_max(text: &str) -> Result<Setting<Nanos>, String> {
    setting(text, "default", duration)
}

fn overhead(text: &str) -> Result<Setting<u32>, String> {
    setting(text, "default", |text| ratio(number(text)?).map_err(|error| error.to_string()))
}

fn weight(text: &str) -> Result<Setting<u32>, String> {
    setting(text, "default", |text| milli(number(text)?).map_err(|error| error.to_string()))
}

fn priority(text: &str) -> Result<Setting<i32>, String> {
    setting(text, "default", |text| {
        let number = text.parse::<i32>().ok().filter(|priority| (-1000..=1000).contains(priority));
        number.ok_or_else(|| format!("`{text}` is not a whole number from -1000 to 1000"))
    })
}

fn limit(text: &str) -> Result<Setting<Bytes>, String> {
    setting(text, "none", |text| parse_size(text).map_err(|error| error.to_string()))
}

fn client(text: &str) -> Result<Who, String> {
    let id =
        text.strip_prefix('c').and_then(|number| number.parse().ok()).map(|id| Who::Client(ClientId(id)));
    id.or_else(|| text.parse().ok().map(Who::Pid)).ok_or_else(|| {
        format!(
            "`{text}` is neither a client's number (c3) nor a process id; `nvsharectl clients` shows both"
        )
    })
}

fn user(text: &str) -> Result<Who, String> {
    let by_name = || uid_of(&std::fs::read_to_string("/etc/passwd").unwrap_or_default(), text);
    text.parse().ok().or_else(by_name).map(Who::Uid).ok_or_else(|| {
        format!("no user `{text}` in /etc/passwd; a user from elsewhere goes by its number (`id -u {text}`)")
    })
}

/// The number of a user in the text of /etc/passwd.
fn uid_of(passwd: &str, name: &str) -> Option<u32> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

impl Whose {
    fn who(&self) -> Who {
        // The command line asks for exactly one.
        self.client.or(self.user).unwrap_or(Who::Client(ClientId(0)))
    }
}

impl Order {
    /// The request, and how its answer is printed.
    pub fn request(&self) -> (Request, Format) {
        match self {
            Self::Mode { mode, gpu, lasting: Lasting { persist, format } } => {
                let mode = match mode {
                    Mode::Auto => ModeOrder::Auto,
                    Mode::Shared => ModeOrder::Shared,
                    Mode::Exclusive => ModeOrder::Exclusive,
                };
                (Request::SetMode { gpu: *gpu, mode, persist: *persist }, *format)
            }
            Self::Quantum { quantum, lasting: Lasting { persist, format } } => {
                (Request::SetQuantum { quantum: quantum.0, persist: *persist }, *format)
            }
            Self::QuantumMax { quantum_max, lasting: Lasting { persist, format } } => {
                (Request::SetQuantumMax { quantum_max: quantum_max.0, persist: *persist }, *format)
            }
            Self::Overhead { overhead, lasting: Lasting { persist, format } } => {
                (Request::SetOverhead { overhead_milli: overhead.0, persist: *persist }, *format)
            }
            Self::Weight { weight, whose, lasting: Lasting { persist, format } } => {
                let (who, persist) = (whose.who(), *persist);
                (Request::SetWeight { who, weight_milli: weight.0, persist }, *format)
            }
            Self::Priority { priority, whose, lasting: Lasting { persist, format } } => {
                let (who, persist) = (whose.who(), *persist);
                (Request::SetPriority { who, priority: priority.0, persist }, *format)
            }
            Self::Limit { limit, whose, lasting: Lasting { persist, format } } => {
                let (who, persist) = (whose.who(), *persist);
                (Request::SetLimit { who, bytes: limit.0, persist }, *format)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_go_by_number_or_process_and_nothing_else() {
        assert_eq!(client("c12"), Ok(Who::Client(ClientId(12))));
        assert_eq!(client("12"), Ok(Who::Pid(12)));
        for wrong in ["", "c", "cc1", "-1", "python"] {
            assert!(client(wrong).unwrap_err().contains("nvsharectl clients"), "{wrong}");
        }
    }

    #[test]
    fn users_go_by_name_or_number() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\nalice2:x:7:7::/:\nalice:x:1001:1001::/home/alice:/bin/sh\n";
        assert_eq!((uid_of(passwd, "alice"), uid_of(passwd, "bob")), (Some(1001), None));
        assert_eq!(user("root"), Ok(Who::Uid(0)));
        assert_eq!(user("4711"), Ok(Who::Uid(4711)));
        assert!(user("no such user").unwrap_err().contains("id -u"));
    }

    #[test]
    fn a_wrong_value_is_told_with_what_would_be_right() {
        for (error, said) in [
            (quantum("5").unwrap_err(), "ms, s, min, h"),
            (quantum_max("0s").unwrap_err(), "or default"),
            (overhead("2").unwrap_err(), "between 0.001 and 0.9"),
            (weight("heavy").unwrap_err(), "`heavy` is not a number"),
            (weight("-1").unwrap_err(), "0.001 to 1000"),
            (priority("1.5").unwrap_err(), "-1000 to 1000"),
            (limit("8").unwrap_err(), "MiB, GiB"),
        ] {
            assert!(error.contains(said), "{error}");
        }
        assert_eq!(limit("none"), Ok(Setting(None)));
        assert_eq!(weight("0.5"), Ok(Setting(Some(500))));
        assert_eq!(priority("-3"), Ok(Setting(Some(-3))));
    }
}
