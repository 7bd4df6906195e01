//! `cargo xtask vm-test`: the agent's BPF sensors on a kernel with kprobes, in a virtual machine.
//!
//! Problem: the best source of observations, kprobes on nvidia-uvm, can be tried neither on kernels without kprobes
//! nor safely on any machine of value: it needs a module loaded, unloaded and replaced.
//!
//! Approach: Debian's own kernel boots under QEMU with `nvshare-vm-test` as its first process, beside a module of the
//! driver's name in two versions. Packages are downloaded and unpacked under `target/vm-cache`, not installed.
//!
//! Invariants: nothing on this machine changes outside the target directories; only a last line `N passed` from
//! inside is a success.

mod kernel;
mod machine;

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use nvshare_tests::everything_required;

use self::kernel::Kernel;
use crate::cargo::{cargo, root, run as run_command, target_dir};

/// Test the BPF sensors on a kernel with kprobes, in a virtual machine.
///
/// Takes half a minute once Debian's kernel is downloaded (40 MB, kept in target/vm-cache). Needs no root and no
/// KVM. Where something is missing it says so and skips; under NVSHARE_REQUIRE_ALL=1 that is a failure.
#[derive(clap::Args)]
pub(crate) struct Args {}

const PACKAGE: &str = "nvshare-vm-test";
/// Driver versions that the module is built as; the tests load them by these names.
const VERSIONS: [(&str, &str); 2] = [("580.126.20", "580"), ("550.163.01", "550")];
/// Programs, and the packages they come with.
const TOOLS: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("gcc", "gcc"),
    ("make", "make"),
    ("apt-get", "apt"),
    ("dpkg", "dpkg"),
];

pub(crate) fn run(_: &Args) -> Result<()> {
    if cfg!(not(target_arch = "x86_64")) {
        return skip("the virtual machine is of x86-64, this machine is not");
    }
    let missing: Vec<&str> =
        TOOLS.iter().filter(|(program, _)| !on_path(program)).map(|&(_, package)| package).collect();
    if !missing.is_empty() {
        return skip(&format!(
            "packages are missing; on Debian: `apt-get install --no-install-recommends {}`",
            missing.join(" ")
        ));
    }
    let cache = root().join("target/vm-cache");
    let kernel = match Kernel::get(&cache) {
        Ok(kernel) => kernel,
        Err(error) => return skip(&format!("{error:#}")),
    };
    let image = initramfs(&kernel, &cache)?;
    machine::run(&kernel.image, &image)
}

/// Says what cannot be tested; an error where everything must be.
fn skip(why: &str) -> Result<()> {
    if everything_required() {
        bail!(
            "the BPF sensors cannot be tested with kprobes: {why} (NVSHARE_REQUIRE_ALL=1 forbids skipping)"
        );
    }
    eprintln!("SKIPPED: the BPF sensors were not tested with kprobes: {why}");
    Ok(())
}

/// The root file system: the first process and the modules.
fn initramfs(kernel: &Kernel, cache: &Path) -> Result<std::path::PathBuf> {
    let root_dir = cache.join("initramfs");
    if root_dir.exists() {
        fs::remove_dir_all(&root_dir).with_context(|| format!("removing {}", root_dir.display()))?;
    }
    let modules = root_dir.join("modules");
    fs::create_dir_all(&modules).with_context(|| format!("creating {}", modules.display()))?;
    for (version, branch) in VERSIONS {
        let module = kernel.build_module(&cache.join("module").join(version), version, branch)?;
        fs::copy(&module, modules.join(format!("{version}.ko")))
            .with_context(|| format!("copying {}", module.display()))?;
    }
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
    let built = target_dir()?.join("debug").join(PACKAGE);
    fs::copy(&built, root_dir.join("init")).with_context(|| format!("copying {}", built.display()))?;
    let image = cache.join("initramfs.cpio");
    let archive = fs::File::create(&image).with_context(|| format!("creating {}", image.display()))?;
    let names = std::io::Cursor::new(names_of(&root_dir)?);
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--owner=0:0", "--quiet"])
        .current_dir(&root_dir)
        .stdin(std::process::Stdio::piped())
        .stdout(archive)
        .spawn()
        .context("starting cpio")?;
    let mut stdin = cpio.stdin.take().context("cpio has no input")?;
    std::io::copy(&mut { names }, &mut stdin).context("telling cpio what to pack")?;
    drop(stdin);
    let status = cpio.wait().context("waiting for cpio")?;
    ensure!(status.success(), "cpio ended with {status}");
    Ok(image)
}

/// What is packed, a line each, directories before what they hold.
fn names_of(root_dir: &Path) -> Result<Vec<u8>> {
    let mut names = String::from("init\nmodules\n");
    for entry in fs::read_dir(root_dir.join("modules")).context("listing the modules")? {
        names.push_str("modules/");
        names.push_str(&entry?.file_name().to_string_lossy());
        names.push('\n');
    }
    Ok(names.into_bytes())
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()))
}
