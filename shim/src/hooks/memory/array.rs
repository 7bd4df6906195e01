//! Arrays (textures). Counted; the driver has no managed ones.

use std::ffi::c_uint;

use super::{and_read, counted, held};
use crate::{
    abi::{CUarray3DDescriptor, CUarrayDescriptor, CUresult, Ptr},
    hooks::{hooks, or_original},
    memory::{Kind, bytes_of_array, bytes_of_mipmaps},
};

/// `CUDA_ARRAY3D_SPARSE` and `CUDA_ARRAY3D_DEFERRED_MAPPING`: the program brings the memory itself.
const WITHOUT_MEMORY: u32 = 0x40 | 0x80;

fn make(
    place: *const Ptr,
    array: Option<CUarray3DDescriptor>,
    bytes_of: impl FnOnce(&CUarray3DDescriptor) -> u64,
    real: impl Fn() -> CUresult,
) -> CUresult {
    or_original(
        || {
            let Some(array) = array.filter(|array| array.flags & WITHOUT_MEMORY == 0) else { return real() };
            counted(
                held().plan_original(bytes_of(&array)),
                || and_read(real(), place),
                |reserved, handle| reserved.keep(&held().arrays, handle as u64, Kind::Device),
            )
        },
        &real,
    )
}

hooks! {
    cuArrayCreate_v2 = c"cuArrayCreate" from 3020, Legacy:
        (place: *mut Ptr, descriptor: *const CUarrayDescriptor) |real| {
        // SAFETY: null or the caller's descriptor.
        let array = unsafe { descriptor.as_ref() }.map(|flat| CUarray3DDescriptor {
            width: flat.width,
            height: flat.height,
            depth: 0,
            format: flat.format,
            channels: flat.channels,
            flags: 0,
        });
        make(place, array, bytes_of_array, || real(place, descriptor))
    };
    cuArray3DCreate_v2 = c"cuArray3DCreate" from 3020, Legacy:
        (place: *mut Ptr, descriptor: *const CUarray3DDescriptor) |real| {
        // SAFETY: null or the caller's descriptor.
        let array = unsafe { descriptor.as_ref() }.copied();
        make(place, array, bytes_of_array, || real(place, descriptor))
    };
    cuArrayDestroy = c"cuArrayDestroy" from 2000, Legacy: (array: Ptr) |real| {
        held().free(&held().arrays, array as u64, || real(array))
    };
    cuMipmappedArrayCreate = c"cuMipmappedArrayCreate" from 5000, Legacy:
        (place: *mut Ptr, descriptor: *const CUarray3DDescriptor, levels: c_uint) |real| {
        // SAFETY: null or the caller's descriptor.
        let array = unsafe { descriptor.as_ref() }.copied();
        make(place, array, |array| bytes_of_mipmaps(array, levels), || real(place, descriptor, levels))
    };
    cuMipmappedArrayDestroy = c"cuMipmappedArrayDestroy" from 5000, Legacy: (array: Ptr) |real| {
        held().free(&held().arrays, array as u64, || real(array))
    };
}
