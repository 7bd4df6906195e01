//! Arrays: what they take of the GPU. There are no textures, so nothing reads or writes them.

use std::sync::Arc;

use crate::{
    abi::{Handle, INVALID_VALUE, In, Out, Outcome},
    arena::BLOCK,
    context,
    entry::driver_api,
    graph,
    process::{driver, sim_error},
    registry::Registry,
};

/// `CUDA_ARRAY_DESCRIPTOR`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Flat {
    width: usize,
    height: usize,
    format: u32,
    channels: u32,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Descriptor {
    width: usize,
    height: usize,
    depth: usize,
    format: u32,
    channels: u32,
    flags: u32,
}

struct Array {
    gpu: usize,
    len: u64,
}

impl Drop for Array {
    fn drop(&mut self) {
        if let Ok(driver) = driver() {
            driver.session.free_device(self.gpu, self.len);
        }
    }
}

static ARRAYS: Registry<Array> = Registry::new();

fn make(out: Out<Handle>, descriptor: Descriptor, levels: u32) -> Outcome {
    let context = context::current()?;
    graph::forbid_unsafe()?;
    // The formats of whole bytes: 8, 16 and 32 bit integers, half and float.
    let bytes = match descriptor.format {
        1 | 8 => 1,
        2 | 9 | 0x10 => 2,
        3 | 0xa | 0x20 => 4,
        _ => return Err(INVALID_VALUE),
    };
    if out.is_null() || descriptor.width == 0 || !matches!(descriptor.channels, 1 | 2 | 4) || levels == 0 {
        return Err(INVALID_VALUE);
    }
    let level = |level: u32| {
        let extents = [descriptor.width, descriptor.height, descriptor.depth];
        extents.iter().map(|&extent| (extent as u64 >> level).max(1)).product::<u64>()
    };
    let texels: u64 = (0..levels).map(level).sum();
    let len = (texels * bytes * u64::from(descriptor.channels)).next_multiple_of(BLOCK);
    driver()?.session.allocate_device(context.gpu, len).map_err(sim_error)?;
    out.set(ARRAYS.insert(Arc::new(Array { gpu: context.gpu, len })))
}

driver_api! {
    fn cuArrayCreate_v2(out: Out<Handle>, descriptor: In<Flat>) {
        let Flat { width, height, format, channels } = descriptor.get()?;
        make(out, Descriptor { width, height, depth: 0, format, channels, flags: 0 }, 1)
    }

    fn cuArray3DCreate_v2(out: Out<Handle>, descriptor: In<Descriptor>) {
        make(out, descriptor.get()?, 1)
    }

    fn cuArrayDestroy(array: Handle) {
        ARRAYS.remove(array).map(drop)
    }

    fn cuMipmappedArrayCreate(out: Out<Handle>, descriptor: In<Descriptor>, levels: u32) {
        make(out, descriptor.get()?, levels)
    }

    fn cuMipmappedArrayDestroy(array: Handle) {
        ARRAYS.remove(array).map(drop)
    }
}
