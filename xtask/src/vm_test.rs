//! `cargo xtask vm-test`: the agent's BPF sensors on kernels with kprobes, in a virtual machine.
//!
//! Problem: the best source of observations, kprobes on nvidia-uvm, can be tried neither on kernels without kprobes
//! nor safely on any machine of value: it needs a module loaded, unloaded and replaced.
//!
//! Approach: two of Debian's kernels boot under QEMU with `nvshare-vm-test` as the first process. It has the driver's
//! own nvidia-uvm, built from Debian's source of the driver and loaded without a GPU, and modules of ours with the
//! driver's names for the versions that Debian does not have. Packages are downloaded and unpacked under
//! `target/vm-cache`, not installed; without that directory the newest are taken.
//!
//! Invariants: nothing on this machine changes outside the target directories; only a last line `N passed` from
//! inside is a success.

mod archive;
mod build;
mod driver;
mod initramfs;
mod kernel;
mod machine;
mod stand_in;

use std::path::PathBuf;

use anyhow::{Result, bail};
use nvshare_tests::everything_required;

use self::kernel::Kernel;
use crate::cargo::root;

/// Test the BPF sensors on kernels with kprobes, in a virtual machine.
///
/// Takes two minutes once Debian's kernels and the driver's source are downloaded (150 MB) and built, all kept in
/// target/vm-cache. Needs no root and no KVM. Where something is missing it says so and skips; under
/// NVSHARE_REQUIRE_ALL=1 that is a failure.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The suites of the kernels, and those of the driver whose nvidia-uvm each gets: 6.1 with 535, 6.12 with 550.
const MACHINES: [(&str, &str); 2] = [("bookworm", "bookworm"), ("bookworm-backports", "trixie")];
/// Programs, and the packages they come with.
const TOOLS: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("gcc", "gcc"),
    ("make", "make"),
    ("apt-get", "apt"),
    ("dpkg", "dpkg"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
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
    let init = initramfs::first_process()?;
    for (suite, driver_suite) in MACHINES {
        let kernel = match Kernel::get(&cache, suite) {
            Ok(kernel) => kernel,
            Err(error) => return skip(&format!("no kernel from Debian's {suite}: {error:#}")),
        };
        let source = match driver::source(&cache, &kernel, driver_suite) {
            Ok(source) => source,
            Err(error) => return skip(&format!("no driver from Debian's {driver_suite}: {error:#}")),
        };
        let mut modules: Vec<(PathBuf, String)> = stand_in::build(&kernel)?;
        modules.extend(source.build(&kernel)?);
        let image = initramfs::pack(&kernel.directory, &init, &modules)?;
        machine::run(&kernel.image(), &image)?;
    }
    Ok(())
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

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()))
}
