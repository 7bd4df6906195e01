//! The control socket, `nvsharectl`, and HTTP.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    process::{Command, Stdio},
};

use nvshare_wire::{AgentMessage, RefusalCode};
use serde_json::Value;

use crate::{
    client::{ScriptedClient, connect, receive},
    process::{Agent, ctl, text, wait_for},
};

#[test]
fn an_unknown_request_is_told_which_are_known() {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    for (bad, said) in [
        (r#"{"request":"reboot"}"#, "known requests: status"),
        ("hello", "not a JSON object"),
        (r#"{"request":"set_mode","mode":"turbo"}"#, "turbo"),
        (
            r#"{"request":"set_mode","mode":"exclusive","gpu":"GPU-22222222-2222-2222-2222-222222222222"}"#,
            "no GPU",
        ),
        (r#"{"request":"set_quantum","quantum":0}"#, "out of range"),
        (r#"{"request":"set_quantum","quantum":-5}"#, "-5"),
    ] {
        let answer = agent.control(bad);
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(said)), "{bad}: {answer}");
    }
    assert_eq!(agent.metric("nvshare_control_requests_total{outcome=\"error\"}"), 6.0);
    healthy.noticed_nothing(&agent);
}

#[test]
fn an_endless_request_is_cut_off() {
    let agent = Agent::start();
    let mut stream = UnixStream::connect(agent.run_dir().join("control.sock")).unwrap();
    // The agent may stop reading, and close, at any time.
    stream.write_all(&vec![b'x'; 1 << 20]).ok();
    let mut answer = String::new();
    if BufReader::new(stream).read_line(&mut answer).is_ok() && !answer.is_empty() {
        assert!(answer.contains("longer than"), "{answer}");
    }
    assert_eq!(agent.metric("nvshare_control_requests_total{outcome=\"error\"}"), 1.0);
    assert!(agent.status().is_object());
}

#[test]
fn a_control_request_on_the_clients_socket_is_refused() {
    let agent = Agent::start();
    let mut stream = connect(&agent);
    stream.write_all(b"{\"request\":\"set_mode\",\"mode\":\"exclusive\"}\n").unwrap();
    match receive(&stream) {
        Some(AgentMessage::Refused { code: RefusalCode::Malformed, .. }) => {}
        other => panic!("expected a refusal, got {other:?}"),
    }
    assert_eq!(agent.control(r#"{"request":"explain"}"#)["ok"]["changes"].as_array().unwrap().len(), 0);
}

#[test]
fn an_unprivileged_user_is_told_what_to_do() {
    if !rustix::process::geteuid().is_root() {
        let reason = "not root, so no other user to be";
        assert!(std::env::var_os("NVSHARE_REQUIRE_ALL").is_none(), "would skip: {reason}");
        eprintln!("SKIPPED: {reason}");
        return;
    }
    let agent = Agent::start();
    // The directories above must let the other user through; what stops it must be the socket.
    std::fs::set_permissions(agent.dir(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = agent.dir().join("nvsharectl");
    std::fs::copy(env!("CARGO_BIN_EXE_nvsharectl"), &copy).unwrap();
    let output = Command::new(copy)
        .arg("--run-dir")
        .arg(agent.run_dir())
        .args(["set", "mode", "exclusive"])
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text(&output.stderr).contains("group nvshare"), "{output:?}");
}

#[test]
fn without_an_agent_nvsharectl_says_which_command_starts_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = ctl(dir.path(), &["status"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("nvshare-agent"), "{output:?}");
}

#[test]
fn wrong_usage_ends_with_2_and_a_refused_order_with_1() {
    let agent = Agent::start();
    for bad in [
        &["set", "quantum", "-5"][..],
        &["set", "quantum", "0s"],
        &["set", "quantum", "4294967297s"],
        &["set", "quantum", "soon"],
        &["set", "mode", "turbo"],
        &["-T", "0"],
        &["-T", "text"],
        &["-S", "maybe"],
        &["frobnicate"],
    ] {
        let output = agent.ctl(bad);
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {output:?}");
        assert!(!output.stderr.is_empty());
    }
    let unknown = "GPU-22222222-2222-2222-2222-222222222222";
    assert_eq!(agent.ctl(&["set", "mode", "shared", "--gpu", unknown]).status.code(), Some(1));
    assert_eq!(agent.control(r#"{"request":"explain"}"#)["ok"]["changes"].as_array().unwrap().len(), 0);
}

#[test]
fn every_report_has_a_text_and_a_json_form() {
    let agent = Agent::start();
    let client = ScriptedClient::working(&agent);
    wait_for("the GPU to be known", || (agent.status()["gpus"].as_array()?.len() == 1).then_some(()));
    for report in ["status", "clients", "explain", "doctor"] {
        let people = agent.ctl(&[report]);
        assert!(people.status.success() && !people.stdout.is_empty(), "{people:?}");
        let json = agent.ctl(&[report, "--json"]);
        let said = text(&json.stdout);
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert!(last.is_object(), "{said}");
    }
    let status = text(&agent.ctl(&["status"]).stdout);
    assert!(status.contains("scripted") && status.contains("mode shared"), "{status}");
    let clients = agent.clients();
    assert_eq!(clients[0]["name"], "scripted");
    assert_eq!(clients[0]["pid"], std::process::id());
    assert_eq!(clients[0]["bytes_in"], Value::Null, "no sensor says it");
    client.noticed_nothing(&agent);
}

#[test]
fn events_tell_each_change_of_plan_once_with_its_order() {
    let agent = Agent::start();
    let _clients = [ScriptedClient::working(&agent), ScriptedClient::working(&agent)];
    wait_for("the GPU to be known", || (agent.status()["gpus"].as_array()?.len() == 1).then_some(()));
    let mut follower = Command::new(env!("CARGO_BIN_EXE_nvsharectl"))
        .arg("--run-dir")
        .arg(agent.run_dir())
        .args(["events", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    wait_for("the follower to be served", || {
        std::fs::read_to_string(agent.dir().join("log"))
            .ok()?
            .contains("an operator follows the plan")
            .then_some(())
    });
    assert!(agent.ctl(&["-S", "on"]).status.success());
    let event: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!((&event["from"], &event["to"]), (&"shared".into(), &"exclusive".into()));
    assert_eq!(event["order"], "exclusive");
    assert!(event["t_ms"].is_f64() && event["reason"].is_string(), "{event}");
    assert_eq!(event["first_refault_ms"], Value::Null);
    assert!(agent.ctl(&["-S", "off"]).status.success());
    let event: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(event["to"], "shared");
    follower.kill().unwrap();
    follower.wait().unwrap();
    let explain = text(&agent.ctl(&["explain"]).stdout);
    assert!(explain.contains("shared -> exclusive") && explain.contains("exclusive -> shared"), "{explain}");
}

#[test]
fn a_slow_http_client_does_not_keep_others_from_metrics() {
    let agent = Agent::start();
    let address = agent.status()["metrics"].as_str().unwrap().to_owned();
    let _slow: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    assert!(agent.http("/metrics").1.contains("nvshare_build_info"));
    assert!(agent.http("/").1.contains("Sensors</h2>"));
    assert!(agent.http("/nothing").0.contains("404"));
}

#[test]
fn a_clients_gauges_disappear_with_the_client() {
    let agent = Agent::start();
    let client = ScriptedClient::working(&agent);
    let series = format!("client=\"c{}\"", client.id);
    wait_for("the gauge", || agent.http("/metrics").1.contains(&series).then_some(()));
    drop(client);
    wait_for("the gauge to go", || (!agent.http("/metrics").1.contains(&series)).then_some(()));
}
