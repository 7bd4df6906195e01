//! Turns by the operator's order, seen from the clients.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
    thread,
};

use nvshare_wire::AgentMessage;

use crate::{
    client::ScriptedClient,
    process::{Agent, wait_for},
};

/// What several clients do together.
#[derive(Default)]
struct Stage {
    /// Clients whose gate is open.
    open: AtomicI32,
    /// Two were open at once after turns had begun.
    overlap: AtomicBool,
    /// The first turn has begun.
    taking_turns: AtomicBool,
}

/// Plays a well-behaved client until its connection ends; counts its grants.
fn play(client: ScriptedClient, stage: Arc<Stage>, grants: Arc<AtomicU32>) -> thread::JoinHandle<()> {
    stage.open.fetch_add(1, Ordering::SeqCst);
    thread::spawn(move || {
        let mut is_open = true;
        while let Some(order) = client.next_order() {
            match order {
                AgentMessage::Revoke { epoch, .. } => {
                    if std::mem::replace(&mut is_open, false) {
                        stage.open.fetch_sub(1, Ordering::SeqCst);
                    }
                    client.drain(epoch);
                }
                AgentMessage::Grant { epoch, .. } => {
                    if !std::mem::replace(&mut is_open, true) {
                        let others = stage.open.fetch_add(1, Ordering::SeqCst);
                        if others > 0 && stage.taking_turns.load(Ordering::SeqCst) {
                            stage.overlap.store(true, Ordering::SeqCst);
                        }
                        stage.taking_turns.store(true, Ordering::SeqCst);
                    }
                    grants.fetch_add(1, Ordering::SeqCst);
                    client.resume(epoch);
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    })
}

/// Plays a well-behaved client until its connection ends; its grants so far.
pub(crate) fn play_alone(client: ScriptedClient) -> Arc<AtomicU32> {
    let grants: Arc<AtomicU32> = Arc::default();
    play(client, Arc::default(), Arc::clone(&grants));
    grants
}

#[test]
fn two_clients_take_turns_in_exclusive_mode_and_share_again_when_told() {
    let agent = Agent::start();
    let stage = Arc::new(Stage::default());
    let grants: Vec<Arc<AtomicU32>> = (0..2).map(|_| Arc::default()).collect();
    let players: Vec<_> = grants
        .iter()
        .map(|grants| play(ScriptedClient::working(&agent), Arc::clone(&stage), Arc::clone(grants)))
        .collect();
    assert!(agent.ctl(&["set", "quantum", "100ms"]).status.success());
    let order = agent.ctl(&["set", "mode", "exclusive"]);
    assert!(order.status.success(), "{order:?}");
    wait_for("both to get turns", || {
        grants.iter().all(|grants| grants.load(Ordering::SeqCst) >= 4).then_some(())
    });
    assert!(!stage.overlap.load(Ordering::SeqCst), "two gates were open at the same time");
    let status = agent.status();
    assert_eq!(status["gpus"][0]["mode"], "exclusive");
    assert_eq!(status["gpus"][0]["order"], "exclusive");
    assert!(
        agent.metric("nvshare_scheduler_grants_total{gpu=\"GPU-11111111-1111-1111-1111-111111111111\"}")
            >= 8.0
    );

    stage.taking_turns.store(false, Ordering::SeqCst);
    assert!(agent.ctl(&["set", "mode", "shared"]).status.success());
    wait_for("all gates to be open", || (stage.open.load(Ordering::SeqCst) == 2).then_some(()));
    assert_eq!(agent.status()["gpus"][0]["mode"], "shared");
    drop(agent);
    for player in players {
        player.join().unwrap();
    }
}

#[test]
fn a_dead_client_gives_its_turn_to_the_next_at_once() {
    let agent = Agent::start();
    assert!(agent.ctl(&["set", "quantum", "1h"]).status.success());
    let (a, b) = (ScriptedClient::working(&agent), ScriptedClient::working(&agent));
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    // One of them is revoked and will wait for an hour.
    let (held, gated) = wait_for("one to be revoked", || {
        let status = agent.status();
        let clients = status["gpus"][0]["clients"].as_array()?.clone();
        let draining = clients.iter().find(|client| client["state"] == "draining")?["client"].clone();
        Some(if draining == a.id { (b.id, a.id) } else { (a.id, b.id) })
    });
    let (holder, waiter) = if held == a.id { (a, b) } else { (b, a) };
    assert_eq!(waiter.id, gated);
    match waiter.next_order() {
        Some(AgentMessage::Revoke { epoch, .. }) => waiter.drain(epoch),
        other => panic!("expected a revocation, got {other:?}"),
    }
    drop(holder);
    match waiter.next_order() {
        Some(AgentMessage::Grant { epoch, .. }) => waiter.resume(epoch),
        other => panic!("expected a grant, got {other:?}"),
    }
}

#[test]
fn a_stopping_agent_opens_every_gate_before_it_goes() {
    let mut agent = Agent::start();
    assert!(agent.ctl(&["set", "quantum", "1h"]).status.success());
    let clients = [ScriptedClient::working(&agent), ScriptedClient::working(&agent)];
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    let gated = wait_for("one to be revoked", || {
        let status = agent.status();
        let list = status["gpus"][0]["clients"].as_array()?.clone();
        let id = list.iter().find(|client| client["state"] == "draining")?["client"].as_u64()?;
        clients.iter().find(|client| client.id == id)
    });
    let Some(AgentMessage::Revoke { epoch, .. }) = gated.next_order() else {
        panic!("expected a revocation")
    };
    gated.drain(epoch);
    wait_for("the client to wait", || agent.status().to_string().contains("\"waiting\"").then_some(()));
    assert!(agent.terminate());
    match gated.next_order() {
        Some(AgentMessage::Grant { epoch: granted, .. }) => assert!(granted > epoch),
        other => panic!("expected a grant, got {other:?}"),
    }
}

#[test]
fn a_gated_client_hears_that_the_agent_lives() {
    let agent = Agent::start();
    assert!(agent.ctl(&["set", "quantum", "1h"]).status.success());
    let clients = [ScriptedClient::working(&agent), ScriptedClient::working(&agent)];
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    let gated = wait_for("one to be revoked", || {
        let status = agent.status();
        let list = status["gpus"][0]["clients"].as_array()?.clone();
        let id = list.iter().find(|client| client["state"] == "draining")?["client"].as_u64()?;
        clients.iter().find(|client| client.id == id)
    });
    let Some(AgentMessage::Revoke { epoch, .. }) = gated.next_order() else {
        panic!("expected a revocation")
    };
    gated.drain(epoch);
    assert_eq!(gated.receive(), Some(AgentMessage::Alive));
    assert_eq!(gated.receive(), Some(AgentMessage::Alive));
}

#[test]
fn a_recording_of_turns_replays_to_the_same_decisions() {
    let dir = tempfile::tempdir().unwrap();
    let recording = dir.path().join("recording");
    let mut agent = Agent::start_with("", &["--record", recording.to_str().unwrap()]);
    let stage = Arc::new(Stage::default());
    let grants: Arc<AtomicU32> = Arc::default();
    let players: Vec<_> = (0..2)
        .map(|_| play(ScriptedClient::working(&agent), Arc::clone(&stage), Arc::clone(&grants)))
        .collect();
    assert!(agent.ctl(&["set", "quantum", "50ms"]).status.success());
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    wait_for("turns", || (grants.load(Ordering::SeqCst) >= 6).then_some(()));
    assert!(agent.terminate());
    for player in players {
        player.join().unwrap();
    }
    let replay = std::process::Command::new(env!("CARGO_BIN_EXE_nvshare-agent"))
        .arg("replay")
        .arg(&recording)
        .output()
        .unwrap();
    assert!(replay.status.success(), "{replay:?}");
    let said = String::from_utf8(replay.stdout).unwrap();
    assert!(said.contains("all as recorded") && !said.contains(" 0 decisions"), "{said}");
}
