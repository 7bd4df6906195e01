//! What can be said of dashboards and rules without running anything: they are well-formed, ask for nothing
//! that does not exist, and the rules do what their tests say. `cargo xtask demo --prometheus` runs them.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};
use nvshare_tests::{
    Dashboard,
    dashboards::{folder, metrics},
    prometheus::{files, obstacle, promtool},
    skip,
};
use serde_json::Value;

/// What `docs/metrics.md` lists.
fn documented() -> Result<BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    let text = fs::read_to_string(path)?;
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect())
}

fn rules() -> Result<String> {
    files(&folder().join("rules"), "yaml")?.iter().map(|path| Ok(fs::read_to_string(path)?)).collect()
}

/// Series that recording rules make.
fn recorded() -> Result<BTreeSet<String>> {
    let rules = rules()?;
    Ok(rules.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).map(str::to_owned).collect())
}

/// A metric, or one of the series that make up a histogram.
fn exists(name: &str, known: &BTreeSet<String>) -> bool {
    let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    known.contains(name) || base.is_some_and(|base| known.contains(base))
}

#[test]
fn dashboards_and_rules_name_only_metrics_that_are_documented() -> Result<()> {
    let mut known = documented()?;
    known.extend(recorded()?);
    assert!(known.len() > 50, "{known:?}");
    let mut texts = vec![("the rules".to_owned(), rules()?)];
    for dashboard in Dashboard::all()? {
        texts.push((dashboard.name(), dashboard.json.to_string()));
    }
    for (name, text) in texts {
        let named = metrics(&text);
        assert!(named.len() > 10, "{name} names hardly any metric: {named:?}");
        let unknown: Vec<_> = named.iter().filter(|metric| !exists(metric, &known)).collect();
        assert!(unknown.is_empty(), "{name} names what docs/metrics.md does not list: {unknown:?}");
    }
    Ok(())
}

#[test]
fn every_panel_explains_itself_and_asks_the_chosen_source_about_the_chosen_gpus() -> Result<()> {
    for dashboard in Dashboard::all()? {
        let (name, json) = (dashboard.name(), &dashboard.json);
        assert_eq!((json["uid"].as_str(), &json["id"]), (Some(name.as_str()), &Value::Null), "{name}");
        assert!(json["schemaVersion"].as_u64() >= Some(39), "{name}");
        let variables: Vec<_> = json["templating"]["list"]
            .as_array()
            .context("no variables")?
            .iter()
            .map(|v| &v["name"])
            .collect();
        for variable in ["datasource", "instance", "gpu"] {
            assert!(variables.iter().any(|found| *found == variable), "{name} lacks ${variable}");
        }
        let mut ids = BTreeSet::new();
        for panel in dashboard.panels() {
            let title = panel["title"].as_str().context("a panel without a title")?;
            assert!(ids.insert(panel["id"].as_u64()), "{name}, {title}: an id twice");
            assert!(panel["description"].as_str().is_some_and(|text| text.len() > 20), "{name}, {title}");
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{name}, {title} has no unit");
            assert_eq!(panel["datasource"]["uid"], "$datasource", "{name}, {title}");
            for target in panel["targets"].as_array().context("a panel without queries")? {
                let expr = target["expr"].as_str().context("a query without an expression")?;
                assert!(expr.contains("instance=~\"$instance\""), "{name}, {title}: every host is asked");
                assert_ne!(target["legendFormat"], "__auto", "{name}, {title} leaves its legend to chance");
            }
        }
        assert!(ids.len() >= 10, "{name} has {} panels", ids.len());
        let overlap = overlapping(&dashboard.panels());
        assert_eq!(overlap, None, "{name}: panels on top of each other");
    }
    Ok(())
}

/// Two panels that share a place.
fn overlapping(panels: &[&Value]) -> Option<(String, String)> {
    let place = |panel: &Value| ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap_or(0));
    panels.iter().enumerate().find_map(|(index, one)| {
        let [x, y, w, h] = place(one);
        let hit = panels[..index].iter().find(|other| {
            let [ox, oy, ow, oh] = place(other);
            x < ox + ow && ox < x + w && y < oy + oh && oy < y + h
        })?;
        Some((one["title"].to_string(), hit["title"].to_string()))
    })
}

#[test]
fn rules_are_well_formed_and_do_what_their_tests_say() -> Result<()> {
    if let Some(why) = obstacle() {
        skip("the test of the rules", &why);
        return Ok(());
    }
    let run = |check: &[&str], folder: &Path| {
        let paths = files(folder, "yaml")?;
        let paths: Vec<&str> = paths.iter().filter_map(|path| path.to_str()).collect();
        promtool(&[check, &paths].concat(), "")
    };
    let folder = folder().join("rules");
    run(&["check", "rules", "--lint=all", "--lint-fatal"], &folder)?;
    run(&["test", "rules"], &folder.join("tests"))?;
    Ok(())
}

#[test]
fn every_alert_and_every_recorded_series_has_a_test() -> Result<()> {
    let tests: String = files(&folder().join("rules/tests"), "yaml")?
        .iter()
        .map(|path| Ok(fs::read_to_string(path)?))
        .collect::<Result<_>>()?;
    let rules = rules()?;
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 10);
    for alert in alerts {
        let fires = tests.split("alertname: ").any(|case| {
            case.starts_with(&format!("{alert}\n"))
                && case.lines().nth(1).is_some_and(|l| l.ends_with("exp_alerts:"))
        });
        let quiet = tests.contains(&format!("alertname: {alert}\n        exp_alerts: []"));
        assert!(
            fires && quiet,
            "{alert} must be shown to fire and to be quiet (fires: {fires}, quiet: {quiet})"
        );
    }
    for series in recorded()? {
        assert!(tests.contains(&series), "{series} has no test");
    }
    Ok(())
}
