//! The operator's tool.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

use clap::{CommandFactory as _, Parser as _};
use nvshare_agent::{
    clock,
    ctl::{
        cli::{Cli, Command, Format, RecordArgs, Switch},
        connection::{Connection, CtlError},
        record::{self, RecordError, record},
        show,
        top::{self, TopError},
    },
    driver::{PlanEvent, millis},
    operator::protocol::{
        ClientsReport, DoctorReport, Done, ExplainReport, Request, SettingsReport, StatusReport,
    },
};
use nvshare_core::{ModeOrder, Nanos};
use serde::de::DeserializeOwned;
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

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
    #[error(transparent)]
    Record(RecordError),
    #[error(transparent)]
    Top(TopError),
}

impl From<RecordError> for Failure {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Ctl(error) => Self::Ctl(error),
            other => Self::Record(other),
        }
    }
}

impl From<TopError> for Failure {
    fn from(error: TopError) -> Self {
        match error {
            TopError::Ctl(error) => Self::Ctl(error),
            TopError::Answer(error) => Self::Answer(error),
            TopError::Print(error) => Self::Print(error),
            TopError::NoTerminal => Self::Top(error),
        }
    }
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
                Failure::Ctl(CtlError::Refused(_))
                | Failure::Answer(_)
                | Failure::Print(_)
                | Failure::Record(_)
                | Failure::Top(_) => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: &Cli, started: Nanos) -> Result<(), Failure> {
    if let Some(Command::Completions { shell }) = &cli.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "nvsharectl", &mut script);
        return Ok(std::io::stdout().lock().write_all(&script)?);
    }
    let mut agent = Connection::open(&cli.run_dir)?;
    let text = Format { json: false };
    if let Some(switch) = cli.anti_thrash {
        let mode = match switch {
            Switch::On => ModeOrder::Exclusive,
            Switch::Off => ModeOrder::Shared,
        };
        answer::<Done>(&mut agent, &Request::SetMode { gpu: None, mode, persist: false }, text, show::done)?;
    }
    if let Some(seconds) = cli.quantum {
        let quantum = Some(Nanos::seconds(seconds));
        answer::<Done>(&mut agent, &Request::SetQuantum { quantum, persist: false }, text, show::done)?;
    }
    match &cli.command {
        None | Some(Command::Completions { .. }) => Ok(()),
        Some(Command::Status(format)) => {
            answer::<StatusReport>(&mut agent, &Request::Status {}, *format, show::status)
        }
        Some(Command::Top(args)) => Ok(top::run(agent, &cli.run_dir, args, &*stop_flag()?)?),
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
            let (request, format) = order.request();
            answer::<Done>(&mut agent, &request, format, show::done)
        }
        Some(Command::Settings(format)) => {
            answer::<SettingsReport>(&mut agent, &Request::Settings {}, *format, show::settings)
        }
        Some(Command::Record(args)) => keep(&mut agent, args),
    }
}

/// Set by the signals that end a program, so that it ends in good order.
fn stop_flag() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
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

fn keep(agent: &mut Connection, args: &RecordArgs) -> Result<(), Failure> {
    if args.length.is_none() && std::io::stderr().is_terminal() {
        eprintln!("recording; end with Ctrl-C");
    }
    let recorded = record(agent, args, &*stop_flag()?)?;
    let mut out = std::io::stdout().lock();
    if args.format.json {
        writeln!(out, "{}", serde_json::to_string(&recorded)?)?;
    } else {
        write!(out, "{}", record::show(&recorded))?;
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
