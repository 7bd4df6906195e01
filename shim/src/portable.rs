//! What the portable library (`cargo xtask shim`) brings itself, so that it needs nothing but an old C library.
//!
//! **Problem.** Catching a panic takes libgcc_s, which small images lack: a library that needs it keeps their programs
//! from starting. And two functions that std and we call were no part of the shared C library in old versions: each
//! program had them linked in.
//!
//! **Approach.** The unwinder's functions are found in libgcc_s when they are first called. An unwinder of our own would
//! be independent of it, but wrong: where a program cancels a thread inside the driver, libgcc_s unwinds through our
//! frames, and the code that cleans up after them must ask the unwinder that called it. The two functions of the C
//! library are here.
//!
//! **Invariants.** None of these names is exported: the final link hides them. Without libgcc_s a panic, which is a
//! defect of ours, ends the program with std's message; nothing else differs.

use std::{
    ffi::{CStr, c_void},
    mem::transmute,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use libc::c_int;

use crate::loader::elf;

/// `_URC_FATAL_PHASE1_ERROR`: std says that it could not begin a panic, and aborts.
const CANNOT_RAISE: c_int = 3;

/// A function of libgcc_s, loaded if it can be.
fn of_unwinder(known: &AtomicPtr<c_void>, name: &CStr) -> Option<*mut c_void> {
    let mut address = known.load(Ordering::Acquire);
    if address.is_null() {
        // SAFETY: a valid name. The handle is kept: who unwinds is never unloaded.
        let loaded = unsafe { !libc::dlopen(c"libgcc_s.so.1".as_ptr(), libc::RTLD_LAZY).is_null() };
        if loaded {
            address = elf::symbol_of(c"libgcc_s.so.1", name);
        }
        known.store(address, Ordering::Release);
    }
    (!address.is_null()).then_some(address)
}

/// Defines functions that call libgcc_s's of the same name, and what they do where there is none.
macro_rules! forwarded {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $result:ty, or $default:expr;)*) => {$(
        // An unwinder passes through this frame: hence the ABI, and no variable that would need a destructor.
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: $ty),*) -> $result {
            static KNOWN: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
            const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("an identifier holds no zero byte"),
            };
            match of_unwinder(&KNOWN, NAME) {
                None => $default,
                Some(address) => {
                    // SAFETY: the symbol has this type in every libgcc_s.
                    let function: unsafe extern "C-unwind" fn($($ty),*) -> $result = unsafe { transmute(address) };
                    // SAFETY: the caller's own arguments.
                    unsafe { function($($arg),*) }
                }
            }
        }
    )*};
}

type Context = *mut c_void;
type Exception = *mut c_void;

forwarded! {
    _Unwind_RaiseException(exception: Exception) -> c_int, or CANNOT_RAISE;
    // What follows is called only while somebody unwinds.
    _Unwind_Resume(exception: Exception) -> (), or std::process::abort();
    _Unwind_DeleteException(exception: Exception) -> (), or ();
    _Unwind_GetLanguageSpecificData(context: Context) -> *mut c_void, or ptr::null_mut();
    _Unwind_GetIPInfo(context: Context, before: *mut c_int) -> usize, or 0;
    _Unwind_GetRegionStart(context: Context) -> usize, or 0;
    _Unwind_GetTextRelBase(context: Context) -> usize, or 0;
    _Unwind_GetDataRelBase(context: Context) -> usize, or 0;
    _Unwind_SetGR(context: Context, register: c_int, value: usize) -> (), or ();
    _Unwind_SetIP(context: Context, value: usize) -> (), or ();
}

/// `fstat64(2)`, which the C library exports from 2.33 on.
#[unsafe(no_mangle)]
unsafe extern "C" fn fstat64(file: c_int, place: *mut libc::stat64) -> c_int {
    // SAFETY: the caller's own arguments. On 64-bit machines the kernel writes the C library's layout.
    unsafe { libc::syscall(libc::SYS_fstat, file, place) as c_int }
}

type Handler = Option<unsafe extern "C" fn()>;

/// `pthread_atfork(3)`: in glibc a shell around `__register_atfork` that each program has for itself.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> c_int {
    let register = elf::symbol_of(c"libc.so.6", c"__register_atfork");
    if !register.is_null() {
        // SAFETY: the symbol has this type in every glibc.
        let register: unsafe extern "C" fn(Handler, Handler, Handler, *mut c_void) -> c_int =
            unsafe { transmute(register) };
        // SAFETY: the caller's own handlers. A null owner is never unloaded, nor is the shim.
        return unsafe { register(prepare, parent, child, ptr::null_mut()) };
    }
    // musl has it in its shared library.
    let plain = elf::symbol_of(c"libc.so.6", c"pthread_atfork");
    if plain.is_null() {
        return libc::ENOSYS;
    }
    // SAFETY: the symbol has this type in every C library.
    let plain: unsafe extern "C" fn(Handler, Handler, Handler) -> c_int = unsafe { transmute(plain) };
    // SAFETY: the caller's own handlers.
    unsafe { plain(prepare, parent, child) }
}
