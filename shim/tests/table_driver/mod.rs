//! The driver made from the table, as a test sees it: built once, asked for its calls, called with arguments that can be
//! told apart.
#![allow(dead_code, reason = "each file of tests uses a part of it")]

use std::{
    collections::BTreeMap,
    ffi::{CString, c_void},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use nvshare_tests::{
    api::{Function, entry_points},
    compile,
    cuda::Cuda,
    program::{body, built},
};

/// As many words as the driver notes of a call.
pub(crate) const WORDS: usize = 12;

type Any = extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) -> i32;

/// The folder that holds the driver, as `libcuda.so.1` alone.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("coverage");
        fs::create_dir_all(&folder).unwrap();
        let mut symbols = BTreeMap::new();
        let mut keys = String::new();
        for point in entry_points() {
            let next = symbols.len();
            let index = *symbols.entry(point.symbol).or_insert(next);
            let (name, version, thread) = (point.name, point.version, point.per_thread);
            writeln!(keys, "    (\"{name}\", {version}, {thread}, {index}),").unwrap();
        }
        let mut names: Vec<_> = symbols.into_iter().map(|(symbol, index)| (index, symbol)).collect();
        names.sort_unstable();
        let names: Vec<_> = names.iter().map(|(index, symbol)| format!("    {index} {symbol}")).collect();
        let names = names.join("\n");
        let text = include_str!("driver.rs");
        fs::write(
            folder.join("driver.rs"),
            format!("{text}table! {{\nfunctions:\n{names}\nkeys:\n{keys}}}\n"),
        )
        .unwrap();
        let link = "-Clink-args=-Wl,-soname,libcuda.so.1 -Wl,-Bsymbolic";
        // Compiled beside its place: another run of these tests may have the last one loaded.
        let fresh = folder.join(format!("driver-{}", std::process::id()));
        compile::rustc(&folder.join("driver.rs"), &fresh, &["--crate-type=cdylib", link]);
        fs::rename(fresh, folder.join("libcuda.so.1")).unwrap();
        folder
    })
}

/// A command that runs the body of `test` before this driver, under the shim.
pub(crate) fn shimmed(test: &str, role: &str, run_dir: &Path) -> Command {
    let mut command = body(test, role);
    command
        .env("LD_LIBRARY_PATH", folder())
        .env("LD_PRELOAD", built().join("libnvshare.so"))
        .env("NVSHARE_RUN_DIR", run_dir);
    command
}

/// The calls of a function so far, and the arguments of the last one.
pub(crate) fn calls(cuda: &Cuda, symbol: &str) -> (usize, [u64; WORDS]) {
    let (name, mut words) = (CString::new(symbol).unwrap(), [0; WORDS]);
    // SAFETY: the type is that of the driver's function.
    let count = unsafe {
        let calls: extern "C" fn(*const i8, *mut [u64; WORDS]) -> usize =
            std::mem::transmute(cuda.symbol("fake_calls"));
        calls(name.as_ptr(), &raw mut words)
    };
    (count, words)
}

/// What a function that has no answer of its own returns.
pub(crate) fn result(cuda: &Cuda, symbol: &str) -> i32 {
    let name = CString::new(symbol).unwrap();
    // SAFETY: the type is that of the driver's function.
    unsafe {
        let result: extern "C" fn(*const i8) -> i32 = std::mem::transmute(cuda.symbol("fake_result"));
        result(name.as_ptr())
    }
}

/// Memory for whatever a function may read behind a pointer.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub(crate) struct Cell(pub(crate) [u64; 32]);

/// Arguments for one call of a function, each unlike the others and as wide as its type.
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) words: [u64; WORDS],
    widths: Vec<u64>,
    /// What pointers point at, in the order of the arguments.
    _cells: Vec<Cell>,
}

impl Arguments {
    /// Arguments whose stream is `stream`, and whose device addresses and memory `shape` may change.
    pub(crate) fn new(function: &Function, stream: u64, shape: impl Fn(char, &mut u64, &mut Cell)) -> Self {
        let (mut words, mut widths) = ([0; WORDS], Vec::new());
        let mut cells = vec![Cell([0; 32]); function.arguments.len()];
        for ((at, letter), cell) in function.arguments.chars().enumerate().zip(&mut cells) {
            let at_64 = at as u64;
            if letter == 'c' {
                // `CUlaunchConfig::hStream`.
                cell.0[4] = stream;
            }
            let (value, width) = match letter {
                'p' | 'c' => (cell.0.as_ptr() as u64, u64::MAX),
                's' => (stream, u64::MAX),
                'd' => (0x7000_1234_0000_0000 + at_64 * 0x1001, u64::MAX),
                'z' | 'q' => (0xfedc_ba98_0000_0000 + at_64, u64::MAX),
                'u' => (0xfffe_0000 + at_64, 0xffff_ffff),
                'h' => (0xfe00 + at_64, 0xffff),
                'b' => (0xf0 + at_64, 0xff),
                // Two 32-bit fields, by value.
                'l' => (0x8765_4321_0000_0000 + at_64, u64::MAX),
                other => panic!("{} has an argument {other}", function.symbol),
            };
            words[at] = value;
            shape(letter, &mut words[at], cell);
            widths.push(width);
        }
        Self { words, widths, _cells: cells }
    }

    /// Calls `function` with them.
    pub(crate) fn call(&self, function: *mut c_void) -> i32 {
        // SAFETY: integers, pointers and two-word structs travel alike, and surplus arguments are the caller's own.
        let function: Any = unsafe { std::mem::transmute(function) };
        let w = &self.words;
        function(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11])
    }

    /// Whether these are the arguments that arrived.
    pub(crate) fn arrived(&self, words: &[u64; WORDS]) -> bool {
        self.widths
            .iter()
            .zip(self.words.iter().zip(words))
            .all(|(width, (sent, came))| sent & width == came & width)
    }
}
