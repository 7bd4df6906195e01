//! The files as they lie on a system.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::source;
use crate::cargo::run as run_command;

/// The programs.
pub(super) const PROGRAMS: [&str; 3] = ["nvshare-agent", "nvsharectl", "nvshare-device-plugin"];
/// Where the configuration lies.
pub(super) const CONFIGURATION: &str = "etc/nvshare/nvshare.toml";
/// Shells for which `nvsharectl completions` writes a file, and where each looks for it.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/nvsharectl"),
    ("fish", "usr/share/fish/vendor_completions.d/nvsharectl.fish"),
    ("zsh", "usr/share/zsh/vendor-completions/_nvsharectl"),
];

/// What has been built.
pub(super) struct Parts {
    /// Folder of the programs.
    pub(super) programs: PathBuf,
    /// The library for containers.
    pub(super) library: PathBuf,
}

/// A folder laid out as `/`.
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Lays out everything that is installed.
    pub(super) fn new(root: &Path, parts: &Parts) -> Result<Self> {
        let tree = Self { root: root.to_owned() };
        for program in PROGRAMS {
            let to = tree.add(&parts.programs.join(program), &format!("usr/bin/{program}"), 0o755)?;
            // What only a debugger reads is most of a program.
            run_command(Command::new("strip").arg("--strip-debug").arg(to))?;
        }
        tree.add(&parts.library, "usr/lib/nvshare/libnvshare.so", 0o755)?;
        tree.add_source("nvshare-agent/nvshare.toml", CONFIGURATION)?;
        tree.add_source(
            "deploy/systemd/nvshare-agent.service",
            "usr/lib/systemd/system/nvshare-agent.service",
        )?;
        tree.add_source("deploy/systemd/nvshare.sysusers", "usr/lib/sysusers.d/nvshare.conf")?;
        for document in fs::read_dir(source("docs")?).context("reading docs")? {
            let path = document?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let name = path.file_name().unwrap_or_default().display().to_string();
                tree.add(&path, &format!("usr/share/doc/nvshare/{name}"), 0o644)?;
            }
        }
        for document in ["README.md", "CHANGELOG.md"] {
            tree.add_source(document, &format!("usr/share/doc/nvshare/{document}"))?;
        }
        tree.add_source("LICENSE", "usr/share/doc/nvshare/copyright")?;
        tree.add_completions(&parts.programs.join("nvsharectl"))?;
        Ok(tree)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// What only whoever installs by other means needs.
    pub(super) fn add_deployment(&self) -> Result<()> {
        self.add_source("deploy/containers/nvshare.Dockerfile", "containers/nvshare.Dockerfile")?;
        let helm = self.root.join("helm");
        fs::create_dir_all(&helm).with_context(|| format!("creating {}", helm.display()))?;
        // The rules are a link to those of the dashboards.
        run_command(
            Command::new("cp")
                .args(["--recursive", "--dereference"])
                .arg(source("deploy/helm/nvshare")?)
                .arg(helm),
        )
    }

    fn add_source(&self, from: &str, to: &str) -> Result<()> {
        self.add(&source(from)?, to, 0o644).map(drop)
    }

    fn add(&self, from: &Path, to: &str, mode: u32) -> Result<PathBuf> {
        ensure!(from.exists(), "{} is missing; build everything first", from.display());
        let path = self.root.join(to);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        fs::copy(from, &path).with_context(|| format!("copying {} to {to}", from.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
        Ok(path)
    }

    /// Completions as the program itself writes them, if it does.
    fn add_completions(&self, ctl: &Path) -> Result<()> {
        for (shell, place) in COMPLETIONS {
            let output =
                Command::new(ctl).args(["completions", shell]).output().context("running nvsharectl")?;
            if !output.status.success() {
                eprintln!("no completions for {shell}: nvsharectl writes none");
                continue;
            }
            let path = self.root.join(place);
            fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            fs::write(&path, output.stdout).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}
