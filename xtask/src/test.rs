//! `cargo xtask test`: everything that checks nvshare.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use nvshare_tests::{everything_required, is_root};

use crate::cargo::{cargo, host_triple, run as run_command};

/// Check the format, the lints and the eBPF object, then run every test.
///
/// Runs as a user. Tests of eBPF and of the simulated driver files need root: they are run through `sudo`
/// (the command is printed), or skipped with a loud line where that is impossible. Under
/// NVSHARE_REQUIRE_ALL=1 a skip is a failure.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what needs seconds: no demo, no virtual machine.
    #[arg(long)]
    quick: bool,
}

/// Packages whose tests load eBPF programs or mount simulated driver files.
const NEED_ROOT: &[&str] = &[
    "nvshare-agent",
    "nvshare-device-plugin",
    "nvshare-tests",
    "nvshare-gpu-sim",
    "nvshare-gpu-sim-libcuda",
    "nvshare-shim",
];

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut steps = Steps::default();
    if has_cargo_tool("fmt") {
        steps.step("format", || run_command(cargo().args(["fmt", "--all", "--check"])))?;
    } else {
        steps.skip("format", "rustfmt is not installed (rustup component add rustfmt)")?;
    }
    if has_cargo_tool("clippy") {
        steps.step("lints", || {
            run_command(cargo().args(["clippy", "--all-targets", "--", "-D", "warnings"]))
        })?;
    } else {
        steps.skip("lints", "clippy is not installed (rustup component add clippy)")?;
    }
    steps.step("eBPF object", || crate::ebpf::run(&crate::ebpf::Args { check: true }))?;
    steps.step("build", || run_command(cargo().arg("build")))?;
    match crate::shim::obstacle()? {
        None => steps.step("portable library", portable_library)?,
        Some(why) => steps.skip("portable library", &why)?,
    }
    steps.step("tests", || {
        let mut command = cargo();
        command.arg("test");
        for package in NEED_ROOT {
            command.args(["--exclude", package]);
        }
        // `--exclude` needs `--workspace`; the eBPF programs build for another target only.
        command.args(["--workspace", "--exclude", "nvshare-ebpf"]);
        run_command(&mut command)
    })?;
    steps.step("tests that need root", || {
        let mut command = cargo();
        command.arg("test");
        for package in NEED_ROOT {
            command.args(["--package", package]);
        }
        if !is_root() && can_sudo() {
            let runner = format!("CARGO_TARGET_{}_RUNNER", host_triple()?.to_uppercase().replace('-', "_"));
            eprintln!("  (each test program runs as `sudo -E PROGRAM`)");
            command.env(runner, "sudo -E");
        }
        run_command(&mut command)
    })?;
    if !args.quick {
        steps.step("kprobes in a virtual machine", || crate::vm_test::run(&crate::vm_test::Args {}))?;
        let obstacle = nvshare_tests::prometheus::obstacle();
        if let Some(why) = &obstacle {
            steps.skip("dashboards in the demo", why)?;
        }
        let demo =
            crate::demo::Args { json: true, prometheus: obstacle.is_none(), panels: None, sensors: None };
        steps.step("demo", || crate::demo::run(&demo))?;
        let two = ["uvm-counters", "fault-thread"].map(str::to_owned).to_vec();
        let two = crate::demo::Args { json: true, prometheus: false, panels: None, sensors: Some(two) };
        steps.step("demo with two sensors", || crate::demo::run(&two))?;
    }
    steps.report();
    Ok(())
}

/// The library that ships, for every machine; this machine's passes the tests of the plain one.
fn portable_library() -> Result<()> {
    let library = crate::shim::build_all()?;
    let mut command = cargo();
    command.args(["test", "--package", "nvshare-shim", "--test", "preload"]);
    run_command(command.env("NVSHARE_TEST_SHIM", library))
}

/// The steps done, with what each cost.
#[derive(Default)]
struct Steps {
    done: Vec<(&'static str, String)>,
}

impl Steps {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        eprintln!("\n== {name}");
        let start = Instant::now();
        work().with_context(|| format!("step `{name}` failed"))?;
        self.done.push((name, format!("{:.0} s", start.elapsed().as_secs_f64())));
        Ok(())
    }

    fn skip(&mut self, name: &'static str, why: &str) -> Result<()> {
        if everything_required() {
            bail!("step `{name}` cannot run: {why}; NVSHARE_REQUIRE_ALL=1 forbids skipping");
        }
        eprintln!("\n== {name}: SKIPPED: {why}");
        self.done.push((name, format!("SKIPPED: {why}")));
        Ok(())
    }

    fn report(&self) {
        eprintln!("\nAll steps passed:");
        for (name, outcome) in &self.done {
            eprintln!("  {name:<24} {outcome}");
        }
    }
}

fn has_cargo_tool(name: &str) -> bool {
    succeeds(cargo().args([name, "--version"]))
}

fn can_sudo() -> bool {
    succeeds(Command::new("sudo").args(["-n", "true"]))
}

fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
