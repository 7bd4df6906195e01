//! The exported `dlsym` and `dlvsym`: naked, so that the real function sees the program as its caller.

#![expect(unreachable_pub, reason = "exported by name from the library, not by path")]

use std::{
    arch::naked_asm,
    ffi::{c_char, c_void},
};

/// `dlsym(3)`.
///
/// # Safety
/// As for the C library's function.
#[cfg(target_arch = "x86_64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    // The return address and two saved arguments leave the stack 8 bytes off the 16 that a call needs.
    naked_asm!(
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {resolve}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "test rax, rax",
        "jnz 2f",
        "jmp qword ptr [rip + {real}]",
        "2:",
        "mov rax, rdx",
        "ret",
        resolve = sym super::resolve,
        real = sym super::REAL_DLSYM,
    )
}

/// `dlvsym(3)`.
///
/// # Safety
/// As for the C library's function.
#[cfg(target_arch = "x86_64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
pub unsafe extern "C" fn dlvsym(
    handle: *mut c_void,
    name: *const c_char,
    version: *const c_char,
) -> *mut c_void {
    naked_asm!(
        "push rdi",
        "push rsi",
        "push rdx",
        "call {resolve}",
        "mov rcx, rdx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "test rax, rax",
        "jnz 2f",
        "jmp qword ptr [rip + {real}]",
        "2:",
        "mov rax, rcx",
        "ret",
        resolve = sym super::resolve_versioned,
        real = sym super::REAL_DLVSYM,
    )
}

/// `dlsym(3)`.
///
/// # Safety
/// As for the C library's function.
#[cfg(target_arch = "aarch64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    naked_asm!(
        "stp x29, x30, [sp, #-32]!",
        "stp x0, x1, [sp, #16]",
        "mov x29, sp",
        "bl {resolve}",
        "mov x16, x0",
        "mov x17, x1",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        "cbnz x16, 2f",
        "adrp x16, {real}",
        "ldr x16, [x16, :lo12:{real}]",
        "br x16",
        "2:",
        "mov x0, x17",
        "ret",
        resolve = sym super::resolve,
        real = sym super::REAL_DLSYM,
    )
}

/// `dlvsym(3)`.
///
/// # Safety
/// As for the C library's function.
#[cfg(target_arch = "aarch64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
pub unsafe extern "C" fn dlvsym(
    handle: *mut c_void,
    name: *const c_char,
    version: *const c_char,
) -> *mut c_void {
    naked_asm!(
        "stp x29, x30, [sp, #-48]!",
        "stp x0, x1, [sp, #16]",
        "str x2, [sp, #32]",
        "mov x29, sp",
        "bl {resolve}",
        "mov x16, x0",
        "mov x17, x1",
        "ldr x2, [sp, #32]",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #48",
        "cbnz x16, 2f",
        "adrp x16, {real}",
        "ldr x16, [x16, :lo12:{real}]",
        "br x16",
        "2:",
        "mov x0, x17",
        "ret",
        resolve = sym super::resolve_versioned,
        real = sym super::REAL_DLVSYM,
    )
}
