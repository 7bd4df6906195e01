//! What the driver tells about pointers and ranges of managed memory, and the advice it takes about them.

use std::ffi::c_void;

use crate::{
    abi::{
        DEVICE_CPU, Device, DevicePtr, INVALID_VALUE, In, LOCATION_DEVICE, LOCATION_HOST, MEMORY_DEVICE,
        MEMORY_HOST, MemLocation, NOT_SUPPORTED, Out, Outcome,
    },
    entry::driver_api,
    memory::{self, Allocation, Kind},
    process::{driver, gpu_index},
};

/// A value of one attribute, in the width the driver writes it.
enum Value {
    Int(u32),
    Wide(u64),
    Bool(bool),
}

impl Value {
    fn store(&self, data: *mut c_void) -> Outcome {
        match *self {
            Self::Int(value) => Out::from_raw(data.cast()).set(value),
            Self::Wide(value) => Out::from_raw(data.cast()).set(value),
            Self::Bool(value) => Out::from_raw(data.cast()).set(value),
        }
    }
}

/// `CU_POINTER_ATTRIBUTE_*` of a known allocation.
fn attribute(attribute: u32, address: u64, allocation: &Allocation) -> Outcome<Value> {
    let on_host = matches!(allocation.kind, Kind::Host | Kind::Registered);
    let managed = allocation.kind == Kind::Managed;
    Ok(match attribute {
        1 => Value::Wide(allocation.context as u64),
        2 => Value::Int(if on_host { MEMORY_HOST } else { MEMORY_DEVICE }),
        3 => Value::Wide(address),
        4 if on_host || managed => Value::Wide(address),
        6 | 10 | 15 => Value::Bool(false),
        7 | 20 => Value::Wide(allocation.id),
        // A boolean by its description, but as wide as an `int` in what the driver writes.
        8 => Value::Int(managed.into()),
        9 => Value::Int(allocation.gpu as u32),
        11 | 19 => Value::Wide(allocation.base),
        12 | 18 => Value::Wide(allocation.len),
        13 => Value::Bool(true),
        14 => Value::Wide(0),
        16 => Value::Int(3),
        17 => Value::Wide(allocation.pool as u64),
        4 | 5 => return Err(INVALID_VALUE),
        _ => return Err(NOT_SUPPORTED),
    })
}

/// What `cuPointerGetAttributes` gives for memory the driver does not know.
fn attribute_of_unknown(attribute: u32) -> Value {
    match attribute {
        6 | 8 | 10 | 13 | 15 => Value::Bool(false),
        2 | 16 => Value::Int(0),
        9 => Value::Int((-2_i32).cast_unsigned()),
        _ => Value::Wide(0),
    }
}

/// Checks a range of managed memory.
fn managed_range(address: DevicePtr, len: usize) -> Outcome {
    let allocation = memory::check_device_range(address, len as u64)?;
    if allocation.kind == Kind::Managed { Ok(()) } else { Err(INVALID_VALUE) }
}

fn advise(address: DevicePtr, len: usize, advice: u32, location: MemLocation) -> Outcome {
    driver()?;
    managed_range(address, len)?;
    if !(1..=6).contains(&advice) {
        return Err(INVALID_VALUE);
    }
    // Advice that names no location ignores the argument.
    if !matches!(advice, 1 | 2) && location.kind == LOCATION_DEVICE {
        gpu_index(location.id)?;
    }
    Ok(())
}

driver_api! {
    fn cuPointerGetAttribute(data: *mut c_void, which: u32, address: DevicePtr) {
        driver()?;
        let allocation = memory::find(address).ok_or(INVALID_VALUE)?;
        attribute(which, address, &allocation)?.store(data)
    }

    fn cuPointerGetAttributes(count: u32, which: In<u32>, data: In<*mut c_void>, address: DevicePtr) {
        driver()?;
        let allocation = memory::find(address);
        for index in 0..count as usize {
            let name = which.at(index)?;
            let value = match &allocation {
                Some(allocation) => {
                    attribute(name, address, allocation).unwrap_or_else(|_none| attribute_of_unknown(name))
                }
                None => attribute_of_unknown(name),
            };
            value.store(data.at(index)?)?;
        }
        Ok(())
    }

    fn cuPointerSetAttribute(_value: usize, _which: u32, address: DevicePtr) {
        driver()?;
        memory::find(address).ok_or(INVALID_VALUE).map(drop)
    }

    fn cuMemAdvise(address: DevicePtr, len: usize, advice: u32, device: Device) {
        let kind = if device == DEVICE_CPU { LOCATION_HOST } else { LOCATION_DEVICE };
        advise(address, len, advice, MemLocation { kind, id: device })
    }

    fn cuMemAdvise_v2(address: DevicePtr, len: usize, advice: u32, location: MemLocation) {
        advise(address, len, advice, location)
    }
}
