//! Copies. A blocking copy waits for the GPU, so it counts as waiting too.

use std::ffi::{c_uint, c_ulonglong};

use super::{blocking, both, gated};
use crate::{
    abi::{CUdeviceptr, Flavour, MEMORY_HOST, Ptr},
    gate::Work,
};

/// Where a copy's description says what kinds of memory it goes from and to.
#[derive(Clone, Copy, Debug)]
struct Layout {
    from: usize,
    to: usize,
}

/// `CUDA_MEMCPY2D`.
const PLANE: Layout = Layout { from: 16, to: 72 };
/// `CUDA_MEMCPY3D` and `CUDA_MEMCPY3D_PEER`.
const BOX: Layout = Layout { from: 32, to: 120 };

/// The work of a described copy; none if it says that both its ends are host memory.
#[inline]
fn unless_between_hosts(layout: Layout, copy: Ptr, work: Work) -> Option<Work> {
    if copy.is_null() {
        return Some(work);
    }
    // SAFETY: the caller's description, which the driver reads in this call; the offsets are those of its type.
    let kind = |offset| unsafe { copy.byte_add(offset).cast::<u32>().read_unaligned() };
    (kind(layout.from) != MEMORY_HOST || kind(layout.to) != MEMORY_HOST).then_some(work)
}

/// Rows of copies that block.
pub(crate) mod blocked {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    both! { blocking;
        cuMemcpy, cuMemcpy_ptds = c"cuMemcpy" from 4000, 7000: (to: CUdeviceptr, from: CUdeviceptr, size: usize) |_| Work::Copy(to, from) => to, size;
        cuMemcpyPeer, cuMemcpyPeer_ptds = c"cuMemcpyPeer" from 4000, 7000: (to: CUdeviceptr, to_context: Ptr, from: CUdeviceptr, from_context: Ptr, size: usize) |_| Work::Plain => to, size;
        cuMemcpyHtoD_v2, cuMemcpyHtoD_v2_ptds = c"cuMemcpyHtoD" from 3020, 7000: (to: CUdeviceptr, from: Ptr, size: usize) |_| Work::Plain => to, size;
        cuMemcpyDtoH_v2, cuMemcpyDtoH_v2_ptds = c"cuMemcpyDtoH" from 3020, 7000: (to: Ptr, from: CUdeviceptr, size: usize) |_| Work::Plain;
        cuMemcpyDtoD_v2, cuMemcpyDtoD_v2_ptds = c"cuMemcpyDtoD" from 3020, 7000: (to: CUdeviceptr, from: CUdeviceptr, size: usize) |_| Work::Plain => to, size;
        cuMemcpy2D_v2, cuMemcpy2D_v2_ptds = c"cuMemcpy2D" from 3020, 7000: (copy: Ptr) |_| unless_between_hosts(PLANE, copy, Work::Plain);
        cuMemcpy2DUnaligned_v2, cuMemcpy2DUnaligned_v2_ptds = c"cuMemcpy2DUnaligned" from 3020, 7000: (copy: Ptr) |_| unless_between_hosts(PLANE, copy, Work::Plain);
        cuMemcpy3D_v2, cuMemcpy3D_v2_ptds = c"cuMemcpy3D" from 3020, 7000: (copy: Ptr) |_| unless_between_hosts(BOX, copy, Work::Plain);
        cuMemcpy3DPeer, cuMemcpy3DPeer_ptds = c"cuMemcpy3DPeer" from 4000, 7000: (copy: Ptr) |_| unless_between_hosts(BOX, copy, Work::Plain);
    }
}

/// Rows of copies that return before they are done.
pub(crate) mod queued {
    #[allow(clippy::wildcard_imports, reason = "a group of lines within this file")]
    use super::*;

