//! How the shim comes between a program and the driver when the program asks for symbols by name.
//!
//! **Problem.** Nearly every CUDA program gets at the driver through `dlsym`, so the shim exports `dlsym` and
//! `dlvsym`. glibc answers `RTLD_NEXT` by the caller's return address: a wrapper that *calls* the real
//! function makes itself the caller and sends other preloaded libraries into endless recursion.
//!
//! **Approach.** The exports ([`trampoline`]) are naked: they save the arguments, ask [`resolve`] whether it
//! answers in the driver's place, and else *jump* to the real function with arguments and return address as
//! they were. The real `dlvsym` is taken from libc's own hash table ([`elf`]), the real `dlsym` is the next
//! one after us.
//!
//! **Invariants.** A look-up that fails without the shim fails with it, and leaves the same `dlerror`. Only a
//! symbol that lies in the driver's own object is replaced. `RTLD_NEXT` is never touched: who asks for it is
//! an interposer itself.

pub(crate) mod elf;
mod library;
mod trampoline;

pub(crate) use library::{CUDA, Library, NVML};

use std::{
    ffi::{CStr, c_char, c_void},
    mem::transmute,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use crate::{abi::Ptr, config, hooks::nvml, table, table::Real};

type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;
type Dlvsym = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char) -> *mut c_void;

#[cfg(target_arch = "x86_64")]
const BASE_VERSION: &CStr = c"GLIBC_2.2.5";
#[cfg(target_arch = "aarch64")]
const BASE_VERSION: &CStr = c"GLIBC_2.17";

/// The next `dlsym`; the trampoline jumps through this word. Filled by [`bootstrap`].
static REAL_DLSYM: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
/// The real `dlvsym`; likewise.
static REAL_DLVSYM: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// What the trampoline does next; two words, returned in two registers.
#[repr(C)]
pub(crate) struct Answer {
    /// 1: return `pointer`; 0: jump to the real function.
    answered: usize,
    pointer: *mut c_void,
}

const JUMP: Answer = Answer { answered: 0, pointer: ptr::null_mut() };

/// Finds the real functions. Idempotent, without locks or allocation, because it may run inside anything.
fn bootstrap() {
    if !REAL_DLSYM.load(Ordering::Acquire).is_null() {
        return;
    }
    let mut versioned = elf::symbol_of(c"libc.so.6", c"dlvsym");
    if versioned.is_null() {
        // Before glibc 2.34 both functions lived in libdl.
        versioned = elf::symbol_of(c"libdl.so.2", c"dlvsym");
    }
    let plain = if versioned.is_null() {
        // musl has no symbol versions: its `dlsym` is the only one.
        versioned = no_versions as *mut c_void;
        elf::symbol_of(c"libc.so.6", c"dlsym")
    } else {
        // SAFETY: the symbol has this type in every glibc.
        let dlvsym: Dlvsym = unsafe { transmute(versioned) };
        // SAFETY: names are valid C strings.
        unsafe { dlvsym(libc::RTLD_NEXT, c"dlsym".as_ptr(), BASE_VERSION.as_ptr()) }
    };
    if plain.is_null() {
        die();
    }
    REAL_DLVSYM.store(versioned, Ordering::Release);
    REAL_DLSYM.store(plain, Ordering::Release);
}

/// The `dlvsym` of a C library that has none.
extern "C" fn no_versions(_: *mut c_void, _: *const c_char, _: *const c_char) -> *mut c_void {
    ptr::null_mut()
}

/// Without the real function there is nothing to jump to. It takes a C library that is neither glibc nor musl.
fn die() -> ! {
    let text = b"nvshare: this C library has no dlsym; unset LD_PRELOAD for this program\n";
    // SAFETY: plain write of a constant, then the end of the process.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::abort()
    }
}

fn dlsym_real(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    bootstrap();
    // SAFETY: bootstrap stored a `dlsym`.
    let real: Dlsym = unsafe { transmute(REAL_DLSYM.load(Ordering::Acquire)) };
    // SAFETY: `handle` and `name` come from a caller of `dlsym` or are our own constants.
    unsafe { real(handle, name) }
}

