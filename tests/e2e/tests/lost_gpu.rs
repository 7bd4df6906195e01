//! A GPU that falls off the bus takes nobody with it but its own programs.

use std::time::Duration;

use anyhow::{Result, ensure};
use nvshare_tests::{Scene, SimulatorOptions, wait_until};

const PATIENCE: Duration = Duration::from_mins(1);

#[test]
fn programs_of_a_lost_gpu_get_the_drivers_error_and_those_of_the_other_take_turns_on() -> Result<()> {
    let options = SimulatorOptions { gpus: 2, ..SimulatorOptions::default() };
    let scene = Scene::open(&options)?;
    let mut doomed = [
        scene.sweep("doomed-a", "64MiB", "60s", &["--gpu", "1"])?,
        scene.sweep("doomed-b", "64MiB", "60s", &["--gpu", "1"])?,
    ];
    let mut others =
        [scene.sweep("other-a", "64MiB", "3s", &[])?, scene.sweep("other-b", "64MiB", "3s", &[])?];
    ensure!(scene.agent.ctl(&["set", "quantum", "200ms"])?.status.success());
    ensure!(scene.agent.ctl(&["set", "mode", "exclusive"])?.status.success());
    for program in doomed.iter().chain(&others) {
        wait_until("every program to run", PATIENCE, || Ok((program.stamps()?.len() >= 5).then_some(())))?;
    }
    let gpus = |scene: &Scene| -> Result<usize> {
        let status = scene.agent.ctl_json(&["status", "--json"])?;
        Ok(status["gpus"].as_array().map_or(0, Vec::len))
    };
    ensure!(gpus(&scene)? == 2);

    scene.simulator.fault(scene.binaries(), 1, "lost")?;
    for program in &mut doomed {
        // The one that waits for its turn must not wait for ever.
        let status = program.process().wait(PATIENCE)?;
        let log = program.process().log();
        ensure!(!status.success() && log.contains("(999)"), "{status}: {log}");
    }
    wait_until("the agent to know one GPU", PATIENCE, || Ok((gpus(&scene)? == 1).then_some(())))?;
    let status = scene.agent.ctl_json(&["doctor", "--json"])?;
    let nvml = status["sensors"].as_array().and_then(|all| all.iter().find(|one| one["sensor"] == "nvml"));
    ensure!(nvml.is_some_and(|nvml| nvml.to_string().contains("attached")), "{nvml:?}");
    for program in &mut others {
        program.finish(PATIENCE)?;
    }

    scene.simulator.fault(scene.binaries(), 1, "back")?;
    wait_until("both GPUs to be known", PATIENCE, || Ok((gpus(&scene)? == 2).then_some(())))?;
    let mut again = scene.sweep("again", "64MiB", "200ms", &["--gpu", "1"])?;
    again.finish(PATIENCE)?;
    Ok(())
}
