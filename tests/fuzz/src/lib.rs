//! Feeds damaged input to a parser, for as long as there is time.
//!
//! **Problem.** Every byte that a program of ours reads may be wrong, and some were made wrong with intent. The usual
//! fuzzers need a nightly compiler for their instrumentation.
//!
//! **Approach.** A target is a function from bytes to an *outcome*, a number that says what became of the input (which
//! error, which message). Inputs begin with committed examples (`tests/corpus/TARGET/` of the crate under test), are
//! damaged and joined at random, and one with an outcome not seen before becomes an example itself. The outcomes stand
//! for the coverage that an instrumented build would give. A target that panics, or takes longer than a second, has
//! failed; its input is kept beside the examples and so is tried first from then on.
//!
//! `NVSHARE_FUZZ_SECONDS` says how long (default 1), `NVSHARE_FUZZ_SEED` where chance begins, `NVSHARE_FUZZ_REPORT` a file
//! that gets a line of figures, `NVSHARE_FUZZ_KEEP=1` keeps inputs with new outcomes among the examples.
#![expect(
    clippy::missing_panics_doc,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "what fails here fails the test, and its seed must be seen"
)]

mod mutate;

use std::{
    collections::{BTreeSet, hash_map::DefaultHasher},
    fs,
    hash::{Hash as _, Hasher as _},
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mutate::Mutator;

/// Inputs are no longer than this.
const INPUT_MAX: usize = 16 << 10;
/// Examples that are kept in memory.
const POOL_MAX: usize = 4096;
/// Examples beyond this are not kept on disk.
const KEPT_MAX: usize = 60;
/// No input may keep a parser busy for longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// What became of an input, from text such as an error message or a `Debug` form. Of it count the first words, without
/// those that hold a digit, a quotation mark or a backslash: an unknown key is one outcome, whatever it is called.
pub fn outcome(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let counts =
        |word: &&str| !word.chars().any(|c| c.is_ascii_digit() || "`\"'\\".contains(c)) && word.is_ascii();
    for word in text.split_whitespace().filter(counts).take(6) {
        word.hash(&mut hasher);
    }
    hasher.finish()
}

fn number(name: &str) -> Option<f64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// Fuzzes `target` with the examples in `tests/corpus/NAME` below `manifest_dir`. `words` are what the input is made of.
pub fn fuzz(manifest_dir: &str, name: &str, words: &[&[u8]], target: impl Fn(&[u8]) -> u64) {
    let dir = Path::new(manifest_dir).join("tests/corpus").join(name);
    let lasting = Duration::from_secs_f64(number("NVSHARE_FUZZ_SECONDS").unwrap_or(1.0));
    let now = || std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64);
    let seed = number("NVSHARE_FUZZ_SEED").map_or_else(now, |seed| seed as u64) & ((1 << 53) - 1);
    println!("NVSHARE_FUZZ_SEED={seed}");
    let keep = std::env::var_os("NVSHARE_FUZZ_KEEP").is_some_and(|value| value == "1");

    let mut outcomes = BTreeSet::new();
    let mut pool = Vec::new();
    for path in examples(&dir) {
        let input = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        outcomes.insert(try_one(&target, &input, &dir, seed));
        pool.push(input);
    }
    assert!(!pool.is_empty(), "{} holds no examples", dir.display());

    let mut mutator = Mutator::new(seed, words, INPUT_MAX);
    let begun = Instant::now();
    let mut executions = pool.len() as u64;
    while begun.elapsed() < lasting {
        for _ in 0..64 {
            let input = mutator.mutate(&pool);
            executions += 1;
            if outcomes.insert(try_one(&target, &input, &dir, seed)) && pool.len() < POOL_MAX {
                if keep && pool.len() < KEPT_MAX {
                    fs::write(dir.join(file_name("seen", &input)), &input)
                        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
                }
                pool.push(input);
            }
        }
    }
    let figures = serde_json::json!({
        "target": name,
        "executions": executions,
        "outcomes": outcomes.len(),
        "examples": pool.len(),
        "seconds": begun.elapsed().as_secs_f64(),
        "seed": seed,
    });
    println!("{figures}");
    if let Some(report) = std::env::var_os("NVSHARE_FUZZ_REPORT") {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(report).expect("the report");
        writeln!(file, "{figures}").expect("the report");
    }
}

fn examples(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map_while(Result::ok).map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn file_name(kind: &str, input: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    format!("{kind}-{:016x}", hasher.finish())
}

/// Runs the target once; an input that it does not survive is kept.
fn try_one(target: impl Fn(&[u8]) -> u64, input: &[u8], dir: &Path, seed: u64) -> u64 {
    let begun = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| target(input)));
    let took = begun.elapsed();
    let what = match result {
        Ok(outcome) if took <= PATIENCE => return outcome,
        Ok(_) => format!("took {took:?}"),
        Err(_) => "panicked".to_owned(),
    };
    let path = dir.join(file_name("crash", input));
    let kept = fs::write(&path, input);
    panic!("the target {what} (seed {seed}); its input is {} ({kept:?})", path.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A parser with a flaw that only input near its example reaches.
    fn flawed(input: &[u8]) -> u64 {
        match input {
            [b'N', b'V', length, rest @ ..] if usize::from(*length) > rest.len() => {
                outcome(&format!("{:?}", &rest[..usize::from(*length)]))
            }
            [b'N', b'V', ..] => 1,
            _ => 0,
        }
    }

    #[test]
    fn a_flaw_is_found_and_its_input_kept() {
        let home = tempfile_dir("found");
        fs::create_dir_all(home.join("tests/corpus/flawed")).unwrap();
        fs::write(home.join("tests/corpus/flawed/one"), b"NV\x02ab").unwrap();
        let failed = catch_unwind(|| fuzz(home.to_str().unwrap(), "flawed", &[], flawed));
        assert!(failed.is_err());
        let kept = examples(&home.join("tests/corpus/flawed"));
        assert!(kept.iter().any(|path| path.to_str().unwrap().contains("crash-")), "{kept:?}");
        fs::remove_dir_all(home).unwrap();
    }

    #[test]
    fn the_outcome_of_an_error_does_not_depend_on_the_numbers_in_it() {
        assert_eq!(outcome("line 3: unknown key `a`"), outcome("line 44: unknown key `bcd`"));
        assert_ne!(outcome("unknown key"), outcome("missing key"));
    }

    fn tempfile_dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("nvshare-fuzz-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}
