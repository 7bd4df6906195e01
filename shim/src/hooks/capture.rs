//! Stream captures: the shim has to know when one is open, and must not let one open during a drain.

use std::ffi::c_int;

use super::hooks;
use crate::{
    abi::{CUresult, Flavour, Ptr, SUCCESS},
    driver, gate, state,
};

/// Lines whose call begins a capture.
macro_rules! beginning {
    ($($symbol:ident = $name:literal from $from:literal, $flavour:ident:
       ($stream:ident: Ptr $(, $arg:ident: $ty:ty)*);)*) => {
        hooks! {$(
            $symbol = $name from $from, $flavour: ($stream: Ptr $(, $arg: $ty)*) |real| {
                let _inside = gate::enter_all();
                let code = real($stream $(, $arg)*);
                if code == SUCCESS {
                    let context = driver::context_of($stream, Flavour::$flavour).ok();
                    state::get().captures.began($stream, Flavour::$flavour, context);
                }
                code
            };
        )*}
    };
}

/// Rows of calls that begin a capture.
pub(crate) mod beginning {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    beginning! {
        cuStreamBeginCapture = c"cuStreamBeginCapture" from 10000, Legacy: (stream: Ptr);
        cuStreamBeginCapture_ptsz = c"cuStreamBeginCapture" from 10000, PerThread: (stream: Ptr);
        cuStreamBeginCapture_v2 = c"cuStreamBeginCapture" from 10010, Legacy: (stream: Ptr, mode: c_int);
        cuStreamBeginCapture_v2_ptsz = c"cuStreamBeginCapture" from 10010, PerThread: (stream: Ptr, mode: c_int);
        cuStreamBeginCaptureToGraph = c"cuStreamBeginCaptureToGraph" from 12030, Legacy:
            (stream: Ptr, graph: Ptr, dependencies: Ptr, edges: Ptr, count: usize, mode: c_int);
        cuStreamBeginCaptureToGraph_ptsz = c"cuStreamBeginCaptureToGraph" from 12030, PerThread:
            (stream: Ptr, graph: Ptr, dependencies: Ptr, edges: Ptr, count: usize, mode: c_int);
        cuStreamBeginRecaptureToGraph = c"cuStreamBeginRecaptureToGraph" from 13030, Legacy:
            (stream: Ptr, mode: c_int, graph: Ptr, changed: Ptr, data: Ptr);
        cuStreamBeginRecaptureToGraph_ptsz = c"cuStreamBeginRecaptureToGraph" from 13030, PerThread:
            (stream: Ptr, mode: c_int, graph: Ptr, changed: Ptr, data: Ptr);
        cuStreamBeginCaptureToCig = c"cuStreamBeginCaptureToCig" from 13010, Legacy: (stream: Ptr, parameters: Ptr);
        cuStreamBeginCaptureToCig_ptsz = c"cuStreamBeginCaptureToCig" from 13010, PerThread: (stream: Ptr, parameters: Ptr);
    }
}

/// Ends a capture. A stream that still captures afterwards was refused, so its capture stays open.
fn ended(stream: Ptr, flavour: Flavour, code: CUresult) -> CUresult {
    if code == SUCCESS || !driver::is_capturing(stream, flavour) {
        state::get().captures.ended(stream, flavour);
    }
    code
}

fn destroyed(stream: Ptr, code: CUresult) -> CUresult {
    if code == SUCCESS {
        state::get().captures.ended(stream, Flavour::Legacy);
    }
    code
}

/// Rows of calls that end one.
pub(crate) mod ending {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    hooks! {
        cuStreamEndCapture = c"cuStreamEndCapture" from 10000, Legacy: (stream: Ptr, graph: *mut Ptr) |real| {
            ended(stream, Flavour::Legacy, real(stream, graph))
        };
        cuStreamEndCapture_ptsz = c"cuStreamEndCapture" from 10000, PerThread: (stream: Ptr, graph: *mut Ptr) |real| {
            ended(stream, Flavour::PerThread, real(stream, graph))
        };
        cuStreamEndCaptureToCig = c"cuStreamEndCaptureToCig" from 13010, Legacy: (stream: Ptr) |real| {
            ended(stream, Flavour::Legacy, real(stream))
        };
        cuStreamEndCaptureToCig_ptsz = c"cuStreamEndCaptureToCig" from 13010, PerThread: (stream: Ptr) |real| {
            ended(stream, Flavour::PerThread, real(stream))
        };
        cuStreamDestroy = c"cuStreamDestroy" from 2000, Legacy: (stream: Ptr) |real| {
            destroyed(stream, real(stream))
        };
        cuStreamDestroy_v2 = c"cuStreamDestroy" from 4000, Legacy: (stream: Ptr) |real| {
            destroyed(stream, real(stream))
        };
    }
}
