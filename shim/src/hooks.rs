//! The hooked functions as the C ABI sees them. Each is a thin shell: it finds the driver's function and
//! hands over to an operation in safe code ([`crate::gate`], [`crate::memory`], …). A call for which there
//! is nothing to do goes to the driver with its own arguments.
#![expect(non_snake_case, reason = "the exports bear the driver API's own names")]
#![expect(unreachable_pub, reason = "exported by name from the library, not by path")]

pub(crate) mod array;
pub(crate) mod capture;
pub(crate) mod context;
pub(crate) mod copy;
pub(crate) mod fill;
pub(crate) mod launch;
pub(crate) mod memory;
pub(crate) mod narrow;
pub(crate) mod nvml;
pub(crate) mod proc_address;
pub(crate) mod residency;
pub(crate) mod stream;
pub(crate) mod wait;

use crate::{log::error, sys::Uncancelled};

/// Writes the exports and the table rows of one file.
///
/// A line reads `symbol = "name" from version, Flavour: (arguments) |real| body;`. The body runs with `real` bound to
/// the driver's function, already typed, and may call it as `real(arguments)`. A thread that is cancelled in the driver unwinds
/// through here, which a plain `extern "C"` function would turn into an abort.
macro_rules! hooks {
    ($($symbol:ident = $name:literal from $from:literal, $flavour:ident:
       ($($arg:ident: $ty:ty),* $(,)?) |$real:ident| $body:expr;)*) => {
        $(
            mod $symbol {
                #[allow(unused_imports, reason = "not every signature names a type of the driver")]
                use super::*;
                pub(super) static REAL: $crate::table::Real =
                    // The literal has no inner zero byte: it is an identifier.
                    $crate::table::Real::new(match ::std::ffi::CStr::from_bytes_with_nul(
                        concat!(stringify!($symbol), "\0").as_bytes(),
                    ) {
                        Ok(symbol) => symbol,
                        Err(_) => panic!("an identifier holds no zero byte"),
                    });
                pub(super) type Function = unsafe extern "C-unwind" fn($($ty),*) -> $crate::abi::CUresult;
            }

            /// As the driver's function of this name.
            ///
            /// # Safety
            /// As for the driver's function.
            #[cfg_attr(not(test), unsafe(no_mangle))]
            pub unsafe extern "C-unwind" fn $symbol($($arg: $ty),*) -> $crate::abi::CUresult {
                let Some(address) = $symbol::REAL.get() else { return $crate::abi::NO_DRIVER };
                // SAFETY: the row's symbol has this signature in every driver that exports it.
                let function = unsafe { ::std::mem::transmute::<$crate::abi::Ptr, $symbol::Function>(address) };
                #[allow(clippy::redundant_closure_call, reason = "keeps the unsafe call in one place")]
                let $real = |$($arg: $ty),*| {
                    // SAFETY: the caller keeps the driver's contract; arguments that the shim replaces are valid.
                    unsafe { function($($arg),*) }
                };
                $body
            }
        )*

        /// This file's rows of the table.
        pub(crate) static ROWS: &[$crate::table::Row] = &[$(
            $crate::table::Row {
                symbol: $symbol::REAL.symbol(),
                name: $name,
                from: $from,
                flavour: $crate::abi::Flavour::$flavour,
                #[cfg(test)]
                arguments: &[$(stringify!($ty)),*],
                wrapper: || $symbol as *const () as $crate::abi::Ptr,
                real: &$symbol::REAL,
            },
        )*];
    };
}

/// Lines whose call submits work: it passes the gate. The last part of a line says what work, or that there is none; after an
/// arrow, where it writes without a gap, and how many bytes.
macro_rules! gated {
    ($($symbol:ident = $name:literal from $from:literal, $flavour:ident:
       ($($arg:ident: $ty:ty),* $(,)?) $work:expr $(=> $to:expr, $bytes:expr)?;)*) => {
        $crate::hooks::hooks! {$(
            $symbol = $name from $from, $flavour: ($($arg: $ty),*) |real| {
                // Not by `map`: the gate is entered from the wrapper's own frame.
                let _inside = match ::std::option::Option::from($work) {
                    Some(work) => Some($crate::gate::enter(work)),
                    None => None,
                };
                $crate::hooks::noting!(real($($arg),*) $(=> $to, $bytes)?)
            };
        )*}
    };
}

/// Lines whose call submits work and waits for it.
macro_rules! blocking {
    ($($symbol:ident = $name:literal from $from:literal, $flavour:ident:
       ($($arg:ident: $ty:ty),* $(,)?) $work:expr $(=> $to:expr, $bytes:expr)?;)*) => {
        $crate::hooks::hooks! {$(
            $symbol = $name from $from, $flavour: ($($arg: $ty),*) |real| {
                // Not by `map`: the gate is entered from the wrapper's own frame.
                let _inside = match ::std::option::Option::from($work) {
                    Some(work) => Some($crate::gate::enter(work)),
                    None => None,
                };
                let _syncing = $crate::gate::thread::Syncing::begin();
                $crate::hooks::noting!(real($($arg),*) $(=> $to, $bytes)?)
            };
        )*}
    };
}

/// A call, and a note of what it writes as a whole: where, and how many bytes.
macro_rules! noting {
    ($call:expr) => {
        $call
    };
    ($call:expr => $to:expr, $bytes:expr) => {{
        let code = $call;
        $crate::memory::residency::note_write(code, $to, $bytes as u64);
        code
    }};
}

/// Lines for [`gated`] or [`blocking`] of which each stands for two functions: one for each default stream.
macro_rules! both {
    ($kind:ident;
     $($legacy:ident, $thread:ident = $name:literal from $from:literal, $later:literal:
       ($($arg:ident: $ty:ty),* $(,)?) |$flavour:pat_param| $work:expr $(=> $to:expr, $bytes:expr)?;)*) => {
        $kind! {$(
            $legacy = $name from $from, Legacy: ($($arg: $ty),*)
                { let $flavour = Flavour::Legacy; $work } $(=> $to, $bytes)?;
            $thread = $name from $later, PerThread: ($($arg: $ty),*)
                { let $flavour = Flavour::PerThread; $work } $(=> $to, $bytes)?;
        )*}
    };
}

pub(crate) use {blocking, both, gated, hooks, noting};

/// Runs an operation whose panic must not reach the program; a panic is a defect of ours, so the driver's own
/// function answers instead. A thread that is cancelled meanwhile ends after it: its unwinding cannot pass what catches
/// panics.
pub(crate) fn or_original<T>(operation: impl FnOnce() -> T, original: impl FnOnce() -> T) -> T {
    let _whole = Uncancelled::begin();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(operation)).unwrap_or_else(|_| {
        error!("internal error; this call goes to the driver unchanged. Please report it");
        original()
    })
}
