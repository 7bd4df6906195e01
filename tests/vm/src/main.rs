//! Tests of the agent's BPF sensors on a kernel with kprobes, as the first process of a virtual machine.
//!
//! Problem: the sensors' best source, kprobes on nvidia-uvm, needs a kernel that many machines do not run and a
//! module that loads, unloads and comes back in another version. No machine should be tried out like that.
//!
//! Approach: `cargo xtask vm-test` boots a distribution's kernel in a virtual machine, with this program as its
//! first process. It runs the real loader with the real object against the driver's own nvidia-uvm ([`driver`]), and
//! against a stand-in with the driver's names ([`stand_in`]) that is told what to call, with event data laid out as
//! other driver versions lay it out.
//!
//! Invariants: every line for the host begins with `vm-test:`; the last says how many tests passed, or that some
//! failed, and then the machine is switched off. Without a last line the machine has crashed.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test program: it talks to the host through its console, and a panic is a failed test"
)]

mod driver;
mod kernel_module;
mod stand_in;
mod tenant;
mod tests;

use std::{
    fs,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    mount::{MountFlags, mount},
    process::getpid,
    system::{RebootCommand, reboot},
};

fn main() -> ExitCode {
    if let Some(events) = tenant::asked() {
        tenant::run(&events);
        return ExitCode::SUCCESS;
    }
    if !getpid().is_init() {
        println!("This program is the first process of a virtual machine; run `cargo xtask vm-test`.");
        return ExitCode::FAILURE;
    }
    match prepare() {
        Ok(kernel) => run_all(&kernel),
        Err(error) => say(&format!("FAILED before the first test: {error:#}")),
    }
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        say(&format!("FAILED to switch off: {error}"));
    }
    // The kernel panics when its first process ends, which the host sees.
    ExitCode::FAILURE
}

/// Mounts what the tests need and gives the kernel's name. tracefs is left to the loader, as in containers.
fn prepare() -> Result<String> {
    for (what, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(at).with_context(|| format!("creating {at}"))?;
        mount(what, at, what, MountFlags::empty(), None).with_context(|| format!("mounting {at}"))?;
    }
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's name")?;
    if kernel_module::shown("nvidia_uvm") {
        bail!("the kernel has a module nvidia_uvm already");
    }
    Ok(kernel.trim().to_owned())
}

fn run_all(kernel: &str) {
    say(&format!("kernel {kernel}"));
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in tests::all() {
        let begin = Instant::now();
        // The message of a panic is on the console, before this line.
        let outcome = catch_unwind(AssertUnwindSafe(test));
        let took = begin.elapsed().as_secs_f64();
        if outcome.is_ok() {
            passed += 1;
            say(&format!("ok {name} ({took:.1} s)"));
        } else {
            failed += 1;
            say(&format!("not ok {name} ({took:.1} s)"));
        }
        kernel_module::clear_away();
    }
    if failed == 0 {
        say(&format!("{passed} passed"));
    } else {
        say(&format!("FAILED {failed} of {}", passed + failed));
    }
}

/// A line for the host.
fn say(line: &str) {
    println!("vm-test: {line}");
    // A console that cannot be written to has nobody to be told.
    let _unheard = std::io::stdout().flush();
}
