//! What an operator changed: over the configuration, for now or for good.
//!
//! What is meant to last is kept in a file of its own next to the configuration, so that nobody's comments are
//! lost and the configuration can be read-only. The file is replaced as a whole, never written in place.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use nvshare_core::{Bytes, GpuId, ModeOrder, Nanos, Order};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{ConfigError, EngineConfig, read_toml, text};

/// Begins the file.
const HEAD: &str =
    "# Written by `nvsharectl set --persist`. The agent reads it when it starts, over its configuration.\n";

/// Everything that an operator may change. An absent value leaves what the configuration says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overrides {
    /// The mode of every GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<ModeOrder>,
    /// The fixed quantum.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional_duration")]
    pub quantum: Option<Nanos>,
    /// The longest derived quantum.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional_duration")]
    pub quantum_max: Option<Nanos>,
    /// Share of GPU time that hand-overs may cost, in thousandths.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional_ratio")]
    pub overhead: Option<u32>,
    /// What differs on single GPUs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub gpu: BTreeMap<GpuId, GpuOverrides>,
    /// What holds for the programs of a user.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub user: BTreeMap<Uid, Rule>,
}

/// What differs on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuOverrides {
    /// Its mode.
    pub mode: ModeOrder,
}

/// A user's number; text where it is a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Uid(pub u32);

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Uid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Uid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = |_| D::Error::custom(format!("`{text}` is not the number of a user"));
        text.parse().map(Self).map_err(wrong)
    }
}

/// What holds for the programs of a user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// Share in thousandths of the default; what a program asks for lowers it further.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional_milli")]
    pub weight: Option<u32>,
    /// Class; what a program asks for lowers it further.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// The most that each program may hold on each GPU.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional_bytes")]
    pub memory_limit: Option<Bytes>,
}

impl Rule {
    /// The share of a program that asked for `wish` thousandths of the default.
    pub fn weight_milli(&self, wish: u32) -> u32 {
        let share = u64::from(self.weight.unwrap_or(1000)) * u64::from(wish) / 1000;
        u32::try_from(share).unwrap_or(u32::MAX).max(1)
    }

    /// The class of a program that asked for `wish`.
    pub fn priority(&self, wish: i32) -> i32 {
        self.priority.unwrap_or(0).saturating_add(wish)
    }

    /// What of `self` holds where `over` says nothing.
    #[must_use]
    pub fn under(self, over: Self) -> Self {
        Self {
            weight: over.weight.or(self.weight),
            priority: over.priority.or(self.priority),
            memory_limit: over.memory_limit.or(self.memory_limit),
        }
    }
}

/// One change. `None` goes back to what the configuration says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The mode of one GPU or of all, single ones included.
    Mode(Option<GpuId>, ModeOrder),
    /// The fixed quantum.
    Quantum(Option<Nanos>),
    /// The longest derived quantum.
    QuantumMax(Option<Nanos>),
    /// Share of GPU time that hand-overs may cost, in thousandths.
    Overhead(Option<u32>),
    /// A part of what holds for a user.
    User(Uid, RuleChange),
}

/// One change to a [`Rule`]. `None` takes it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleChange {
    /// The share, in thousandths.
    Weight(Option<u32>),
    /// The class.
    Priority(Option<i32>),
    /// The most memory on each GPU.
    Limit(Option<Bytes>),
}

impl RuleChange {
    /// Carries it out.
    pub fn apply(self, rule: &mut Rule) {
        match self {
            Self::Weight(weight) => rule.weight = weight,
            Self::Priority(priority) => rule.priority = priority,
            Self::Limit(limit) => rule.memory_limit = limit,
        }
    }
}

impl Overrides {
    /// Where the file of a configuration lies: `nvshare.toml` has `nvshare.overrides.toml`.
    pub fn beside(config: &Path) -> PathBuf {
        config.with_extension("overrides.toml")
    }

