//! Modules, libraries and functions.
//!
//! # The module format
//! Text in place of machine code: the line `nvshare-sim-module 1`, then one kernel per line: the name of a built-in, the
//! kinds of its parameters, and `as NAME` if the program knows it by another name:
//! ```text
//! nvshare-sim-module 1
//! sweep ptr u64 u64 u32
//! add ptr ptr ptr u64 as _Z3addPfPKfS1_m
//! ```
//! It ends at a NUL byte. A program may pass it bare, behind a fat binary wrapper (as `__cudaRegisterFatBinary` does), or
//! behind a fat binary header, which is what a real CUDA runtime insists on.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char, c_void},
    sync::Arc,
};

use crate::{
    abi::{
        Device, FILE_NOT_FOUND, Handle, INVALID_HANDLE, INVALID_IMAGE, INVALID_VALUE, NO_BINARY_FOR_GPU,
        NOT_FOUND, Out, Outcome, Text,
    },
    context,
    entry::driver_api,
    kernels::{Builtin, ParameterKind},
    process::{driver, log, logging},
    registry::{Registry, handle_of},
};

const MAGIC: &str = "nvshare-sim-module 1";
/// `FATBINC_MAGIC`, the wrapper that compilers emit, and the header of the container behind it.
const WRAPPER_MAGIC: u32 = 0x4662_43b1;
const CONTAINER_MAGIC: u32 = 0xba55_ed50;

/// A kernel of a module, as a program holds it (`CUfunction` and `CUkernel` alike).
pub(crate) struct Function {
    name: CString,
    pub(crate) builtin: Builtin,
    module: Handle,
}

/// What `cuModuleLoad…` and `cuLibraryLoad…` make.
pub(crate) struct Module {
    functions: BTreeMap<String, Arc<Function>>,
}

static MODULES: Registry<Module> = Registry::new();
static FUNCTIONS: Registry<Function> = Registry::new();

impl Function {
    pub(crate) fn kinds(&self) -> &'static [ParameterKind] {
        self.builtin.kinds()
    }

    /// Each parameter with its offset in a packed buffer, aligned to its size.
    pub(crate) fn layout(&self) -> impl Iterator<Item = (ParameterKind, usize)> {
        self.kinds().iter().scan(0_usize, |end, &kind| {
            let offset = end.next_multiple_of(kind.size());
            *end = offset + kind.size();
            Some((kind, offset))
        })
    }
}

pub(crate) fn function(handle: Handle) -> Outcome<Arc<Function>> {
    FUNCTIONS.get(handle)
}

/// Finds the module text behind an image pointer.
fn text<'a>(image: *const c_void) -> Outcome<&'a str> {
    let mut at = image;
    for _ in 0..4 {
        if at.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: an image is at least four bytes; each form is told by them before more is read.
        let magic = unsafe { at.cast::<u32>().read_unaligned() };
        at = match magic {
            // SAFETY: the wrapper is {magic, version, pointer to the container, …}.
            WRAPPER_MAGIC => unsafe { at.cast::<*const c_void>().add(1).read_unaligned() },
            // SAFETY: the container's header is {magic, version u16, header size u16, size u64}; the payload follows.
            CONTAINER_MAGIC => unsafe {
                let header = at.cast::<u16>().add(3).read_unaligned();
                at.byte_add(usize::from(header))
            },
            _ if magic.to_le_bytes() == MAGIC.as_bytes()[..4] => {
                // SAFETY: the format says that the text ends with a NUL.
                let text = unsafe { CStr::from_ptr(at.cast::<c_char>()) };
                return text.to_str().map_err(|_utf8| INVALID_IMAGE);
            }
            // Machine code or PTX of a real compiler.
            _ => return Err(NO_BINARY_FOR_GPU),
        };
    }
    Err(INVALID_IMAGE)
}

/// (name, built-in) of every kernel of a module text.
fn parse(text: &str) -> Result<Vec<(String, Builtin)>, String> {
    let mut lines = text.lines();
    if lines.next().map(str::trim) != Some(MAGIC) {
        return Err(format!("the first line is not `{MAGIC}`"));
    }
    let mut kernels = Vec::new();
    for line in lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let word = words.next().unwrap_or_default();
        let builtin = Builtin::parse(word).ok_or_else(|| format!("`{word}` is not a built-in kernel"))?;
        let mut name = word.to_owned();
        let mut kinds = Vec::new();
        while let Some(word) = words.next() {
            if word == "as" {
                words.next().ok_or_else(|| format!("no name after `as` in `{line}`"))?.clone_into(&mut name);
            } else {
                let kind = ParameterKind::parse(word);
                kinds.push(kind.ok_or_else(|| format!("`{word}` in `{line}` is not ptr, u64, u32 or f32"))?);
            }
        }
        if kinds != builtin.kinds() {
            return Err(format!("`{line}`: the parameters of this built-in are {:?}", builtin.kinds()));
        }
        kernels.push((name, builtin));
    }
    Ok(kernels)
}

