//! Programs that stand for a user's: they use CUDA through the driver's interface, reached as the CUDA runtime reaches it
//! (`dlopen`, one `dlsym`, then `cuGetProcAddress`), so that a preloaded library meets what it meets in real programs.
//! They run on the simulated GPU and on a real one.

mod bench;
mod cuda;
mod direct;
mod hostile;
mod nvml;
mod pattern;
mod quantity;
mod sweep;

use clap::{Parser, Subcommand};

/// Programs that use CUDA, for tests and demonstrations of nvshare.
#[derive(Debug, Parser)]
#[command(name = "nvshare-workload", version)]
struct Arguments {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// Sweep over memory again and again until a given amount of GPU work is done.
    Sweep(sweep::Options),
    /// Misbehave towards an agent in one of several ways, for a while.
    Hostile(hostile::Options),
    /// Measure what a benchmark asks for on standard input.
    Bench(bench::Options),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().workload {
        Workload::Sweep(options) => sweep::run(&options),
        Workload::Hostile(options) => hostile::run(&options),
        Workload::Bench(options) => bench::run(&options),
    }
}
