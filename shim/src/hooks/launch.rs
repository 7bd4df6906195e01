//! Kernels and graphs.

use std::ffi::c_uint;

use super::gated;
use crate::{
    abi::{CUlaunchConfig, Flavour, Ptr},
    gate::Work,
};

gated! {
    cuLaunchKernel = c"cuLaunchKernel" from 4000, Legacy: (function: Ptr, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Ptr, params: Ptr, extra: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuLaunchKernel_ptsz = c"cuLaunchKernel" from 7000, PerThread: (function: Ptr, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Ptr, params: Ptr, extra: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuLaunchKernelEx = c"cuLaunchKernelEx" from 11060, Legacy: (config: *const CUlaunchConfig, function: Ptr, params: Ptr, extra: Ptr) Work::Config(config, Flavour::Legacy);
    cuLaunchKernelEx_ptsz = c"cuLaunchKernelEx" from 11060, PerThread: (config: *const CUlaunchConfig, function: Ptr, params: Ptr, extra: Ptr) Work::Config(config, Flavour::PerThread);
    cuLaunchCooperativeKernel = c"cuLaunchCooperativeKernel" from 9000, Legacy: (function: Ptr, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Ptr, params: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuLaunchCooperativeKernel_ptsz = c"cuLaunchCooperativeKernel" from 9000, PerThread: (function: Ptr, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: Ptr, params: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuLaunchCooperativeKernelMultiDevice = c"cuLaunchCooperativeKernelMultiDevice" from 9000, Legacy: (launches: Ptr, count: c_uint, flags: c_uint) Work::Plain;
    cuGraphLaunch = c"cuGraphLaunch" from 10000, Legacy: (graph: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuGraphLaunch_ptsz = c"cuGraphLaunch" from 10000, PerThread: (graph: Ptr, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
    cuGraphUpload = c"cuGraphUpload" from 11010, Legacy: (graph: Ptr, stream: Ptr) Work::Stream(stream, Flavour::Legacy);
    cuGraphUpload_ptsz = c"cuGraphUpload" from 11010, PerThread: (graph: Ptr, stream: Ptr) Work::Stream(stream, Flavour::PerThread);
}
