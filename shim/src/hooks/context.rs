//! Contexts come and go: with the first one on a GPU, the GPU begins to be shared.

use std::{
    ffi::{c_int, c_uint},
    sync::MutexGuard,
};

use super::{hooks, or_original};
use crate::{
    abi::{CUdevice, CUresult, Ptr, SUCCESS},
    config,
    devices::Device,
    state,
};

/// Takes note of a context that the driver has just given.
fn noted(code: CUresult, place: *const Ptr, device: CUdevice, note: impl FnOnce(&Device, Ptr)) -> CUresult {
    if code != SUCCESS || place.is_null() || config::get().disabled {
        return code;
    }
    or_original(
        || {
            let state = state::get();
            let slot = state.devices.slot_or_add(device);
            if let Some(device) = slot.and_then(|slot| state.devices.get(slot)) {
                // SAFETY: not null, and the driver succeeded, so it has stored a context there.
                note(device, unsafe { *place });
                state.session.start();
                state.session.kick();
            }
        },
        || (),
    );
    code
}

fn created(code: CUresult, place: *const Ptr, device: CUdevice) -> CUresult {
    noted(code, place, device, Device::created)
}

/// Keeps a device's contexts from being drained while the driver takes one away.
fn leaving<'a>(
    device: CUdevice,
    leave: impl FnOnce(&'a Device) -> MutexGuard<'a, ()>,
) -> Option<MutexGuard<'a, ()>> {
    let devices = &state::get().devices;
    Some(leave(devices.get(devices.slot_of(device)?)?))
}

hooks! {
    cuCtxCreate_v2 = c"cuCtxCreate" from 3020, Legacy:
        (place: *mut Ptr, flags: c_uint, device: CUdevice) |real| {
        created(real(place, flags, device), place, device)
    };
    cuCtxCreate_v3 = c"cuCtxCreate" from 11040, Legacy:
        (place: *mut Ptr, affinity: Ptr, count: c_int, flags: c_uint, device: CUdevice) |real| {
        created(real(place, affinity, count, flags, device), place, device)
    };
    cuCtxCreate_v4 = c"cuCtxCreate" from 12050, Legacy:
        (place: *mut Ptr, parameters: Ptr, flags: c_uint, device: CUdevice) |real| {
        created(real(place, parameters, flags, device), place, device)
    };
    cuCtxDestroy_v2 = c"cuCtxDestroy" from 4000, Legacy: (context: Ptr) |real| {
        let _leaving = state::get()
            .devices
            .iter()
            .find(|(_, device)| device.has(context))
            .map(|(_, device)| device.destroying(context));
        real(context)
    };
    cuDevicePrimaryCtxRetain = c"cuDevicePrimaryCtxRetain" from 7000, Legacy:
        (place: *mut Ptr, device: CUdevice) |real| {
        noted(real(place, device), place, device, Device::retained)
    };
    cuDevicePrimaryCtxRelease = c"cuDevicePrimaryCtxRelease" from 7000, Legacy: (device: CUdevice) |real| {
        let _leaving = leaving(device, Device::releasing);
        real(device)
    };
    cuDevicePrimaryCtxRelease_v2 = c"cuDevicePrimaryCtxRelease" from 11000, Legacy: (device: CUdevice) |real| {
        let _leaving = leaving(device, Device::releasing);
        real(device)
    };
    cuDevicePrimaryCtxReset = c"cuDevicePrimaryCtxReset" from 7000, Legacy: (device: CUdevice) |real| {
        let _leaving = leaving(device, Device::resetting);
        real(device)
    };
    cuDevicePrimaryCtxReset_v2 = c"cuDevicePrimaryCtxReset" from 11000, Legacy: (device: CUdevice) |real| {
        let _leaving = leaving(device, Device::resetting);
        real(device)
    };
}
