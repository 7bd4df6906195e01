//! Copies, fills and prefetches: their functions, and how a worker carries them out.

use nvshare_gpu_sim_model::client::{Access, Direction, Location, Work};

use crate::{
    abi::{
        DEVICE_CPU, Device, DevicePtr, Handle, INVALID_VALUE, In, LOCATION_DEVICE, LOCATION_HOST,
        LOCATION_HOST_NUMA, LOCATION_HOST_NUMA_CURRENT, MEMORY_ARRAY, MEMORY_DEVICE, MEMORY_HOST,
        MEMORY_UNIFIED, MemLocation, Memcpy2D, Memcpy3D, MemsetNodeParams, NOT_SUPPORTED, Out, Outcome,
        STREAM_CAPTURE_UNSUPPORTED,
    },
    context,
    entry::stream_api,
    graph,
    launch::Operation,
    memory::{self, Kind},
    process::{driver, gpu_index, sim_error},
    stream::{Flavour, resolve},
};

/// Bandwidth of the card's own memory as copies and fills see it, bytes per nanosecond (H100 SXM, read plus write).
const MEMORY_BYTES_PER_NS: u64 = 1500;

/// A copy of `depth` slices of `height` rows of `width` bytes; a plain copy is one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) width: u64,
    pub(crate) height: u64,
    pub(crate) depth: u64,
    pub(crate) dst_pitch: u64,
    pub(crate) src_pitch: u64,
    pub(crate) dst_slice: u64,
    pub(crate) src_slice: u64,
}

/// A fill of `height` rows of `width` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fill {
    pub(crate) dst: u64,
    pub(crate) pitch: u64,
    pub(crate) value: u32,
    pub(crate) element: u64,
    pub(crate) width: u64,
    pub(crate) height: u64,
}

impl Copy {
    pub(crate) fn linear(dst: u64, src: u64, len: u64) -> Self {
        let (dst_pitch, src_pitch) = (len, len);
        Self {
            dst,
            src,
            width: len,
            height: 1,
            depth: 1,
            dst_pitch,
            src_pitch,
            dst_slice: len,
            src_slice: len,
        }
    }

    fn bytes(&self) -> u64 {
        self.width * self.height * self.depth
    }

    /// Bytes from the first to the last that is touched.
    fn span(&self, pitch: u64, slice: u64) -> u64 {
        if self.bytes() == 0 { 0 } else { (self.depth - 1) * slice + (self.height - 1) * pitch + self.width }
    }

    fn dst_span(&self) -> u64 {
        self.span(self.dst_pitch, self.dst_slice)
    }

    fn src_span(&self) -> u64 {
        self.span(self.src_pitch, self.src_slice)
    }

    /// Whether either side is host memory that the driver does not know, so that the call cannot return before the end.
    fn is_pageable(&self) -> bool {
        memory::find(self.dst).is_none() || memory::find(self.src).is_none()
    }

    pub(crate) fn execute(&self, gpu: usize) -> Outcome {
        if self.bytes() == 0 {
            return Ok(());
        }
        let (dst, dst_kind) = memory::copy_access(self.dst, self.dst_span())?;
        let (src, src_kind) = memory::copy_access(self.src, self.src_span())?;
        spend(gpu, self, src_kind, dst_kind)?;
        for slice in 0..self.depth {
            for row in 0..self.height {
                let to = slice * self.dst_slice + row * self.dst_pitch;
                let from = slice * self.src_slice + row * self.src_pitch;
                // SAFETY: both spans were checked against their allocations, or are the program's own host memory,
                // which it lends for the copy; ranges may overlap.
                unsafe {
                    std::ptr::copy(src.add(from as usize), dst.add(to as usize), self.width as usize);
                }
            }
        }
        Ok(())
    }
}

fn on_gpu(kind: Option<Kind>) -> bool {
    matches!(kind, Some(Kind::Device(_) | Kind::Mapped(_) | Kind::Managed))
}

/// Spends the time of a copy: page faults of managed memory, then the link or the card's memory.
fn spend(gpu: usize, copy: &Copy, src: Option<Kind>, dst: Option<Kind>) -> Outcome {
    let session = &driver()?.session;
    let mut work = Work::default();
    if src == Some(Kind::Managed) {
        work.ranges.push(Access { base: copy.src, len: copy.src_span(), write: false });
    }
    if dst == Some(Kind::Managed) {
        work.ranges.push(Access { base: copy.dst, len: copy.dst_span(), write: true });
    }
    let direction = match (on_gpu(src), on_gpu(dst)) {
        (false, false) => return Ok(()),
        (true, true) => {
            work.compute_ns = copy.bytes() / MEMORY_BYTES_PER_NS;
            None
        }
        (false, true) => Some(Direction::In),
        (true, false) => Some(Direction::Out),
    };
    if work.compute_ns > 0 || !work.ranges.is_empty() {
        session.run_kernel(gpu, &work).map_err(sim_error)?;
    }
    if let Some(direction) = direction {
        session.copy_engine(gpu, copy.bytes(), direction);
    }
    Ok(())
}

