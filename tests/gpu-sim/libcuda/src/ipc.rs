//! Handles by which processes share memory. As with the driver, only plain device memory of `cuMemAlloc` has them. Opening
//! one in another process is not simulated.

use crate::{
    abi::{DevicePtr, INVALID_VALUE, Out},
    entry::driver_api,
    memory::{self, Kind},
    process::driver,
};

driver_api! {
    fn cuIpcGetMemHandle(out: Out<[u64; 8]>, address: DevicePtr) {
        driver()?;
        let allocation = memory::find(address).ok_or(INVALID_VALUE)?;
        if !matches!(allocation.kind, Kind::Device(_)) || allocation.pool != 0 {
            return Err(INVALID_VALUE);
        }
        out.set([u64::from(std::process::id()), allocation.base, allocation.id, 0, 0, 0, 0, 0])
    }
}
