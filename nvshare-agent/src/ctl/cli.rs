//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use nvshare_core::{Nanos, quantity::parse_duration};

use super::set::Order;

/// Shows what nvshare-agent sees and decides, and gives it orders.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage, 3 no agent reachable.
#[derive(Debug, Parser)]
#[command(name = "nvsharectl", version, arg_required_else_help = true)]
pub struct Cli {
    /// Directory of the agent's sockets.
    #[arg(long, global = true, value_name = "DIR", env = "NVSHARE_RUN_DIR", default_value = "/run/nvshare")]
    pub run_dir: PathBuf,
    /// As in the first nvshare: on makes clients take turns always (`set mode exclusive`), off never (`set mode
    /// shared`). `set mode auto` lets the agent decide.
    #[arg(short = 'S', long = "anti-thrash", value_name = "on|off")]
    pub anti_thrash: Option<Switch>,
    /// As in the first nvshare: the quantum in whole seconds (`set quantum`).
    #[arg(short = 'T', long = "set-tq", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub quantum: Option<u64>,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// On or off.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[expect(missing_docs, reason = "they say it")]
pub enum Switch {
    On,
    Off,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// GPUs, their plans, clients and sensors.
    Status(Format),
    /// The same live in the terminal, with the last two minutes.
    Top(TopArgs),
    /// Clients and what the driver did for them.
    Clients(Format),
    /// Why the plan is what it is.
    Explain(Format),
    /// Which sensors work, what they see, and how to get those that are missing.
    Doctor(Format),
    /// Print changes of plan as they happen, from the start of this command until it is interrupted.
    Events(Format),
    /// Change how GPUs are shared, for now or for good.
    ///
    /// A change holds until the agent restarts; with --persist it is also kept in a file beside the agent's
    /// configuration. `nvsharectl settings` shows what was changed.
    Set {
        /// What to change.
        #[command(subcommand)]
        order: Order,
    },
    /// What was changed with `set`, for now and for good.
    Settings(Format),
    /// Record what the agent's engine is told and decides, until interrupted with Ctrl-C.
    ///
    /// The recording begins with the engine's state, so it replays at any time and anywhere, without a GPU:
    /// `nvshare-agent replay FILE`. It names programs by number only.
    Record(RecordArgs),
    /// Print a shell's completions; `source <(nvsharectl completions bash)` tries them.
    Completions {
        /// For which shell.
        shell: Shell,
    },
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, Args)]
pub struct Format {
    /// Print JSON, one object per line.
    #[arg(long)]
    pub json: bool,
}

/// What `top` takes.
#[derive(Clone, Copy, Debug, Args)]
pub struct TopArgs {
    /// How often to look.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    pub every: Nanos,
    /// Print one picture as plain text and end; for pipes and reports.
    #[arg(long)]
    pub once: bool,
    /// How the clients of a GPU are ordered at first; the key `s` changes it.
    #[arg(long, value_enum, default_value_t)]
    pub sort: super::top::model::Sort,
    /// Format.
    #[command(flatten)]
    pub format: Format,
}

/// What `record` takes.
#[derive(Debug, Args)]
pub struct RecordArgs {
    /// The file to write.
    pub file: PathBuf,
    /// End by itself after this long, as in 30s or 10min.
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
    pub length: Option<Nanos>,
    /// Overwrite the file if it exists.
    #[arg(long)]
    pub force: bool,
    /// Format of what is printed at the end.
    #[command(flatten)]
    pub format: Format,
}
