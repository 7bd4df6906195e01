//! The root file system of the virtual machine: its first process and the modules.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::cargo::{cargo, run as run_command, target_dir};

const PACKAGE: &str = "nvshare-vm-test";

/// Builds the first process.
pub(super) fn first_process() -> Result<PathBuf> {
    // Linked statically, as there are no libraries inside. Only this crate is compiled for it.
    run_command(cargo().args([
        "rustc",
        "--package",
        PACKAGE,
        "--bin",
        PACKAGE,
        "--",
        "-Ctarget-feature=+crt-static",
    ]))?;
    Ok(target_dir()?.join("debug").join(PACKAGE))
}

/// Packs the first process and modules, each a file and its name below `modules`. Gives the image.
pub(super) fn pack(directory: &Path, init: &Path, modules: &[(PathBuf, String)]) -> Result<PathBuf> {
    let root = directory.join("initramfs");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))?;
    }
    // Directories before what they hold.
    let mut names = vec!["init".to_owned(), "modules".to_owned()];
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    copy(init, &root.join("init"))?;
    for (file, name) in modules {
        let name = format!("modules/{name}");
        if let Some((above, _)) = name.rsplit_once('/')
            && !root.join(above).exists()
        {
            fs::create_dir_all(root.join(above)).with_context(|| format!("creating {above}"))?;
            names.push(above.to_owned());
        }
        copy(file, &root.join(&name))?;
        names.push(name);
    }
    let image = directory.join("initramfs.cpio");
    let archive = fs::File::create(&image).with_context(|| format!("creating {}", image.display()))?;
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--owner=0:0", "--quiet"])
        .current_dir(&root)
        .stdin(Stdio::piped())
        .stdout(archive)
        .spawn()
        .context("starting cpio")?;
    let mut stdin = cpio.stdin.take().context("cpio has no input")?;
    stdin.write_all(format!("{}\n", names.join("\n")).as_bytes()).context("telling cpio what to pack")?;
    drop(stdin);
    let status = cpio.wait().context("waiting for cpio")?;
    ensure!(status.success(), "cpio ended with {status}");
    Ok(image)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}
