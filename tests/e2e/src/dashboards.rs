//! The shipped dashboards: what they ask Prometheus.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::prometheus::files;

/// Where dashboards and rules are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dashboards")
}

/// A dashboard.
#[derive(Debug)]
pub struct Dashboard {
    /// Its file.
    pub path: PathBuf,
    /// Its content.
    pub json: Value,
}

/// Something that a dashboard asks Prometheus.
#[derive(Clone, Debug)]
pub struct Query {
    /// For whom: dashboard and panel.
    pub panel: String,
    /// The expression, with Grafana's variables in it.
    pub expr: String,
}

impl Query {
    /// The expression as Grafana would send it: everything selected, a scrape every second.
    pub fn concrete(&self) -> String {
        let replace = [("$instance", ".*"), ("$gpu", ".*"), ("$client", ".*"), ("$__rate_interval", "4s")];
        replace.into_iter().fold(self.expr.clone(), |expr, (variable, value)| expr.replace(variable, value))
    }
}

impl Dashboard {
    /// All of them.
    pub fn all() -> Result<Vec<Self>> {
        let read = |path: PathBuf| {
            let text = fs::read_to_string(&path)?;
            let json = serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
            Ok(Self { path, json })
        };
        files(&folder(), "json")?.into_iter().map(read).collect()
    }

    /// The name of its file.
    pub fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its panels, without the rows.
    pub fn panels(&self) -> Vec<&Value> {
        let panels = self.json["panels"].as_array();
        panels.into_iter().flatten().filter(|panel| panel["type"] != "row").collect()
    }

    /// What its panels and annotations ask.
    pub fn queries(&self) -> Vec<Query> {
        let of_panel = |panel: &Value| {
            let title = panel["title"].as_str().unwrap_or_default().to_owned();
            let targets = panel["targets"].as_array().cloned().unwrap_or_default();
            targets.into_iter().map(move |target| (title.clone(), target["expr"].clone()))
        };
        let annotations = self.json["annotations"]["list"].as_array().into_iter().flatten();
        let annotations = annotations.map(|one| ("annotations".to_owned(), one["expr"].clone()));
        let asked = self.panels().into_iter().flat_map(of_panel).chain(annotations);
        asked
            .filter_map(|(title, expr)| {
                Some(Query { panel: format!("{}: {title}", self.name()), expr: expr.as_str()?.to_owned() })
            })
            .collect()
    }
}

/// The names of metrics, and of recorded series, in expressions: whatever begins like one of ours.
pub fn metrics(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| {
            word.starts_with("nvshare_") || word.starts_with("process_") || word.contains(":nvshare_")
        })
        .map(str::to_owned)
        .collect()
}
