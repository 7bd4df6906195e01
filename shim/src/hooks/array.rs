//! Copies from and to arrays, and the mapping of sparse ones.

use std::ffi::c_uint;

use super::{blocking, both, gated};
use crate::{
    abi::{CUdeviceptr, Flavour, Ptr},
    gate::Work,
};

/// Rows of copies that block.
pub(crate) mod blocked {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    both! { blocking;
        cuMemcpyAtoA_v2, cuMemcpyAtoA_v2_ptds = c"cuMemcpyAtoA" from 3020, 7000: (to: Ptr, to_offset: usize, from: Ptr, from_offset: usize, size: usize) |_| Work::Plain;
        cuMemcpyAtoD_v2, cuMemcpyAtoD_v2_ptds = c"cuMemcpyAtoD" from 3020, 7000: (to: CUdeviceptr, from: Ptr, from_offset: usize, size: usize) |_| Work::Plain;
        cuMemcpyAtoH_v2, cuMemcpyAtoH_v2_ptds = c"cuMemcpyAtoH" from 3020, 7000: (to: Ptr, from: Ptr, from_offset: usize, size: usize) |_| Work::Plain;
        cuMemcpyDtoA_v2, cuMemcpyDtoA_v2_ptds = c"cuMemcpyDtoA" from 3020, 7000: (to: Ptr, to_offset: usize, from: CUdeviceptr, size: usize) |_| Work::Plain;
        cuMemcpyHtoA_v2, cuMemcpyHtoA_v2_ptds = c"cuMemcpyHtoA" from 3020, 7000: (to: Ptr, to_offset: usize, from: Ptr, size: usize) |_| Work::Plain;
    }
}

/// Rows of everything that returns before it is done.
pub(crate) mod queued {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    both! { gated;
        cuMemcpyAtoHAsync_v2, cuMemcpyAtoHAsync_v2_ptsz = c"cuMemcpyAtoHAsync" from 3020, 7000: (to: Ptr, from: Ptr, from_offset: usize, size: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemcpyHtoAAsync_v2, cuMemcpyHtoAAsync_v2_ptsz = c"cuMemcpyHtoAAsync" from 3020, 7000: (to: Ptr, to_offset: usize, from: Ptr, size: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemMapArrayAsync, cuMemMapArrayAsync_ptsz = c"cuMemMapArrayAsync" from 11010, 11010: (maps: Ptr, count: c_uint, stream: Ptr) |flavour| Work::Stream(stream, flavour);
    }
}
