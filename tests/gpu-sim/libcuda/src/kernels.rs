//! The built-in kernels: what they do to real bytes, what they touch and how long they take on the simulated card.
//!
//! Each kernel first spends its time in the model (which blocks the stream while pages are missing or other processes
//! have the card) and then does its work through the GPU's view of the memory.

use std::ffi::c_void;

use nvshare_gpu_sim_model::client::{Access, Work};

use crate::{
    abi::{ILLEGAL_ADDRESS, INVALID_VALUE, Outcome},
    memory::{self, Kind},
    process::{driver, sim_error},
};

/// The stride of `sweep`: one word per page, so that the host's work stays far below the simulated GPU's.
pub(crate) const PAGE: u64 = 4096;
/// Fixed GPU time of a kernel, and its memory bandwidth (H100 SXM), for kernels that do not name their time.
const LAUNCH_NS: u64 = 3_000;
const BYTES_PER_NS: u64 = 2_000;

/// How a parameter is passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ParameterKind {
    Pointer,
    U64,
    U32,
    F32,
}

impl ParameterKind {
    pub(crate) fn parse(word: &str) -> Option<Self> {
        match word {
            "ptr" => Some(Self::Pointer),
            "u64" => Some(Self::U64),
            "u32" => Some(Self::U32),
            "f32" => Some(Self::F32),
            _ => None,
        }
    }

    pub(crate) fn size(self) -> usize {
        match self {
            Self::Pointer | Self::U64 => 8,
            Self::U32 | Self::F32 => 4,
        }
    }

    pub(crate) fn read(self, from: *const c_void) -> Outcome<Argument> {
        if from.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the C contract: the parameter's value lies here, in the parameter's size.
        Ok(unsafe {
            match self {
                Self::Pointer | Self::U64 => Argument(from.cast::<u64>().read_unaligned()),
                Self::U32 | Self::F32 => Argument(u64::from(from.cast::<u32>().read_unaligned())),
            }
        })
    }
}

/// The bits of one argument.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Argument(u64);

/// A kernel the simulated card can run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Builtin {
    /// `sweep(ptr, bytes, gpu_ns, value)`: adds `value` to the first u32 of every 4 KiB page.
    Sweep,
    /// `fill(ptr, words, value)`: stores `value` into every u32.
    Fill,
    /// `add(out, a, b, count)`: `out[i] = a[i] + b[i]`, f32.
    Add,
    /// `checksum(ptr, bytes, out)`: the wrapping sum of all u32 into the u64 at `out`.
    Checksum,
    /// `spin(ns)`: GPU time without memory.
    Spin,
}

/// Memory a kernel uses, in the GPU's view.
struct Span {
    view: *mut u8,
    access: Option<Access>,
}

fn span(base: u64, len: u64, write: bool) -> Outcome<Span> {
    if !base.is_multiple_of(4) {
        return Err(ILLEGAL_ADDRESS);
    }
    let (view, kind) = memory::kernel_access(base, len)?;
    Ok(Span { view, access: (kind == Kind::Managed && len > 0).then_some(Access { base, len, write }) })
}

fn spend<const N: usize>(gpu: usize, compute_ns: u64, spans: [&Span; N]) -> Outcome {
    let ranges = spans.iter().filter_map(|span| span.access).collect();
    driver()?.session.run_kernel(gpu, &Work { ranges, compute_ns }).map_err(sim_error)
}

impl Builtin {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "sweep" => Some(Self::Sweep),
            "fill" => Some(Self::Fill),
            "add" => Some(Self::Add),
            "checksum" => Some(Self::Checksum),
            "spin" => Some(Self::Spin),
            _ => None,
        }
    }

    pub(crate) fn kinds(self) -> &'static [ParameterKind] {
        use ParameterKind::{Pointer, U32, U64};
        match self {
            Self::Sweep => &[Pointer, U64, U64, U32],
            Self::Fill => &[Pointer, U64, U32],
            Self::Add => &[Pointer, Pointer, Pointer, U64],
            Self::Checksum => &[Pointer, U64, Pointer],
            Self::Spin => &[U64],
        }
    }

    pub(crate) fn run(self, gpu: usize, arguments: &[Argument]) -> Outcome {
        let at = |index: usize| arguments.get(index).map(|argument| argument.0).ok_or(INVALID_VALUE);
        match self {
            Self::Sweep => sweep(gpu, at(0)?, at(1)?, at(2)?, at(3)? as u32),
            Self::Fill => fill(gpu, at(0)?, at(1)?, at(2)? as u32),
            Self::Add => add(gpu, at(0)?, at(1)?, at(2)?, at(3)?),
            Self::Checksum => checksum(gpu, at(0)?, at(1)?, at(2)?),
            Self::Spin => spend(gpu, at(0)?, []),
        }
    }
}

fn sweep(gpu: usize, base: u64, bytes: u64, gpu_ns: u64, value: u32) -> Outcome {
    let memory = span(base, bytes, true)?;
    spend(gpu, gpu_ns, [&memory])?;
    for offset in (0..bytes / 4 * 4).step_by(PAGE as usize) {
        // SAFETY: inside the span, aligned; volatile because another process of the card never shares these bytes but
        // the program's own CPU view may.
        unsafe {
            let word = memory.view.add(offset as usize).cast::<u32>();
            word.write_volatile(word.read_volatile().wrapping_add(value));
        }
    }
    Ok(())
}

fn fill(gpu: usize, base: u64, words: u64, value: u32) -> Outcome {
    let bytes = words.checked_mul(4).ok_or(ILLEGAL_ADDRESS)?;
    let memory = span(base, bytes, true)?;
    spend(gpu, LAUNCH_NS + bytes / BYTES_PER_NS, [&memory])?;
    for index in 0..words as usize {
        // SAFETY: inside the span, aligned.
        unsafe { memory.view.cast::<u32>().add(index).write_volatile(value) };
    }
    Ok(())
}

fn add(gpu: usize, out: u64, a: u64, b: u64, count: u64) -> Outcome {
    let bytes = count.checked_mul(4).ok_or(ILLEGAL_ADDRESS)?;
    let (out, a, b) = (span(out, bytes, true)?, span(a, bytes, false)?, span(b, bytes, false)?);
    spend(gpu, LAUNCH_NS + 3 * bytes / BYTES_PER_NS, [&a, &b, &out])?;
    for index in 0..count as usize {
        // SAFETY: inside the three spans, aligned; the spans may be the same memory.
        unsafe {
            let sum = a.view.cast::<f32>().add(index).read() + b.view.cast::<f32>().add(index).read();
            out.view.cast::<f32>().add(index).write(sum);
        }
    }
    Ok(())
}

fn checksum(gpu: usize, base: u64, bytes: u64, out: u64) -> Outcome {
    let memory = span(base, bytes, false)?;
    let result = span(out, 8, true)?;
    spend(gpu, LAUNCH_NS + bytes / BYTES_PER_NS, [&memory, &result])?;
    let mut sum = 0_u64;
    for index in 0..(bytes / 4) as usize {
        // SAFETY: inside the span, aligned.
        sum = sum.wrapping_add(u64::from(unsafe { memory.view.cast::<u32>().add(index).read() }));
    }
    // SAFETY: inside the span; eight bytes need not be aligned.
    unsafe { result.view.cast::<u64>().write_unaligned(sum) };
    Ok(())
}
