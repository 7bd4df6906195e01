//! The driver's interface as data: its entry points, what real runtimes look up, and what the shim does with each
//! function.
#![expect(clippy::missing_panics_doc, reason = "a bad line in the data fails the test")]

/// One entry point: what `cuGetProcAddress` is asked for, and the name that the driver exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryPoint {
    /// Name for `cuGetProcAddress`.
    pub name: &'static str,
    /// Version from which on it is given, 1000·major + 10·minor.
    pub version: i32,
    /// Whether stream 0 means the calling thread's default stream.
    pub per_thread: bool,
    /// Name in the ELF symbol table.
    pub symbol: &'static str,
}

fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty())
}

/// Every entry point of the drivers so far.
pub fn entry_points() -> Vec<EntryPoint> {
    lines(include_str!("../../gpu-sim/libcuda/data/driver-api.txt"))
        .map(|line| {
            let [name, version, stream, symbol] = line.split_whitespace().collect::<Vec<_>>()[..] else {
                panic!("not four columns: {line}")
            };
            let version = version.parse().unwrap_or_else(|_| panic!("no version: {line}"));
            EntryPoint { name, version, per_thread: stream == "thread", symbol }
        })
        .collect()
}

/// A look-up that a runtime makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LookUp {
    /// Name for `cuGetProcAddress`.
    pub name: &'static str,
    /// Version of the caller's ABI.
    pub version: i32,
    /// Flags of `cuGetProcAddress`.
    pub flags: u64,
}

/// Every look-up of the recorded runtimes, as often as they make it.
pub fn runtime_look_ups() -> Vec<LookUp> {
    let mut rows = Vec::new();
    for line in lines(include_str!("../../gpu-sim/libcuda/data/cudart-lookups.txt")) {
        let mut cells = line.split('|').map(str::trim);
        let name = cells.next().unwrap_or_default();
        for ask in cells.flat_map(|cell| cell.split(',')).filter(|ask| *ask != "-") {
            let (version, flags) = ask.split_once('/').unwrap_or_else(|| panic!("no version/flags: {line}"));
            let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("not a number: {line}"));
            rows.push(LookUp { name, version: number(version), flags: number(flags) as u64 });
        }
    }
    assert!(rows.len() > 1600, "the fixture is cut short: {} rows", rows.len());
    rows
}

/// What the shim does with one driver function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Name in the ELF symbol table.
    pub symbol: &'static str,
    /// Whether the shim has a wrapper for it.
    pub hooked: bool,
    /// Functions that are treated alike for one reason.
    pub group: &'static str,
    /// A letter for each argument, if it is hooked.
    pub arguments: &'static str,
}

impl Function {
    /// Whether it submits work and so passes the gate.
    pub fn is_work(&self) -> bool {
        self.hooked && self.group == "work"
    }
}

/// The shim's classification of the driver's functions.
pub fn functions() -> Vec<Function> {
    let mut found = Vec::new();
    let (mut hooked, mut group) = (false, "");
    for line in lines(include_str!("../../../shim/data/driver-functions.txt")) {
        if let Some(row) = line.strip_prefix("  ") {
            let mut columns = row.split_whitespace();
            let symbol = columns.next().unwrap_or_default();
            let arguments = columns.next();
            assert!(
                arguments.is_some() == hooked && columns.next().is_none(),
                "columns of a {group} row: {line}"
            );
            found.push(Function {
                symbol,
                hooked,
                group,
                arguments: arguments.unwrap_or("").trim_matches('-'),
            });
        } else {
            let (heading, reason) = line.split_once(": ").unwrap_or_else(|| panic!("no reason: {line}"));
            let (verdict, name) = heading.split_once(' ').unwrap_or_else(|| panic!("no group: {line}"));
            assert!(matches!(verdict, "hooked" | "passed") && reason.len() > 10, "not a heading: {line}");
            (hooked, group) = (verdict == "hooked", name);
        }
    }
    found
}
