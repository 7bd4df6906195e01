//! Contexts: the current one of each thread, the primary one of each device, and what belongs to a context.

use std::{
    cell::RefCell,
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use crate::{
    abi::{
        CONTEXT_IS_DESTROYED, CUresult, Device, Handle, INVALID_CONTEXT, INVALID_VALUE, Out, Outcome,
        PEER_ACCESS_UNSUPPORTED,
    },
    entry::driver_api,
    graph, memory,
    process::{driver, gpu_index},
    registry::{Registry, handle_of, lock},
    stream::{Kind, Stream},
};

/// A context and the streams that belong to it.
pub(crate) struct Context {
    pub(crate) gpu: usize,
    flags: AtomicU32,
    destroyed: AtomicBool,
    /// The error that made the context unusable, 0 while it is sound.
    fault: Arc<AtomicU32>,
    pub(crate) legacy: Arc<Stream>,
    streams: Mutex<Vec<Weak<Stream>>>,
    /// Held while an operation learns what it must wait for, so that dependencies always point backwards.
    pub(crate) submitting: Mutex<()>,
    limits: Mutex<[Option<usize>; 8]>,
}

pub(crate) static CONTEXTS: Registry<Context> = Registry::new();

struct Primary {
    references: u32,
    flags: u32,
    context: Option<Arc<Context>>,
}

thread_local! {
    static STACK: RefCell<Vec<Arc<Context>>> = const { RefCell::new(Vec::new()) };
}

impl Context {
    fn create(gpu: usize, flags: u32) -> Arc<Self> {
        let fault = Arc::new(AtomicU32::new(0));
        let context = Arc::new_cyclic(|context| Self {
            gpu,
            flags: AtomicU32::new(flags),
            destroyed: AtomicBool::new(false),
            legacy: Stream::create(context.clone(), gpu, Arc::clone(&fault), Kind::Legacy, 0, 0),
            fault,
            streams: Mutex::new(Vec::new()),
            submitting: Mutex::new(()),
            limits: Mutex::new([None; 8]),
        });
        CONTEXTS.insert(Arc::clone(&context));
        context
    }

    pub(crate) fn add_stream(self: &Arc<Self>, kind: Kind, flags: u32, priority: i32) -> Arc<Stream> {
        let stream =
            Stream::create(Arc::downgrade(self), self.gpu, Arc::clone(&self.fault), kind, flags, priority);
        let mut streams = lock(&self.streams);
        streams.retain(|known| known.strong_count() > 0);
        streams.push(Arc::downgrade(&stream));
        stream
    }

    /// Every stream, the legacy one first.
    pub(crate) fn streams(&self) -> Vec<Arc<Stream>> {
        let mut all = vec![Arc::clone(&self.legacy)];
        all.extend(lock(&self.streams).iter().filter_map(Weak::upgrade));
        all
    }

    /// The error of an earlier operation that makes every later call fail.
    pub(crate) fn check(&self) -> Outcome {
        if self.destroyed.load(Ordering::Acquire) {
            return Err(CONTEXT_IS_DESTROYED);
        }
        match self.fault.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(CUresult(code)),
        }
    }

    /// Waits for everything submitted so far.
    pub(crate) fn synchronize(&self) -> Outcome {
        for stream in self.streams() {
            stream.wait_idle();
        }
        self.check()
    }

    fn destroy(&self) {
        for stream in self.streams() {
            if let Some(capture) = stream.capture() {
                capture.stream_destroyed(&stream);
            }
            stream.wait_idle();
            stream.close();
        }
        self.destroyed.store(true, Ordering::Release);
        memory::free_all_of(std::ptr::from_ref(self) as Handle);
    }
}

/// The calling thread's context, sound and alive.
pub(crate) fn current() -> Outcome<Arc<Context>> {
    driver()?;
    let context = STACK.with_borrow(|stack| stack.last().cloned()).ok_or(INVALID_CONTEXT)?;
    context.check()?;
    Ok(context)
}

fn current_or_named(handle: Handle) -> Outcome<Arc<Context>> {
    if handle == 0 { current() } else { CONTEXTS.get(handle).map_err(|_unknown| INVALID_CONTEXT) }
}

