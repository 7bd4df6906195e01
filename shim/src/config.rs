//! What the environment says, read once at the first CUDA look-up. A bad value is named in one line and
//! the default holds.

use std::{
    ffi::OsString,
    path::PathBuf,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use nvshare_wire::Mover;

use crate::log::{self, Level, warning};

/// The settings of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// `NVSHARE_DISABLE`: nothing is hooked.
    pub(crate) disabled: bool,
    /// `NVSHARE_RUN_DIR`: where the agent's socket lies.
    pub(crate) run_dir: PathBuf,
    /// `NVSHARE_LOG`.
    pub(crate) level: Level,
    /// `NVSHARE_MANAGED_MIN_BYTES`: smaller blocks stay plain device memory; `u64::MAX` is all of them.
    pub(crate) managed_min: u64,
    /// `NVSHARE_MEMORY_LIMIT`: bytes this process may hold on each device; `None` is the whole device.
    pub(crate) memory_limit: Option<u64>,
    /// `NVSHARE_ALLOW_SINGLE_OVERSUB`: this process alone may hold more than a device has.
    pub(crate) allow_oversub: bool,
    /// `NVSHARE_WEIGHT` in thousandths, at most 1000.
    pub(crate) weight_milli: u32,
    /// `NVSHARE_PRIORITY`, at most 0.
    pub(crate) priority: i32,
    /// `NVSHARE_HANDOVER`: how memory is moved; not proven means that the driver is to show what it does best.
    pub(crate) handover: Mover,
    /// `NVSHARE_TEST_EVACUATE`: each hand-over moves all that is known to be resident, however little is asked for.
    pub(crate) evacuate: bool,
    /// `NVSHARE_TEST_FAIL`: a step of moving memory that fails every so many times.
    pub(crate) failing: Option<Failing>,
}

/// A step of moving memory, for tests of what happens when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Memory cannot be protected.
    Protect,
    /// The driver refuses to move it.
    Prefetch,
    /// Waiting for the move reports an error.
    Wait,
    /// The host is short of memory.
    Host,
    /// The thread that moves it panics, in the middle of it.
    Panic,
    /// That thread is gone without a word.
    Vanish,
    /// It does not come back for longer than a gate waits for it.
    Stall,
}

/// Which step fails, and every how many times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failing {
    pub(crate) step: Step,
    pub(crate) every: u32,
}

impl Failing {
    fn read(text: &str) -> Option<Self> {
        let (step, every) = text.split_once(':')?;
        let step = match step {
            "protect" => Step::Protect,
            "prefetch" => Step::Prefetch,
            "wait" => Step::Wait,
            "host" => Step::Host,
            "panic" => Step::Panic,
            "vanish" => Step::Vanish,
            "stall" => Step::Stall,
            _ => return None,
        };
        Some(Self { step, every: every.parse().ok().filter(|&every| every > 0)? })
    }
}

/// Blocks above 2 MiB, the unit in which UVM moves memory. A smaller one cannot be evicted for itself; and
/// PyTorch keeps its small tensors in blocks of just 2 MiB, which plain device memory can share with
/// other processes (CUDA IPC).
const MANAGED_MIN: u64 = (2 << 20) + 1;

/// What launchers of several ranks tell each of them: how many there are. Ranks share GPU memory with each other (CUDA IPC
/// under MPI and older NCCL, network cards that read GPU memory), which managed memory cannot be.
const RANKS: [&str; 5] =
    ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

impl Default for Config {
    fn default() -> Self {
        Self {
            disabled: false,
            run_dir: PathBuf::from("/run/nvshare"),
            level: Level::Warn,
            managed_min: MANAGED_MIN,
            memory_limit: None,
            allow_oversub: false,
            weight_milli: 1000,
            priority: 0,
            handover: Mover::Unproven,
            evacuate: false,
            failing: None,
        }
    }
}

static CONFIG: AtomicPtr<Config> = AtomicPtr::new(ptr::null_mut());

/// The settings, read from the environment by the first caller.
pub(crate) fn get() -> &'static Config {
    // SAFETY: stored settings are never freed.
    unsafe { CONFIG.load(Ordering::Acquire).as_ref() }.unwrap_or_else(read)
}

