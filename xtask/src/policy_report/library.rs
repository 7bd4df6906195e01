//! The scenario library: what each scenario stands for.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use nvshare_core::sim::Scenario;
use serde::Deserialize;

use super::bound::Known;
use crate::simulate::load;

/// What is asked of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Class {
    Thrash,
    Benign,
    Adversarial,
    Mixed,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Thrash => "thrash",
            Self::Benign => "benign",
            Self::Adversarial => "adversarial",
            Self::Mixed => "mixed",
        })
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) class: Class,
    pub(super) scenario: Scenario,
}

#[derive(Debug)]
pub(super) struct Library {
    /// By class, and within it in the order of `library.toml`.
    pub(super) entries: Vec<Entry>,
    pub(super) known: Known,
}

impl Library {
    /// Reads `library.toml`, all scenarios beside it, and `data/policy-report.toml`.
    pub(super) fn load(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let classes: BTreeMap<Class, Vec<String>> =
            toml::from_str(&read("library.toml")?).context("library.toml")?;
        let mut entries = Vec::new();
        for (class, names) in classes {
            for name in names {
                let scenario = load(&dir.join(format!("{name}.toml")))?;
                entries.push(Entry { name, class, scenario });
            }
        }
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let is_scenario = path.extension().is_some_and(|end| end == "toml") && name != "library";
            if is_scenario && !entries.iter().any(|entry| entry.name == name) {
                bail!("library.toml does not say what {name}.toml is for");
            }
        }
        let known: Known =
            toml::from_str(&read("data/policy-report.toml")?).context("data/policy-report.toml")?;
        for name in known.loss.iter().flat_map(|known| &known.scenarios) {
            ensure!(
                entries.iter().any(|entry| entry.name == *name),
                "[[loss]] names `{name}`, which is no scenario"
            );
        }
        Ok(Self { entries, known })
    }

    pub(super) fn named(&self, name: &str) -> Result<&Entry> {
        self.entries.iter().find(|entry| entry.name == name).with_context(|| format!("no scenario `{name}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo::root;

    #[test]
    fn the_library_has_scenarios_of_every_class_and_none_without_one() {
        let library = Library::load(&root().join("tests/scenarios")).unwrap();
        for class in [Class::Thrash, Class::Benign, Class::Adversarial, Class::Mixed] {
            assert!(library.entries.iter().filter(|entry| entry.class == class).count() >= 5, "{class}");
        }
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        write("library.toml", "benign = [\"a\"]\n");
        write("data/policy-report.toml", "");
        let scenario =
            "[[client]]\nname = \"a\"\nallocated = \"1 GiB\"\ngpu_work = \"1 s\"\nburst = \"1 s\"\n";
        write("a.toml", scenario);
        assert_eq!(Library::load(dir.path()).unwrap().entries.len(), 1);
        write("b.toml", scenario);
        assert!(Library::load(dir.path()).unwrap_err().to_string().contains("b.toml"));
    }
}
