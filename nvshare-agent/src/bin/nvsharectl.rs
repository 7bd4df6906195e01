//! The operator's tool.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use nvshare_agent::{
    clock,
    ctl::{
        connection::{Connection, CtlError},
        show,
    },
    driver::{PlanEvent, millis},
    operator::protocol::{ClientsReport, DoctorReport, ExplainReport, Request, StatusReport},
};
use nvshare_core::{GpuId, ModeOrder, Nanos, quantity::parse_duration};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Shows what nvshare-agent sees and decides, and gives it orders.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage, 3 no agent reachable.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// Directory of the agent's sockets.
    #[arg(long, global = true, value_name = "DIR", env = "NVSHARE_RUN_DIR", default_value = "/run/nvshare")]
    run_dir: PathBuf,
    /// As in the first nvshare: on makes clients take turns always (`set mode exclusive`), off never (`set mode
    /// shared`). `set mode auto` lets the agent decide.
    #[arg(short = 'S', long = "anti-thrash", value_name = "on|off")]
    anti_thrash: Option<Switch>,
    /// As in the first nvshare: the quantum in whole seconds (`set quantum`).
    #[arg(short = 'T', long = "set-tq", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    quantum: Option<u64>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// GPUs, their plans, clients and sensors.
    Status(Format),
    /// Clients and what the driver did for them.
    Clients(Format),
    /// Why the plan is what it is.
    Explain(Format),
    /// Which sensors work, what they see, and how to get those that are missing.
    Doctor(Format),
    /// Print changes of plan as they happen, from the start of this command until it is interrupted.
    Events(Format),
    /// Give an order.
    Set {
        #[command(subcommand)]
        order: Order,
    },
}

#[derive(Clone, Copy, Debug, Args)]
struct Format {
    /// Print JSON, one object per line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Order {
    /// Force a mode on all GPUs or one, or let the agent decide.
    Mode {
        /// auto: the agent decides; shared: everybody at once; exclusive: one at a time.
        mode: Mode,
        /// Only on this GPU [default: all].
        #[arg(long, value_name = "UUID")]
        gpu: Option<GpuId>,
    },
    /// Fix the length of turns, or let it follow from what a hand-over costs.
    Quantum {
        /// A duration such as 2s or 500ms (10 ms to 24 h), or auto.
        #[arg(value_parser = parse_quantum)]
        quantum: Quantum,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    Auto,
    Shared,
    Exclusive,
}

#[derive(Clone, Copy, Debug)]
enum Quantum {
    Auto,
    Fixed(Nanos),
}

fn parse_quantum(text: &str) -> Result<Quantum, String> {
    if text == "auto" {
        return Ok(Quantum::Auto);
    }
    parse_duration(text).map(Quantum::Fixed).map_err(|error| format!("{error}, or auto"))
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Ctl(#[from] CtlError),
    #[error(
        "the agent's answer cannot be understood ({0}); are nvsharectl and nvshare-agent of one version?"
    )]
    Answer(#[from] serde_json::Error),
    #[error("cannot print: {0}")]
    Print(#[from] std::io::Error),
}

fn main() -> ExitCode {
    let started = clock::now();
    let cli = Cli::parse();
    match run(&cli, started) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has enough.
        Err(Failure::Print(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("nvsharectl: {failure}");
            match failure {
                Failure::Ctl(CtlError::NotRunning(_) | CtlError::Forbidden(_) | CtlError::Broken { .. }) => {
                    ExitCode::from(3)
                }
                Failure::Ctl(CtlError::Refused(_)) | Failure::Answer(_) | Failure::Print(_) => {
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn run(cli: &Cli, started: Nanos) -> Result<(), Failure> {
    let mut agent = Connection::open(&cli.run_dir)?;
    if let Some(switch) = cli.anti_thrash {
        let mode = match switch {
            Switch::On => ModeOrder::Exclusive,
            Switch::Off => ModeOrder::Shared,
        };
        agent.ask(&Request::SetMode { gpu: None, mode })?;
    }
    if let Some(seconds) = cli.quantum {
        agent.ask(&Request::SetQuantum { quantum: Some(Nanos::seconds(seconds)) })?;
    }
    match &cli.command {
        None => Ok(()),
        Some(Command::Status(format)) => {
            answer::<StatusReport>(&mut agent, &Request::Status {}, *format, show::status)
        }
        Some(Command::Clients(format)) => {
            answer::<ClientsReport>(&mut agent, &Request::Clients {}, *format, show::clients)
        }
        Some(Command::Explain(format)) => {
            answer::<ExplainReport>(&mut agent, &Request::Explain {}, *format, show::explain)
        }
        Some(Command::Doctor(format)) => {
            answer::<DoctorReport>(&mut agent, &Request::Doctor {}, *format, show::doctor)
        }
        Some(Command::Events(format)) => follow(&mut agent, *format, started),
        Some(Command::Set { order }) => {
            let request = match *order {
                Order::Mode { mode, gpu } => Request::SetMode {
                    gpu,
                    mode: match mode {
                        Mode::Auto => ModeOrder::Auto,
                        Mode::Shared => ModeOrder::Shared,
                        Mode::Exclusive => ModeOrder::Exclusive,
                    },
                },
                Order::Quantum { quantum } => Request::SetQuantum {
                    quantum: match quantum {
                        Quantum::Auto => None,
                        Quantum::Fixed(quantum) => Some(quantum),
                    },
                },
            };
            agent.ask(&request)?;
            Ok(())
        }
    }
}

fn answer<T: DeserializeOwned>(
    agent: &mut Connection,
    request: &Request,
    format: Format,
    show: impl Fn(&T) -> String,
) -> Result<(), Failure> {
    let value = agent.ask(request)?;
    let mut out = std::io::stdout().lock();
    if format.json {
        writeln!(out, "{value}")?;
    } else {
        write!(out, "{}", show(&serde_json::from_value(value)?))?;
    }
    Ok(out.flush()?)
}

fn follow(agent: &mut Connection, format: Format, started: Nanos) -> Result<(), Failure> {
    agent.send(&Request::Events { since_ms: Some(millis(started)) })?;
    agent.wait_for_ever()?;
    if std::io::stderr().is_terminal() {
        eprintln!("waiting for changes of plan; end with Ctrl-C");
    }
    while let Some(value) = agent.receive()? {
        let mut out = std::io::stdout().lock();
        print_event(&mut out, value, format)?;
        out.flush()?;
    }
    Ok(())
}

fn print_event(out: &mut impl std::io::Write, value: Value, format: Format) -> Result<(), Failure> {
    if format.json {
        writeln!(out, "{value}")?;
    } else {
        writeln!(out, "{}", show::event(&serde_json::from_value::<PlanEvent>(value)?))?;
    }
    Ok(())
}
