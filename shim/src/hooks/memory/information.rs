//! What a program is told about memory.

use crate::{
    abi::{CUdevice, SUCCESS},
    config,
    hooks::{hooks, or_original},
    memory,
};

hooks! {
    cuMemGetInfo_v2 = c"cuMemGetInfo" from 3020, Legacy: (free: *mut usize, total: *mut usize) |real| {
        let code = real(free, total);
        if code != SUCCESS || free.is_null() || total.is_null() || config::get().disabled {
            return code;
        }
        // SAFETY: the driver succeeded, so it has stored both.
        let real_total = unsafe { *total };
        if let Some((told_free, told_total)) = or_original(|| memory::information(real_total as u64), || None) {
            // SAFETY: as above.
            unsafe {
                *free = told_free as usize;
                *total = told_total as usize;
            }
        }
        code
    };
    cuDeviceTotalMem_v2 = c"cuDeviceTotalMem" from 3020, Legacy: (bytes: *mut usize, device: CUdevice) |real| {
        let code = real(bytes, device);
        if code == SUCCESS && !bytes.is_null() && !config::get().disabled {
            // SAFETY: the driver succeeded, so it has stored the size.
            unsafe { *bytes = memory::told_total(*bytes as u64) as usize };
        }
        code
    };
}
