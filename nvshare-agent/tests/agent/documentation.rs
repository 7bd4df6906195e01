//! `docs/metrics.md` and the registry say the same.

use std::path::Path;

use nvshare_agent::metrics::{Family, Metrics};

fn row(family: &Family) -> String {
    let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
    format!("| `{}` | {} | {} | {} |", family.name, family.kind.as_str(), labels.join(", "), family.help)
}

#[test]
fn the_document_lists_exactly_the_metrics_there_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let metrics = Metrics::new().unwrap();
    let expected: Vec<String> = metrics.families().iter().map(row).collect();
    let listed: Vec<&str> = document.lines().filter(|line| line.starts_with("| `")).collect();
    assert_eq!(listed, expected, "the table of {} should read:\n{}", path.display(), expected.join("\n"));
}

#[test]
fn names_follow_the_conventions() {
    for family in Metrics::new().unwrap().families() {
        let name = family.name.as_str();
        assert!(name.starts_with("nvshare_") || name.starts_with("process_"), "{name}");
        let total = name.ends_with("_total");
        let counter = family.kind == nvshare_agent::metrics::Kind::Counter;
        assert_eq!(total, counter, "{name}: counters, and only they, end in _total");
        assert!(
            !family
                .labels
                .iter()
                .any(|label| label == "pid" || label == "name" && name != "nvshare_gpu_info")
        );
    }
}
