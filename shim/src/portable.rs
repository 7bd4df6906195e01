//! What the portable library (`cargo xtask shim`) brings itself, so that it needs nothing but an old C library.
//!
//! **Problem.** Catching a panic takes libgcc_s, which small images lack. And two functions that std and we call were
//! no part of the shared C library in old versions: each program had them linked in.
//!
//! **Approach.** An unwinder in Rust stands in for libgcc_s; the two functions are here.
//!
//! **Invariant.** None of these names is exported: the final link (in `cargo xtask shim`) hides them. A foreign
//! unwinder therefore never meets ours.

use std::{ffi::c_void, mem::transmute, ptr};

use libc::c_int;
// Nothing calls it by name: std refers to its functions as it would to libgcc_s's.
use unwinding as _;

use crate::loader::elf;

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