    both! { gated;
        cuMemcpyAsync, cuMemcpyAsync_ptsz = c"cuMemcpyAsync" from 4000, 7000: (to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: Ptr) |flavour| Work::CopyIn(to, from, stream, flavour) => to, size;
        cuMemcpyPeerAsync, cuMemcpyPeerAsync_ptsz = c"cuMemcpyPeerAsync" from 4000, 7000: (to: CUdeviceptr, to_context: Ptr, from: CUdeviceptr, from_context: Ptr, size: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour) => to, size;
        cuMemcpyHtoDAsync_v2, cuMemcpyHtoDAsync_v2_ptsz = c"cuMemcpyHtoDAsync" from 3020, 7000: (to: CUdeviceptr, from: Ptr, size: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour) => to, size;
        cuMemcpyDtoHAsync_v2, cuMemcpyDtoHAsync_v2_ptsz = c"cuMemcpyDtoHAsync" from 3020, 7000: (to: Ptr, from: CUdeviceptr, size: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemcpyDtoDAsync_v2, cuMemcpyDtoDAsync_v2_ptsz = c"cuMemcpyDtoDAsync" from 3020, 7000: (to: CUdeviceptr, from: CUdeviceptr, size: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour) => to, size;
        cuMemcpy2DAsync_v2, cuMemcpy2DAsync_v2_ptsz = c"cuMemcpy2DAsync" from 3020, 7000: (copy: Ptr, stream: Ptr) |flavour| unless_between_hosts(PLANE, copy, Work::Stream(stream, flavour));
        cuMemcpy3DAsync_v2, cuMemcpy3DAsync_v2_ptsz = c"cuMemcpy3DAsync" from 3020, 7000: (copy: Ptr, stream: Ptr) |flavour| unless_between_hosts(BOX, copy, Work::Stream(stream, flavour));
        cuMemcpy3DPeerAsync, cuMemcpy3DPeerAsync_ptsz = c"cuMemcpy3DPeerAsync" from 4000, 7000: (copy: Ptr, stream: Ptr) |flavour| unless_between_hosts(BOX, copy, Work::Stream(stream, flavour));
        cuMemcpyBatchAsync, cuMemcpyBatchAsync_ptsz = c"cuMemcpyBatchAsync" from 12080, 12080: (to: Ptr, from: Ptr, sizes: Ptr, count: usize, attributes: Ptr, indices: Ptr, attribute_count: usize, failed: Ptr, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemcpyBatchAsync_v2, cuMemcpyBatchAsync_v2_ptsz = c"cuMemcpyBatchAsync" from 13000, 13000: (to: Ptr, from: Ptr, sizes: Ptr, count: usize, attributes: Ptr, indices: Ptr, attribute_count: usize, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemcpy3DBatchAsync, cuMemcpy3DBatchAsync_ptsz = c"cuMemcpy3DBatchAsync" from 12080, 12080: (count: usize, list: Ptr, failed: Ptr, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemcpy3DBatchAsync_v2, cuMemcpy3DBatchAsync_v2_ptsz = c"cuMemcpy3DBatchAsync" from 13000, 13000: (count: usize, list: Ptr, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemcpyWithAttributesAsync, cuMemcpyWithAttributesAsync_ptsz = c"cuMemcpyWithAttributesAsync" from 13020, 13020: (to: CUdeviceptr, from: CUdeviceptr, size: usize, attributes: Ptr, stream: Ptr) |flavour| Work::CopyIn(to, from, stream, flavour) => to, size;
        cuMemcpy3DWithAttributesAsync, cuMemcpy3DWithAttributesAsync_ptsz = c"cuMemcpy3DWithAttributesAsync" from 13020, 13020: (copy: Ptr, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuFabricCpyBatchAsync, cuFabricCpyBatchAsync_ptsz = c"cuFabricCpyBatchAsync" from 13050, 13050: (count: usize, list: Ptr, flags: c_ulonglong, stream: Ptr) |flavour| Work::Stream(stream, flavour);
        cuMemBatchDecompressAsync, cuMemBatchDecompressAsync_ptsz = c"cuMemBatchDecompressAsync" from 12060, 12060: (parameters: Ptr, count: usize, flags: c_uint, failed: Ptr, stream: Ptr) |flavour| Work::Stream(stream, flavour);
    }
}

#[cfg(test)]
mod tests {
    use nvshare_tests::{compile, pypi, runtime};

    use super::{BOX, MEMORY_HOST, PLANE};

    #[test]
    fn the_places_of_the_kinds_of_memory_are_those_of_nvidias_headers() {
        let home = tempfile::tempdir().unwrap();
        let kinds = [("CUDA_MEMCPY2D", PLANE), ("CUDA_MEMCPY3D", BOX), ("CUDA_MEMCPY3D_PEER", BOX)];
        for package in runtime::PACKAGES {
            let Some(folder) = pypi::fetched(package) else { return };
            let headers = pypi::find(&folder, "cuda.h");
            let mut lines = vec![
                "#include <stddef.h>".to_owned(),
                "#include <cuda.h>".to_owned(),
                format!("_Static_assert(CU_MEMORYTYPE_HOST == {MEMORY_HOST}, \"host\");"),
                "int main(void) { return 0; }".to_owned(),
            ];
            for (kind, layout) in kinds {
                for (field, offset) in [("srcMemoryType", layout.from), ("dstMemoryType", layout.to)] {
                    let place = format!("offsetof({kind}, {field}) == {offset}");
                    let size = format!("sizeof((({kind} *)0)->{field}) == 4");
                    lines.push(format!("_Static_assert({place} && {size}, \"{kind}\");"));
                }
            }
            let include = format!("-I{}", headers.parent().unwrap().display());
            compile::gcc(&lines.join("\n"), &home.path().join("layout"), &[&include]);
        }
    }
}