fn primaries() -> Outcome<&'static Vec<Mutex<Primary>>> {
    static PRIMARIES: OnceLock<Vec<Mutex<Primary>>> = OnceLock::new();
    let count = driver()?.gpus.len();
    Ok(PRIMARIES.get_or_init(|| {
        (0..count).map(|_| Mutex::new(Primary { references: 0, flags: 0, context: None })).collect()
    }))
}

pub(crate) fn retain_primary(device: Device) -> Outcome<Arc<Context>> {
    let gpu = gpu_index(device)?;
    let mut primary = lock(&primaries()?[gpu]);
    primary.references += 1;
    let flags = primary.flags;
    Ok(Arc::clone(primary.context.get_or_insert_with(|| Context::create(gpu, flags))))
}

fn release_primary(device: Device) -> Outcome {
    let mut primary = lock(&primaries()?[gpu_index(device)?]);
    if primary.references == 0 {
        return Err(INVALID_CONTEXT);
    }
    primary.references -= 1;
    if primary.references == 0
        && let Some(context) = primary.context.take()
    {
        context.destroy();
        CONTEXTS.remove(handle_of(&context))?;
    }
    Ok(())
}

fn set_primary_flags(device: Device, flags: u32) -> Outcome {
    let mut primary = lock(&primaries()?[gpu_index(device)?]);
    primary.flags = flags;
    if let Some(context) = &primary.context {
        context.flags.store(flags, Ordering::Relaxed);
    }
    Ok(())
}

fn push(context: Arc<Context>) {
    STACK.with_borrow_mut(|stack| stack.push(context));
}

fn create(out: Out<Handle>, flags: u32, device: Device) -> Outcome {
    let gpu = gpu_index(device)?;
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    let context = Context::create(gpu, flags);
    out.set(handle_of(&context))?;
    push(context);
    Ok(())
}

fn pop(out: Out<Handle>) -> Outcome {
    driver()?;
    let context = STACK.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)?;
    out.set_optional(handle_of(&context));
    Ok(())
}

fn synchronize(context: &Context) -> Outcome {
    graph::forbid_while_capturing(context)?;
    context.synchronize()
}

