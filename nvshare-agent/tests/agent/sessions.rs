//! The life of sessions and of the agent.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::Ordering,
};

use nvshare_wire::{AgentMessage, ClientMessage, RefusalCode};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Pid, Signal, kill_process},
};

use crate::{
    client::{GPU, ScriptedClient, connect, receive},
    process::{Agent, text, wait_for},
};

#[test]
fn registering_and_closing_fifty_times_leaves_nothing_behind() {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let mut ids: Vec<u64> = (0..50).map(|_| ScriptedClient::join(&agent).id).collect();
    wait_for("the clients to be forgotten", || (agent.clients().len() == 1).then_some(()));
    ids.dedup();
    assert_eq!(ids.len(), 50, "a client's number is never used again");
    assert_eq!(agent.metric("nvshare_sessions"), 1.0);
    assert_eq!(agent.metric("nvshare_sessions_total"), 51.0);
    healthy.noticed_nothing(&agent);
}

#[test]
fn a_client_that_leaves_takes_its_series_with_it_and_no_other_clients() {
    let agent = Agent::start();
    let (first, second) = (ScriptedClient::working(&agent), ScriptedClient::working(&agent));
    let series_of = |client: u64| {
        let label = format!("client=\"c{client}\"");
        agent.http("/metrics").1.lines().filter(|line| line.contains(&label)).count()
    };
    let (gone, staying) = (first.id, second.id);
    wait_for("both to be shown", || (series_of(gone) > 0 && series_of(staying) > 0).then_some(()));
    drop(first);
    wait_for("the first to be gone", || (series_of(gone) == 0).then_some(()));
    assert!(series_of(staying) > 0);
}

#[test]
fn closing_without_a_word_is_no_offence() {
    let agent = Agent::start();
    for _ in 0..10 {
        drop(connect(&agent));
    }
    let client = ScriptedClient::join(&agent);
    for code in ["malformed", "order", "timeout"] {
        assert_eq!(agent.refused(code), 0.0);
    }
    client.noticed_nothing(&agent);
}

#[test]
fn clients_beyond_the_limit_are_told_so_and_those_within_stay() {
    let agent = Agent::start_with("[listen]\nmax_clients_per_uid = 3\n", &[]);
    let within: Vec<_> = (0..3).map(|_| ScriptedClient::working(&agent)).collect();
    let stream = connect(&agent);
    let page = crate::client::memfd(4096, rustix::fs::SealFlags::SHRINK);
    rustix::io::pwrite(&page, b"NVP1", 0).unwrap();
    let descriptor = std::os::fd::AsFd::as_fd(&page);
    crate::client::send_with(&stream, crate::client::hello().encode().as_bytes(), &[descriptor]);
    match receive(&stream) {
        Some(AgentMessage::Refused { code: RefusalCode::Limit, detail }) => {
            assert!(detail.as_str().contains("max_clients_per_uid"), "{detail:?}");
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
    for client in &within {
        client.noticed_nothing(&agent);
    }
}

#[test]
fn a_client_that_floods_the_agent_and_never_reads_leaves_it_responsive() {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let deaf = ScriptedClient::working(&agent);
    let mut stream = deaf.stream().try_clone().unwrap();
    stream.set_nonblocking(true).unwrap();
    let frame = ClientMessage::Waiting { gpu: GPU, threads: 0 }.encode();
    // Until the socket is full, because the agent reads at its own rate.
    let blocked = (0..100_000).any(|_| stream.write_all(frame.as_bytes()).is_err());
    assert!(blocked, "the agent took everything at once");
    assert!(agent.http("/healthz").0.contains("200"));
    healthy.noticed_nothing(&agent);
}

/// Not a test of its own: a client process that passes its socket on to a child, as programs without
/// close-on-exec do.
#[test]
#[ignore = "run by another test as a process of its own"]
fn process_that_passes_its_socket_on() {
    let path = std::env::var_os("NVSHARE_TEST_SOCKET").unwrap();
    let client = ScriptedClient::join_on(UnixStream::connect(Path::new(&path)).unwrap());
    fcntl_setfd(client.stream(), FdFlags::empty()).unwrap();
    #[expect(clippy::zombie_processes, reason = "it is to outlive this process")]
    let heir = Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().unwrap();
    println!("heir {} client {}", heir.id(), client.id);
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_process_is_forgotten_at_once_although_its_child_holds_the_socket() {
    let agent = Agent::start();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sessions::process_that_passes_its_socket_on", "--ignored", "--nocapture"])
        .env("NVSHARE_TEST_SOCKET", agent.run_dir().join("clients.sock"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let line = BufReader::new(process.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .find(|line| line.contains("heir "))
        .unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let heir = words[words.iter().position(|word| *word == "heir").unwrap() + 1].parse().unwrap();
    assert_eq!(agent.clients().len(), 1);
    assert_eq!(agent.clients()[0]["pid"], process.id());
    process.kill().unwrap();
    process.wait().unwrap();
    wait_for("the killed client to be forgotten", || agent.clients().is_empty().then_some(()));
    // The child, which still holds the socket, lives.
    let heir = Pid::from_raw(heir).unwrap();
    kill_process(heir, Signal::KILL).expect("the heir must still live");
}

#[test]
fn a_second_agent_on_the_same_directory_is_refused_and_the_first_goes_on() {
    let agent = Agent::start();
    let client = ScriptedClient::join(&agent);
    let second = Command::new(env!("CARGO_BIN_EXE_nvshare-agent"))
        .args(["run", "--metrics-listen", "off", "--run-dir"])
        .arg(agent.run_dir())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("another nvshare-agent already serves"), "{second:?}");
    client.noticed_nothing(&agent);
    ScriptedClient::join(&agent);
}

#[test]
fn a_killed_agent_leaves_sockets_that_the_next_one_replaces() {
    let mut agent = Agent::start();
    let client = ScriptedClient::join(&agent);
    agent.replace();
    assert_eq!(receive(client.stream()), None, "the old session ended");
    let again = ScriptedClient::working(&agent);
    again.noticed_nothing(&agent);
}

#[test]
fn an_agent_that_is_told_to_end_removes_its_sockets_and_ends_well() {
    let mut agent = Agent::start();
    let client = ScriptedClient::working(&agent);
    assert!(agent.terminate());
    assert_eq!(client.receive(), None);
    assert!(!agent.run_dir().join("clients.sock").exists());
    assert!(!agent.run_dir().join("control.sock").exists());
}

#[test]
fn everybody_may_connect_as_client_and_only_some_as_operator() {
    let agent = Agent::start();
    let mode =
        |name: &str| std::fs::metadata(agent.run_dir().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("clients.sock"), 0o666);
    assert_eq!(mode("control.sock"), 0o660);
    assert_eq!(mode("") & 0o022, 0, "others must not be able to replace the sockets");
}

#[test]
fn a_client_is_told_what_the_others_leave_of_the_hosts_memory() {
    let agent = Agent::start();
    let first = ScriptedClient::working(&agent);
    let alone = first.host_room();
    let second = ScriptedClient::working(&agent);
    // What the host has available changes a little by itself; the claim does not.
    let claim = alone / 2;
    second.page.gpu().managed.store(claim, Ordering::Relaxed);
    wait_for("less room", || (first.host_room() < alone - claim / 2).then_some(()));
    drop(second);
    wait_for("the room of one that is alone", || (first.host_room() > alone - claim / 2).then_some(()));
}