fn load(out: Out<Handle>, image: *const c_void) -> Outcome {
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    let kernels = parse(text(image)?).map_err(|problem| {
        if logging() {
            log(&format!("module refused: {problem}"));
        }
        INVALID_IMAGE
    })?;
    let module = Arc::new_cyclic(|module| Module {
        functions: kernels
            .into_iter()
            .filter_map(|(name, builtin)| {
                let text = CString::new(name.as_str()).ok()?;
                let function = Arc::new(Function { name: text, builtin, module: module.as_ptr() as Handle });
                FUNCTIONS.insert(Arc::clone(&function));
                Some((name, function))
            })
            .collect(),
    });
    out.set(MODULES.insert(module))
}

fn load_file(out: Out<Handle>, path: Text) -> Outcome {
    let mut image = std::fs::read(path.get()?).map_err(|_unreadable| FILE_NOT_FOUND)?;
    image.push(0);
    image.resize(image.len().next_multiple_of(8), 0);
    load(out, image.as_ptr().cast())
}

fn unload(handle: Handle) -> Outcome {
    let module = MODULES.remove(handle)?;
    for function in module.functions.values() {
        FUNCTIONS.remove(handle_of(function))?;
    }
    Ok(())
}

fn find(out: Out<Handle>, module: Handle, name: Text) -> Outcome {
    let module = MODULES.get(module)?;
    out.set(handle_of(module.functions.get(name.get()?).ok_or(NOT_FOUND)?))
}

/// `CU_FUNC_ATTRIBUTE_*`.
fn attribute(value: Out<i32>, attribute: u32, function: Handle) -> Outcome {
    FUNCTIONS.get(function)?;
    value.set(match attribute {
        0 => 1024,
        4 => 32,
        5 | 6 => 90,
        8 => 48 << 10,
        9 => -1,
        1..=3 | 7 | 10..=17 => 0,
        _ => return Err(INVALID_VALUE),
    })
}

fn parameter(function: Handle, index: usize, offset: Out<usize>, size: Out<usize>) -> Outcome {
    let function = FUNCTIONS.get(function)?;
    let (kind, at) = function.layout().nth(index).ok_or(INVALID_VALUE)?;
    offset.set(at)?;
    size.set_optional(kind.size());
    Ok(())
}

