//! Taking turns: by the operator's order, and when the agent goes away in the middle.

use std::time::Duration;

use anyhow::Result;
use nvshare_tests::{Scene, SimulatorOptions, Workload, wait_until, workload::Stamp};

const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until a program has done `count` sweeps.
fn sweeps(program: &Workload, count: usize) -> Result<()> {
    wait_until(&format!("{} to do {count} sweeps", program.name()), PATIENCE, || {
        Ok((program.stamps()?.len() >= count).then_some(()))
    })
}

/// The stamps of both, in the order of time, as runs of one program: `(0, 12), (1, 9), …`.
fn runs(programs: [&[Stamp]; 2]) -> Vec<(usize, usize)> {
    let mut all: Vec<(f64, usize)> = programs
        .iter()
        .enumerate()
        .flat_map(|(who, stamps)| stamps.iter().map(move |stamp| (stamp.t_ms, who)))
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (_, who) in all {
        match runs.last_mut() {
            Some((last, length)) if *last == who => *length += 1,
            Some(_) | None => runs.push((who, 1)),
        }
    }
    runs
}

#[test]
fn an_order_makes_programs_that_fit_take_turns_and_loses_nothing() -> Result<()> {
    let scene = Scene::open(&SimulatorOptions::default())?;
    let order = scene.agent.ctl(&["set", "quantum", "300ms"])?;
    assert!(order.status.success(), "{order:?}");
    let mut a = scene.sweep("a", "128MiB", "4s", &[])?;
    let mut b = scene.sweep("b", "128MiB", "4s", &[])?;
    sweeps(&a, 20)?;
    sweeps(&b, 20)?;
    assert_eq!(scene.agent.mode()?, "shared");

    assert!(scene.agent.ctl(&["set", "mode", "exclusive"])?.status.success());
    scene.agent.wait_for_mode("exclusive", PATIENCE)?;
    // Both have had a few turns when both have done this many more sweeps.
    let (done_a, done_b) = (a.stamps()?.len(), b.stamps()?.len());
    sweeps(&a, done_a + 60)?;
    sweeps(&b, done_b + 60)?;
    let (stamps_a, stamps_b) = (a.stamps()?, b.stamps()?);
    let (after_a, after_b) = (&stamps_a[done_a + 5..], &stamps_b[done_b + 5..]);
    let runs = runs([after_a, after_b]);
    let longest_foreign = after_a.len() + after_b.len();
    assert!(runs.len() >= 3, "both must get turns: {runs:?}");
    // Side by side, the runs would be as many as the sweeps; 300 ms of 10 ms sweeps are about 30 in a row.
    assert!(runs.len() * 5 < longest_foreign, "programs ran side by side: {runs:?}");

    assert!(scene.agent.ctl(&["set", "mode", "auto"])?.status.success());
    scene.agent.wait_for_mode("shared", PATIENCE)?;
    a.finish(PATIENCE)?;
    b.finish(PATIENCE)?;
    Ok(())
}

#[test]
fn an_agent_killed_mid_slice_leaves_its_programs_running_to_the_right_result() -> Result<()> {
    let mut scene = Scene::open(&SimulatorOptions::default())?;
    let mut a = scene.sweep("a", "128MiB", "8s", &[])?;
    let mut b = scene.sweep("b", "128MiB", "8s", &[])?;
    assert!(scene.agent.ctl(&["set", "mode", "exclusive"])?.status.success());
    scene.agent.wait_for_mode("exclusive", PATIENCE)?;
    sweeps(&a, 10)?;

    scene.agent.process().signal(libc::SIGKILL);
    scene.agent.process().wait(PATIENCE)?;
    // Both go on without an agent, the gated one too.
    let (done_a, done_b) = (a.stamps()?.len(), b.stamps()?.len());
    sweeps(&a, done_a + 10)?;
    sweeps(&b, done_b + 10)?;

    // A new agent finds both again.
    scene.replace_agent()?;
    wait_until("both clients to reconnect", PATIENCE, || {
        let clients = scene.agent.ctl_json(&["clients", "--json"])?;
        Ok((clients["clients"].as_array().map(Vec::len) == Some(2)).then_some(()))
    })?;
    a.finish(PATIENCE)?;
    b.finish(PATIENCE)?;
    Ok(())
}

#[test]
fn a_killed_program_gives_its_turn_to_the_others_at_once() -> Result<()> {
    let scene = Scene::open(&SimulatorOptions::default())?;
    assert!(scene.agent.ctl(&["set", "mode", "exclusive"])?.status.success());
    assert!(scene.agent.ctl(&["set", "quantum", "20s"])?.status.success());
    let holder = scene.sweep("holder", "128MiB", "30s", &[])?;
    sweeps(&holder, 10)?;
    let mut waiter = scene.sweep("waiter", "128MiB", "500ms", &[])?;
    wait_until("the waiter to wait", PATIENCE, || {
        let clients = scene.agent.ctl_json(&["status", "--json"])?;
        Ok(clients.to_string().contains("\"waiting\"").then_some(()))
    })?;
    let mut holder = holder;
    holder.process().signal(libc::SIGKILL);
    // Far less than the rest of the holder's quantum.
    waiter.finish(Duration::from_secs(10))?;
    Ok(())
}
