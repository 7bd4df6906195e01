//! Calls that say where managed memory lies: the driver moves pages, or changes their mappings.

use std::ffi::{c_int, c_uint, c_ulonglong};

use super::{both, gated};
use crate::{
    abi::{CUdevice, CUdeviceptr, CUmemLocation, Flavour, Ptr},
    gate::Work,
};

/// Rows of calls in a stream.
pub(crate) mod queued {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    both! { gated;
        cuMemPrefetchAsync, cuMemPrefetchAsync_ptsz = c"cuMemPrefetchAsync" from 8000, 8000: (address: CUdeviceptr, size: usize, device: CUdevice, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemPrefetchAsync_v2, cuMemPrefetchAsync_v2_ptsz = c"cuMemPrefetchAsync" from 12020, 12020: (address: CUdeviceptr, size: usize, location: CUmemLocation, flags: c_uint, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemPrefetchBatchAsync, cuMemPrefetchBatchAsync_ptsz = c"cuMemPrefetchBatchAsync" from 13000, 13000: (addresses: Ptr, sizes: Ptr, count: usize, locations: Ptr, indices: Ptr, location_count: usize, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemDiscardBatchAsync, cuMemDiscardBatchAsync_ptsz = c"cuMemDiscardBatchAsync" from 13000, 13000: (addresses: Ptr, sizes: Ptr, count: usize, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemDiscardAndPrefetchBatchAsync, cuMemDiscardAndPrefetchBatchAsync_ptsz = c"cuMemDiscardAndPrefetchBatchAsync" from 13000, 13000: (addresses: Ptr, sizes: Ptr, count: usize, locations: Ptr, indices: Ptr, location_count: usize, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuStreamAttachMemAsync, cuStreamAttachMemAsync_ptsz = c"cuStreamAttachMemAsync" from 6000, 7000: (stream: Ptr, address: CUdeviceptr, length: usize, flags: c_uint) |flavour| Work::Stream(stream, flavour);
    }
}

/// Rows of advice, which takes effect at once.
pub(crate) mod advice {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    gated! {
        cuMemAdvise = c"cuMemAdvise" from 8000, Legacy: (address: CUdeviceptr, count: usize, advice: c_int, device: CUdevice) Work::Plain;
        cuMemAdvise_v2 = c"cuMemAdvise" from 12020, Legacy: (address: CUdeviceptr, count: usize, advice: c_int, location: CUmemLocation) Work::Plain;
    }
}
