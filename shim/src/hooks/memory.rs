//! Allocations, frees, and what a program is told about memory.

pub(crate) mod allocation;
pub(crate) mod array;
pub(crate) mod graph;
pub(crate) mod information;
pub(crate) mod ipc;
pub(crate) mod physical;
pub(crate) mod pinned;
pub(crate) mod pool;

use crate::{
    abi::{CUresult, OUT_OF_MEMORY, SUCCESS},
    log::debug,
    memory::{Memory, Plan, Reserved},
    state,
    table::Row,
};

/// The rows of every file here.
pub(crate) static ROWS: [&[Row]; 8] = [
    allocation::ROWS,
    array::ROWS,
    graph::ROWS,
    information::ROWS,
    ipc::ROWS,
    physical::ROWS,
    pinned::ROWS,
    pool::ROWS,
];

fn held() -> &'static Memory {
    &state::get().memory
}

/// Carries out the plan for memory that keeps its kind: `original` makes the call that the program asked for and
/// returns what `keep` remembers.
fn counted<T>(
    plan: Plan,
    original: impl FnOnce() -> Result<T, CUresult>,
    keep: impl FnOnce(Reserved, T),
) -> CUresult {
    let reserved = match plan {
        Plan::Refuse => return OUT_OF_MEMORY,
        Plan::Unknown(reason) => {
            debug!("memory goes uncounted: {reason:?}");
            return original().err().unwrap_or(SUCCESS);
        }
        Plan::Original(reserved, _) | Plan::Managed(reserved) => reserved,
    };
    match original() {
        Ok(made) => {
            keep(reserved, made);
            SUCCESS
        }
        Err(code) => code,
    }
}

/// Runs a call that stores something at `place`, and reads it back.
fn and_read<T: Copy>(code: CUresult, place: *const T) -> Result<T, CUresult> {
    if code != SUCCESS {
        return Err(code);
    }
    // SAFETY: the driver succeeded, so it has stored a value there.
    Ok(unsafe { *place })
}
