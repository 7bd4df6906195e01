//! The model against the published table. Fitted on every other quantum; the others are the check.

use std::path::Path;

use nvshare_core::sim::{
    Scenario,
    calibrate::{self, Row},
};

fn rows() -> Vec<Row> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/scenarios");
    let csv = std::fs::read_to_string(dir.join("data/nvshare-thesis-table-12-2.csv")).unwrap();
    let published = calibrate::published(&csv).unwrap();
    let mut rows = Vec::new();
    for workload in ["small_50", "small_90", "big_50", "big_90"] {
        let text = std::fs::read_to_string(dir.join(format!("thesis/{workload}.toml"))).unwrap();
        rows.extend(calibrate::rows(&Scenario::parse(workload, &text).unwrap(), workload, &published));
    }
    rows
}

#[test]
fn the_thesis_exclusive_rows_come_out_within_5_percent_and_the_free_ones_within_a_factor_of_1_5() {
    let rows = rows();
    let (free, exclusive): (Vec<Row>, Vec<Row>) =
        rows.into_iter().partition(|row| row.published.quantum.is_none());
    assert_eq!((free.len(), exclusive.len()), (4, 56));
    for fitted in [true, false] {
        let half: Vec<&Row> = exclusive.iter().filter(|row| row.fitted == fitted).collect();
        assert_eq!(half.len(), 28);
        let rms = calibrate::rms(half);
        assert!(rms <= 0.05, "rms {rms:.3} over the rows with fitted = {fitted}");
    }
    for row in free {
        assert!((1.0 / 1.5..=1.5).contains(&(row.error() + 1.0)), "{row:?}");
    }
}
