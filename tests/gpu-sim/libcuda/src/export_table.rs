//! `cuGetExportTable`: the private tables that CUDA runtimes ask for.

use std::ffi::c_void;

use crate::{
    abi::{In, NOT_FOUND, Out, Uuid},
    entry::driver_api,
    process,
};

driver_api! {
    fn cuGetExportTable(table: Out<*const c_void>, id: In<Uuid>) {
        let id = id.get()?;
        if process::logging() {
            process::log(&format!("cuGetExportTable {:02x?}", id.0));
        }
        table.set(std::ptr::null())?;
        Err(NOT_FOUND)
    }
}
