//! Two GPUs are two plans.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nvshare_tests::{Scene, SimulatorOptions};

const PATIENCE: Duration = Duration::from_mins(1);

#[test]
fn thrash_on_one_gpu_leaves_the_other_shared() -> Result<()> {
    let scene = Scene::open(&SimulatorOptions { gpus: 2, ..SimulatorOptions::default() })?;
    let events = scene.agent.events()?;
    let calm = scene.sweep("calm", "200MiB", "3s", &["--gpu", "1"])?;
    let thrashing = ["x", "y", "z"].map(|name| scene.sweep(name, "450MiB", "1500ms", &["--gpu", "0"]));
    let change = events.wait_for_turns(PATIENCE)?;
    let turns = change["gpu"].as_str().context("event without gpu")?.to_owned();

    let status = scene.agent.ctl_json(&["status", "--json"])?;
    let gpus = status["gpus"].as_array().context("status without gpus")?;
    assert_eq!(gpus.len(), 2);
    for gpu in gpus {
        if gpu["gpu"] != turns.as_str() {
            assert_eq!(gpu["mode"], "shared", "{status}");
        }
    }
    let mut calm = calm;
    calm.finish(PATIENCE)?;
    for program in thrashing {
        program?.finish(PATIENCE)?;
    }
    Ok(())
}
