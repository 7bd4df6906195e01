//! One line to standard error, rarely. The program's own output matters more than ours.

use std::{
    fmt,
    io::Write,
    sync::atomic::{AtomicU8, Ordering},
};

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Level {
    /// Nothing at all.
    Off = 0,
    /// Something of ours failed.
    Error = 1,
    /// Something is not as the user asked for, or sharing is off.
    Warn = 2,
    /// Sessions, devices.
    Info = 3,
    /// Hand-overs.
    Debug = 4,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Warn as u8);

/// Lets lines of up to this level through.
pub(crate) fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Whether a line of this level would be written.
pub(crate) fn enabled(level: Level) -> bool {
    level as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Writes one line in one system call, so that lines of several processes stay whole. Failure is ignored:
/// a program may have closed its standard error.
pub(crate) fn write(level: Level, text: fmt::Arguments<'_>) {
    if !enabled(level) {
        return;
    }
    let mut line = [0u8; 512];
    let mut rest = &mut line[..];
    // A full buffer cuts the line.
    writeln!(rest, "nvshare: {text}").unwrap_or_default();
    let left = rest.len();
    let len = line.len() - left;
    if left == 0 {
        line[len - 1] = b'\n';
    }
    // SAFETY: `line` holds `len` initialised bytes.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len) };
}

macro_rules! error { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($arg)*)) } }
macro_rules! warning { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Warn, format_args!($($arg)*)) } }
macro_rules! info { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) } }
macro_rules! debug { ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Debug, format_args!($($arg)*)) } }
pub(crate) use {debug, error, info, warning};
