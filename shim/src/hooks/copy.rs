//! Copies and prefetches. A blocking copy waits for the GPU, so it counts as waiting too.

use std::ffi::{c_uint, c_ulonglong};

use super::{gated, hooks};
use crate::{
    abi::{CUdevice, CUdeviceptr, CUmemLocation, Flavour, Ptr},
    gate::{self, Work, thread::Syncing},
};

/// Lines whose call submits work and waits for it.
macro_rules! blocking {
    ($($symbol:ident = $name:literal from $from:literal, $flavour:ident:
       ($($arg:ident: $ty:ty),* $(,)?) $work:expr;)*) => {
        hooks! {$(
            $symbol = $name from $from, $flavour: ($($arg: $ty),*) |real| {
                let _inside = gate::enter($work);
                let _syncing = Syncing::begin();
                real($($arg),*)
            };
        )*}
    };
}

/// Rows of copies that block.
pub(crate) mod blocking {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    blocking! {
        cuMemcpy = c"cuMemcpy" from 4000, Legacy: (to: CUdeviceptr, from: CUdeviceptr, size: usize) Work::Copy(to, from);
        cuMemcpy_ptds = c"cuMemcpy" from 7000, PerThread: (to: CUdeviceptr, from: CUdeviceptr, size: usize) Work::Copy(to, from);
        cuMemcpyPeer = c"cuMemcpyPeer" from 4000, Legacy: (to: CUdeviceptr, to_context: Ptr, from: CUdeviceptr, from_context: Ptr, size: usize) Work::Plain;
        cuMemcpyPeer_ptds = c"cuMemcpyPeer" from 7000, PerThread: (to: CUdeviceptr, to_context: Ptr, from: CUdeviceptr, from_context: Ptr, size: usize) Work::Plain;
        cuMemcpyHtoD_v2 = c"cuMemcpyHtoD" from 3020, Legacy: (to: CUdeviceptr, from: Ptr, size: usize) Work::Plain;
        cuMemcpyHtoD_v2_ptds = c"cuMemcpyHtoD" from 7000, PerThread: (to: CUdeviceptr, from: Ptr, size: usize) Work::Plain;
        cuMemcpyDtoH_v2 = c"cuMemcpyDtoH" from 3020, Legacy: (to: Ptr, from: CUdeviceptr, size: usize) Work::Plain;
        cuMemcpyDtoH_v2_ptds = c"cuMemcpyDtoH" from 7000, PerThread: (to: Ptr, from: CUdeviceptr, size: usize) Work::Plain;
        cuMemcpyDtoD_v2 = c"cuMemcpyDtoD" from 3020, Legacy: (to: CUdeviceptr, from: CUdeviceptr, size: usize) Work::Plain;
        cuMemcpyDtoD_v2_ptds = c"cuMemcpyDtoD" from 7000, PerThread: (to: CUdeviceptr, from: CUdeviceptr, size: usize) Work::Plain;
        cuMemcpy2D_v2 = c"cuMemcpy2D" from 3020, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpy2D_v2_ptds = c"cuMemcpy2D" from 7000, PerThread: (copy: Ptr) Work::Plain;
        cuMemcpy2DUnaligned_v2 = c"cuMemcpy2DUnaligned" from 3020, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpy2DUnaligned_v2_ptds = c"cuMemcpy2DUnaligned" from 7000, PerThread: (copy: Ptr) Work::Plain;
        cuMemcpy3D_v2 = c"cuMemcpy3D" from 3020, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpy3D_v2_ptds = c"cuMemcpy3D" from 7000, PerThread: (copy: Ptr) Work::Plain;
        cuMemcpy3DPeer = c"cuMemcpy3DPeer" from 4000, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpy3DPeer_ptds = c"cuMemcpy3DPeer" from 7000, PerThread: (copy: Ptr) Work::Plain;
    }
}

