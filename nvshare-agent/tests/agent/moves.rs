//! What clients are asked to move, and what becomes of what they say about it.

use std::sync::atomic::Ordering;

use nvshare_wire::{AgentMessage, ClientMessage, Direction, DrainOutcome, Mover};

use crate::{
    client::{GPU, ScriptedClient},
    process::{Agent, wait_for},
};

/// Two clients that use more than there is, of which the second gets the first turn after some memory of it was out; what the
/// first is asked to move out, and what the second may bring back.
fn asked(arguments: &[&str], by: Option<Mover>) -> (u64, u64) {
    let agent = Agent::start_with("", arguments);
    let clients = [(); 2].map(|()| ScriptedClient::working(&agent));
    for client in &clients {
        client.page.gpu().managed.store(900 << 20, Ordering::Relaxed);
        if let Some(by) = by {
            client.say(&ClientMessage::Moves { by });
        }
    }
    assert!(agent.ctl(&["set", "quantum", "100ms"]).status.success());
    wait_for("the agent to see their memory", || {
        let clients = agent.clients();
        let managed = |client: &serde_json::Value| client["managed_bytes"].as_u64() == Some(900 << 20);
        (clients.len() == 2 && clients.iter().all(managed)).then_some(())
    });
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    // Whatever comes first: each says that half of its memory is out whenever it is revoked, so that it lacks it when it
    // comes back, and the other one has to leave room for it.
    let (mut shortfall, mut prefetch) = (0, 0);
    std::thread::scope(|scope| {
        let players = clients.each_ref().map(|client| {
            scope.spawn(move || {
                let (mut most_out, mut most_in, mut grants) = (0, 0, 0);
                while grants < 4 {
                    match client.next_order() {
                        Some(AgentMessage::Revoke { epoch, shortfall, .. }) => {
                            most_out = most_out.max(shortfall);
                            client.drain(epoch);
                        }
                        Some(AgentMessage::Grant { epoch, prefetch, .. }) => {
                            grants += 1;
                            most_in = most_in.max(prefetch);
                            client.resume(epoch);
                        }
                        Some(AgentMessage::Displaced { .. }) => {}
                        other => panic!("unexpected {other:?}"),
                    }
                }
                (most_out, most_in)
            })
        });
        for player in players {
            let (most_out, most_in) = player.join().unwrap();
            shortfall = shortfall.max(most_out);
            prefetch = prefetch.max(most_in);
        }
    });
    (shortfall, prefetch)
}

#[test]
fn only_clients_that_move_are_asked_to_and_only_if_the_operator_lets_them() {
    let (_, prefetch) = asked(&[], Some(Mover::Unproven));
    assert!(prefetch > 0, "a client that moves may bring back what it had");
    assert_eq!(asked(&[], None), (0, 0));
    assert_eq!(asked(&[], Some(Mover::Demand)), (0, 0));
    assert_eq!(asked(&["--handover", "demand"], Some(Mover::Protected)), (0, 0));
}

#[test]
fn what_clients_moved_is_counted_and_no_report_breaks_the_counting() {
    let agent = Agent::start();
    let client = ScriptedClient::working(&agent);
    client.say(&ClientMessage::Moves { by: Mover::Protected });
    let moved = |direction, moved, moved_ns| {
        client.say(&ClientMessage::Moved { gpu: GPU, epoch: 1, direction, moved, moved_ns });
    };
    moved(Direction::Out, 3 << 30, 500_000_000);
    moved(Direction::In, 1 << 30, 250_000_000);
    let metric = |name: &str, direction: &str| {
        let gpu = "GPU-11111111-1111-1111-1111-111111111111";
        agent.metric(&format!("{name}{{direction=\"{direction}\",gpu=\"{gpu}\"}}"))
    };
    wait_for("both to be counted", || {
        (metric("nvshare_handover_moved_bytes_total", "in") > 0.0).then_some(())
    });
    assert_eq!(metric("nvshare_handover_moved_bytes_total", "out"), (3_u64 << 30) as f64);
    assert_eq!(metric("nvshare_handover_moved_bytes_total", "in"), (1_u64 << 30) as f64);
    assert_eq!(metric("nvshare_handover_moved_seconds_total", "out"), 0.5);
    for _ in 0..3 {
        moved(Direction::In, u64::MAX, u64::MAX);
    }
    client.say(&ClientMessage::Revoked {
        gpu: GPU,
        epoch: 7,
        outcome: DrainOutcome::Drained,
        drain_ns: 1,
        moved: u64::MAX,
    });
    wait_for("the nonsense to be taken in", || {
        (metric("nvshare_handover_moved_bytes_total", "in") > 1e13).then_some(())
    });
    client.noticed_nothing(&agent);
}
