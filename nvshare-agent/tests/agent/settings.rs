//! `nvsharectl set`, what it keeps, and `nvsharectl record`.

use std::{
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
};

use nvshare_wire::AgentMessage;
use serde_json::{Value, json};

use crate::{
    client::{GPU, ScriptedClient},
    process::{Agent, ctl, text, wait_for},
};

/// What `nvsharectl … --json` prints.
fn json_of(agent: &Agent, arguments: &[&str]) -> Value {
    let output = agent.ctl(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The only client on the only GPU.
fn client(agent: &Agent) -> Value {
    agent.status()["gpus"][0]["clients"][0].clone()
}

fn working(agent: &Agent) -> ScriptedClient {
    let working = ScriptedClient::working(agent);
    wait_for("the client on its GPU", || client(agent).is_object().then_some(()));
    working
}

fn gpu() -> String {
    nvshare_core::GpuId(GPU).to_string()
}

#[test]
fn what_is_set_for_now_holds_at_once_and_not_after_a_restart() {
    let mut agent = Agent::start();
    let _client = working(&agent);
    for set in [&["mode", "exclusive"][..], &["quantum", "2s"], &["quantum-max", "7s"], &["overhead", "0.25"]]
    {
        let said = text(&agent.ctl(&[&["set"], set].concat()).stdout);
        assert!(said.contains("until the agent restarts"), "{said}");
    }
    let settings = json_of(&agent, &["settings", "--json"]);
    assert_eq!(settings["in_force"]["mode"], "exclusive");
    assert_eq!((&settings["overhead"], &settings["quantum_max_s"]), (&json!(0.25), &json!(7.0)));
    assert_eq!(settings["persisted"], json!({}));
    assert_eq!(agent.status()["gpus"][0]["quantum_s"], 2.0);
    agent.replace();
    assert_eq!(json_of(&agent, &["settings", "--json"])["in_force"], json!({}));
}

#[test]
fn the_longest_quantum_reaches_the_engine_and_goes_back_to_the_configured_one() {
    let agent = Agent::start();
    let _clients = [working(&agent), ScriptedClient::working(&agent)];
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    let quantum = || agent.status()["gpus"][0]["quantum_s"].as_f64();
    // No sensor tells what a hand-over costs, so the longest quantum is the one in force.
    assert_eq!(quantum(), Some(30.0));
    assert!(agent.ctl(&["set", "quantum-max", "300ms"]).status.success());
    assert_eq!(quantum(), Some(0.3));
    assert!(agent.ctl(&["set", "quantum-max", "default"]).status.success());
    assert_eq!(quantum(), Some(30.0));
}

#[test]
fn what_is_persisted_holds_after_a_restart_and_what_is_taken_back_does_not() {
    let mut agent = Agent::start();
    let uid = rustix::process::getuid().as_raw().to_string();
    let file = agent.dir().join("nvshare.overrides.toml");
    let client_before = working(&agent);
    for set in [
        &["mode", "exclusive", "--gpu", &gpu()][..],
        &["quantum", "3s"],
        &["overhead", "0.1"],
        &["weight", "2.5", "--user", &uid],
        &["priority", "-4", "--user", &uid],
        &["limit", "512MiB", "--user", &uid],
    ] {
        let output = agent.ctl(&[&["set"], set, &["--persist"]].concat());
        assert!(text(&output.stdout).contains(&file.display().to_string()), "{output:?}");
    }
    // Not kept, and not mixed into what is.
    assert!(agent.ctl(&["set", "quantum-max", "5s"]).status.success());
    assert!(!std::fs::read_to_string(&file).unwrap().contains("quantum_max"));
    drop(client_before);

    agent.replace();
    let after = ScriptedClient::working(&agent);
    // The limit is among the first things it hears.
    let heard = wait_for("the limit", || match after.receive() {
        Some(AgentMessage::Limit { bytes }) => Some(bytes),
        Some(_) => None,
        None => panic!("the session ended"),
    });
    assert_eq!(heard, 512 << 20);
    wait_for("the ordered mode of a GPU that came after the order", || {
        (agent.status()["gpus"][0]["mode"] == "exclusive").then_some(())
    });
    let status = agent.status();
    assert_eq!(status["gpus"][0]["quantum_s"], 3.0);
    let client = client(&agent);
    assert_eq!(
        (&client["weight_milli"], &client["priority"], &client["limit_bytes"]),
        (&json!(2500), &json!(-4), &json!(512 << 20))
    );
    let settings = json_of(&agent, &["settings", "--json"]);
    assert_eq!((&settings["overhead"], &settings["quantum_max_s"]), (&json!(0.1), &json!(30.0)));
    let shown = text(&agent.ctl(&["settings"]).stdout);
    assert!(shown.contains(&format!("weight of user {uid}")) && shown.contains("2.5"), "{shown}");

    for set in [&["mode", "auto"][..], &["quantum", "auto"], &["overhead", "default"]] {
        assert!(agent.ctl(&[&["set"], set, &["--persist"]].concat()).status.success());
    }
    for set in ["weight", "priority"] {
        assert!(agent.ctl(&["set", set, "default", "--user", &uid, "--persist"]).status.success());
    }
    assert!(agent.ctl(&["set", "limit", "none", "--user", &uid, "--persist"]).status.success());
    assert_eq!(json_of(&agent, &["settings", "--json"])["persisted"], json!({}));
    let left = std::fs::read_to_string(&file).unwrap();
    assert!(left.lines().all(|line| line.starts_with('#')), "{left}");
}

#[test]
fn a_broken_file_of_changes_stops_the_start_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("nvshare.toml");
    std::fs::write(&config, "").unwrap();
    std::fs::write(dir.path().join("nvshare.overrides.toml"), "mode = \"exclusive\"\nquantun = 1\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_nvshare-agent"))
        .args(["run", "--metrics-listen", "off", "--run-dir"])
        .arg(dir.path().join("run"))
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("nvshare.overrides.toml:2:1: unknown key `quantun`"), "{said}");
    assert!(said.contains("did you mean `quantum`?"), "{said}");
}

