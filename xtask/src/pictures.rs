//! `cargo xtask pictures`: the pictures in the documentation, from a real agent on the simulated GPU.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{
    Agent, Binaries, Browser, Simulator, SimulatorOptions, Terminal, browser, monotonic_ms, process::Guarded,
    terminal, wait_until,
};

use crate::cargo;

/// Draw the pictures of the status page and of `nvsharectl top` into docs/pictures/.
///
/// Needs Chromium. Three programs share a simulated card and stop to fit; the pictures show the agent that
/// lets them take turns.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to write them.
    #[arg(long, value_name = "DIR", default_value = "docs/pictures")]
    dir: PathBuf,
    /// Use the programs in this cargo profile's folder instead of building them, as in target/debug.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
}

/// How long two programs share before the third comes, and how long all three take turns.
const TOGETHER: Duration = Duration::from_secs(25);
const TURNS: Duration = Duration::from_secs(45);
const PATIENCE: Duration = Duration::from_mins(1);
/// No picture is larger, in bytes.
const SIZE_MAX: usize = 150 << 10;

pub(crate) fn run(args: &Args) -> Result<()> {
    let chromium = browser::installed().context("the pictures need Chromium (Debian: chromium)")?;
    let binaries = match &args.binaries {
        Some(dir) => Binaries::in_dir(dir)?,
        None => cargo::build_simulated()?,
    };
    let out = cargo::root().join(&args.dir);
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let dir = tempfile::Builder::new().prefix("nvshare-pictures-").tempdir()?;
    let dir = dir.path();
    let simulator = Simulator::start(&binaries, &dir.join("sim"), &SimulatorOptions::default())?;
    let agent = Agent::start(&binaries, &simulator.agent_config(), &dir.join("run"))?;
    let program = |name: &str| {
        // A program goes by the name of its file.
        let file = dir.join(name);
        std::fs::copy(binaries.workload(), &file)?;
        let mut command = Command::new(file);
        command
            .args([
                "sweep",
                "--name",
                name,
                "--memory",
                "400MiB",
                "--gpu-work",
                "200s",
                "--sweep-time",
                "20ms",
            ])
            .envs(simulator.environment())
            .env("LD_PRELOAD", binaries.shim())
            .env("NVSHARE_RUN_DIR", agent.run_dir());
        Guarded::spawn(name, &mut command, &dir.join(format!("{name}.log")), false)
    };
    let _fit = [program("training")?, program("notebook")?];
    pass(TOGETHER)?;
    let _third = program("inference")?;
    wait_until("turns", PATIENCE, || Ok((agent.mode()? != "shared").then_some(())))?;
    pass(TURNS)?;

    let status = agent.ctl_json(&["status", "--json"])?;
    let address = status["metrics"].as_str().context("the agent serves no page")?;
    let mut page = Browser::start(&chromium, 1000, 800)?;
    page.open(&format!("http://{address}/"))?;
    page.wait_for("document.getElementById('state').textContent === 'Live, every second'", PATIENCE)?;
    for scheme in ["light", "dark"] {
        page.prefer(scheme)?;
        save(&out.join(format!("status-page-{scheme}.png")), &page.screenshot()?)?;
    }
    for (name, columns, rows) in [("top", 100, 30), ("top-80x24", 80, 24)] {
        let mut command = Command::new(binaries.ctl());
        command.arg("--run-dir").arg(agent.run_dir()).arg("top");
        let mut screen = Terminal::start(&mut command, columns, rows)?;
        screen.wait_for("the picture", PATIENCE, |text| text.contains("turn: "))?;
        let svg = dir.join("screen.svg");
        std::fs::write(&svg, terminal::to_svg(&screen.screen()))?;
        screen.press("q")?;
        screen.wait(PATIENCE)?;
        page.resize(u32::from(columns) * 84 / 10 + 24, u32::from(rows) * 18 + 24)?;
        page.open(&format!("file://{}", svg.display()))?;
        save(&out.join(format!("{name}.png")), &page.screenshot()?)?;
    }
    Ok(())
}

fn pass(time: Duration) -> Result<()> {
    let until = monotonic_ms() + time.as_secs_f64() * 1e3;
    wait_until("some time to pass", time * 2, || Ok((monotonic_ms() >= until).then_some(())))
}

fn save(path: &Path, picture: &[u8]) -> Result<()> {
    ensure!(
        picture.len() <= SIZE_MAX,
        "{} has {} KiB; a picture may have {}",
        path.display(),
        picture.len() >> 10,
        SIZE_MAX >> 10
    );
    std::fs::write(path, picture).with_context(|| format!("writing {}", path.display()))?;
    eprintln!("{} ({} KiB)", path.display(), picture.len() >> 10);
    Ok(())
}
