//! What one user can take away from the others: nothing.

use std::{
    io::Write as _,
    os::{
        fd::AsFd as _,
        unix::{fs::PermissionsExt as _, net::UnixStream},
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use nvshare_wire::{AgentMessage, DrainOutcome};

use crate::{
    client::{GPU, ScriptedClient, connect, hello, memfd, receive, send_with},
    process::{Agent, wait_for},
};

/// Nobody, on every system.
const NOBODY: libc::c_long = 65534;

/// Runs `act` in a thread that is another user; says why it cannot where this is not root.
fn as_nobody<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Option<thread::JoinHandle<T>> {
    if !rustix::process::geteuid().is_root() {
        let reason = "not root, so no other user to be";
        assert!(std::env::var_os("NVSHARE_REQUIRE_ALL").is_none(), "would skip: {reason}");
        eprintln!("SKIPPED: {reason}");
        return None;
    }
    Some(thread::spawn(move || {
        // The bare call changes this thread only, which is what the kernel tells of a connection that it makes.
        // SAFETY: takes numbers, and an empty list.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()), 0);
            assert_eq!(libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY), 0);
        }
        act()
    }))
}

fn open_to_all(agent: &Agent) -> PathBuf {
    std::fs::set_permissions(agent.dir(), std::fs::Permissions::from_mode(0o755)).unwrap();
    agent.run_dir().join("clients.sock")
}

fn limited(agent: &Agent, limit: &str) -> f64 {
    agent.metric(&format!("nvshare_sessions_limited_total{{limit=\"{limit}\"}}"))
}

#[test]
fn a_user_that_connects_without_end_is_slowed_down_and_others_connect() {
    let agent = Agent::start_with("[listen]\nmax_clients_per_uid = 100\nconnections_per_second = 1\n", &[]);
    let healthy = ScriptedClient::working(&agent);
    let path = open_to_all(&agent);
    let Some(flood) = as_nobody(move || {
        for _ in 0..2000 {
            drop(UnixStream::connect(&path).unwrap());
        }
    }) else {
        return;
    };
    flood.join().unwrap();
    wait_for("all to be seen", || {
        let (by_uid, by_cgroup) = (limited(&agent, "uid_rate"), limited(&agent, "cgroup_rate"));
        // Some tokens came back meanwhile.
        (by_uid + by_cgroup > 1700.0).then_some(())
    });
    // Where the system tells containers apart, this test is one of its own; else another user is not affected.
    if limited(&agent, "cgroup_rate") == 0.0 {
        ScriptedClient::working(&agent).noticed_nothing(&agent);
    }
    healthy.noticed_nothing(&agent);
    let lines = agent.log().matches("session refused").count();
    assert!(lines < 500, "{lines} lines for one flood");
}

#[test]
fn a_user_that_holds_connections_without_a_word_leaves_places_to_others() {
    let config = "[listen]\nconnections_per_second = 100000\nmax_clients_per_uid = 5000\n\
                  max_clients_per_cgroup = 5000\n";
    let agent = Agent::start_with(config, &[]);
    let path = open_to_all(&agent);
    let Some(hoard) =
        as_nobody(move || (0..600).map(|_| UnixStream::connect(&path).unwrap()).collect::<Vec<UnixStream>>())
    else {
        return;
    };
    let held = hoard.join().unwrap();
    // In the same container the other user has a share too, unless the container's is used up.
    wait_for("the hoard to be limited", || (limited(&agent, "greeting") > 300.0).then_some(()));
    let stream = connect(&agent);
    let page = memfd(4096, rustix::fs::SealFlags::SHRINK);
    rustix::io::pwrite(&page, b"NVP1", 0).unwrap();
    send_with(&stream, hello().encode().as_bytes(), &[page.as_fd()]);
    let in_a_container =
        std::fs::read_to_string("/proc/self/cgroup").unwrap().lines().any(|line| line != "0::/");
    match receive(&stream) {
        Some(AgentMessage::Welcome { .. }) => {}
        Some(AgentMessage::Refused { .. }) if in_a_container => {}
        other => panic!("expected Welcome, got {other:?}"),
    }
    drop(held);
}

