//! A driver that hangs is noticed, shown, and made no worse.

use std::time::Duration;

use anyhow::{Result, ensure};
use nvshare_tests::{Scene, SimulatorOptions, is_root, skip, wait_until};

const PATIENCE: Duration = Duration::from_mins(1);

#[test]
fn a_fault_thread_that_spins_brings_exclusive_mode_and_nobody_new_is_admitted_until_it_works_again()
-> Result<()> {
    if !is_root() {
        skip("seeing the fault-service thread", "not root");
        return Ok(());
    }
    let scene = Scene::open(&SimulatorOptions::default())?;
    let mut a = scene.sweep("a", "400MiB", "6s", &[])?;
    let mut b = scene.sweep("b", "400MiB", "6s", &[])?;
    for program in [&a, &b] {
        wait_until("both to run", PATIENCE, || Ok((program.stamps()?.len() >= 20).then_some(())))?;
    }
    let hangs = || -> Result<bool> {
        Ok(scene.agent.ctl_json(&["status", "--json"])?["gpus"][0]["hangs_s"].as_f64().is_some())
    };
    ensure!(!hangs()? && scene.agent.mode()? == "shared");

    scene.simulator.fault(scene.binaries(), 0, "hang")?;
    wait_until("the hang to be noticed", PATIENCE, || Ok(hangs()?.then_some(())))?;
    scene.agent.wait_for_mode("exclusive", PATIENCE)?;
    // Whoever comes now runs as without an agent, as far as the driver lets it.
    let mut late = scene.sweep("late", "64MiB", "100ms", &[])?;
    wait_until("the newcomer to be refused", PATIENCE, || {
        Ok(late.process().log().contains("nobody is admitted").then_some(()))
    })?;

    scene.simulator.fault(scene.binaries(), 0, "back")?;
    wait_until("the end of the hang to be noticed", PATIENCE, || Ok((!hangs()?).then_some(())))?;
    ensure!(scene.agent.mode()? == "exclusive", "an operator ends it");
    ensure!(scene.agent.ctl(&["set", "mode", "auto"])?.status.success());
    for program in [&mut a, &mut b, &mut late] {
        program.finish(PATIENCE)?;
    }
    Ok(())
}
