//! What the programs cost the kernel's verifier is written down, and noticed when it changes.

use std::{collections::BTreeMap, fs};

use nvshare_agent::observe::bpf::Bpf;

use super::Test;

/// Every test, in the order in which they run.
pub(super) const ALL: &[Test] =
    &[("the verifier looks at as many instructions as is written down", as_written_down)];

/// Has a table with a row for each program and a column for each kernel.
const WRITTEN_DOWN: &str = include_str!("../../../../docs/sensors.md");
/// Compilers and kernels of one series differ by less, in percent.
const TOLERANCE: u32 = 10;

fn as_written_down() {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let found = Bpf::verified_instructions().unwrap();
    let expected = column(&kernel);
    let differs = |name: &String| match (found.get(name), expected.get(name)) {
        (Some(&found), Some(&expected)) => found.abs_diff(expected) * 100 > expected * TOLERANCE,
        _ => true,
    };
    let mut names = found.keys().chain(expected.keys());
    assert!(!names.any(differs), "found {found:?}, written down {expected:?}");
}

/// What is written down for a kernel, by program.
fn column(kernel: &str) -> BTreeMap<String, u32> {
    let cells = |line: &'static str| line.trim().trim_matches('|').split('|').map(str::trim);
    let mut lines = WRITTEN_DOWN.lines().skip_while(|line| !line.starts_with("| program |"));
    let series = cells(lines.next().expect("a table of programs"));
    let index = series
        .clone()
        .position(|series| kernel.strip_prefix(series).is_some_and(|rest| rest.starts_with('.')));
    let index = index.unwrap_or_else(|| panic!("no column for {kernel}"));
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let name = cells(row).next().unwrap().trim_matches('`').to_owned();
        (name, cells(row).nth(index).unwrap().parse().unwrap())
    })
    .collect()
}
