//! What measures and checks on a real GPU, tried on the simulated one, so that none of it is first run where time is scarce.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use nvshare_tests::{Binaries, Simulator, SimulatorOptions, skip};
use serde_json::Value;

fn has_python() -> bool {
    let has = Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has {
        skip("the compatibility suite", "there is no python3");
    }
    has
}

fn scripts() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu")
}

/// Runs the suite's one program that needs nothing but a driver, with the programs and libraries in `dir`.
fn compatibility(dir: &Path, simulator: &Simulator, out: &Path) -> Result<(Output, Value)> {
    let output = Command::new("python3")
        .arg(scripts().join("compat.py"))
        .args(["--only", "driver", "--turns", "--budget", "120", "--binaries"])
        .arg(dir)
        .arg("--agent-config")
        .arg(simulator.agent_config())
        .arg("--out")
        .arg(out)
        .envs(simulator.environment())
        .output()
        .context("running compat.py")?;
    let results = std::fs::read_to_string(out.join("results.json"))
        .with_context(|| format!("no results: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output, serde_json::from_str(&results)?))
}

#[test]
fn the_compatibility_suite_finds_a_program_bit_identical_under_the_shim() -> Result<()> {
    if !has_python() {
        return Ok(());
    }
    let binaries = Binaries::of_this_test()?;
    let dir = tempfile::tempdir()?;
    let simulator = Simulator::start(&binaries, &dir.path().join("sim"), &SimulatorOptions::default())?;
    let (output, results) = compatibility(binaries.dir(), &simulator, &dir.path().join("out"))?;
    let program = &results["programs"][0];
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(program["verdict"], "bit-identical", "{program}");
    assert_eq!(program["turns"], "bit-identical", "{program}");
    let page = std::fs::read_to_string(dir.path().join("out/compatibility.md"))?;
    assert!(page.contains("simulated GPU and say nothing"), "{page}");
    Ok(())
}

#[test]
fn the_compatibility_suite_refuses_a_run_that_never_met_the_agent() -> Result<()> {
    if !has_python() {
        return Ok(());
    }
    let binaries = Binaries::of_this_test()?;
    let dir = tempfile::tempdir()?;
    let simulator = Simulator::start(&binaries, &dir.path().join("sim"), &SimulatorOptions::default())?;
    // A library that can be preloaded, but is not the shim.
    let fake = dir.path().join("binaries");
    std::fs::create_dir(&fake)?;
    for name in ["nvshare-agent", "nvsharectl"] {
        std::os::unix::fs::symlink(binaries.dir().join(name), fake.join(name))?;
    }
    std::os::unix::fs::symlink(binaries.managed_malloc(), fake.join("libnvshare.so"))?;
    let (output, results) = compatibility(&fake, &simulator, &dir.path().join("out"))?;
    let program = &results["programs"][0];
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(program["verdict"], "FAILED", "{program}");
    assert!(program["note"].as_str().is_some_and(|note| note.contains("agent")), "{program}");
    Ok(())
}

#[test]
fn the_verdicts_of_the_compatibility_suite_are_tested() -> Result<()> {
    if !has_python() {
        return Ok(());
    }
    let output = Command::new("python3")
        .args(["-m", "unittest", "discover", "--start-directory"])
        .arg(scripts())
        .output()
        .context("running the unit tests")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !text.contains("Ran 0 tests"), "{text}");
    Ok(())
}

#[test]
fn the_check_of_the_sensors_finds_every_byte_where_it_was_moved() -> Result<()> {
    if !has_python() {
        return Ok(());
    }
    let binaries = Binaries::of_this_test()?;
    let dir = tempfile::tempdir()?;
    let simulator = Simulator::start(&binaries, &dir.path().join("sim"), &SimulatorOptions::default())?;
    let out = dir.path().join("out");
    let output = Command::new("python3")
        .arg(scripts().join("sensors.py"))
        .args([
            "--simulated",
            "--mib",
            "64",
            "--rounds",
            "1",
            "--clients",
            "2",
            "--seconds",
            "1",
            "--binaries",
        ])
        .arg(binaries.dir())
        .arg("--agent-config")
        .arg(simulator.agent_config())
        .arg("--out")
        .arg(&out)
        .envs(simulator.environment())
        .output()
        .context("running sensors.py")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let results: Value = serde_json::from_str(&std::fs::read_to_string(out.join("results.json"))?)?;
    let moved = |check: &&Value| check["done"]["bytes_in"].as_u64().is_some_and(|bytes| bytes > 0);
    let checks = results["checks"].as_array().context("no checks")?;
    assert_eq!(checks.iter().filter(moved).count(), 4, "two steps of two programs: {said}");
    for arm in ["calm", "sampling"] {
        for pairs in ["faults", "launches"] {
            let found = results["cost"]["ratios"][arm][pairs].as_array().map(Vec::len);
            assert_eq!(found, Some(12), "{arm}, {pairs}: {said}");
        }
    }
    assert!(out.join("recording").exists());
    Ok(())
}

#[test]
fn the_program_for_hand_overs_moves_memory_in_every_part_and_finds_no_wrong_word() -> Result<()> {
    if !has_python() {
        return Ok(());
    }
    let binaries = Binaries::of_this_test()?;
    let dir = tempfile::tempdir()?;
    let simulator = Simulator::start(&binaries, &dir.path().join("sim"), &SimulatorOptions::default())?;
    let json = dir.path().join("figures.json");
    let output = Command::new("python3")
        .arg(scripts().join("handover.py"))
        .args(["--simulated", "--sizes", "0.0625", "--link", "16", "--over", "0.25,0.03125", "--soak", "60"])
        .args(["--soak-mib", "48", "--agent-gib", "0.125", "--binaries"])
        .arg(binaries.dir())
        .arg("--agent-config")
        .arg(simulator.agent_config())
        .arg("--logs")
        .arg(dir.path().join("logs"))
        .arg("--json")
        .arg(&json)
        .envs(simulator.environment())
        .output()
        .context("running handover.py")?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let figures: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    assert_eq!(figures["left_out"], Value::Null, "{said}");
    for part in ["link", "stray", "agent", "rates"] {
        assert!(figures[part].is_object(), "{part} is missing: {said}");
    }
    let checks = figures["checks"].as_array().map_or(0, Vec::len);
    assert_eq!(checks, 14, "{said}");
    Ok(())
}

#[test]
fn the_benchmark_measures_every_arm() -> Result<()> {
    let binaries = Binaries::of_this_test()?;
    let dir = tempfile::tempdir()?;
    // Any library that can be preloaded is a baseline.
    let baseline = format!("other={}", binaries.managed_malloc().display());
    let output = Command::new(binaries.dir().join("xtask"))
        .args([
            "gpu-bench",
            "launch",
            "start",
            "memory",
            "--simulate",
            "--json",
            "--pairs",
            "3",
            "--epochs",
            "1",
        ])
        .args(["--instances", "2", "--baseline", &baseline, "--binaries"])
        .arg(binaries.dir())
        .arg("--out")
        .arg(dir.path())
        .output()
        .context("running xtask gpu-bench")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout)?;
    let summary: Value = serde_json::from_str(text.lines().last().context("no JSON")?)?;
    assert_eq!(summary["simulated"], true);
    assert_eq!(summary["failures"], serde_json::json!([]));
    for metric in ["launch", "submit", "start", "4 KiB alloc", "20 MiB touch", "pattern sum"] {
        for arm in ["bare again", "bare managed", "shared", "exclusive", "other"] {
            let found = summary["results"]
                .as_array()
                .context("no results")?
                .iter()
                .find(|result| result["metric"] == metric && result["arm"] == arm)
                .with_context(|| format!("no {metric} of {arm}: {errors}"))?;
            assert!(found["median"].as_f64().is_some_and(|value| value > 0.0), "{found}");
            // Nothing is judged by simulated figures.
            assert!(found["met"].is_null(), "{found}");
        }
    }
    for arm in ["bare again", "shared", "exclusive", "other"] {
        let call = |result: &&Value| result["metric"] == "call" && result["arm"] == arm;
        let found = summary["results"].as_array().and_then(|results| results.iter().find(call));
        assert_eq!(found.map(|found| found["pairs"].as_u64()), Some(Some(40)), "{arm}: {errors}");
    }
    let rows = std::fs::read_to_string(dir.path().join("rows.csv"))?;
    assert!(rows.lines().filter(|row| row.starts_with("launch,launch,shared,")).count() == 3, "{rows}");
    Ok(())
}

