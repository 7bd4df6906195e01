//! A program that a benchmark can ask for one short measurement after another.
//!
//! **Problem.** Two processes that run the same code differ by more than what is to be measured: clocks drift, and where a
//! library lies in memory or which core a thread runs on changes with every start.
//!
//! **Approach.** The program stays alive and idle between rounds, so that rounds of several such programs can be interleaved.
//! Commands arrive as lines on standard input, answers leave as JSON lines on standard output:
//! ```text
//! launch N               N tiny kernels and one wait: nanoseconds each
//! submit N               the same in bursts shorter than the launch queue, without the wait: what the call itself costs
//! call PAIRS             as submit, in pairs of bursts: by the driver's own function and by the one that look-ups give, in
//!                        turn, in one process: all that is left is what comes between
//! memory BYTES REPEATS   allocate, touch all of it for the first time, free: medians in microseconds
//! pattern SEED BYTES     a caching allocator's life, replayed: milliseconds of each part
//! quit
//! ```

use std::{
    io::{BufRead as _, Write as _},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    cuda::{Cuda, Kernel},
    nvml, pattern, sweep,
};

/// Memory that the program holds all the time, as every real one does.
const HELD: u64 = 4 << 20;
/// Far below the number of launches that the driver queues before it makes the program wait.
const BURST: u64 = 256;
/// Launches before each measurement: they bring the clocks up and the code into the caches.
const WARM_UP: u64 = 1000;

/// Options of `bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Allocate managed memory, as a program written for unified memory does.
    #[arg(long)]
    managed_own: bool,
    /// One launch and the end: what starting a program costs.
    #[arg(long)]
    once: bool,
    /// Device to use.
    #[arg(long, default_value_t = 0)]
    gpu: u32,
    /// Allocate even if a real GPU has less memory free; this can hang the card.
    #[arg(long)]
    allow_oversubscription: bool,
}

/// The program between two commands.
struct Bench {
    cuda: Cuda,
    kernel: Kernel,
    held: u64,
    managed: bool,
    /// Whether to look at free memory first.
    careful: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let cuda = Cuda::open(options.gpu)?;
    let (kernel, simulated) = sweep::load(&cuda)?;
    let careful = !simulated && !options.allow_oversubscription;
    let held = cuda.allocate(HELD, options.managed_own)?;
    cuda.clear(held, HELD)?;
    cuda.launch_tiny(kernel, held)?;
    cuda.synchronize()?;
    let bench = Bench { cuda, kernel, held, managed: options.managed_own, careful };
    say(&json!({
        "ready": true,
        "gpu": bench.cuda.device_name,
        "simulated": simulated,
        "managed": bench.cuda.is_managed(held)?,
    }))?;
    if !options.once {
        for line in std::io::stdin().lock().lines() {
            let line = line.context("reading a command")?;
            let words: Vec<&str> = line.split_whitespace().collect();
            if words == ["quit"] {
                break;
            }
            // Whoever asks must see why, and decides.
            say(&bench.answer(&words).unwrap_or_else(|error| json!({"error": format!("{error:#}")})))?;
        }
    }
    bench.cuda.free(bench.held)?;
    Ok(())
}

fn say(answer: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{answer}").context("answering")?;
    out.flush().context("answering")
}

fn number(word: &str) -> Result<u64> {
    word.parse().with_context(|| format!("`{word}` is not a whole number"))
}