#[test]
fn a_client_goes_by_its_number_or_its_process() {
    let agent = Agent::start();
    let scripted = working(&agent);
    let number = format!("c{}", scripted.id);
    let pid = std::process::id().to_string();
    assert!(agent.ctl(&["set", "weight", "0.5", "--client", &number]).status.success());
    assert!(agent.ctl(&["set", "priority", "7", "--client", &pid]).status.success());
    let seen = client(&agent);
    assert_eq!((&seen["weight_milli"], &seen["priority"]), (&json!(500), &json!(7)));
    assert!(agent.ctl(&["set", "limit", "2GiB", "--client", &pid]).status.success());
    assert_eq!(client(&agent)["limit_bytes"], 2u64 << 30);
    let told = wait_for("the limit", || match scripted.receive() {
        Some(AgentMessage::Limit { bytes }) => Some(bytes),
        Some(_) => None,
        None => panic!("the session ended"),
    });
    assert_eq!(told, 2 << 30);
    assert!(agent.ctl(&["set", "weight", "default", "--client", &number]).status.success());
    assert!(agent.ctl(&["set", "limit", "none", "--client", &number]).status.success());
    let seen = client(&agent);
    assert_eq!((&seen["weight_milli"], &seen["limit_bytes"]), (&json!(1000), &Value::Null));
}

#[test]
fn every_refusal_says_what_to_do() {
    let agent = Agent::start();
    let scripted = working(&agent);
    let number = format!("c{}", scripted.id);
    for (set, code, said) in [
        (&["weight", "2", "--client", "c999"][..], 1, number.as_str()),
        (&["weight", "2", "--client", "999999999"], 1, "there are c"),
        (&["weight", "2", "--client", &number, "--persist"], 1, "--user"),
        (&["weight", "2", "--client", "python"], 2, "nvsharectl clients"),
        (&["weight", "2"], 2, "--client"),
        (&["weight", "2", "--client", "c1", "--user", "0"], 2, "cannot be used with"),
        (&["weight", "0", "--user", "0"], 2, "0.001 to 1000"),
        (&["priority", "high", "--user", "0"], 2, "-1000 to 1000"),
        (&["limit", "5", "--user", "0"], 2, "GiB"),
        (&["limit", "8GiB", "--user", "nobody-of-that-name"], 2, "id -u"),
        (&["overhead", "95"], 2, "between 0.001 and 0.9"),
        (&["quantum-max", "1ms"], 1, "10 ms to 24 h"),
        (&["mode", "shared", "--gpu", "GPU-22222222-2222-2222-2222-222222222222"], 1, "known: GPU-"),
    ] {
        let output = agent.ctl(&[&["set"], set].concat());
        assert_eq!(output.status.code(), Some(code), "{set:?}: {output:?}");
        assert!(text(&output.stderr).contains(said), "{set:?}: {output:?}");
    }
    assert_eq!(json_of(&agent, &["settings", "--json"])["in_force"], json!({}));
    scripted.noticed_nothing(&agent);
}

