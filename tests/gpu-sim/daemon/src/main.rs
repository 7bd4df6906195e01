//! The process that owns the simulated GPU.
//!
//! It runs one fault service thread for each card, one thread for each connected program, and one for the device files.
//! All of them share the [`world::World`].
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "a command that speaks to a terminal")]

mod entry;
mod files;
mod fuse;
mod options;
mod remote;
mod run;
mod server;
mod service;
mod stats;
mod tools;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser as _;
use options::{Command, Fault, Options, What};

fn main() -> ExitCode {
    match command(Options::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nvshare-gpu-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(run) => run::run(&run),
        Command::Stats(stats) => {
            let json = nvshare_gpu_sim_model::client::stats(&stats.dir)?;
            if stats.json {
                println!("{json}");
            } else {
                print!("{}", stats::table(&json)?);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Fault(fault) => {
            inflict(&fault)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn inflict(Fault { dir, gpu, what }: &Fault) -> Result<()> {
    let host = nvshare_gpu_sim_model::client::Host::open_in(dir)?;
    let done = match what {
        What::Lost => host.set_lost(*gpu, true),
        What::Back => host.set_lost(*gpu, false) && host.set_hanging(*gpu, false),
        What::Hang => host.set_hanging(*gpu, true),
        What::Link { rate } => host.set_link_rate(*gpu, (rate * 1e9) as u64),
    };
    anyhow::ensure!(done, "there is no card {gpu}");
    Ok(())
}
