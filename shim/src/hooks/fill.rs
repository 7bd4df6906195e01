//! Fills of device memory.

use std::ffi::{c_uchar, c_uint, c_ushort};

use super::gated;
use crate::{
    abi::{CUdeviceptr, Flavour, Ptr},
    gate::Work,
};

gated! {
    cuMemsetD8_v2 = c"cuMemsetD8" from 3020, Legacy: (to: CUdeviceptr, value: c_uchar, count: usize) Work::Plain;
    cuMemsetD8_v2_ptds = c"cuMemsetD8" from 7000, PerThread: (to: CUdeviceptr, value: c_uchar, count: usize) Work::Plain;
    cuMemsetD8Async = c"cuMemsetD8Async" from 3020, Legacy: (to: CUdeviceptr, value: c_uchar, count: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuMemsetD8Async_ptsz = c"cuMemsetD8Async" from 7000, PerThread: (to: CUdeviceptr, value: c_uchar, count: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuMemsetD2D8_v2 = c"cuMemsetD2D8" from 3020, Legacy: (to: CUdeviceptr, pitch: usize, value: c_uchar, width: usize, height: usize) Work::Plain;
    cuMemsetD2D8_v2_ptds = c"cuMemsetD2D8" from 7000, PerThread: (to: CUdeviceptr, pitch: usize, value: c_uchar, width: usize, height: usize) Work::Plain;
    cuMemsetD2D8Async = c"cuMemsetD2D8Async" from 3020, Legacy: (to: CUdeviceptr, pitch: usize, value: c_uchar, width: usize, height: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuMemsetD2D8Async_ptsz = c"cuMemsetD2D8Async" from 7000, PerThread: (to: CUdeviceptr, pitch: usize, value: c_uchar, width: usize, height: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuMemsetD16_v2 = c"cuMemsetD16" from 3020, Legacy: (to: CUdeviceptr, value: c_ushort, count: usize) Work::Plain;
    cuMemsetD16_v2_ptds = c"cuMemsetD16" from 7000, PerThread: (to: CUdeviceptr, value: c_ushort, count: usize) Work::Plain;
    cuMemsetD16Async = c"cuMemsetD16Async" from 3020, Legacy: (to: CUdeviceptr, value: c_ushort, count: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuMemsetD16Async_ptsz = c"cuMemsetD16Async" from 7000, PerThread: (to: CUdeviceptr, value: c_ushort, count: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuMemsetD2D16_v2 = c"cuMemsetD2D16" from 3020, Legacy: (to: CUdeviceptr, pitch: usize, value: c_ushort, width: usize, height: usize) Work::Plain;
    cuMemsetD2D16_v2_ptds = c"cuMemsetD2D16" from 7000, PerThread: (to: CUdeviceptr, pitch: usize, value: c_ushort, width: usize, height: usize) Work::Plain;
    cuMemsetD2D16Async = c"cuMemsetD2D16Async" from 3020, Legacy: (to: CUdeviceptr, pitch: usize, value: c_ushort, width: usize, height: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuMemsetD2D16Async_ptsz = c"cuMemsetD2D16Async" from 7000, PerThread: (to: CUdeviceptr, pitch: usize, value: c_ushort, width: usize, height: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuMemsetD32_v2 = c"cuMemsetD32" from 3020, Legacy: (to: CUdeviceptr, value: c_uint, count: usize) Work::Plain;
    cuMemsetD32_v2_ptds = c"cuMemsetD32" from 7000, PerThread: (to: CUdeviceptr, value: c_uint, count: usize) Work::Plain;
    cuMemsetD32Async = c"cuMemsetD32Async" from 3020, Legacy: (to: CUdeviceptr, value: c_uint, count: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuMemsetD32Async_ptsz = c"cuMemsetD32Async" from 7000, PerThread: (to: CUdeviceptr, value: c_uint, count: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuMemsetD2D32_v2 = c"cuMemsetD2D32" from 3020, Legacy: (to: CUdeviceptr, pitch: usize, value: c_uint, width: usize, height: usize) Work::Plain;
    cuMemsetD2D32_v2_ptds = c"cuMemsetD2D32" from 7000, PerThread: (to: CUdeviceptr, pitch: usize, value: c_uint, width: usize, height: usize) Work::Plain;
    cuMemsetD2D32Async = c"cuMemsetD2D32Async" from 3020, Legacy: (to: CUdeviceptr, pitch: usize, value: c_uint, width: usize, height: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuMemsetD2D32Async_ptsz = c"cuMemsetD2D32Async" from 7000, PerThread: (to: CUdeviceptr, pitch: usize, value: c_uint, width: usize, height: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
}
