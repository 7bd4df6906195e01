//! Kernels and graphs.

use std::ffi::{c_int, c_uint};

use super::{both, gated};
use crate::{
    abi::{CUlaunchConfig, Flavour, Ptr},
    gate::Work,
};

/// Rows of launches that exist for both default streams.
pub(crate) mod flavoured {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    both! { gated;
        cuLaunchKernel, cuLaunchKernel_ptsz = c"cuLaunchKernel" from 4000, 7000: (function: Ptr, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Ptr, params: Ptr, extra: Ptr) |flavour| Work::Stream(stream, flavour);
        cuLaunchKernelEx, cuLaunchKernelEx_ptsz = c"cuLaunchKernelEx" from 11060, 11060: (config: *const CUlaunchConfig, function: Ptr, params: Ptr, extra: Ptr) |flavour| Work::Config(config, flavour);
        cuLaunchCooperativeKernel, cuLaunchCooperativeKernel_ptsz = c"cuLaunchCooperativeKernel" from 9000, 9000: (function: Ptr, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Ptr, params: Ptr) |flavour| Work::Stream(stream, flavour);
        cuGraphLaunch, cuGraphLaunch_ptsz = c"cuGraphLaunch" from 10000, 10000: (graph: Ptr, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuGraphUpload, cuGraphUpload_ptsz = c"cuGraphUpload" from 11010, 11010: (graph: Ptr, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        // It can upload the graph at once, so it counts as an upload.
        cuGraphInstantiateWithParams, cuGraphInstantiateWithParams_ptsz = c"cuGraphInstantiateWithParams" from 12000, 12000: (place: Ptr, graph: Ptr, parameters: Ptr) |_| Work::Plain;
    }
}

/// Rows of launches that exist once.
pub(crate) mod single {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    gated! {
        cuLaunchCooperativeKernelMultiDevice = c"cuLaunchCooperativeKernelMultiDevice" from 9000, Legacy: (launches: Ptr, count: c_uint, flags: c_uint) Work::Plain;
        cuLaunch = c"cuLaunch" from 2000, Legacy: (function: Ptr) Work::Plain;
        cuLaunchGrid = c"cuLaunchGrid" from 2000, Legacy: (function: Ptr, grid_width: c_int, grid_height: c_int) Work::Plain;
        cuLaunchGridAsync = c"cuLaunchGridAsync" from 2000, Legacy: (function: Ptr, grid_width: c_int, grid_height: c_int, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    }
}
