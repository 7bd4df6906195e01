//! Configuration files as users meet them.

use std::process::{Command, Output};

use crate::process::text;

fn agent(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nvshare-agent")).args(arguments).output().unwrap()
}

#[test]
fn an_unknown_key_stops_the_agent_with_file_line_and_the_key_that_was_meant() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nvshare.toml");
    std::fs::write(&file, "[engine]\noverhaed = 0.1\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in [&["check-config", file][..], &["run", "--config", file]] {
        let output = agent(arguments);
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.contains(&format!("{file}:2:1")), "{said}");
        assert!(said.contains("unknown key `overhaed` in [engine]; did you mean `overhead`?"), "{said}");
    }
}

#[test]
fn the_example_configuration_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nvshare.toml");
    let example = agent(&["example-config"]);
    assert!(example.status.success());
    std::fs::write(&file, example.stdout).unwrap();
    assert!(agent(&["check-config", file.to_str().unwrap()]).status.success());
}

#[test]
fn a_missing_file_is_named_and_the_reason_said_once() {
    for arguments in [&["run", "--config", "/nonexistent/file"][..], &["replay", "/nonexistent/file"]] {
        let output = agent(arguments);
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.contains("/nonexistent/file"), "{said}");
        assert_eq!(said.matches("No such file").count(), 1, "{said}");
    }
}

#[test]
fn a_taken_metrics_address_is_named_with_the_way_out() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let output = agent(&["run", "--run-dir", dir.path().to_str().unwrap(), "--metrics-listen", &address]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&format!("cannot listen at {address}")), "{output:?}");
    assert!(text(&output.stderr).contains("--metrics-listen"), "{output:?}");
}
