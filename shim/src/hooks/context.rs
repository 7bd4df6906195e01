//! Contexts come and go: with the first one on a GPU, the GPU begins to be shared.

use std::ffi::{c_int, c_uint};

use super::{hooks, or_original};
use crate::{
    abi::{CUdevice, CUresult, Ptr, SUCCESS},
    config,
    devices::{Device, Leaving},
    state,
};

/// The program uses this GPU: `note` takes down how.
fn in_use(device: CUdevice, note: impl FnOnce(&Device)) {
    or_original(
        || {
            let state = state::get();
            let slot = state.devices.slot_or_add(device);
            if let Some(device) = slot.and_then(|slot| state.devices.get(slot)) {
                note(device);
                state.session.start();
                state.session.kick();
            }
        },
        || (),
    );
}

/// Takes note of a context that the driver has just given.
fn noted(code: CUresult, place: *const Ptr, device: CUdevice, note: impl FnOnce(&Device, Ptr)) -> CUresult {
    if code == SUCCESS && !place.is_null() && !config::get().disabled {
        // SAFETY: not null, and the driver succeeded, so it has stored a context there.
        in_use(device, |device| note(device, unsafe { *place }));
    }
    code
}

fn created(code: CUresult, place: *const Ptr, device: CUdevice) -> CUresult {
    noted(code, place, device, |device, context| device.contexts.created(context))
}

fn retained(code: CUresult, place: *const Ptr, device: CUdevice) -> CUresult {
    noted(code, place, device, |device, context| device.contexts.retained(context))
}

/// Lets the driver take a context away while no drain is in it, and none of its memory on the way.
fn leaving(leave: Option<Leaving<'_>>, real: impl FnOnce() -> CUresult) -> CUresult {
    if let Some(going) = leave.as_ref().and_then(|leave| leave.gone) {
        state::get().memory.residency.context_going(going);
    }
    let code = real();
    if let Some(gone) = leave.as_ref().and_then(|leave| leave.gone)
        && code == SUCCESS
    {
        let state = state::get();
        state.captures.context_gone(gone);
        state.memory.context_gone(gone);
    }
    drop(leave);
    code
}

/// The same of a primary context, with which the device's pools go.
fn leaving_primary(
    ordinal: CUdevice,
    leave: Option<Leaving<'_>>,
    real: impl FnOnce() -> CUresult,
) -> CUresult {
    let goes = leave.as_ref().is_some_and(|leave| leave.gone.is_some());
    let code = leaving(leave, real);
    let state = state::get();
    if goes
        && code == SUCCESS
        && let Some(slot) = state.devices.slot_of(ordinal)
    {
        state.memory.pools.device_reset(slot);
    }
    code
}

fn device(ordinal: CUdevice) -> Option<&'static Device> {
    let devices = &state::get().devices;
    devices.get(devices.slot_of(ordinal)?)
}

/// The GPU on which the program created this context.
fn device_of(context: Ptr) -> Option<&'static Device> {
    state::get().devices.iter().map(|(_, device)| device).find(|device| device.contexts.has(context))
}

fn destroying(context: Ptr) -> Option<Leaving<'static>> {
    device_of(context).map(|device| device.contexts.destroying(context))
}

fn releasing(ordinal: CUdevice) -> Option<Leaving<'static>> {
    device(ordinal).map(|device| device.contexts.releasing())
}

fn resetting(ordinal: CUdevice) -> Option<Leaving<'static>> {
    device(ordinal).map(|device| device.contexts.resetting())
}

hooks! {
    cuCtxCreate = c"cuCtxCreate" from 2000, Legacy: (place: *mut Ptr, flags: c_uint, device: CUdevice) |real| {
        created(real(place, flags, device), place, device)
    };
    cuCtxCreate_v2 = c"cuCtxCreate" from 3020, Legacy: (place: *mut Ptr, flags: c_uint, device: CUdevice) |real| {
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
    cuGLCtxCreate = c"cuGLCtxCreate" from 2000, Legacy: (place: *mut Ptr, flags: c_uint, device: CUdevice) |real| {
        created(real(place, flags, device), place, device)
    };
    cuGLCtxCreate_v2 = c"cuGLCtxCreate" from 3020, Legacy:
        (place: *mut Ptr, flags: c_uint, device: CUdevice) |real| {
        created(real(place, flags, device), place, device)
    };
    cuGreenCtxCreate = c"cuGreenCtxCreate" from 12040, Legacy:
        (place: *mut Ptr, resources: Ptr, device: CUdevice, flags: c_uint) |real| {
        // It is a part of the primary context, which the driver itself retains and which a drain covers.
        noted(real(place, resources, device, flags), place, device, |_, _| {})
    };
    cuCtxAttach = c"cuCtxAttach" from 2000, Legacy: (place: *mut Ptr, flags: c_uint) |real| {
        let code = real(place, flags);
        if code == SUCCESS && !place.is_null() {
            // SAFETY: not null, and the driver succeeded, so it has stored a context there.
            let context = unsafe { *place };
            if let Some(device) = device_of(context) {
                device.contexts.created(context);
            }
        }
        code
    };
    cuCtxDetach = c"cuCtxDetach" from 2000, Legacy: (context: Ptr) |real| {
        leaving(device_of(context).map(|device| device.contexts.detaching(context)), || real(context))
    };
    cuCtxDestroy = c"cuCtxDestroy" from 2000, Legacy: (context: Ptr) |real| {
        leaving(destroying(context), || real(context))
    };
    cuCtxDestroy_v2 = c"cuCtxDestroy" from 4000, Legacy: (context: Ptr) |real| {
        leaving(destroying(context), || real(context))
    };
    cuDevicePrimaryCtxRetain = c"cuDevicePrimaryCtxRetain" from 7000, Legacy:
        (place: *mut Ptr, device: CUdevice) |real| {
        retained(real(place, device), place, device)
    };
    cuDevicePrimaryCtxRelease = c"cuDevicePrimaryCtxRelease" from 7000, Legacy: (device: CUdevice) |real| {
        leaving_primary(device, releasing(device), || real(device))
    };
    cuDevicePrimaryCtxRelease_v2 = c"cuDevicePrimaryCtxRelease" from 11000, Legacy: (device: CUdevice) |real| {
        leaving_primary(device, releasing(device), || real(device))
    };
    cuDevicePrimaryCtxReset = c"cuDevicePrimaryCtxReset" from 7000, Legacy: (device: CUdevice) |real| {
        leaving_primary(device, resetting(device), || real(device))
    };
    cuDevicePrimaryCtxReset_v2 = c"cuDevicePrimaryCtxReset" from 11000, Legacy: (device: CUdevice) |real| {
        leaving_primary(device, resetting(device), || real(device))
    };
}
