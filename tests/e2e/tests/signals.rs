//! What the agent knows of the driver, compared with what the simulator did.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nvshare_tests::{Scene, SimulatorOptions, is_root, skip};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_mins(1);

fn client<'a>(status: &'a Value, name: &str) -> Result<&'a Value> {
    status["clients"]
        .as_array()
        .and_then(|clients| {
            clients.iter().find(|client| client["name"].as_str().is_some_and(|n| n.contains(name)))
        })
        .with_context(|| format!("no client {name} in {status}"))
}

#[test]
fn programs_that_fit_show_faults_once_and_no_bytes() -> Result<()> {
    if !is_root() {
        skip("comparing the sensors", "not root, so no device files and no eBPF");
        return Ok(());
    }
    let scene = Scene::open(&SimulatorOptions::default())?;
    let mut program = scene.sweep("fits", "300MiB", "3s", &[])?;
    nvshare_tests::wait_until("the program to have touched all its memory", PATIENCE, || {
        Ok((program.stamps()?.len() >= 20).then_some(()))
    })?;
    let clients = scene.agent.ctl_json(&["clients", "--json"])?;
    let seen = client(&clients, "nvshare-workload")?;
    assert!(seen["gpu_faults"].as_u64().is_some_and(|faults| faults > 0), "a cold start faults: {seen}");
    assert_eq!(seen["bytes_in"], 0, "a cold start brings nothing back: {seen}");
    assert_eq!(seen["bytes_out"], 0, "nothing was evicted: {seen}");
    program.finish(PATIENCE)?;
    Ok(())
}