#[test]
fn an_unprivileged_user_can_neither_order_nor_listen_in_and_each_attempt_fails_at_the_socket() {
    let agent = Agent::start();
    let _clients = [ScriptedClient::working(&agent), ScriptedClient::working(&agent)];
    open_to_all(&agent);
    let run_dir = agent.run_dir();
    let Some(attempts) = as_nobody(move || {
        let control = UnixStream::connect(run_dir.join("control.sock")).map(drop);
        let replace = std::fs::remove_file(run_dir.join("clients.sock"));
        let own = std::os::unix::net::UnixListener::bind(run_dir.join("mine.sock")).map(drop);
        let lock = std::fs::OpenOptions::new().write(true).open(run_dir.join("agent.lock")).map(drop);
        [control, replace, own, lock].map(|attempt| attempt.map_err(|error| error.kind()))
    }) else {
        return;
    };
    assert_eq!(attempts.join().unwrap(), [Err(std::io::ErrorKind::PermissionDenied); 4]);
    let mode =
        wait_for("the GPU to be known", || agent.status()["gpus"][0]["mode"].as_str().map(str::to_owned));
    assert_eq!(mode, "shared");
    assert_eq!(agent.control(r#"{"request":"explain"}"#)["ok"]["changes"].as_array().unwrap().len(), 0);
}

#[test]
fn whatever_a_client_asks_for_its_share_is_not_raised() {
    let agent = Agent::start();
    let stream = connect(&agent);
    let page = memfd(4096, rustix::fs::SealFlags::SHRINK);
    rustix::io::pwrite(&page, b"NVP1", 0).unwrap();
    let name = nvshare_wire::Label::new("greedy");
    let greedy = nvshare_wire::ClientMessage::Hello {
        weight_milli: u32::MAX,
        priority: i32::MAX,
        memory_limit: 0,
        name,
    };
    send_with(&stream, greedy.encode().as_bytes(), &[page.as_fd()]);
    assert!(matches!(receive(&stream), Some(AgentMessage::Welcome { .. })));
    let use_gpu = nvshare_wire::ClientMessage::UseGpu { slot: 0, gpu: GPU };
    (&stream).write_all(use_gpu.encode().as_bytes()).unwrap();
    let weight = wait_for("the client on the GPU", || {
        let status = agent.status();
        status["gpus"][0]["clients"][0]["weight_milli"].as_u64()
    });
    assert_eq!(weight, 1000);
}

#[test]
fn one_client_cannot_answer_for_another() {
    let agent = Agent::start();
    assert!(agent.ctl(&["set", "quantum", "1h"]).status.success());
    let clients = [ScriptedClient::working(&agent), ScriptedClient::working(&agent)];
    let liar = ScriptedClient::working(&agent);
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    let draining = |id: u64| {
        let status = agent.status();
        let list = status["gpus"][0]["clients"].as_array().unwrap().clone();
        list.iter().any(|client| client["client"] == id && client["state"] == "draining")
    };
    let victim =
        wait_for("an honest client to be revoked", || clients.iter().find(|client| draining(client.id)));
    let Some(AgentMessage::Revoke { epoch, .. }) = victim.next_order() else {
        panic!("expected a revocation")
    };
    // Epochs are counted for each client; the liar tries all that can be meant.
    for epoch in 0..epoch + 10 {
        liar.say(&nvshare_wire::ClientMessage::Revoked {
            gpu: GPU,
            epoch,
            outcome: DrainOutcome::Drained,
            drain_ns: 1,
            moved: 0,
        });
    }
    liar.say(&nvshare_wire::ClientMessage::Yield { gpu: GPU, epoch });
    // The agent has taken all that: it answers what came after it on the same connection's queue.
    wait_for("the lies to be read", || {
        (agent.metric("nvshare_scheduler_drains_total{gpu=\"GPU-11111111-1111-1111-1111-111111111111\",outcome=\"drained\"}")
            >= 10.0)
            .then_some(())
    });
    assert!(draining(victim.id), "another client's answer was taken for the victim's");
    victim.drain(epoch);
    wait_for("the victim's own answer", || (!draining(victim.id)).then_some(()));
}

#[test]
fn a_client_that_ignores_revocation_over_and_over_under_new_names_does_not_stop_the_turns() {
    let agent = Agent::start_with("[engine]\ndrain_within = \"1 s\"\n", &[]);
    assert!(agent.ctl(&["set", "quantum", "100ms"]).status.success());
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    let stop = Arc::new(AtomicBool::new(false));
    let run_dir = agent.run_dir();
    let hostile = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            // Each session is shorter than the agent's patience, and the next one is there before it ends.
            let mut sessions = std::collections::VecDeque::new();
            while !stop.load(Ordering::Relaxed) {
                let stream = UnixStream::connect(run_dir.join("clients.sock")).unwrap();
                stream.set_read_timeout(Some(crate::process::PATIENCE)).unwrap();
                let client = ScriptedClient::join_on(stream);
                client.begin_work();
                sessions.push_back(client);
                if sessions.len() > 3 {
                    sessions.pop_front();
                }
                thread::sleep(std::time::Duration::from_millis(300));
            }
        }
    });
    wait_for("the hostile client to be there", || (agent.clients().len() >= 3).then_some(()));
    // Two honest clients take turns meanwhile.
    let grants: Vec<_> = (0..2).map(|_| crate::turns::play_alone(ScriptedClient::working(&agent))).collect();
    wait_for("both to have had many turns", || {
        grants.iter().all(|grants| grants.load(Ordering::SeqCst) >= 50).then_some(())
    });
    stop.store(true, Ordering::Relaxed);
    hostile.join().unwrap();
}
