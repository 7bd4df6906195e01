//! Debian's archive: packages of one suite, downloaded and unpacked, never installed.
//!
//! The package lists are kept beside what is downloaded, so that neither the lists of this machine nor root are
//! needed, and any suite will do.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::cargo::run as run_command;

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One suite of the archive.
pub(super) struct Archive {
    /// Where its package lists are.
    directory: PathBuf,
}

impl Archive {
    /// The suite as it is now.
    pub(super) fn of(cache: &Path, suite: &str, components: &str) -> Result<Self> {
        let archive = Self { directory: cache.join("lists").join(suite) };
        for directory in ["lists/partial", "archives/partial"] {
            let path = archive.directory.join(directory);
            fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        }
        let source = format!("deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {suite} {components}\n");
        fs::write(archive.directory.join("sources.list"), source).context("naming the suite")?;
        fs::write(archive.directory.join("status"), "")
            .context("naming what is installed, which is nothing")?;
        run_command(archive.apt("apt-get").args(["update", "-qq"]))?;
        Ok(archive)
    }

    /// The packages that one depends on.
    pub(super) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let mut command = self.apt("apt-cache");
        let output =
            command.args(["depends", package]).env("LC_ALL", "C").output().context("running apt-cache")?;
        ensure!(output.status.success(), "the package lists do not name {package}");
        let text = String::from_utf8(output.stdout)?;
        let names =
            text.lines().filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    /// Unpacks packages into a directory.
    pub(super) fn unpack(&self, packages: &[String], into: &Path) -> Result<()> {
        let downloads = self.directory.join("downloads");
        if downloads.exists() {
            fs::remove_dir_all(&downloads).with_context(|| format!("removing {}", downloads.display()))?;
        }
        fs::create_dir_all(&downloads).with_context(|| format!("creating {}", downloads.display()))?;
        fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
        let mut command = self.apt("apt-get");
        run_command(command.args(["download", "-qq"]).args(packages).current_dir(&downloads))?;
        for entry in fs::read_dir(&downloads).context("listing what was downloaded")? {
            run_command(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(into))?;
        }
        fs::remove_dir_all(&downloads).with_context(|| format!("removing {}", downloads.display()))
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let at = |path: &str| self.directory.join(path).display().to_string();
        let options = [
            ("Dir::State::Lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("")),
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("APT::Architecture", "amd64".to_owned()),
            // The directory of a checkout is not one that another user can read.
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        for (name, value) in options {
            command.arg("-o").arg(format!("{name}={value}"));
        }
        command
    }
}
