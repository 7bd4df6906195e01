//! The Debian package.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{
    EPOCH,
    tree::{CONFIGURATION, PROGRAMS, Tree},
};
use crate::{cargo::run as run_command, shim::glibc_needed};

/// After unpacking: the group, the unit, and the agent running in its new version.
const POSTINST: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ]; then
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers nvshare.conf
    elif ! getent group nvshare >/dev/null; then
        groupadd --system nvshare
    fi
    if command -v deb-systemd-helper >/dev/null; then
        deb-systemd-helper unmask nvshare-agent.service >/dev/null || true
        if deb-systemd-helper --quiet was-enabled nvshare-agent.service; then
            deb-systemd-helper enable nvshare-agent.service >/dev/null || true
        fi
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
        deb-systemd-invoke restart nvshare-agent.service >/dev/null || true
    fi
fi
";
/// Before removal. On an upgrade the agent runs on until the new one is there.
const PRERM: &str = "#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop nvshare-agent.service >/dev/null || true
fi
";
/// After removal.
const POSTRM: &str = "#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
if [ \"$1\" = purge ] && command -v deb-systemd-helper >/dev/null; then
    deb-systemd-helper purge nvshare-agent.service >/dev/null || true
fi
";

/// Builds the package of what lies in `tree`; `stage` is a folder that does not exist yet.
pub(super) fn build(tree: &Tree, stage: &Path, out: &Path, version: &str, machine: &str) -> Result<PathBuf> {
    run_command(Command::new("cp").arg("--archive").arg(tree.root()).arg(stage))?;
    let control = stage.join("DEBIAN");
    fs::create_dir_all(&control).with_context(|| format!("creating {}", control.display()))?;
    let architecture = match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let write = |name: &str, text: &str, mode: u32| {
        let path = control.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(mode)).context("setting a mode")
    };
    write("control", &description(tree, version, architecture)?, 0o644)?;
    write("conffiles", &format!("/{CONFIGURATION}\n"), 0o644)?;
    for (name, script) in [("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)] {
        write(name, script, 0o755)?;
    }
    let package = out.join(format!("nvshare_{version}_{architecture}.deb"));
    run_command(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zxz", "--build"])
            .arg(stage)
            .arg(&package)
            .env("SOURCE_DATE_EPOCH", EPOCH),
    )?;
    Ok(package)
}

fn description(tree: &Tree, version: &str, architecture: &str) -> Result<String> {
    let mut newest = (0, 0);
    for program in PROGRAMS {
        newest = newest.max(glibc_needed(&tree.root().join("usr/bin").join(program))?);
    }
    let (major, minor) = newest;
    Ok(format!(
        "Package: nvshare
Version: {version}
Architecture: {architecture}
Maintainer: nvshare <nvshare@users.noreply.github.com>
Section: admin
Priority: optional
Homepage: {homepage}
Depends: libc6 (>= {major}.{minor}), libgcc-s1, init-system-helpers (>= 1.54)
Description: several processes on one GPU, with more memory than it has
 Lets unmodified CUDA programs share a GPU's memory, notices when they evict
 each other's memory faster than they work, and then has them take turns until
 it is safe again.
 .
 This package holds the agent, its tool nvsharectl, the library that programs
 are started with, and the Kubernetes device plugin.
",
        homepage = env!("CARGO_PKG_REPOSITORY"),
    ))
}
