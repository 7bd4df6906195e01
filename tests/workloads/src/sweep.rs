//! A program that sweeps over its memory again and again, as a training loop does over its parameters, and can prove that
//! every sweep reached every page.

use std::{
    fs::File,
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::json;

use crate::{
    cuda::{Cuda, Kernel},
    nvml, quantity,
};

/// What each sweep adds to the first word of each page.
const VALUE: u32 = 3;
const PAGE: usize = 4096;
/// A sweep that takes this many times its GPU time was held up, by page faults or by waiting for its turn. Sharing the card
/// with two or three others by time slices stays below it.
const STALL_FACTOR: u32 = 4;

/// Options of `sweep`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Its name in results.
    #[arg(long, default_value = "sweep")]
    name: String,
    /// Memory to allocate and sweep, such as 400MiB.
    #[arg(long, value_parser = quantity::size)]
    memory: u64,
    /// GPU time in all that it needs when alone and resident.
    #[arg(long, value_parser = quantity::time, default_value = "4s")]
    gpu_work: Duration,
    /// GPU time of one sweep.
    #[arg(long, value_parser = quantity::time, default_value = "20ms")]
    sweep_time: Duration,
    /// Share of the time that it wants the GPU for, when alone; the rest it computes on the CPU (here: sleeps).
    #[arg(long, default_value_t = 1.0)]
    duty: f64,
    /// Wait this long before using the GPU.
    #[arg(long, value_parser = quantity::time, default_value = "0s")]
    start_after: Duration,
    /// Append one JSON line per sweep to this file: name, t_ms (CLOCK_MONOTONIC, milliseconds), sweep.
    #[arg(long)]
    progress_file: Option<PathBuf>,
    /// End after the sweep in which this file appears, as if the work were done.
    #[arg(long)]
    stop_file: Option<PathBuf>,
    /// Read all memory back at the end and check every word.
    #[arg(long)]
    verify: bool,
    /// Allocate managed memory, as a program written for unified memory does.
    #[arg(long)]
    managed_own: bool,
    /// Device to use.
    #[arg(long, default_value_t = 0)]
    gpu: u32,
    /// Allocate even if a real GPU has less memory free; this can hang the card.
    #[arg(long)]
    allow_oversubscription: bool,
}

/// The kernel, and whether the GPU is a simulated one.
pub(crate) fn load(cuda: &Cuda) -> Result<(Kernel, bool)> {
    if let Ok(kernel) = cuda.kernel(c"nvshare-sim-module 1\nsweep ptr u64 u64 u32\n", c"sweep") {
        return Ok((kernel, true));
    }
    let text = concat!(include_str!("sweep.ptx"), "\0");
    let text = std::ffi::CStr::from_bytes_with_nul(text.as_bytes())?;
    let kernel = cuda.kernel(text, c"sweep").context("compiling the sweep kernel for this GPU")?;
    Ok((kernel, false))
}

/// CLOCK_MONOTONIC in milliseconds, which all processes share.
fn monotonic_ms() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a live local; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

/// Compares all memory with what `sweeps` sweeps over zeroed memory leave; fails at the first wrong word.
fn verify(cuda: &Cuda, address: u64, bytes: u64, sweeps: u32) -> Result<()> {
    let mut buffer = vec![0_u32; 1 << 20];
    let expected = VALUE.wrapping_mul(sweeps);
    let mut at = 0;
    while at < bytes {
        let words = ((bytes - at) / 4).min(buffer.len() as u64) as usize;
        let part = &mut buffer[..words];
        cuda.read(address + at, part)?;
        for (index, &word) in part.iter().enumerate() {
            let right = if index % (PAGE / 4) == 0 { expected } else { 0 };
            if word != right {
                let offset = at + index as u64 * 4;
                bail!("wrong result: the word at byte {offset} of {bytes} is {word} instead of {right}");
            }
        }
        at += words as u64 * 4;
    }
    Ok(())
}

/// Runs the workload; fails if it is asked to verify and a word is wrong.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(options.duty > 0.0 && options.duty <= 1.0, "--duty must be above 0 and at most 1");
    ensure!(!options.sweep_time.is_zero(), "--sweep-time must be above 0");
    let bytes = options.memory / 4 * 4;
    ensure!(bytes > 0, "--memory must be at least one word");
    let mut progress = options
        .progress_file
        .as_ref()
        .map(|path| File::create(path).with_context(|| format!("creating {}", path.display())))
        .transpose()?;
    std::thread::sleep(options.start_after);

    let cuda = Cuda::open(options.gpu)?;
    let (kernel, simulated) = load(&cuda)?;
    if !simulated && !options.allow_oversubscription {
        nvml::refuse_oversubscription(&cuda, bytes)?;
    }
    let address = cuda
        .allocate(bytes, options.managed_own)
        .with_context(|| format!("allocating {} MiB on {}", bytes >> 20, cuda.device_name))?;
    let start = Instant::now();
    cuda.clear(address, bytes)?;
    cuda.synchronize()?;

    let planned = options.gpu_work.div_duration_f64(options.sweep_time).ceil().max(1.0) as u32;
    let pause = options.sweep_time.mul_f64((1.0 - options.duty) / options.duty);
    let gpu_ns = u64::try_from(options.sweep_time.as_nanos()).context("--sweep-time is too long")?;
    let (mut stalls, mut stalled, mut longest) = (0_u32, Duration::ZERO, Duration::ZERO);
    let mut sweeps = 0;
    while sweeps < planned && !options.stop_file.as_ref().is_some_and(|file| file.exists()) {
        let began = Instant::now();
        cuda.launch(kernel, address, bytes, gpu_ns, VALUE)?;
        cuda.synchronize()?;
        let took = began.elapsed();
        longest = longest.max(took);
        if took > options.sweep_time * STALL_FACTOR {
            stalls += 1;
            stalled += took.saturating_sub(options.sweep_time);
        }
        if let Some(file) = &mut progress {
            let stamp = json!({"name": options.name, "t_ms": monotonic_ms(), "sweep": sweeps});
            writeln!(file, "{stamp}").context("writing the progress file")?;
        }
        sweeps += 1;
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    if options.verify {
        verify(&cuda, address, bytes, sweeps)?;
    }
    cuda.free(address)?;
    let result = json!({
        "name": options.name,
        "simulated": simulated,
        "seconds": seconds,
        "sweeps": sweeps,
        "stalls": stalls,
        "stall_s": stalled.as_secs_f64(),
        "longest_sweep_s": longest.as_secs_f64(),
        "verified": options.verify,
    });
    let mut out = std::io::stdout().lock();
    writeln!(out, "{result}").context("printing the result")?;
    Ok(())
}
