//! `cargo xtask`: the one entry point for building, running and testing nvshare.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "talking to a person is what this program does"
)]

mod bench;
mod cargo;
mod chaos;
mod demo;
mod dist;
mod ebpf;
mod fuzz;
mod gpu_bench;
mod pictures;
mod policy_report;
mod run_agent;
mod setup_ebpf;
mod shim;
mod simulate;
mod test;
mod vm_test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs and tests nvshare.
///
/// Start with `cargo xtask run-agent` (on a machine without an NVIDIA GPU it uses the simulated one), or
/// watch `cargo xtask demo` tell what nvshare is for.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    RunAgent(run_agent::Args),
    Demo(demo::Args),
    Chaos(chaos::Args),
    Bench(bench::Args),
    Fuzz(fuzz::Args),
    GpuBench(gpu_bench::Args),
    Pictures(pictures::Args),
    PolicyReport(policy_report::Args),
    Test(test::Args),
    Ebpf(ebpf::Args),
    SetupEbpf(setup_ebpf::Args),
    VmTest(vm_test::Args),
    Shim(shim::Args),
    Simulate(simulate::Args),
    Dist(dist::Args),
}

fn main() -> ExitCode {
    match carry_out(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The reason alone: where in here it came up helps nobody who built or ran something.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(task: Task) -> anyhow::Result<()> {
    match task {
        Task::RunAgent(args) => run_agent::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Chaos(args) => chaos::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::GpuBench(args) => gpu_bench::run(&args),
        Task::Pictures(args) => pictures::run(&args),
        Task::PolicyReport(args) => policy_report::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Ebpf(args) => ebpf::run(&args),
        Task::SetupEbpf(args) => setup_ebpf::run(&args),
        Task::VmTest(args) => vm_test::run(&args),
        Task::Shim(args) => shim::run(&args),
        Task::Simulate(args) => simulate::run(&args),
        Task::Dist(args) => dist::run(&args),
    }
}
