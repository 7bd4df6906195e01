//! `cuGetProcAddress`, through which CUDA runtimes find nearly every driver function.
//!
//! The driver answers first; its code, its status and its nulls reach the program as they are.

use std::ffi::{CStr, c_char, c_int, c_ulonglong};

use super::{hooks, or_original};
use crate::{
    abi::{CUresult, Ptr, SUCCESS},
    config, table,
};

/// Puts our wrapper where the driver stored its function, if it is one that we know.
fn replace(
    code: CUresult,
    name: *const c_char,
    place: *mut Ptr,
    flags: c_ulonglong,
    ask: impl Fn(&CStr, c_int, c_ulonglong) -> Ptr,
) -> CUresult {
    if code != SUCCESS || name.is_null() || place.is_null() || config::get().disabled {
        return code;
    }
    or_original(
        || {
            // SAFETY: the driver has read the name and stored an answer.
            let (name, answer) = unsafe { (CStr::from_ptr(name), *place) };
            if answer.is_null() {
                return;
            }
            if let Some(row) = table::by_answer(name, flags, answer, ask) {
                // SAFETY: as above.
                unsafe { *place = row.wrapper() };
            }
        },
        || (),
    );
    code
}

hooks! {
    cuGetProcAddress = c"cuGetProcAddress" from 11030, Legacy:
        (name: *const c_char, place: *mut Ptr, version: c_int, flags: c_ulonglong) |real| {
        replace(real(name, place, version, flags), name, place, flags, |name, version, flags| {
            let mut found: Ptr = std::ptr::null_mut();
            let code = real(name.as_ptr(), &raw mut found, version, flags);
            if code == SUCCESS { found } else { std::ptr::null_mut() }
        })
    };
    cuGetProcAddress_v2 = c"cuGetProcAddress" from 12000, Legacy:
        (name: *const c_char, place: *mut Ptr, version: c_int, flags: c_ulonglong, status: *mut c_int) |real| {
        replace(real(name, place, version, flags, status), name, place, flags, |name, version, flags| {
            let mut found: Ptr = std::ptr::null_mut();
            let mut unseen: c_int = 0;
            let code = real(name.as_ptr(), &raw mut found, version, flags, &raw mut unseen);
            if code == SUCCESS { found } else { std::ptr::null_mut() }
        })
    };
}