/// Rows of everything that returns before the work is done.
pub(crate) mod queued {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    gated! {
        cuMemcpyAsync = c"cuMemcpyAsync" from 4000, Legacy: (to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: Ptr) Work::CopyIn(to, from, stream, Flavour::Legacy);
        cuMemcpyAsync_ptsz = c"cuMemcpyAsync" from 7000, PerThread: (to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: Ptr) Work::CopyIn(to, from, stream, Flavour::PerThread);
        cuMemcpyPeerAsync = c"cuMemcpyPeerAsync" from 4000, Legacy: (to: CUdeviceptr, to_context: Ptr, from: CUdeviceptr, from_context: Ptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyPeerAsync_ptsz = c"cuMemcpyPeerAsync" from 7000, PerThread: (to: CUdeviceptr, to_context: Ptr, from: CUdeviceptr, from_context: Ptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpyHtoDAsync_v2 = c"cuMemcpyHtoDAsync" from 3020, Legacy: (to: CUdeviceptr, from: Ptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyHtoDAsync_v2_ptsz = c"cuMemcpyHtoDAsync" from 7000, PerThread: (to: CUdeviceptr, from: Ptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpyDtoHAsync_v2 = c"cuMemcpyDtoHAsync" from 3020, Legacy: (to: Ptr, from: CUdeviceptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyDtoHAsync_v2_ptsz = c"cuMemcpyDtoHAsync" from 7000, PerThread: (to: Ptr, from: CUdeviceptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpyDtoDAsync_v2 = c"cuMemcpyDtoDAsync" from 3020, Legacy: (to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyDtoDAsync_v2_ptsz = c"cuMemcpyDtoDAsync" from 7000, PerThread: (to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpy2DAsync_v2 = c"cuMemcpy2DAsync" from 3020, Legacy: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy2DAsync_v2_ptsz = c"cuMemcpy2DAsync" from 7000, PerThread: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpy3DAsync_v2 = c"cuMemcpy3DAsync" from 3020, Legacy: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy3DAsync_v2_ptsz = c"cuMemcpy3DAsync" from 7000, PerThread: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpy3DPeerAsync = c"cuMemcpy3DPeerAsync" from 4000, Legacy: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy3DPeerAsync_ptsz = c"cuMemcpy3DPeerAsync" from 7000, PerThread: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpyBatchAsync = c"cuMemcpyBatchAsync" from 12080, Legacy: (to: Ptr, from: Ptr, sizes: Ptr, count: usize, attributes: Ptr, indices: Ptr, attribute_count: usize, failed: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyBatchAsync_ptsz = c"cuMemcpyBatchAsync" from 12080, PerThread: (to: Ptr, from: Ptr, sizes: Ptr, count: usize, attributes: Ptr, indices: Ptr, attribute_count: usize, failed: Ptr, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpyBatchAsync_v2 = c"cuMemcpyBatchAsync" from 13000, Legacy: (to: Ptr, from: Ptr, sizes: Ptr, count: usize, attributes: Ptr, indices: Ptr, attribute_count: usize, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyBatchAsync_v2_ptsz = c"cuMemcpyBatchAsync" from 13000, PerThread: (to: Ptr, from: Ptr, sizes: Ptr, count: usize, attributes: Ptr, indices: Ptr, attribute_count: usize, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpy3DBatchAsync = c"cuMemcpy3DBatchAsync" from 12080, Legacy: (count: usize, list: Ptr, failed: Ptr, flags: c_ulonglong, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy3DBatchAsync_ptsz = c"cuMemcpy3DBatchAsync" from 12080, PerThread: (count: usize, list: Ptr, failed: Ptr, flags: c_ulonglong, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemcpy3DBatchAsync_v2 = c"cuMemcpy3DBatchAsync" from 13000, Legacy: (count: usize, list: Ptr, flags: c_ulonglong, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy3DBatchAsync_v2_ptsz = c"cuMemcpy3DBatchAsync" from 13000, PerThread: (count: usize, list: Ptr, flags: c_ulonglong, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemPrefetchAsync = c"cuMemPrefetchAsync" from 8000, Legacy: (address: CUdeviceptr, size: usize, device: CUdevice, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemPrefetchAsync_ptsz = c"cuMemPrefetchAsync" from 8000, PerThread: (address: CUdeviceptr, size: usize, device: CUdevice, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
        cuMemPrefetchAsync_v2 = c"cuMemPrefetchAsync" from 12020, Legacy: (address: CUdeviceptr, size: usize, location: CUmemLocation, flags: c_uint, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemPrefetchAsync_v2_ptsz = c"cuMemPrefetchAsync" from 12020, PerThread: (address: CUdeviceptr, size: usize, location: CUmemLocation, flags: c_uint, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    }
}
