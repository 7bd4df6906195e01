//! The agent's daemon.
#![expect(clippy::print_stdout, reason = "subcommands print their result")]

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use nvshare_agent::{
    agent::{self, Options},
    config::{self, Config, MetricsListen, overrides::Overrides},
    recording,
};
use nvshare_core::Handover;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Lets processes share a GPU's memory: watches the driver and arranges turns when they would thrash.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground (also without a subcommand).
    Run(RunArgs),
    /// Drive the engine from a recording and check that it decides the same.
    Replay {
        /// A file written by `nvshare-agent --record FILE` or `nvsharectl record FILE`.
        file: PathBuf,
    },
    /// Check a configuration file.
    CheckConfig {
        /// The file.
        file: PathBuf,
    },
    /// Print a configuration file in which every key is documented.
    ExampleConfig,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Configuration file (TOML); see `nvshare-agent example-config`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the sockets [default: /run/nvshare].
    #[arg(long, value_name = "DIR", env = "NVSHARE_RUN_DIR")]
    run_dir: Option<PathBuf>,
    /// Address of /metrics, or `off` [default: 127.0.0.1:9464].
    #[arg(long, value_name = "ADDR")]
    metrics_listen: Option<MetricsListen>,
    /// What goes to the log on standard error, as in `info` or `nvshare_agent=debug`.
    #[arg(long, value_name = "FILTER", env = "NVSHARE_LOG", default_value = "info")]
    log: String,
    /// Record what the sensors say, the engine's inputs and its decisions for `nvshare-agent replay`; a running agent
    /// is recorded with `nvsharectl record`.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Who moves memory at hand-overs, `shim` or `demand` [default: shim]; see `nvshare-agent example-config`.
    #[arg(long, value_name = "WHO", value_parser = handover)]
    handover: Option<Handover>,
    /// Where `nvsharectl set --persist` keeps what it changes [default: beside the configuration file, as in
    /// nvshare.overrides.toml; without one, nowhere].
    #[arg(long, value_name = "FILE")]
    overrides: Option<PathBuf>,
}

fn handover(text: &str) -> Result<Handover, &'static str> {
    match text {
        "shim" => Ok(Handover::Shim),
        "demand" => Ok(Handover::Demand),
        _ => Err("expected shim or demand"),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        None => run(cli.run),
        Some(Command::Run(args)) => run(args),
        Some(Command::Replay { file }) => replay(&file),
        Some(Command::CheckConfig { file }) => check_config(&file),
        Some(Command::ExampleConfig) => {
            print!("{}", config::EXAMPLE);
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvshare-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn replay(file: &Path) -> Result<()> {
    let recording::Replayed { bins, disagreements, inputs, outputs } = recording::replay(file)?;
    println!(
        "{}: {bins} bins of the sensors ({disagreements} windows of disagreement), {inputs} inputs, {outputs} decisions, all as recorded",
        file.display()
    );
    Ok(())
}

fn check_config(file: &Path) -> Result<()> {
    Config::load(file)?;
    println!("{}: ok", file.display());
    Ok(())
}

fn run(args: RunArgs) -> Result<()> {
    let RunArgs { config, run_dir, metrics_listen, log, record, handover, overrides } = args;
    let filter = EnvFilter::try_new(&log).with_context(|| format!("`{log}` is not a log filter"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let overrides_file = overrides.or_else(|| config.as_deref().map(Overrides::beside));
    // Operators are told the path, and are elsewhere.
    let overrides_file = overrides_file.map(std::path::absolute).transpose()?;
    let overrides = overrides_file.as_deref().map(Overrides::load).transpose()?.unwrap_or_default();
    if overrides != Overrides::default() {
        let file = overrides_file.as_deref().unwrap_or(Path::new("")).display();
        tracing::info!("what operators persisted in {file} holds over the configuration");
    }
    let mut config = config.as_deref().map(Config::load).transpose()?.unwrap_or_default();
    if let Some(run_dir) = run_dir {
        config.listen.run_dir = run_dir;
    }
    if let Some(listen) = metrics_listen {
        config.listen.metrics = listen;
    }
    if let Some(handover) = handover {
        config.engine.handover = handover;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let running =
            agent::run(Options { config, record, overrides: (overrides_file, overrides) }, shutdown.clone());
        tokio::pin!(running);
        tokio::select! {
            result = &mut running => return result,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        shutdown.cancel();
        running.await
    });
    // A call into a hanging driver may occupy a thread for ever; nothing else is left to wait for.
    runtime.shutdown_background();
    result
}
