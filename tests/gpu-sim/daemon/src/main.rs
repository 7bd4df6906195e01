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
use options::{Command, Options};

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
    }
}