/// Two first callers both read, and one is heard: a child that is forked meanwhile has nobody to wait for.
#[cold]
fn read() -> &'static Config {
    let (config, complaints) = Config::read(|name| std::env::var_os(name));
    let level = config.level;
    let new = Box::into_raw(Box::new(config));
    match CONFIG.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            log::set_level(level);
            for complaint in complaints {
                warning!("{complaint}");
            }
            // SAFETY: just made, never freed.
            unsafe { &*new }
        }
        Err(other) => {
            // SAFETY: nobody else has seen `new`; `other` are the settings that won.
            unsafe {
                drop(Box::from_raw(new));
                &*other
            }
        }
    }
}

impl Config {
    /// Reads settings through `lookup`; returns them and a line for each value that was refused.
    fn read(lookup: impl Fn(&str) -> Option<OsString>) -> (Self, Vec<String>) {
        let mut config = Self::default();
        let mut complaints = Vec::new();
        let mut value = |name: &str, expected: &str, take: &mut dyn FnMut(&str) -> Option<()>| {
            let Some(raw) = lookup(name).filter(|raw| !raw.is_empty()) else { return };
            if raw.to_str().map(str::trim).and_then(take).is_none() {
                complaints.push(format!("{name}={} is ignored: expected {expected}", raw.display()));
            }
        };
        value("NVSHARE_DISABLE", "0 or 1", &mut |text| switch(text).map(|on| config.disabled = on));
        value("NVSHARE_DEBUG", "0 or 1", &mut |text| {
            switch(text).map(|on| {
                if on {
                    config.level = Level::Debug;
                }
            })
        });
        value("NVSHARE_LOG", "off, error, warn, info or debug", &mut |text| {
            config.level = match text {
                "off" => Level::Off,
                "error" => Level::Error,
                "warn" => Level::Warn,
                "info" => Level::Info,
                "debug" => Level::Debug,
                _ => return None,
            };
            Some(())
        });
        let mut chosen = false;
        value("NVSHARE_MANAGED_MIN_BYTES", "bytes, such as 2097152 or \"2 MiB\", or never", &mut |text| {
            let least = if text == "never" { Some(u64::MAX) } else { bytes(text) };
            chosen = least.is_some();
            least.map(|bytes| config.managed_min = bytes.max(1))
        });
        value("NVSHARE_MEMORY_LIMIT", "bytes above 0, such as \"8 GiB\"", &mut |text| {
            bytes(text).filter(|&bytes| bytes > 0).map(|bytes| config.memory_limit = Some(bytes))
        });
        for name in ["NVSHARE_ENABLE_SINGLE_OVERSUB", "NVSHARE_ALLOW_SINGLE_OVERSUB"] {
            value(name, "0 or 1", &mut |text| switch(text).map(|on| config.allow_oversub = on));
        }
        value(
            "NVSHARE_WEIGHT",
            "a number above 0 and at most 1 (only the administrator can raise it)",
            &mut |text| {
                let milli = text.parse::<f64>().ok()? * 1000.0;
                (1.0..=1000.0).contains(&milli).then(|| config.weight_milli = milli.round() as u32)
            },
        );
        value(
            "NVSHARE_PRIORITY",
            "a whole number of at most 0 (only the administrator can raise it)",
            &mut |text| {
                text.parse().ok().filter(|&priority| priority <= 0).map(|priority| config.priority = priority)
            },
        );
        value("NVSHARE_HANDOVER", "protected, plain or demand", &mut |text| {
            config.handover = match text {
                "protected" => Mover::Protected,
                "plain" => Mover::Plain,
                "demand" => Mover::Demand,
                _ => return None,
            };
            Some(())
        });
        value("NVSHARE_TEST_EVACUATE", "0 or 1", &mut |text| switch(text).map(|on| config.evacuate = on));
        value("NVSHARE_TEST_FAIL", "STEP:EVERY", &mut |text| {
            Failing::read(text).map(|failing| config.failing = Some(failing))
        });
        let ranks = RANKS.iter().filter_map(|name| lookup(name)?.to_str()?.trim().parse::<u32>().ok()).max();
        if !chosen && ranks.is_some_and(|ranks| ranks > 1) {
            config.managed_min = u64::MAX;
        }
        if let Some(dir) = lookup("NVSHARE_RUN_DIR").filter(|dir| !dir.is_empty()) {
            config.run_dir = dir.into();
        }
        (config, complaints)
    }
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// A number of bytes with an optional unit.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "m" | "MiB" => 1 << 20,
        "G" | "g" | "GiB" => 1 << 30,
        "T" | "t" | "TiB" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor);
    }
    let value = number.parse::<f64>().ok()? * factor as f64;
    (value.is_finite() && value < u64::MAX as f64).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Config, Vec<String>) {
        Config::read(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn an_empty_environment_gives_the_defaults_without_complaint() {
        assert_eq!(read(&[]), (Config::default(), vec![]));
        assert_eq!(read(&[("NVSHARE_MEMORY_LIMIT", "")]), (Config::default(), vec![]));
    }

    #[test]
    fn the_memory_of_a_rank_stays_on_the_device_unless_the_user_says_otherwise() {
        let least = |pairs: &[(&str, &str)]| {
            let (config, complaints) = read(pairs);
            assert_eq!(complaints, Vec::<String>::new());
            config.managed_min
        };
        assert_eq!(least(&[("WORLD_SIZE", "8")]), u64::MAX);
        assert_eq!(least(&[("OMPI_COMM_WORLD_SIZE", "2")]), u64::MAX);
        assert_eq!(least(&[("WORLD_SIZE", "1"), ("PMI_SIZE", "many")]), MANAGED_MIN);
        assert_eq!(least(&[("WORLD_SIZE", "8"), ("NVSHARE_MANAGED_MIN_BYTES", "4MiB")]), 4 << 20);
        assert_eq!(least(&[("NVSHARE_MANAGED_MIN_BYTES", "never")]), u64::MAX);
    }

    #[test]
    fn every_setting_is_taken() {
        let (config, complaints) = read(&[
            ("NVSHARE_DISABLE", "1"),
            ("NVSHARE_RUN_DIR", "/tmp/x"),
            ("NVSHARE_LOG", "info"),
            ("NVSHARE_MANAGED_MIN_BYTES", "64 KiB"),
            ("NVSHARE_MEMORY_LIMIT", "1.5GiB"),
            ("NVSHARE_ENABLE_SINGLE_OVERSUB", "1"),
            ("NVSHARE_WEIGHT", "0.25"),
            ("NVSHARE_PRIORITY", "-3"),
            ("NVSHARE_HANDOVER", "plain"),
            ("NVSHARE_TEST_EVACUATE", "1"),
            ("NVSHARE_TEST_FAIL", "vanish:7"),
        ]);
        assert_eq!(complaints, Vec::<String>::new());
        assert_eq!(
            config,
            Config {
                disabled: true,
                run_dir: "/tmp/x".into(),
                level: Level::Info,
                managed_min: 64 << 10,
                memory_limit: Some(3 << 29),
                allow_oversub: true,
                weight_milli: 250,
                priority: -3,
                handover: Mover::Plain,
                evacuate: true,
                failing: Some(Failing { step: Step::Vanish, every: 7 }),
            }
        );
    }

    #[test]
    fn bad_values_keep_the_default_and_are_named_once_each() {
        let bad = [
            ("NVSHARE_DISABLE", "maybe"),
            ("NVSHARE_LOG", "loud"),
            ("NVSHARE_MANAGED_MIN_BYTES", "-5"),
            ("NVSHARE_MEMORY_LIMIT", "0"),
            ("NVSHARE_WEIGHT", "2"),
            ("NVSHARE_PRIORITY", "1"),
            ("NVSHARE_HANDOVER", "magic"),
            ("NVSHARE_TEST_FAIL", "panic:0"),
        ];
        let (config, complaints) = read(&bad);
        assert_eq!(config, Config::default());
        assert_eq!(complaints.len(), bad.len());
        for ((name, value), line) in
            bad.iter().zip(["DISABLE", "LOG", "MANAGED", "LIMIT", "WEIGHT", "PRIORITY", "HANDOVER", "FAIL"])
        {
            assert!(
                complaints.iter().any(|c| c.contains(name) && c.contains(value) && c.contains(line)),
                "{name} is not named in {complaints:?}"
            );
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert_eq!(bytes("99999999999 GiB"), None);
        assert_eq!(bytes("8 parsecs"), None);
        assert_eq!(bytes("inf"), None);
        assert_eq!(bytes("2 GB"), Some(2_000_000_000));
    }
}
