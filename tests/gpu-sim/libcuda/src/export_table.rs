//! `cuGetExportTable`: the private tables that NVIDIA's own libraries ask for.
//!
//! The simulated driver has none. NVIDIA's CUDA runtime (11.2 and later) looks up every symbol and calls `cuInit`, but then
//! insists on a table through which it tests whether the driver is NVIDIA's, and gives up without a right answer
//! (`cudaErrorSoftwareValidityNotEstablished`). Passing that test would mean forging the vendor's integrity check, which
//! this simulator does not do. Programs of the driver's interface run; those of the runtime's interface need real hardware.

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
            process::log(&format!(
                "cuGetExportTable {:032x}: not found. The CUDA runtime cannot run on the simulated driver; use the driver's interface.",
                u128::from_be_bytes(id.0)
            ));
        }
        table.set(std::ptr::null())?;
        Err(NOT_FOUND)
    }
}
