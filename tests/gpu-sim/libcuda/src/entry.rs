//! How driver functions are written: typed arguments, a body that ends with an [`Outcome`](crate::abi::Outcome), and
//! one wrapper around every body (fork check, call log).
//!
//! `build.rs` finds the implemented functions by the text `fn cuName(` and `fn cuName | cuName_ptsz(` at the start of a
//! line inside these macros.

/// Defines exported driver functions.
macro_rules! driver_api {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $name($($arg: $type),*) -> $crate::abi::CUresult {
            $crate::process::enter(stringify!($name), move || -> $crate::abi::Outcome { $body })
        }
    )*};
}

/// Defines driver functions that exist for both default streams; the body sees which one was called as `$flavour`.
macro_rules! stream_api {
    ($($(#[$meta:meta])* fn $name:ident | $thread:ident($flavour:ident; $($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $name($($arg: $type),*) -> $crate::abi::CUresult {
            let $flavour = $crate::stream::Flavour::Legacy;
            $crate::process::enter(stringify!($name), move || -> $crate::abi::Outcome { $body })
        }
        $(#[$meta])*
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $thread($($arg: $type),*) -> $crate::abi::CUresult {
            let $flavour = $crate::stream::Flavour::Thread;
            $crate::process::enter(stringify!($thread), move || -> $crate::abi::Outcome { $body })
        }
    )*};
}

pub(crate) use {driver_api, stream_api};
