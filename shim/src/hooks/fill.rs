//! Fills of device memory.

use std::ffi::{c_uchar, c_uint, c_ushort};

use super::{both, gated};
use crate::{
    abi::{CUdeviceptr, Flavour, Ptr},
    gate::Work,
};

both! { gated;
    cuMemsetD8_v2, cuMemsetD8_v2_ptds = c"cuMemsetD8" from 3020, 7000: (to: CUdeviceptr, value: c_uchar, count: usize) |_| Work::Plain => to, count;
    cuMemsetD8Async, cuMemsetD8Async_ptsz = c"cuMemsetD8Async" from 3020, 7000: (to: CUdeviceptr, value: c_uchar, count: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour) => to, count;
    cuMemsetD2D8_v2, cuMemsetD2D8_v2_ptds = c"cuMemsetD2D8" from 3020, 7000: (to: CUdeviceptr, pitch: usize, value: c_uchar, width: usize, height: usize) |_| Work::Plain;
    cuMemsetD2D8Async, cuMemsetD2D8Async_ptsz = c"cuMemsetD2D8Async" from 3020, 7000: (to: CUdeviceptr, pitch: usize, value: c_uchar, width: usize, height: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
    cuMemsetD16_v2, cuMemsetD16_v2_ptds = c"cuMemsetD16" from 3020, 7000: (to: CUdeviceptr, value: c_ushort, count: usize) |_| Work::Plain => to, count.saturating_mul(2);
    cuMemsetD16Async, cuMemsetD16Async_ptsz = c"cuMemsetD16Async" from 3020, 7000: (to: CUdeviceptr, value: c_ushort, count: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour) => to, count.saturating_mul(2);
    cuMemsetD2D16_v2, cuMemsetD2D16_v2_ptds = c"cuMemsetD2D16" from 3020, 7000: (to: CUdeviceptr, pitch: usize, value: c_ushort, width: usize, height: usize) |_| Work::Plain;
    cuMemsetD2D16Async, cuMemsetD2D16Async_ptsz = c"cuMemsetD2D16Async" from 3020, 7000: (to: CUdeviceptr, pitch: usize, value: c_ushort, width: usize, height: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
    cuMemsetD32_v2, cuMemsetD32_v2_ptds = c"cuMemsetD32" from 3020, 7000: (to: CUdeviceptr, value: c_uint, count: usize) |_| Work::Plain => to, count.saturating_mul(4);
    cuMemsetD32Async, cuMemsetD32Async_ptsz = c"cuMemsetD32Async" from 3020, 7000: (to: CUdeviceptr, value: c_uint, count: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour) => to, count.saturating_mul(4);
    cuMemsetD2D32_v2, cuMemsetD2D32_v2_ptds = c"cuMemsetD2D32" from 3020, 7000: (to: CUdeviceptr, pitch: usize, value: c_uint, width: usize, height: usize) |_| Work::Plain;
    cuMemsetD2D32Async, cuMemsetD2D32Async_ptsz = c"cuMemsetD2D32Async" from 3020, 7000: (to: CUdeviceptr, pitch: usize, value: c_uint, width: usize, height: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
}
