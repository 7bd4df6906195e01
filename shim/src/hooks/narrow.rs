//! The first ABI of copies and fills, from when device addresses and sizes had 32 bits. Drivers still export it.

use std::ffi::{c_uchar, c_uint, c_ushort};

use super::{blocking, gated};
use crate::{
    abi::{Flavour, Ptr},
    gate::Work,
};

/// Rows of copies that block.
pub(crate) mod blocked {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    blocking! {
        cuMemcpyHtoD = c"cuMemcpyHtoD" from 2000, Legacy: (to: c_uint, from: Ptr, size: c_uint) Work::Plain;
        cuMemcpyDtoH = c"cuMemcpyDtoH" from 2000, Legacy: (to: Ptr, from: c_uint, size: c_uint) Work::Plain;
        cuMemcpyDtoD = c"cuMemcpyDtoD" from 2000, Legacy: (to: c_uint, from: c_uint, size: c_uint) Work::Plain;
        cuMemcpy2D = c"cuMemcpy2D" from 2000, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpy2DUnaligned = c"cuMemcpy2DUnaligned" from 2000, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpy3D = c"cuMemcpy3D" from 2000, Legacy: (copy: Ptr) Work::Plain;
        cuMemcpyAtoA = c"cuMemcpyAtoA" from 2000, Legacy: (to: Ptr, to_offset: c_uint, from: Ptr, from_offset: c_uint, size: c_uint) Work::Plain;
        cuMemcpyAtoD = c"cuMemcpyAtoD" from 2000, Legacy: (to: c_uint, from: Ptr, from_offset: c_uint, size: c_uint) Work::Plain;
        cuMemcpyAtoH = c"cuMemcpyAtoH" from 2000, Legacy: (to: Ptr, from: Ptr, from_offset: c_uint, size: c_uint) Work::Plain;
        cuMemcpyDtoA = c"cuMemcpyDtoA" from 2000, Legacy: (to: Ptr, to_offset: c_uint, from: c_uint, size: c_uint) Work::Plain;
        cuMemcpyHtoA = c"cuMemcpyHtoA" from 2000, Legacy: (to: Ptr, to_offset: c_uint, from: Ptr, size: c_uint) Work::Plain;
    }
}

/// Rows of everything else.
pub(crate) mod queued {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    gated! {
        cuMemcpyHtoDAsync = c"cuMemcpyHtoDAsync" from 2000, Legacy: (to: c_uint, from: Ptr, size: c_uint, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyDtoHAsync = c"cuMemcpyDtoHAsync" from 2000, Legacy: (to: Ptr, from: c_uint, size: c_uint, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyDtoDAsync = c"cuMemcpyDtoDAsync" from 3000, Legacy: (to: c_uint, from: c_uint, size: c_uint, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy2DAsync = c"cuMemcpy2DAsync" from 2000, Legacy: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpy3DAsync = c"cuMemcpy3DAsync" from 2000, Legacy: (copy: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyHtoAAsync = c"cuMemcpyHtoAAsync" from 2000, Legacy: (to: Ptr, to_offset: c_uint, from: Ptr, size: c_uint, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemcpyAtoHAsync = c"cuMemcpyAtoHAsync" from 2000, Legacy: (to: Ptr, from: Ptr, from_offset: c_uint, size: c_uint, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
        cuMemsetD8 = c"cuMemsetD8" from 2000, Legacy: (to: c_uint, value: c_uchar, count: c_uint) Work::Plain;
        cuMemsetD16 = c"cuMemsetD16" from 2000, Legacy: (to: c_uint, value: c_ushort, count: c_uint) Work::Plain;
        cuMemsetD32 = c"cuMemsetD32" from 2000, Legacy: (to: c_uint, value: c_uint, count: c_uint) Work::Plain;
        cuMemsetD2D8 = c"cuMemsetD2D8" from 2000, Legacy: (to: c_uint, pitch: c_uint, value: c_uchar, width: c_uint, height: c_uint) Work::Plain;
        cuMemsetD2D16 = c"cuMemsetD2D16" from 2000, Legacy: (to: c_uint, pitch: c_uint, value: c_ushort, width: c_uint, height: c_uint) Work::Plain;
        cuMemsetD2D32 = c"cuMemsetD2D32" from 2000, Legacy: (to: c_uint, pitch: c_uint, value: c_uint, width: c_uint, height: c_uint) Work::Plain;
    }
}
