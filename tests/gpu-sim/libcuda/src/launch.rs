//! Operations of a stream, and the launch functions.

use std::{
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use nvshare_gpu_sim_model::client::Location;

use crate::{
    abi::{Handle, HostFn, INVALID_HANDLE, INVALID_VALUE, In, LaunchConfig, Outcome, StreamCallback},
    copy::{self, Copy, Fill},
    entry::stream_api,
    event::Event,
    kernels::Argument,
    memory,
    module::{self, Function},
    pool,
    stream::{Flavour, resolve},
};

/// Something a stream does.
#[derive(Clone)]
pub(crate) enum Operation {
    Nothing,
    Kernel(Launch),
    Copy(Copy),
    Fill(Fill),
    Prefetch {
        address: u64,
        len: u64,
        to: Location,
    },
    Call(Callback),
    Record(Arc<Event>),
    Free(u64),
    WriteValue {
        address: u64,
        value: u64,
        bytes: u8,
    },
    WaitValue {
        address: u64,
        value: u64,
        flags: u32,
        bytes: u8,
    },
    /// The operations of a graph, in order.
    Graph(Arc<Vec<Operation>>),
}

#[derive(Clone)]
pub(crate) struct Launch {
    pub(crate) function: Arc<Function>,
    pub(crate) arguments: Arc<[Argument]>,
}

/// A host function with its argument.
#[derive(Clone, Copy)]
pub(crate) struct Callback {
    target: Target,
    argument: *mut c_void,
}

#[derive(Clone, Copy)]
enum Target {
    Host(HostFn),
    Stream(StreamCallback, Handle),
}

// SAFETY: the program hands function and argument to the driver in order that another thread calls the one with the other.
unsafe impl Send for Callback {}
// SAFETY: as above.
unsafe impl Sync for Callback {}

impl Callback {
    pub(crate) fn host(function: HostFn, argument: *mut c_void) -> Self {
        Self { target: Target::Host(function), argument }
    }

    pub(crate) fn stream(function: StreamCallback, stream: Handle, argument: *mut c_void) -> Self {
        Self { target: Target::Stream(function, stream), argument }
    }

    fn call(&self) {
        match self.target {
            Target::Host(function) => function(self.argument),
            Target::Stream(function, stream) => function(stream, 0, self.argument),
        }
    }
}

impl Operation {
    /// Carries the operation out on the calling worker.
    pub(crate) fn execute(&self, gpu: usize) -> Outcome {
        match self {
            Self::Nothing => Ok(()),
            Self::Kernel(launch) => launch.function.builtin.run(gpu, &launch.arguments),
            Self::Copy(copy) => copy.execute(gpu),
            Self::Fill(fill) => fill.execute(gpu),
            Self::Prefetch { address, len, to } => copy::prefetch(*address, *len, *to),
            Self::Call(callback) => {
                callback.call();
                Ok(())
            }
            Self::Record(event) => {
                event.pass();
                Ok(())
            }
            Self::Free(address) => pool::free(*address),
            Self::WriteValue { address, value, bytes } => {
                let (target, _) = memory::kernel_access(*address, u64::from(*bytes))?;
                // SAFETY: in bounds of a live allocation; the driver requires natural alignment, checked here.
                unsafe {
                    match bytes {
                        4 if target.cast::<u32>().is_aligned() => {
                            (*target.cast::<AtomicU32>()).store(*value as u32, Ordering::Release);
                        }
                        8 if target.cast::<u64>().is_aligned() => {
                            (*target.cast::<AtomicU64>()).store(*value, Ordering::Release);
                        }
                        _ => return Err(INVALID_VALUE),
                    }
                }
                Ok(())
            }
            Self::WaitValue { address, value, flags, bytes } => wait_value(*address, *value, *flags, *bytes),
            Self::Graph(operations) => operations.iter().try_for_each(|operation| operation.execute(gpu)),
        }
    }
}

/// `CU_STREAM_WAIT_VALUE_*`: greater or equal (cyclic), equal, and, nor.
fn wait_value(address: u64, value: u64, flags: u32, bytes: u8) -> Outcome {
    /// The hardware polls; so does this, at a rate that does not load the machine.
    const POLL: Duration = Duration::from_micros(50);
    loop {
        let (target, _) = memory::kernel_access(address, u64::from(bytes))?;
        if !(target.cast::<u64>().is_aligned() || bytes == 4 && target.cast::<u32>().is_aligned()) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: in bounds of a live allocation and aligned.
        let (seen, ahead) = unsafe {
            if bytes == 4 {
                let seen = (*target.cast::<AtomicU32>()).load(Ordering::Acquire);
                (u64::from(seen), seen.wrapping_sub(value as u32).cast_signed() >= 0)
            } else {
                let seen = (*target.cast::<AtomicU64>()).load(Ordering::Acquire);
                (seen, seen.wrapping_sub(value).cast_signed() >= 0)
            }
        };
        let met = match flags & 3 {
            0 => ahead,
            1 => seen == value,
            2 => seen & value != 0,
            _ => !(seen | value) & (u64::MAX >> (64 - 8 * u32::from(bytes))) != 0,
        };
        if met {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
}

/// `CU_LAUNCH_PARAM_*` of the `extra` array.
const PARAM_BUFFER: usize = 1;

/// Reads a kernel's arguments as the program packed them.
pub(crate) fn arguments(
    function: &Function,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> Outcome<Arc<[Argument]>> {
    let kinds = function.kinds();
    if kinds.is_empty() {
        return Ok(Arc::new([]));
    }
    if !params.is_null() {
        return kinds
            .iter()
            .enumerate()
            .map(|(index, kind)| {
                // SAFETY: the C contract gives one pointer per parameter of the kernel.
                let at = unsafe { *params.add(index) };
                kind.read(at)
            })
            .collect();
    }
    if extra.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the C contract: key, value, …, terminated by a null key; the buffer holds the parameters in layout order.
    unsafe {
        let mut at = extra;
        while !(*at).is_null() {
            if *at as usize == PARAM_BUFFER {
                let buffer = (*at.add(1)).cast::<u8>();
                return function
                    .layout()
                    .map(|(kind, offset)| kind.read(buffer.add(offset).cast()))
                    .collect();
            }
            at = at.add(2);
        }
    }
    Err(INVALID_VALUE)
}

fn launch(
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    stream: Handle,
    params: *const *const c_void,
    extra: *const *const c_void,
    flavour: Flavour,
) -> Outcome {
    let stream = resolve(stream, flavour)?;
    if grid.contains(&0) || block.contains(&0) || block.iter().product::<u32>() > 1024 {
        return Err(INVALID_VALUE);
    }
    let function = module::function(function).map_err(|_unknown| INVALID_HANDLE)?;
    let arguments = arguments(&function, params, extra)?;
    stream.add(Operation::Kernel(Launch { function, arguments })).map(drop)
}

stream_api! {
    fn cuLaunchKernel | cuLaunchKernel_ptsz(
        flavour; function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, _shared: u32,
        stream: Handle, params: *const *const c_void, extra: *const *const c_void,
    ) {
        launch(function, [gx, gy, gz], [bx, by, bz], stream, params, extra, flavour)
    }

    fn cuLaunchCooperativeKernel | cuLaunchCooperativeKernel_ptsz(
        flavour; function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, _shared: u32,
        stream: Handle, params: *const *const c_void,
    ) {
        launch(function, [gx, gy, gz], [bx, by, bz], stream, params, std::ptr::null(), flavour)
    }

    fn cuLaunchKernelEx | cuLaunchKernelEx_ptsz(
        flavour; config: In<LaunchConfig>, function: Handle, params: *const *const c_void,
        extra: *const *const c_void,
    ) {
        let config = config.get()?;
        launch(function, config.grid, config.block, config.stream, params, extra, flavour)
    }
}