driver_api! {
    fn cuModuleLoad(out: Out<Handle>, path: Text) {
        context::current()?;
        load_file(out, path)
    }

    fn cuModuleLoadData(out: Out<Handle>, image: *const c_void) {
        context::current()?;
        load(out, image)
    }

    fn cuModuleLoadDataEx(out: Out<Handle>, image: *const c_void, _count: u32, _options: usize, _values: usize) {
        context::current()?;
        load(out, image)
    }

    fn cuModuleLoadFatBinary(out: Out<Handle>, image: *const c_void) {
        context::current()?;
        load(out, image)
    }

    fn cuModuleUnload(module: Handle) {
        unload(module)
    }

    fn cuModuleGetFunction(out: Out<Handle>, module: Handle, name: Text) {
        find(out, module, name)
    }

    fn cuModuleGetFunctionCount(count: Out<u32>, module: Handle) {
        count.set(MODULES.get(module)?.functions.len() as u32)
    }

    fn cuModuleGetGlobal_v2(_address: Out<u64>, _size: Out<usize>, module: Handle, _name: Text) {
        // Modules of the simulator have no variables.
        MODULES.get(module)?;
        Err(NOT_FOUND)
    }

    fn cuModuleGetLoadingMode(mode: Out<u32>) {
        // CU_MODULE_LAZY_LOADING.
        mode.set(2)
    }

    fn cuLibraryLoadData(
        out: Out<Handle>, code: *const c_void, _jit_options: usize, _jit_values: usize, _jit_count: u32,
        _options: usize, _values: usize, _count: u32,
    ) {
        driver()?;
        load(out, code)
    }

    fn cuLibraryLoadFromFile(
        out: Out<Handle>, path: Text, _jit_options: usize, _jit_values: usize, _jit_count: u32, _options: usize,
        _values: usize, _count: u32,
    ) {
        driver()?;
        load_file(out, path)
    }

    fn cuLibraryUnload(library: Handle) {
        unload(library)
    }

    fn cuLibraryGetKernel(out: Out<Handle>, library: Handle, name: Text) {
        find(out, library, name)
    }

    fn cuLibraryGetKernelCount(count: Out<u32>, library: Handle) {
        count.set(MODULES.get(library)?.functions.len() as u32)
    }

    fn cuLibraryEnumerateKernels(out: Out<Handle>, count: u32, library: Handle) {
        let module = MODULES.get(library)?;
        for (index, function) in module.functions.values().take(count as usize).enumerate() {
            out.set_at(index, handle_of(function))?;
        }
        Ok(())
    }

    fn cuLibraryGetModule(out: Out<Handle>, library: Handle) {
        out.set(handle_of(&MODULES.get(library)?))
    }

    fn cuLibraryGetGlobal(_address: Out<u64>, _size: Out<usize>, library: Handle, _name: Text) {
        MODULES.get(library)?;
        Err(NOT_FOUND)
    }

    fn cuLibraryGetManaged(_address: Out<u64>, _size: Out<usize>, library: Handle, _name: Text) {
        MODULES.get(library)?;
        Err(NOT_FOUND)
    }

    fn cuKernelGetFunction(out: Out<Handle>, kernel: Handle) {
        // One object serves as both; it is not bound to a context.
        context::current()?;
        out.set(handle_of(&FUNCTIONS.get(kernel)?))
    }

    fn cuKernelGetLibrary(out: Out<Handle>, kernel: Handle) {
        out.set(FUNCTIONS.get(kernel)?.module)
    }

    fn cuKernelGetName(out: Out<*const c_char>, kernel: Handle) {
        out.set(FUNCTIONS.get(kernel)?.name.as_ptr())
    }

    fn cuFuncGetName(out: Out<*const c_char>, function: Handle) {
        out.set(FUNCTIONS.get(function)?.name.as_ptr())
    }

    fn cuFuncGetModule(out: Out<Handle>, function: Handle) {
        out.set(FUNCTIONS.get(function)?.module)
    }

    fn cuFuncGetAttribute(value: Out<i32>, which: u32, function: Handle) {
        attribute(value, which, function)
    }

    fn cuFuncSetAttribute(function: Handle, _which: u32, _value: i32) {
        FUNCTIONS.get(function).map(drop)
    }

    fn cuFuncSetCacheConfig(function: Handle, _config: u32) {
        FUNCTIONS.get(function).map(drop)
    }

    fn cuFuncSetSharedMemConfig(function: Handle, _config: u32) {
        FUNCTIONS.get(function).map(drop)
    }

    fn cuFuncIsLoaded(state: Out<u32>, function: Handle) {
        FUNCTIONS.get(function)?;
        state.set(1)
    }

    fn cuFuncLoad(function: Handle) {
        FUNCTIONS.get(function).map(drop)
    }

    fn cuKernelGetAttribute(value: Out<i32>, which: u32, kernel: Handle, _device: Device) {
        attribute(value, which, kernel)
    }

    fn cuKernelSetAttribute(_which: u32, _value: i32, kernel: Handle, _device: Device) {
        FUNCTIONS.get(kernel).map(drop)
    }

    fn cuKernelSetCacheConfig(kernel: Handle, _config: u32, _device: Device) {
        FUNCTIONS.get(kernel).map(drop)
    }

    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: Out<usize>, size: Out<usize>) {
        parameter(function, index, offset, size)
    }

    fn cuKernelGetParamInfo(kernel: Handle, index: usize, offset: Out<usize>, size: Out<usize>) {
        parameter(kernel, index, offset, size)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: Out<i32>, function: Handle, threads: i32, _shared: usize) {
        occupancy(blocks, function, threads)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<i32>, function: Handle, threads: i32, _shared: usize, _flags: u32,
    ) {
        occupancy(blocks, function, threads)
    }
}

/// Bound by the 2048 threads and 32 blocks of a multiprocessor of compute capability 9.0.
fn occupancy(blocks: Out<i32>, function: Handle, threads: i32) -> Outcome {
    FUNCTIONS.get(function).map_err(|_unknown| INVALID_HANDLE)?;
    if !(1..=1024).contains(&threads) {
        return Err(INVALID_VALUE);
    }
    blocks.set((2048 / threads).min(32))
}

/// Reads the `CUgraphNode`-style function handle of kernel node parameters, whichever of the two forms is set.
pub(crate) fn node_function(function: Handle, kernel: Handle) -> Outcome<Arc<Function>> {
    FUNCTIONS.get(if function == 0 { kernel } else { function })
}
