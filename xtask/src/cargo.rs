//! Running cargo and other programs, always showing the command.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::Binaries;

/// Everything that runs on the host, as opposed to the BPF target.
const PRODUCT: &[&str] = &["nvshare-agent", "nvshare-shim"];
/// The simulated GPU and the programs that run on it.
const SIMULATION: &[&str] =
    &["nvshare-gpu-sim", "nvshare-gpu-sim-libcuda", "nvshare-gpu-sim-libnvml", "nvshare-workloads"];

/// The root of the checkout.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// The cargo that runs this program, in the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Builds the agent and the shim, and with `simulation` what runs without a GPU; optimised.
pub(crate) fn build_product(simulation: bool) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--release", "--bins", "--lib"]);
    let packages = PRODUCT.iter().chain(if simulation { SIMULATION } else { &[] });
    for package in packages {
        command.args(["--package", package]);
    }
    run(&mut command)?;
    Ok(target_dir()?.join("release"))
}

/// Builds everything that runs without a GPU and gives the programs.
pub(crate) fn build_simulated() -> Result<Binaries> {
    Binaries::in_dir(&build_product(true)?)
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata ended with {}", output.status);
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata names no target directory")
}

/// Shows a command and runs it; an unsuccessful end is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("+ {}", shown(command));
    let status = command.status().with_context(|| format!("starting {}", command.get_program().display()))?;
    ensure!(status.success(), "`{}` ended with {status}", shown(command));
    Ok(())
}

/// A command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The machine that rustc runs on.
pub(crate) fn host_triple() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("running rustc")?;
    String::from_utf8(output.stdout)?
        .lines()
        .find_map(|line| line.strip_prefix("host: ").map(str::to_owned))
        .context("rustc -vV names no host")
}
