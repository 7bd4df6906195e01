//! Calls that wait for the GPU. They pass no gate: work that was let in must be able to finish. That somebody
//! waits is demand, and the agent is told.

use super::hooks;
use crate::{abi::Ptr, gate::thread::Syncing};

/// Lines whose call waits for the GPU.
macro_rules! waiting {
    ($($symbol:ident = $name:literal from $from:literal, $flavour:ident: ($($arg:ident: $ty:ty),*);)*) => {
        hooks! {$(
            $symbol = $name from $from, $flavour: ($($arg: $ty),*) |real| {
                let _syncing = Syncing::begin();
                real($($arg),*)
            };
        )*}
    };
}

waiting! {
    cuStreamSynchronize = c"cuStreamSynchronize" from 2000, Legacy: (stream: Ptr);
    cuStreamSynchronize_ptsz = c"cuStreamSynchronize" from 7000, PerThread: (stream: Ptr);
    cuEventSynchronize = c"cuEventSynchronize" from 2000, Legacy: (event: Ptr);
    cuCtxSynchronize = c"cuCtxSynchronize" from 2000, Legacy: ();
    cuCtxSynchronize_v2 = c"cuCtxSynchronize" from 13000, Legacy: (context: Ptr);
}
