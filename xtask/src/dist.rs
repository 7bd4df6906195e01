//! `cargo xtask dist`: what is given to people: a tarball, a .deb, checksums.
//!
//! Packing is reproducible: the same files give the same bytes, whenever and by whomever they are packed.

mod deb;
mod tree;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use self::tree::{Parts, Tree};
use crate::cargo::{cargo, root, run as run_command, target_dir};

/// Build a tarball and a .deb with everything that a machine needs, and their checksums.
///
/// They hold the agent (with the eBPF object inside), nvsharectl, the device plugin, libnvshare.so for any container (as
/// `cargo xtask shim` builds it), a systemd unit, the configuration and the documents; the tarball also the Helm chart and
/// the container file. Needs tar, gzip, strip (binutils) and dpkg-deb; without the last, the .deb is left out.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the packages land [default: target/dist].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Pack the programs and the library of this folder, as they are, instead of building them. For tests.
    #[arg(long, value_name = "DIR", hide = true)]
    built: Option<PathBuf>,
}

/// Every file's time: packing must not depend on when it happens.
const EPOCH: &str = "1767225600";

pub(crate) fn run(args: &Args) -> Result<()> {
    // Folders of a package are for everybody to read, whoever packs it.
    // SAFETY: umask has no preconditions; no other thread makes files.
    unsafe { libc::umask(0o022) };
    let out = match &args.out {
        Some(out) => out.clone(),
        None => target_dir()?.join("dist"),
    };
    let parts = match &args.built {
        Some(dir) => Parts { programs: dir.clone(), library: dir.join("libnvshare.so") },
        None => build()?,
    };
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let version = env!("CARGO_PKG_VERSION");
    let machine = std::env::consts::ARCH;
    let name = format!("nvshare-{version}-{machine}");
    let stage = tempfile::tempdir_in(&out).context("a place to put the packages together")?;

    let mut packages = Vec::new();
    let tree = Tree::new(&stage.path().join(&name), &parts)?;
    if has("dpkg-deb") {
        packages.push(deb::build(&tree, &stage.path().join("deb"), &out, version, machine)?);
    } else {
        eprintln!("no .deb: dpkg-deb is not installed");
    }
    tree.add_deployment()?;
    packages.push(tarball(&tree, &out)?);
    checksums(&packages, &out)?;
    for package in &packages {
        let bytes = fs::metadata(package).with_context(|| format!("reading {}", package.display()))?.len();
        println!("{} ({:.1} MB)", package.display(), bytes as f64 / 1e6);
    }
    println!("{}", out.join("SHA256SUMS").display());
    Ok(())
}

/// Builds what is packed.
fn build() -> Result<Parts> {
    run_command(cargo().args(["build", "--release", "--locked", "--bins"]).args([
        "--package",
        "nvshare-agent",
        "--package",
        "nvshare-device-plugin",
    ]))?;
    let library = crate::shim::build_native()?;
    Ok(Parts { programs: target_dir()?.join("release"), library })
}

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

fn tarball(tree: &Tree, out: &Path) -> Result<PathBuf> {
    let (parent, name) = (tree.root().parent(), tree.root().file_name());
    let (parent, name) = (parent.context("no folder")?, name.context("no name")?);
    let tar = out.join(format!("{}.tar", name.display()));
    run_command(
        Command::new("tar")
            .args(["--create", "--sort=name", "--format=gnu", "--owner=0", "--group=0", "--numeric-owner"])
            .arg(format!("--mtime=@{EPOCH}"))
            .arg("--file")
            .arg(&tar)
            .arg("--directory")
            .arg(parent)
            .arg(name),
    )?;
    run_command(Command::new("gzip").args(["--no-name", "--force", "--best"]).arg(&tar))?;
    Ok(tar.with_extension("tar.gz"))
}

/// In the form that `sha256sum --check` reads.
fn checksums(packages: &[PathBuf], out: &Path) -> Result<()> {
    let mut lines = String::new();
    for package in packages {
        let data = fs::read(package).with_context(|| format!("reading {}", package.display()))?;
        for byte in Sha256::digest(data) {
            write!(lines, "{byte:02x}")?;
        }
        let name = package.file_name().context("a package without a name")?;
        writeln!(lines, "  {}", name.display())?;
    }
    fs::write(out.join("SHA256SUMS"), lines).context("writing SHA256SUMS")
}

/// A file of the checkout; it must be there.
fn source(path: &str) -> Result<PathBuf> {
    let full = root().join(path);
    ensure!(full.exists(), "{path} is not in the checkout");
    Ok(full)
}