impl Fill {
    fn span(&self) -> u64 {
        if self.width == 0 || self.height == 0 {
            0
        } else {
            (self.height - 1) * self.pitch + self.width * self.element
        }
    }

    pub(crate) fn execute(&self, gpu: usize) -> Outcome {
        let span = self.span();
        if span == 0 {
            return Ok(());
        }
        let (dst, kind) = memory::kernel_access(self.dst, span)?;
        let mut work = Work { compute_ns: span / MEMORY_BYTES_PER_NS, ..Work::default() };
        if kind == Kind::Managed {
            work.ranges.push(Access { base: self.dst, len: span, write: true });
        }
        driver()?.session.run_kernel(gpu, &work).map_err(sim_error)?;
        for row in 0..self.height {
            let start = dst.wrapping_add((row * self.pitch) as usize);
            // SAFETY: the span was checked against its allocation; alignment is not assumed.
            unsafe {
                match self.element {
                    1 => start.write_bytes(self.value as u8, self.width as usize),
                    2 => {
                        for index in 0..self.width as usize {
                            start.cast::<u16>().add(index).write_unaligned(self.value as u16);
                        }
                    }
                    _ => {
                        for index in 0..self.width as usize {
                            start.cast::<u32>().add(index).write_unaligned(self.value);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Moves managed memory; what was freed meanwhile is not an error of the stream.
pub(crate) fn prefetch(address: u64, len: u64, to: Location) -> Outcome {
    if memory::check_device_range(address, len).is_err() {
        return Ok(());
    }
    driver()?.session.prefetch(address, len, to).map_err(sim_error)
}

/// Submits a copy; synchronous ones, and asynchronous ones with pageable memory, return after it.
fn copy(copy: Copy, stream: Handle, flavour: Flavour, synchronous: bool) -> Outcome {
    let stream = resolve(stream, flavour)?;
    if copy.bytes() == 0 {
        return Ok(());
    }
    if copy.dst == 0 || copy.src == 0 {
        return Err(INVALID_VALUE);
    }
    if synchronous {
        graph::forbid_unsafe()?;
        if let Some(capture) = stream.capture() {
            capture.invalidate();
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
    }
    let point = stream.add(Operation::Copy(copy))?;
    if let Some(point) = point
        && (synchronous || copy.is_pageable())
    {
        point.wait();
        return stream.context()?.check();
    }
    Ok(())
}

/// The same for addresses that must be device memory, `len` bytes of it.
fn device_copy(
    device: &[u64],
    request: Copy,
    stream: Handle,
    flavour: Flavour,
    synchronous: bool,
) -> Outcome {
    context::current()?;
    if request.bytes() > 0 {
        for &address in device {
            memory::check_device_range(address, request.bytes())?;
        }
    }
    copy(request, stream, flavour, synchronous)
}

fn fill(
    dst: u64,
    pitch: usize,
    value: u32,
    element: u64,
    width: usize,
    height: usize,
    stream: Handle,
    flavour: Flavour,
    synchronous: bool,
) -> Outcome {
    let stream = resolve(stream, flavour)?;
    let (pitch, width, height) = (pitch as u64, width as u64, height as u64);
    let fill = Fill { dst, pitch, value, element, width, height };
    if !dst.is_multiple_of(element) || (height > 1 && pitch < width * element) {
        return Err(INVALID_VALUE);
    }
    if fill.span() == 0 {
        return Ok(());
    }
    memory::check_device_range(dst, fill.span())?;
    if synchronous {
        graph::forbid_unsafe()?;
    }
    let point = stream.add(Operation::Fill(fill))?;
    if let Some(point) = point
        && synchronous
    {
        point.wait();
        return stream.context()?.check();
    }
    Ok(())
}

/// The flat fill of a `cuMemset` node.
pub(crate) fn node_fill(params: &MemsetNodeParams) -> Outcome<Fill> {
    let element = u64::from(params.element_size);
    if !matches!(element, 1 | 2 | 4) {
        return Err(INVALID_VALUE);
    }
    let (pitch, width, height) = (params.pitch as u64, params.width as u64, params.height as u64);
    let fill = Fill { dst: params.dst, pitch, value: params.value, element, width, height };
    memory::check_device_range(fill.dst, fill.span())?;
    Ok(fill)
}

fn side(kind: u32, host: u64, device: u64) -> Outcome<u64> {
    match kind {
        MEMORY_HOST => Ok(host),
        MEMORY_DEVICE | MEMORY_UNIFIED => Ok(device),
        MEMORY_ARRAY => Err(NOT_SUPPORTED),
        _ => Err(INVALID_VALUE),
    }
}

fn copy_2d(params: In<Memcpy2D>) -> Outcome<Copy> {
    let p = params.get()?;
    let src = side(p.src_type, p.src_host, p.src_device)?;
    let dst = side(p.dst_type, p.dst_host, p.dst_device)?;
    let pitch = |pitch: usize| if pitch == 0 { p.width as u64 } else { pitch as u64 };
    let (dst_pitch, src_pitch) = (pitch(p.dst_pitch), pitch(p.src_pitch));
    let height = p.height as u64;
    Ok(Copy {
        dst: dst + p.dst_y as u64 * dst_pitch + p.dst_x as u64,
        src: src + p.src_y as u64 * src_pitch + p.src_x as u64,
        width: p.width as u64,
        height,
        depth: 1,
        dst_pitch,
        src_pitch,
        dst_slice: dst_pitch * height,
        src_slice: src_pitch * height,
    })
}

pub(crate) fn copy_3d(params: In<Memcpy3D>) -> Outcome<Copy> {
    let p = params.get()?;
    let src = side(p.src_type, p.src_host, p.src_device)?;
    let dst = side(p.dst_type, p.dst_host, p.dst_device)?;
    let pitch = |pitch: usize| if pitch == 0 { p.width as u64 } else { pitch as u64 };
    let (dst_pitch, src_pitch) = (pitch(p.dst_pitch), pitch(p.src_pitch));
    let rows = |rows: usize| if rows == 0 { p.height as u64 } else { rows as u64 };
    let (dst_slice, src_slice) = (dst_pitch * rows(p.dst_height), src_pitch * rows(p.src_height));
    Ok(Copy {
        dst: dst + p.dst_z as u64 * dst_slice + p.dst_y as u64 * dst_pitch + p.dst_x as u64,
        src: src + p.src_z as u64 * src_slice + p.src_y as u64 * src_pitch + p.src_x as u64,
        width: p.width as u64,
        height: p.height as u64,
        depth: p.depth as u64,
        dst_pitch,
        src_pitch,
        dst_slice,
        src_slice,
    })
}

/// Where a location of the driver's interface is, for the model.
fn location(location: MemLocation) -> Outcome<Location> {
    match location.kind {
        LOCATION_DEVICE => Ok(Location::Gpu(gpu_index(location.id)?)),
        LOCATION_HOST | LOCATION_HOST_NUMA | LOCATION_HOST_NUMA_CURRENT => Ok(Location::Cpu),
        _ => Err(INVALID_VALUE),
    }
}

fn prefetch_async(
    address: DevicePtr,
    len: usize,
    to: MemLocation,
    stream: Handle,
    flavour: Flavour,
) -> Outcome {
    let to = location(to)?;
    let stream = resolve(stream, flavour)?;
    let allocation = memory::check_device_range(address, len as u64)?;
    if allocation.kind != Kind::Managed {
        return Err(INVALID_VALUE);
    }
    stream.add(Operation::Prefetch { address, len: len as u64, to }).map(drop)
}

stream_api! {
    fn cuMemcpy | cuMemcpy_ptds(flavour; dst: u64, src: u64, len: usize) {
        copy(Copy::linear(dst, src, len as u64), 0, flavour, true)
    }

    fn cuMemcpyAsync | cuMemcpyAsync_ptsz(flavour; dst: u64, src: u64, len: usize, stream: Handle) {
        copy(Copy::linear(dst, src, len as u64), stream, flavour, false)
    }

    fn cuMemcpyHtoD_v2 | cuMemcpyHtoD_v2_ptds(flavour; dst: DevicePtr, src: u64, len: usize) {
        device_copy(&[dst], Copy::linear(dst, src, len as u64), 0, flavour, true)
    }

    fn cuMemcpyHtoDAsync_v2 | cuMemcpyHtoDAsync_v2_ptsz(flavour; dst: DevicePtr, src: u64, len: usize, stream: Handle) {
        device_copy(&[dst], Copy::linear(dst, src, len as u64), stream, flavour, false)
    }

    fn cuMemcpyDtoH_v2 | cuMemcpyDtoH_v2_ptds(flavour; dst: u64, src: DevicePtr, len: usize) {
        device_copy(&[src], Copy::linear(dst, src, len as u64), 0, flavour, true)
    }

    fn cuMemcpyDtoHAsync_v2 | cuMemcpyDtoHAsync_v2_ptsz(flavour; dst: u64, src: DevicePtr, len: usize, stream: Handle) {
        device_copy(&[src], Copy::linear(dst, src, len as u64), stream, flavour, false)
    }

    fn cuMemcpyDtoD_v2 | cuMemcpyDtoD_v2_ptds(flavour; dst: DevicePtr, src: DevicePtr, len: usize) {
        // A device-to-device copy is asynchronous to the host in the driver as well.
        device_copy(&[dst, src], Copy::linear(dst, src, len as u64), 0, flavour, false)
    }

    fn cuMemcpyDtoDAsync_v2 | cuMemcpyDtoDAsync_v2_ptsz(flavour; dst: DevicePtr, src: DevicePtr, len: usize, stream: Handle) {
        device_copy(&[dst, src], Copy::linear(dst, src, len as u64), stream, flavour, false)
    }

    fn cuMemcpyPeer | cuMemcpyPeer_ptds(flavour; dst: DevicePtr, _to: Handle, src: DevicePtr, _from: Handle, len: usize) {
        device_copy(&[dst, src], Copy::linear(dst, src, len as u64), 0, flavour, false)
    }

    fn cuMemcpyPeerAsync | cuMemcpyPeerAsync_ptsz(flavour; dst: DevicePtr, _to: Handle, src: DevicePtr, _from: Handle, len: usize, stream: Handle) {
        device_copy(&[dst, src], Copy::linear(dst, src, len as u64), stream, flavour, false)
    }

    fn cuMemcpy2D_v2 | cuMemcpy2D_v2_ptds(flavour; params: In<Memcpy2D>) {
        copy(copy_2d(params)?, 0, flavour, true)
    }

    fn cuMemcpy2DUnaligned_v2 | cuMemcpy2DUnaligned_v2_ptds(flavour; params: In<Memcpy2D>) {
        copy(copy_2d(params)?, 0, flavour, true)
    }

    fn cuMemcpy2DAsync_v2 | cuMemcpy2DAsync_v2_ptsz(flavour; params: In<Memcpy2D>, stream: Handle) {
        copy(copy_2d(params)?, stream, flavour, false)
    }

    fn cuMemcpy3D_v2 | cuMemcpy3D_v2_ptds(flavour; params: In<Memcpy3D>) {
        copy(copy_3d(params)?, 0, flavour, true)
    }

    fn cuMemcpy3DAsync_v2 | cuMemcpy3DAsync_v2_ptsz(flavour; params: In<Memcpy3D>, stream: Handle) {
        copy(copy_3d(params)?, stream, flavour, false)
    }

    fn cuMemcpy3DPeer | cuMemcpy3DPeer_ptds(flavour; params: In<Memcpy3D>) {
        copy(copy_3d(params)?, 0, flavour, true)
    }

    fn cuMemcpy3DPeerAsync | cuMemcpy3DPeerAsync_ptsz(flavour; params: In<Memcpy3D>, stream: Handle) {
        copy(copy_3d(params)?, stream, flavour, false)
    }

    fn cuMemcpyBatchAsync_v2 | cuMemcpyBatchAsync_v2_ptsz(
        flavour; dsts: In<u64>, srcs: In<u64>, sizes: In<usize>, count: usize,
        _attributes: usize, _indices: usize, _attribute_count: usize, stream: Handle,
    ) {
        for index in 0..count {
            copy(Copy::linear(dsts.at(index)?, srcs.at(index)?, sizes.at(index)? as u64), stream, flavour, false)?;
        }
        Ok(())
    }

    fn cuMemcpyBatchAsync | cuMemcpyBatchAsync_ptsz(
        flavour; dsts: In<u64>, srcs: In<u64>, sizes: In<usize>, count: usize,
        _attributes: usize, _indices: usize, _attribute_count: usize, failed: Out<usize>, stream: Handle,
    ) {
        for index in 0..count {
            let one = Copy::linear(dsts.at(index)?, srcs.at(index)?, sizes.at(index)? as u64);
            copy(one, stream, flavour, false).inspect_err(|_error| failed.set_optional(index))?;
        }
        Ok(())
    }

    fn cuMemsetD8_v2 | cuMemsetD8_v2_ptds(flavour; dst: DevicePtr, value: u8, count: usize) {
        fill(dst, count, u32::from(value), 1, count, 1, 0, flavour, true)
    }

    fn cuMemsetD16_v2 | cuMemsetD16_v2_ptds(flavour; dst: DevicePtr, value: u16, count: usize) {
        fill(dst, count * 2, u32::from(value), 2, count, 1, 0, flavour, true)
    }

    fn cuMemsetD32_v2 | cuMemsetD32_v2_ptds(flavour; dst: DevicePtr, value: u32, count: usize) {
        fill(dst, count * 4, value, 4, count, 1, 0, flavour, true)
    }

    fn cuMemsetD8Async | cuMemsetD8Async_ptsz(flavour; dst: DevicePtr, value: u8, count: usize, stream: Handle) {
        fill(dst, count, u32::from(value), 1, count, 1, stream, flavour, false)
    }

    fn cuMemsetD16Async | cuMemsetD16Async_ptsz(flavour; dst: DevicePtr, value: u16, count: usize, stream: Handle) {
        fill(dst, count * 2, u32::from(value), 2, count, 1, stream, flavour, false)
    }

    fn cuMemsetD32Async | cuMemsetD32Async_ptsz(flavour; dst: DevicePtr, value: u32, count: usize, stream: Handle) {
        fill(dst, count * 4, value, 4, count, 1, stream, flavour, false)
    }

    fn cuMemsetD2D8_v2 | cuMemsetD2D8_v2_ptds(flavour; dst: DevicePtr, pitch: usize, value: u8, width: usize, height: usize) {
        fill(dst, pitch, u32::from(value), 1, width, height, 0, flavour, true)
    }

    fn cuMemsetD2D16_v2 | cuMemsetD2D16_v2_ptds(flavour; dst: DevicePtr, pitch: usize, value: u16, width: usize, height: usize) {
        fill(dst, pitch, u32::from(value), 2, width, height, 0, flavour, true)
    }

    fn cuMemsetD2D32_v2 | cuMemsetD2D32_v2_ptds(flavour; dst: DevicePtr, pitch: usize, value: u32, width: usize, height: usize) {
        fill(dst, pitch, value, 4, width, height, 0, flavour, true)
    }

    fn cuMemsetD2D8Async | cuMemsetD2D8Async_ptsz(flavour; dst: DevicePtr, pitch: usize, value: u8, width: usize, height: usize, stream: Handle) {
        fill(dst, pitch, u32::from(value), 1, width, height, stream, flavour, false)
    }

    fn cuMemsetD2D16Async | cuMemsetD2D16Async_ptsz(flavour; dst: DevicePtr, pitch: usize, value: u16, width: usize, height: usize, stream: Handle) {
        fill(dst, pitch, u32::from(value), 2, width, height, stream, flavour, false)
    }

    fn cuMemsetD2D32Async | cuMemsetD2D32Async_ptsz(flavour; dst: DevicePtr, pitch: usize, value: u32, width: usize, height: usize, stream: Handle) {
        fill(dst, pitch, value, 4, width, height, stream, flavour, false)
    }

    fn cuMemPrefetchAsync | cuMemPrefetchAsync_ptsz(flavour; address: DevicePtr, len: usize, device: Device, stream: Handle) {
        let kind = if device == DEVICE_CPU { LOCATION_HOST } else { LOCATION_DEVICE };
        prefetch_async(address, len, MemLocation { kind, id: device }, stream, flavour)
    }

    fn cuMemPrefetchAsync_v2 | cuMemPrefetchAsync_v2_ptsz(
        flavour; address: DevicePtr, len: usize, to: MemLocation, flags: u32, stream: Handle,
    ) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        prefetch_async(address, len, to, stream, flavour)
    }

    fn cuMemPrefetchBatchAsync | cuMemPrefetchBatchAsync_ptsz(
        flavour; addresses: In<u64>, sizes: In<usize>, count: usize, locations: In<MemLocation>,
        indices: In<usize>, location_count: usize, _flags: u64, stream: Handle,
    ) {
        for index in 0..count {
            // Location `l` applies from range `indices[l]` on.
            let mut which = 0;
            for candidate in 0..location_count {
                if indices.at(candidate)? <= index {
                    which = candidate;
                }
            }
            prefetch_async(addresses.at(index)?, sizes.at(index)?, locations.at(which)?, stream, flavour)?;
        }
        Ok(())
    }
}
