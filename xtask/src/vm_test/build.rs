//! Modules that are built only when their sources have changed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::cargo::root;

/// Our modules' sources, by their names below `tests/vm/module`.
pub(super) fn source(name: &str) -> Result<String> {
    let path = root().join("tests/vm/module").join(name);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// Writes a file whose directory may be missing.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// Remembers from what something was built.
pub(super) struct Stamp {
    path: PathBuf,
    made_of: String,
}

impl Stamp {
    /// `made_of` is all that what is built depends on.
    pub(super) fn new(directory: &Path, made_of: &[&str]) -> Self {
        Self { path: directory.join("built-from"), made_of: made_of.join("\n") }
    }

    /// Whether it is built already.
    pub(super) fn is_current(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text == self.made_of)
    }

    /// Everything is built.
    pub(super) fn set(&self) -> Result<()> {
        write(&self.path, &self.made_of)
    }
}
