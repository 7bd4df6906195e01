//! Names and descriptions of result codes.

use std::ffi::c_char;

use crate::{
    abi::{INVALID_VALUE, Out, Outcome, RESULTS},
    entry::driver_api,
};

fn entry(
    code: u32,
    text: Out<*const c_char>,
    pick: fn(&(u32, &'static str, &'static str)) -> &'static str,
) -> Outcome {
    let Some(found) = RESULTS.iter().find(|result| result.0 == code) else {
        text.set_optional(std::ptr::null());
        return Err(INVALID_VALUE);
    };
    text.set(pick(found).as_ptr().cast())
}

driver_api! {
    fn cuGetErrorName(code: u32, text: Out<*const c_char>) {
        entry(code, text, |result| result.1)
    }

    fn cuGetErrorString(code: u32, text: Out<*const c_char>) {
        entry(code, text, |result| result.2)
    }
}