#[test]
fn two_programs_that_do_not_fit_take_turns_and_are_stopped_or_late_where_they_must_share() -> Result<()> {
    let binaries = Binaries::of_this_test()?;
    let output = Command::new(binaries.dir().join("xtask"))
        .args(["gpu-bench", "thrash", "--simulate", "--json", "--binaries"])
        .arg(binaries.dir())
        .output()
        .context("running xtask gpu-bench thrash")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout)?;
    let outcomes: Value = serde_json::from_str(text.lines().last().context("no JSON")?)?;
    let of = |mode: &str| {
        let found = outcomes.as_array().and_then(|all| all.iter().find(|outcome| outcome["mode"] == mode));
        found.cloned().with_context(|| format!("no outcome of {mode}: {outcomes}"))
    };
    let (auto, shared) = (of("auto")?, of("shared")?);
    let turns = |outcome: &Value| {
        let decisions = outcome["decisions"].as_array().cloned().unwrap_or_default();
        decisions.iter().any(|said| said.as_str().is_some_and(|said| said.starts_with("shared -> exclusive")))
    };
    assert!(turns(&auto) && auto["stopped"] == false, "{outcomes}");
    assert!(!turns(&shared), "{outcomes}");
    let seconds = |outcome: &Value| outcome["makespan_s"].as_f64().context("no makespan");
    assert!(seconds(&shared)? > seconds(&auto)?, "{outcomes}");
    Ok(())
}