    /// Reads the file; without one nothing is overridden.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => read_toml(path, &text),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(why) => Err(ConfigError::Read { path: path.to_owned(), why }),
        }
    }

    /// Replaces the file, or leaves it as it is.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let new = path.with_extension("toml.new");
        let mut file = File::create(&new)?;
        let written = file.write_all(format!("{HEAD}{text}").as_bytes()).and_then(|()| file.sync_all());
        let replaced = written.and_then(|()| std::fs::rename(&new, path));
        if replaced.is_err() {
            // The first error is the one to tell.
            std::fs::remove_file(&new).ok();
        }
        replaced?;
        // The rename lasts once the directory is written.
        File::open(dir)?.sync_all()
    }

    /// Carries out a change.
    pub fn apply(&mut self, change: &Change) {
        match *change {
            Change::Mode(None, mode) => {
                self.gpu.clear();
                self.mode = (mode != ModeOrder::Auto).then_some(mode);
            }
            Change::Mode(Some(gpu), mode) if mode == self.mode.unwrap_or(ModeOrder::Auto) => {
                self.gpu.remove(&gpu);
            }
            Change::Mode(Some(gpu), mode) => {
                self.gpu.insert(gpu, GpuOverrides { mode });
            }
            Change::Quantum(quantum) => self.quantum = quantum,
            Change::QuantumMax(quantum_max) => self.quantum_max = quantum_max,
            Change::Overhead(overhead) => self.overhead = overhead,
            Change::User(uid, change) => {
                let rule = self.user.entry(uid).or_default();
                change.apply(rule);
                if *rule == Rule::default() {
                    self.user.remove(&uid);
                }
            }
        }
    }

    /// What the engine is to be told at the start, beside its configuration.
    pub fn orders(&self) -> Vec<Order> {
        let mode = self.mode.map(|mode| Order::Mode { gpu: None, mode });
        let gpus = self.gpu.iter().map(|(&gpu, over)| Order::Mode { gpu: Some(gpu), mode: over.mode });
        let quantum = self.quantum.map(|quantum| Order::Quantum { quantum: Some(quantum) });
        mode.into_iter().chain(gpus).chain(quantum).collect()
    }

    /// The engine's configuration with these changes.
    pub fn over(&self, engine: &EngineConfig) -> EngineConfig {
        let mut engine = engine.clone();
        engine.overhead = self.overhead.unwrap_or(engine.overhead);
        engine.quantum_max = self.quantum_max.unwrap_or(engine.quantum_max);
        engine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuId = GpuId([7; 16]);

    fn all_changes() -> Vec<Change> {
        vec![
            Change::Mode(None, ModeOrder::Exclusive),
            Change::Mode(Some(GPU), ModeOrder::Auto),
            Change::Quantum(Some(Nanos(1_234_567_891))),
            Change::QuantumMax(Some(Nanos::millis(290))),
            Change::Overhead(Some(125)),
            Change::User(Uid(1000), RuleChange::Weight(Some(2500))),
            Change::User(Uid(1000), RuleChange::Priority(Some(-3))),
            Change::User(Uid(0), RuleChange::Limit(Some(Bytes((1 << 30) + 12_345)))),
        ]
    }

    #[test]
    fn what_was_saved_is_loaded_again_to_the_last_digit() {
        let dir = tempfile::tempdir().unwrap();
        let path = Overrides::beside(&dir.path().join("nvshare.toml"));
        assert_eq!(path.file_name().unwrap(), "nvshare.overrides.toml");
        assert_eq!(Overrides::load(&path).unwrap(), Overrides::default());
        let mut overrides = Overrides::default();
        for change in all_changes() {
            overrides.apply(&change);
            overrides.save(&path).unwrap();
            assert_eq!(Overrides::load(&path).unwrap(), overrides, "{change:?}");
        }
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["nvshare.overrides.toml"], "nothing else stays behind");
    }

    #[test]
    fn taking_every_change_back_leaves_nothing() {
        let mut overrides = Overrides::default();
        for change in all_changes() {
            overrides.apply(&change);
        }
        for change in [
            Change::Mode(None, ModeOrder::Auto),
            Change::Quantum(None),
            Change::QuantumMax(None),
            Change::Overhead(None),
            Change::User(Uid(1000), RuleChange::Weight(None)),
            Change::User(Uid(1000), RuleChange::Priority(None)),
            Change::User(Uid(0), RuleChange::Limit(None)),
        ] {
            overrides.apply(&change);
        }
        assert_eq!(overrides, Overrides::default());
    }

    #[test]
    fn a_file_that_cannot_be_replaced_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("inside"), "x").unwrap();
        assert!(Overrides::default().save(&path).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the new file is gone");
        assert_eq!(std::fs::read_to_string(path.join("inside")).unwrap(), "x");
    }

    #[test]
    fn a_mistake_in_the_file_is_named_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.toml");
        for (text, said) in [
            ("modus = \"auto\"\n", "o.toml:1:1: unknown key `modus`"),
            ("[user.alice]\nweight = 2.0\n", "`alice` is not the number of a user"),
            ("[user.7]\nweight = -2.0\n", "out of range"),
            ("[gpu.GPU-1]\nmode = \"auto\"\n", "is not a GPU UUID"),
            ("quantum = \"5\"\n", "unit"),
            ("overhead = 2.0\n", "between 0.001 and 0.9"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Overrides::load(&path).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_program_only_lowers_what_its_user_has() {
        let rule = Rule { weight: Some(2000), priority: Some(3), memory_limit: None };
        assert_eq!((rule.weight_milli(1000), rule.priority(0)), (2000, 3));
        assert_eq!((rule.weight_milli(250), rule.priority(-5)), (500, -2));
        assert_eq!(Rule::default().weight_milli(0), 1);
    }
}
