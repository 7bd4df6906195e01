//! `cargo xtask run-agent`: from a fresh clone to a running agent.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{Binaries, Simulator, SimulatorOptions, is_root};

use crate::cargo;

/// Build the agent and the shim, and run the agent in the foreground until Ctrl-C.
///
/// On a machine with an NVIDIA GPU the agent watches that GPU; run it as root (`sudo -E env "PATH=$PATH"
/// cargo xtask run-agent`) for the eBPF sensors. Without a GPU, or with --simulate, a simulated GPU is
/// started beside it. A line to start a program under the shim is printed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Use the simulated GPU although this machine has a real one.
    #[arg(long)]
    simulate: bool,
    /// Memory of the simulated card.
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    memory: String,
    /// Number of simulated cards.
    #[arg(long, default_value_t = 1, value_name = "N")]
    gpus: u32,
    /// Where the agent's sockets live [default: /run/nvshare as root, else a folder of the user's own].
    #[arg(long, env = "NVSHARE_RUN_DIR", value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Further arguments for the agent, after `--` (see `nvshare-agent --help`).
    #[arg(last = true)]
    agent: Vec<String>,
}

/// The driver's own mark that an NVIDIA GPU is there.
const DRIVER_VERSION: &str = "/proc/driver/nvidia/version";

pub(crate) fn run(args: &Args) -> Result<()> {
    let real = Path::new(DRIVER_VERSION).exists();
    let simulated = args.simulate || !real;
    match (real, args.simulate) {
        (true, false) => {
            eprintln!("This machine has an NVIDIA GPU ({DRIVER_VERSION} exists): the agent will watch it.");
        }
        (true, true) => {
            eprintln!("This machine has an NVIDIA GPU, but --simulate asks for the simulated one.");
        }
        (false, _) => {
            eprintln!("No NVIDIA GPU here ({DRIVER_VERSION} does not exist): using the simulated GPU.");
        }
    }
    if !is_root() {
        eprintln!("Not running as root: the eBPF sensors will be unavailable; everything else works.");
    }
    let binaries_dir = cargo::build_product(simulated)?;
    let run_dir = args.run_dir.clone().unwrap_or_else(default_run_dir);
    std::fs::create_dir_all(&run_dir).with_context(|| format!("creating {}", run_dir.display()))?;

    let mut agent = Command::new(binaries_dir.join("nvshare-agent"));
    agent.arg("run").arg("--run-dir").arg(&run_dir);
    let shim = binaries_dir.join("libnvshare.so");
    let mut workload = format!("NVSHARE_RUN_DIR={} LD_PRELOAD={}", run_dir.display(), shim.display());

    // Kept until the agent has ended, then the simulator is stopped.
    let simulator = if simulated {
        let binaries = Binaries::in_dir(&binaries_dir)?;
        let options =
            SimulatorOptions { gpus: args.gpus, memory: args.memory.clone(), ..SimulatorOptions::default() };
        let simulator = Simulator::start(&binaries, &run_dir.join("sim"), &options)?;
        agent.arg("--config").arg(simulator.agent_config());
        for (name, value) in simulator.environment() {
            workload = format!("{workload} {name}={}", value.display());
        }
        workload = format!(
            "{workload} {} sweep --memory 400MiB --gpu-work 20s --verify",
            binaries.workload().display()
        );
        Some(simulator)
    } else {
        workload = format!("{workload} python3 your_training.py");
        None
    };
    agent.args(&args.agent);
    let ctl = binaries_dir.join("nvsharectl");
    eprintln!("\nStart a program under nvshare, as often as you like, from another terminal:\n  {workload}");
    eprintln!("See what happens:\n  {} --run-dir {} status\n", ctl.display(), run_dir.display());

    let status = in_foreground(&mut agent)?;
    drop(simulator);
    ensure!(status.success(), "the agent ended with {status}");
    Ok(())
}

/// Runs the agent so that Ctrl-C ends it and not this program, which still has to stop the simulator; and
/// so that it does not outlive this program.
fn in_foreground(agent: &mut Command) -> Result<std::process::ExitStatus> {
    extern "C" fn keep_waiting(_signal: libc::c_int) {}
    let handler = keep_waiting as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing; a handler, unlike SIG_IGN, is not inherited by the agent.
    unsafe { libc::signal(libc::SIGINT, handler as libc::sighandler_t) };
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
    unsafe {
        agent.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        })
    };
    agent.status().with_context(|| format!("running {}", agent.get_program().display()))
}

/// `/run/nvshare` for root, as in production; for others a folder that is theirs.
fn default_run_dir() -> PathBuf {
    if is_root() {
        return PathBuf::from("/run/nvshare");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) => Path::new(&dir).join("nvshare"),
        // SAFETY: getuid has no preconditions.
        None => PathBuf::from(format!("/tmp/nvshare-{}", unsafe { libc::getuid() })),
    }
}
