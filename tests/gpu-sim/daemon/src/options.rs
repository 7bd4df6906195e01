//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nvshare_abi::uvm::{DriverVersion, EventLayout};
use nvshare_gpu_sim_model::cost::Costs;

/// A simulated GPU: programs, the shim and the agent run against it as against NVIDIA's driver.
#[derive(Debug, Parser)]
#[command(
    name = "nvshare-gpu-sim",
    version,
    after_help = "\
Examples:
  nvshare-gpu-sim run --dir /tmp/sim --memory 1GiB
      a host with one card; in another terminal:
      NVSHARE_SIM_DIR=/tmp/sim LD_LIBRARY_PATH=/tmp/sim/lib some-cuda-program
      nvshare-agent --config /tmp/sim/agent.toml
  nvshare-gpu-sim run --dir /tmp/sim -- some-cuda-program
      the same for as long as that program runs, with its exit code
  nvshare-gpu-sim stats --dir /tmp/sim --json
      what really happened: faults, evictions, bytes, per process"
)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a simulated host until a signal, or until COMMAND ends.
    Run(Run),
    /// Print what a running simulator has counted.
    Stats(Stats),
    /// Let something happen to a card of a running simulator.
    Fault(Fault),
}

#[derive(Args, Debug)]
pub(crate) struct Stats {
    /// The simulator's directory.
    #[arg(long, env = "NVSHARE_SIM_DIR")]
    pub(crate) dir: PathBuf,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Fault {
    /// The simulator's directory.
    #[arg(long, env = "NVSHARE_SIM_DIR")]
    pub(crate) dir: PathBuf,
    /// Which card.
    #[arg(long, default_value_t = 0)]
    pub(crate) gpu: usize,
    /// What happens.
    #[command(subcommand)]
    pub(crate) what: What,
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// It falls off the bus: work fails with CUDA_ERROR_UNKNOWN, NVML answers "GPU is lost".
    Lost,
    /// It is back, and its fault-service thread works.
    Back,
    /// Its fault-service thread spins and serves nothing.
    Hang,
    /// Its link has errors and repeats transfers, so that this much gets through.
    Link {
        /// GB/s.
        #[arg(value_parser = parse_rate)]
        rate: f64,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Run {
    /// Where the host's files go [default: nvshare-sim in $XDG_RUNTIME_DIR, else in /tmp]. `ready` appears in it last.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Folder with the built libcuda.so and libnvidia_ml.so [default: where this program is].
    #[arg(long)]
    pub(crate) lib_dir: Option<PathBuf>,
    /// Cards, 1 to 8.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) gpus: u32,
    /// Usable memory of each card, such as 1GiB or 512MiB; whole blocks of 2 MiB.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// Which card's speed to play.
    #[arg(long, value_enum, default_value_t = Preset::H100Pcie5)]
    pub(crate) preset: Preset,
    /// The driver version to play: decides the layout of events and ioctls.
    #[arg(long, default_value = "580.126.20", value_parser = parse_driver)]
    pub(crate) driver_version: DriverVersion,
    /// Bytes that faults bring in, GB/s.
    #[arg(long, value_name = "GB/S")]
    pub(crate) fault_in: Option<f64>,
    /// First touch on the card, GB/s.
    #[arg(long, value_name = "GB/S")]
    pub(crate) zero_fill: Option<f64>,
    /// Bytes that evictions push out, GB/s. Never measured on hardware.
    #[arg(long, value_name = "GB/S")]
    pub(crate) evict: Option<f64>,
    /// Bytes pushed out for the first time, when host pages are allocated, GB/s.
    #[arg(long, value_name = "GB/S")]
    pub(crate) first_out: Option<f64>,
    /// The link, each way, GB/s.
    #[arg(long, value_name = "GB/S")]
    pub(crate) link: Option<f64>,
    /// How long a process computes before another has its turn, microseconds.
    #[arg(long, value_name = "US")]
    pub(crate) slice_us: Option<u64>,
    /// Run this program on the simulated host, and end with it.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) program: Vec<String>,
}

/// A card whose speed is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preset {
    #[value(name = "h100-pcie5")]
    H100Pcie5,
    #[value(name = "p100-pcie3")]
    P100Pcie3,
    #[value(name = "rtx5090-pcie5")]
    Rtx5090Pcie5,
}

impl Preset {
    pub(crate) fn costs(self) -> Costs {
        match self {
            Self::H100Pcie5 => Costs::H100_PCIE5,
            Self::P100Pcie3 => Costs::P100_PCIE3,
            Self::Rtx5090Pcie5 => Costs::RTX5090_PCIE5,
        }
    }

    /// Product name, multiprocessors, compute capability.
    pub(crate) fn product(self) -> (&'static str, u32, (u32, u32)) {
        match self {
            Self::H100Pcie5 => ("NVIDIA H100 80GB HBM3 (simulated)", 132, (9, 0)),
            Self::P100Pcie3 => ("Tesla P100-PCIE-16GB (simulated)", 56, (6, 0)),
            Self::Rtx5090Pcie5 => ("NVIDIA GeForce RTX 5090 (simulated)", 170, (12, 0)),
        }
    }
}

impl Run {
    /// The preset with what was overridden.
    pub(crate) fn costs(&self) -> Result<Costs, String> {
        let mut costs = self.preset.costs();
        for (name, given, rate) in [
            ("--fault-in", self.fault_in, &mut costs.fault_in),
            ("--zero-fill", self.zero_fill, &mut costs.zero_fill),
            ("--evict", self.evict, &mut costs.evict),
            ("--first-out", self.first_out, &mut costs.first_out),
            ("--link", self.link, &mut costs.link),
        ] {
            let Some(given) = given else { continue };
            if !given.is_finite() || !(0.001..=10_000.0).contains(&given) {
                return Err(format!("{name} {given} is no rate: give GB/s between 0.001 and 10000"));
            }
            *rate = given * 1e9;
        }
        if let Some(microseconds) = self.slice_us {
            if !(100..=1_000_000).contains(&microseconds) {
                return Err(format!("--slice-us {microseconds} is out of range: give 100 to 1000000"));
            }
            costs.slice_ns = microseconds * 1000;
        }
        Ok(costs)
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|error| format!("{error}; give GB/s"))?;
    if (0.001..=10_000.0).contains(&rate) {
        Ok(rate)
    } else {
        Err("give GB/s between 0.001 and 10000".to_owned())
    }
}

fn parse_driver(text: &str) -> Result<DriverVersion, String> {
    let version: DriverVersion = text.parse().map_err(|error| format!("{error}"))?;
    match EventLayout::of(version) {
        Some(_) => Ok(version),
        None => Err("the layouts of that driver are unknown: known are branches 515 to 595".to_owned()),
    }
}

/// Bytes from `1GiB`, `1.5 GiB`, `512MiB`, `2GB` or a plain number; whole blocks of 2 MiB, 16 MiB to 1 TiB.
fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|character: char| character.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return Err(format!("unknown unit {unit:?}: use MiB, GiB, MB or GB")),
    };
    let number: f64 = number.trim().parse().map_err(|error| format!("{error}; give a size such as 1GiB"))?;
    let bytes = number * factor;
    let (least, most) = (16_f64 * 1024.0 * 1024.0, (1u64 << 40) as f64);
    if !(least..=most).contains(&bytes) {
        return Err("out of range: give 16MiB to 1024GiB".to_owned());
    }
    Ok(bytes as u64 & !((2 << 20) - 1))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn sizes_are_rounded_down_to_whole_blocks() {
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_size("33MB"), Ok(30 << 20));
        for bad in ["", "1", "GiB", "-1GiB", "1TiB", "nan GiB", "2000GiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_drivers_with_known_layouts_are_played() {
        assert!(parse_driver("550.163.01").is_ok());
        assert!(parse_driver("470.57.02").is_err());
        assert!(parse_driver("new").is_err());
    }
}