#[test]
fn without_a_place_nothing_is_kept_and_nothing_changes() {
    let agent = Agent::start_with("", &["--overrides", "/nonexistent/o.toml"]);
    let output = agent.ctl(&["set", "overhead", "0.2", "--persist"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("/nonexistent/o.toml") && said.contains("nothing was changed"), "{said}");
    assert_eq!(json_of(&agent, &["settings", "--json"])["in_force"], json!({}));
}

#[test]
fn a_recording_that_begins_in_the_middle_replays_to_the_same_decisions() {
    let agent = Agent::start();
    let _clients = [working(&agent), ScriptedClient::working(&agent)];
    assert!(agent.ctl(&["set", "quantum", "100ms"]).status.success());
    let file = agent.dir().join("recording");
    let mut nvsharectl = Command::new(env!("CARGO_BIN_EXE_nvsharectl"))
        .arg("--run-dir")
        .arg(agent.run_dir())
        .args(["record", "--json"])
        .arg(&file)
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    wait_for("the agent to record", || agent.log().contains("an operator records").then_some(()));
    assert!(agent.ctl(&["set", "mode", "exclusive"]).status.success());
    wait_for("the plan", || (agent.status()["gpus"][0]["mode"] == "exclusive").then_some(()));
    let pid = rustix::process::Pid::from_child(&nvsharectl);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = nvsharectl.wait().unwrap();
    assert!(status.success(), "{status}");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut nvsharectl.stdout.take().unwrap(), &mut said).unwrap();
    let recorded: Value = serde_json::from_str(&said).unwrap();
    let lines = recorded["lines"].as_u64().unwrap();
    assert!(lines > 0, "{recorded}");

    let replay = |file: &std::path::Path| {
        Command::new(env!("CARGO_BIN_EXE_nvshare-agent")).arg("replay").arg(file).output().unwrap()
    };
    let output = replay(&file);
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stdout);
    assert!(said.contains("all as recorded") && !said.contains(" 0 decisions"), "{said}");

    // The order's decision depends on the state at the beginning: without the clients there is none.
    let recorded = std::fs::read_to_string(&file).unwrap();
    assert!(recorded.lines().next().unwrap().contains("\"clients\":{\"1\""), "{recorded}");
}

#[test]
fn a_recording_ends_by_itself_and_overwrites_nothing_unasked() {
    let agent = Agent::start();
    let file = agent.dir().join("recording");
    std::fs::write(&file, "precious").unwrap();
    let path = file.to_str().unwrap();
    let output = agent.ctl(&["record", path, "--for", "50ms"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("--force"), "{output:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    let output = agent.ctl(&["record", path, "--for", "200ms", "--force"]);
    assert!(output.status.success() && text(&output.stdout).contains("nvshare-agent replay"), "{output:?}");
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("{\"engine\""));
    let output = agent.ctl(&["record", "/nonexistent/recording"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("cannot write /nonexistent/recording"), "{output:?}");
}

#[test]
fn an_agent_that_ends_leaves_the_recording_so_far_and_says_so() {
    let mut agent = Agent::start();
    let file = agent.dir().join("recording");
    let recorder = Command::new(env!("CARGO_BIN_EXE_nvsharectl"))
        .arg("--run-dir")
        .arg(agent.run_dir())
        .arg("record")
        .arg(&file)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the agent to record", || agent.log().contains("an operator records").then_some(()));
    assert!(agent.terminate());
    let output = recorder.wait_with_output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("recording"), "{output:?}");
    let replayed =
        Command::new(env!("CARGO_BIN_EXE_nvshare-agent")).arg("replay").arg(&file).output().unwrap();
    assert!(replayed.status.success(), "{replayed:?}");
}

#[test]
fn completions_need_no_agent_and_know_the_newest_commands() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = ctl(dir.path(), &["completions", shell]);
        assert!(output.status.success(), "{output:?}");
        let script = text(&output.stdout);
        for word in ["quantum-max", "record", "persist"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    let bash = text(&ctl(dir.path(), &["completions", "bash"]).stdout);
    let checked = Command::new("bash").args(["-n", "-c", &bash]).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn a_picture_goes_to_a_pipe_and_a_live_one_asks_for_a_terminal() {
    let agent = Agent::start();
    let _client = working(&agent);
    let picture = text(&agent.ctl(&["top", "--once"]).stdout);
    assert!(picture.contains("scripted") && picture.contains("Last changes of plan"), "{picture}");
    let json = json_of(&agent, &["top", "--once", "--json"]);
    assert!(json["history"].is_array() && json["gpus"][0]["clients"].is_array(), "{json}");
    let output = agent.ctl(&["top"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("top --once"), "{output:?}");
}