fn might_be_driver_name(name: *const c_char) -> bool {
    // SAFETY: null or a C string; what differs from the prefix ends the comparison, at its end at the latest.
    let begins = |prefix: &[u8]| unsafe {
        prefix.iter().enumerate().all(|(index, &byte)| *name.add(index) as u8 == byte)
    };
    // SAFETY: as above; a name that begins with `cu` has a third byte.
    !name.is_null()
        && (begins(b"cu") && unsafe { *name.add(2) as u8 }.is_ascii_uppercase() || begins(b"nvmlDevice"))
}

/// A hooked function of one of the driver's libraries.
struct Hook {
    library: &'static Library,
    wrapper: Ptr,
    real: &'static Real,
}

impl Hook {
    fn of(symbol: &CStr) -> Option<Self> {
        let cuda = || {
            table::by_symbol(symbol).map(|row| Self {
                library: &CUDA,
                wrapper: row.wrapper(),
                real: row.real(),
            })
        };
        let nvml = || nvml::by_symbol(symbol).map(|(wrapper, real)| Self { library: &NVML, wrapper, real });
        cuda().or_else(nvml)
    }
}

/// Decides what a `dlsym` gets. Called by the trampoline only.
extern "C" fn resolve(handle: *mut c_void, name: *const c_char) -> Answer {
    bootstrap();
    if !might_be_driver_name(name) || handle == libc::RTLD_NEXT {
        return JUMP;
    }
    std::panic::catch_unwind(|| answer(handle, name, dlsym_real)).unwrap_or(JUMP)
}

/// Decides what a `dlvsym` gets. Called by the trampoline only.
extern "C" fn resolve_versioned(handle: *mut c_void, name: *const c_char, version: *const c_char) -> Answer {
    bootstrap();
    if !might_be_driver_name(name) || handle == libc::RTLD_NEXT {
        return JUMP;
    }
    // SAFETY: bootstrap stored a `dlvsym`.
    let real: Dlvsym = unsafe { transmute(REAL_DLVSYM.load(Ordering::Acquire)) };
    std::panic::catch_unwind(|| {
        answer(handle, name, |handle, name| {
            // SAFETY: the caller's own arguments.
            unsafe { real(handle, name, version) }
        })
    })
    .unwrap_or(JUMP)
}

fn answer(
    handle: *mut c_void,
    name: *const c_char,
    look_up: impl Fn(*mut c_void, *const c_char) -> *mut c_void,
) -> Answer {
    // SAFETY: the caller checked that it is a C string.
    let symbol = unsafe { CStr::from_ptr(name) };
    let Some(hook) = Hook::of(symbol) else { return JUMP };
    let mut found = look_up(handle, name);
    if found == hook.wrapper {
        // A search of the whole program meets our export first; what counts is what it meets without us.
        found = look_up(libc::RTLD_NEXT, name);
    }
    if found.is_null() || config::get().disabled || !hook.library.holds(found) {
        return Answer { answered: 1, pointer: found };
    }
    hook.real.remember(found);
    Answer { answered: 1, pointer: hook.wrapper }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_not_hooked_is_answered_as_without_us() {
        for name in [c"malloc", c"cuInit", c"cuMemAlloc_v2", c"no_such_name", c"cu", c""] {
            // SAFETY: look-ups by valid names, through the exports and through the C library.
            let (ours, versioned, theirs) = unsafe {
                (
                    trampoline::dlsym(libc::RTLD_DEFAULT, name.as_ptr()),
                    trampoline::dlvsym(libc::RTLD_DEFAULT, name.as_ptr(), BASE_VERSION.as_ptr()),
                    libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()),
                )
            };
            assert_eq!(ours, theirs, "{name:?}");
            assert_eq!(versioned.is_null(), theirs.is_null(), "{name:?}");
        }
    }
}
