//! `cargo xtask bench`: how fast the parts are that must be fast, on this machine.

use anyhow::Result;

use crate::cargo;

/// What can be measured: the name and the package that has a benchmark of that name.
const BENCHES: [(&str, &str); 2] = [("engine", "nvshare-core"), ("load", "nvshare-agent")];

/// Measure how fast the parts are that must be fast. The figures are of this machine; no test depends on them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure [default: all].
    #[arg(value_name = "NAME", value_parser = BENCHES.map(|(name, _)| name))]
    names: Vec<String>,
    /// Print one JSON object for each as the last lines of standard output.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    for (name, package) in BENCHES {
        if !args.names.is_empty() && !args.names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let mut command = cargo::cargo();
        command.args(["bench", "--quiet", "-p", package, "--bench", name, "--"]);
        if args.json {
            command.arg("--json");
        }
        cargo::run(&mut command)?;
    }
    Ok(())
}