driver_api! {
    fn cuDevicePrimaryCtxRetain(out: Out<Handle>, device: Device) {
        if out.is_null() {
            return Err(INVALID_VALUE);
        }
        out.set(handle_of(&retain_primary(device)?))
    }

    fn cuDevicePrimaryCtxRelease(device: Device) {
        release_primary(device)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: Device) {
        release_primary(device)
    }

    fn cuDevicePrimaryCtxSetFlags(device: Device, flags: u32) {
        set_primary_flags(device, flags)
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: Device, flags: u32) {
        set_primary_flags(device, flags)
    }

    fn cuDevicePrimaryCtxGetState(device: Device, flags: Out<u32>, active: Out<i32>) {
        let primary = lock(&primaries()?[gpu_index(device)?]);
        flags.set(primary.flags)?;
        active.set(i32::from(primary.context.is_some()))
    }

    fn cuDevicePrimaryCtxReset(device: Device) {
        reset_primary(device)
    }

    fn cuDevicePrimaryCtxReset_v2(device: Device) {
        reset_primary(device)
    }

    fn cuCtxCreate_v2(out: Out<Handle>, flags: u32, device: Device) {
        create(out, flags, device)
    }

    fn cuCtxCreate_v3(out: Out<Handle>, _affinity: usize, _count: i32, flags: u32, device: Device) {
        create(out, flags, device)
    }

    fn cuCtxCreate_v4(out: Out<Handle>, _params: usize, flags: u32, device: Device) {
        create(out, flags, device)
    }

    fn cuCtxDestroy_v2(handle: Handle) {
        driver()?;
        let context = CONTEXTS.remove(handle).map_err(|_unknown| INVALID_CONTEXT)?;
        context.destroy();
        STACK.with_borrow_mut(|stack| {
            if stack.last().is_some_and(|top| Arc::ptr_eq(top, &context)) {
                stack.pop();
            }
        });
        Ok(())
    }

    fn cuCtxDetach(handle: Handle) {
        if cuCtxDestroy_v2(handle) == crate::abi::SUCCESS { Ok(()) } else { Err(INVALID_CONTEXT) }
    }

    fn cuCtxPushCurrent_v2(handle: Handle) {
        driver()?;
        push(CONTEXTS.get(handle).map_err(|_unknown| INVALID_CONTEXT)?);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(out: Out<Handle>) {
        pop(out)
    }

    fn cuCtxSetCurrent(handle: Handle) {
        driver()?;
        let context = match handle {
            0 => None,
            handle => Some(CONTEXTS.get(handle).map_err(|_unknown| INVALID_CONTEXT)?),
        };
        STACK.with_borrow_mut(|stack| {
            stack.pop();
            stack.extend(context);
        });
        Ok(())
    }

    fn cuCtxGetCurrent(out: Out<Handle>) {
        driver()?;
        out.set(STACK.with_borrow(|stack| stack.last().map_or(0, handle_of)))
    }

    fn cuCtxGetDevice(device: Out<Device>) {
        driver()?;
        // Asked of unsound contexts too: which device it is does not depend on errors.
        let gpu = STACK.with_borrow(|stack| stack.last().map(|context| context.gpu)).ok_or(INVALID_CONTEXT)?;
        device.set(gpu as Device)
    }

    fn cuCtxGetDevice_v2(device: Out<Device>, handle: Handle) {
        device.set(current_or_named(handle)?.gpu as Device)
    }

    fn cuCtxSynchronize() {
        synchronize(&*current()?)
    }

    fn cuCtxSynchronize_v2(handle: Handle) {
        synchronize(&*current_or_named(handle)?)
    }

    fn cuCtxGetFlags(flags: Out<u32>) {
        flags.set(current()?.flags.load(Ordering::Relaxed))
    }

    fn cuCtxSetFlags(flags: u32) {
        current()?.flags.store(flags, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxGetId(handle: Handle, id: Out<u64>) {
        id.set(handle_of(&current_or_named(handle)?) as u64)
    }

    fn cuCtxGetApiVersion(_handle: Handle, version: Out<u32>) {
        version.set(3020)
    }

    fn cuCtxGetLimit(value: Out<usize>, limit: u32) {
        let context = current()?;
        let stored = *lock(&context.limits).get(limit as usize).ok_or(INVALID_VALUE)?;
        // CU_LIMIT_*: stack, printf buffer, device malloc heap, sync depth, pending launches, L2 granularity, L2 persisting.
        let default = [1024, 1 << 20, 8 << 20, 2, 2048, 64, 0, 0][limit as usize];
        value.set(stored.unwrap_or(default))
    }

    fn cuCtxSetLimit(limit: u32, value: usize) {
        let context = current()?;
        *lock(&context.limits).get_mut(limit as usize).ok_or(INVALID_VALUE)? = Some(value);
        Ok(())
    }

    fn cuCtxGetCacheConfig(config: Out<u32>) {
        current()?;
        config.set(0)
    }

    fn cuCtxSetCacheConfig(_config: u32) {
        current().map(drop)
    }

    fn cuCtxGetSharedMemConfig(config: Out<u32>) {
        current()?;
        config.set(1)
    }

    fn cuCtxSetSharedMemConfig(_config: u32) {
        current().map(drop)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        current()?;
        least.set_optional(0);
        greatest.set_optional(-5);
        Ok(())
    }

    fn cuCtxResetPersistingL2Cache() {
        current().map(drop)
    }

    fn cuCtxEnablePeerAccess(_peer: Handle, _flags: u32) {
        Err(PEER_ACCESS_UNSUPPORTED)
    }

    fn cuCtxDisablePeerAccess(_peer: Handle) {
        Err(PEER_ACCESS_UNSUPPORTED)
    }
}

fn reset_primary(device: Device) -> Outcome {
    // It must still be released as often as it was retained.
    let mut primary = lock(&primaries()?[gpu_index(device)?]);
    if let Some(context) = primary.context.take() {
        context.destroy();
        CONTEXTS.remove(handle_of(&context))?;
    }
    Ok(())
}