/// The middle of some times.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Bench {
    fn answer(&self, words: &[&str]) -> Result<Value> {
        match words {
            ["launch", count] => self.launch(number(count)?),
            ["submit", count] => self.submit(number(count)?),
            ["call", pairs] => self.call(number(pairs)?),
            ["memory", bytes, repeats] => self.memory(number(bytes)?, number(repeats)?),
            ["pattern", seed, bytes] => self.pattern(number(seed)?, number(bytes)?),
            _ => bail!("`{}` is not a command", words.join(" ")),
        }
    }

    fn warm_up(&self) -> Result<()> {
        for _ in 0..WARM_UP {
            self.cuda.launch_tiny(self.kernel, self.held)?;
        }
        Ok(self.cuda.synchronize()?)
    }

    fn launch(&self, count: u64) -> Result<Value> {
        ensure!(count > 0, "no launches to measure");
        self.warm_up()?;
        let began = Instant::now();
        for _ in 0..count {
            self.cuda.launch_tiny(self.kernel, self.held)?;
        }
        self.cuda.synchronize()?;
        Ok(json!({"ns": began.elapsed().as_nanos() as f64 / count as f64}))
    }

    fn submit(&self, count: u64) -> Result<Value> {
        let bursts = count.div_ceil(BURST);
        ensure!(bursts > 0, "no launches to measure");
        self.warm_up()?;
        let mut spent = 0;
        for _ in 0..bursts {
            let began = Instant::now();
            for _ in 0..BURST {
                self.cuda.launch_tiny(self.kernel, self.held)?;
            }
            spent += began.elapsed().as_nanos();
            self.cuda.synchronize()?;
        }
        Ok(json!({"ns": spent as f64 / (bursts * BURST) as f64}))
    }

    fn call(&self, pairs: u64) -> Result<Value> {
        let (direct, found) = self.cuda.launchers()?;
        self.warm_up()?;
        let burst = |launch| -> Result<f64> {
            // Neither pays for what the other has put out of the caches.
            for _ in 0..BURST / 8 {
                self.cuda.launch_tiny_by(launch, self.kernel, self.held)?;
            }
            self.cuda.synchronize()?;
            let began = Instant::now();
            for _ in 0..BURST {
                self.cuda.launch_tiny_by(launch, self.kernel, self.held)?;
            }
            let spent = began.elapsed().as_nanos() as f64 / BURST as f64;
            self.cuda.synchronize()?;
            Ok(spent)
        };
        let mut rows = Vec::new();
        for pair in 0..pairs {
            // Which is first alternates, so that a drift favours neither.
            rows.push(if pair % 2 == 0 {
                let first = burst(direct)?;
                [first, burst(found)?]
            } else {
                let first = burst(found)?;
                [burst(direct)?, first]
            });
        }
        Ok(json!({"pairs_ns": rows}))
    }

    /// Fails if the card does not have these bytes twice: what is measured here must not evict anything.
    fn need(&self, bytes: u64) -> Result<()> {
        if self.careful { nvml::refuse_oversubscription(&self.cuda, bytes.saturating_mul(2)) } else { Ok(()) }
    }

    fn memory(&self, bytes: u64, repeats: u64) -> Result<Value> {
        self.need(bytes)?;
        let [mut alloc, mut touch, mut free] = [const { Vec::new() }; 3];
        for _ in 0..repeats {
            let began = Instant::now();
            let address = self.cuda.allocate(bytes, self.managed)?;
            let allocated = Instant::now();
            self.cuda.clear(address, bytes)?;
            self.cuda.synchronize()?;
            let touched = Instant::now();
            self.cuda.free(address)?;
            alloc.push((allocated - began).as_secs_f64() * 1e6);
            touch.push((touched - allocated).as_secs_f64() * 1e6);
            free.push(touched.elapsed().as_secs_f64() * 1e6);
        }
        Ok(json!({"alloc_us": median(alloc), "touch_us": median(touch), "free_us": median(free)}))
    }

    /// Segments grow as a training program's first step needs them, are filled again and again, and go at the end.
    fn pattern(&self, seed: u64, bytes: u64) -> Result<Value> {
        self.need(bytes)?;
        let sizes = pattern::segments(seed, bytes);
        let mut segments = Vec::with_capacity(sizes.len());
        let (mut alloc, mut touch) = (0.0, 0.0);
        for &size in &sizes {
            let began = Instant::now();
            let address = self.cuda.allocate(size, self.managed)?;
            alloc += began.elapsed().as_secs_f64();
            segments.push((address, size));
            let began = Instant::now();
            self.cuda.clear(address, size)?;
            self.cuda.synchronize()?;
            touch += began.elapsed().as_secs_f64();
        }
        let began = Instant::now();
        for _ in 0..pattern::REUSES {
            for &(address, size) in &segments {
                self.cuda.clear(address, size)?;
            }
        }
        self.cuda.synchronize()?;
        let reuse = began.elapsed().as_secs_f64();
        let began = Instant::now();
        for &(address, _) in &segments {
            self.cuda.free(address)?;
        }
        let free = began.elapsed().as_secs_f64();
        Ok(json!({
            "segments": sizes.len(),
            "bytes": sizes.iter().sum::<u64>(),
            "alloc_ms": alloc * 1e3,
            "touch_ms": touch * 1e3,
            "reuse_ms": reuse * 1e3,
            "free_ms": free * 1e3,
            "sum_ms": (alloc + touch + reuse + free) * 1e3,
        }))
    }
}
