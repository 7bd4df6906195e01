//! One symbol of an already loaded ELF object, found without calling `dlsym` or `dlvsym`.
//!
//! The shim exports both of those names, so a reference to either would lead back to itself. The object's own
//! GNU hash table is the way around: it is part of the stable ELF ABI and mapped into every process. The object is found
//! in the list that the dynamic linker keeps for debuggers: `dlopen` may be wrapped by a library (a sanitizer's) that is
//! itself looking for the real one at that moment.

use std::ffi::{CStr, c_void};

/// The public beginning of `struct link_map`, which is also what a handle of `dlopen` points at.
#[repr(C)]
struct LinkMap {
    base: usize,
    name: *const libc::c_char,
    dynamic: *const Dyn,
    next: *const LinkMap,
}

/// The beginning of `struct r_debug`.
#[repr(C)]
struct Debug {
    version: i32,
    first: *const LinkMap,
}

#[repr(C)]
struct Dyn {
    tag: i64,
    value: usize,
}

#[repr(C)]
struct Sym {
    name: u32,
    info: u8,
    other: u8,
    section: u16,
    value: usize,
    size: u64,
}

const DT_NULL: i64 = 0;
const DT_DEBUG: i64 = 21;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_GNU_HASH: i64 = 0x6fff_fef5;

fn gnu_hash(name: &CStr) -> u32 {
    name.to_bytes().iter().fold(5381u32, |hash, &byte| hash.wrapping_mul(33).wrapping_add(u32::from(byte)))
}

/// The address of `symbol` in the loaded object `soname`, in whichever version comes first; null if the
/// object is not loaded or has no such symbol.
pub(crate) fn symbol_of(soname: &CStr, symbol: &CStr) -> *mut c_void {
    let map = listed(soname).unwrap_or_else(|| {
        // SAFETY: a plain query for an object that is loaded already; it runs no code of that object.
        unsafe { libc::dlopen(soname.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) }.cast_const().cast()
    });
    // SAFETY: the entry of a loaded object, or null. The C library, whose symbols are asked for, is never unloaded.
    unsafe { map.as_ref().and_then(|map| find(map, symbol)) }.unwrap_or(std::ptr::null_mut())
}

/// The loaded object with this file name in the dynamic linker's list. The walk ends at the object: those that were
/// loaded with the program come first in the list and stay, so it is safe while another thread loads or unloads others.
fn listed(soname: &CStr) -> Option<*const LinkMap> {
    // SAFETY: the kernel tells every program where its headers are; they stay mapped.
    let headers = unsafe {
        let first = libc::getauxval(libc::AT_PHDR) as *const libc::Elf64_Phdr;
        (!first.is_null())
            .then(|| std::slice::from_raw_parts(first, libc::getauxval(libc::AT_PHNUM) as usize))?
    };
    let of_kind =
        |kind| headers.iter().find(|header| header.p_type == kind).map(|header| header.p_vaddr as usize);
    let bias = (headers.as_ptr() as usize).wrapping_sub(of_kind(libc::PT_PHDR)?);
    let mut entry = bias.wrapping_add(of_kind(libc::PT_DYNAMIC)?) as *const Dyn;
    // SAFETY: the program's own dynamic section ends with DT_NULL. The dynamic linker stores its list behind DT_DEBUG, and
    // the list's names are C strings.
    unsafe {
        while (*entry).tag != DT_DEBUG {
            if (*entry).tag == DT_NULL {
                return None;
            }
            entry = entry.add(1);
        }
        let mut map = ((*entry).value as *const Debug).as_ref()?.first;
        while let Some(object) = map.as_ref() {
            let path = CStr::from_ptr(object.name).to_bytes();
            if path.rsplit(|&byte| byte == b'/').next() == Some(soname.to_bytes()) {
                return Some(map);
            }
            map = object.next;
        }
    }
    None
}

/// # Safety
/// `map` describes a loaded object that stays loaded.
unsafe fn find(map: &LinkMap, symbol: &CStr) -> Option<*mut c_void> {
    let (mut strings, mut symbols, mut hashes) = (0usize, 0usize, 0usize);
    let mut entry = map.dynamic;
    // SAFETY: the dynamic section of a loaded object ends with DT_NULL.
    unsafe {
        while !entry.is_null() && (*entry).tag != DT_NULL {
            match (*entry).tag {
                DT_STRTAB => strings = (*entry).value,
                DT_SYMTAB => symbols = (*entry).value,
                DT_GNU_HASH => hashes = (*entry).value,
                _ => {}
            }
            entry = entry.add(1);
        }
    }
    if strings == 0 || symbols == 0 || hashes == 0 {
        return None;
    }
    // glibc relocates these entries in place; where a port does not, they are offsets.
    let absolute = |address: usize| if address < map.base { map.base + address } else { address };
    let strings = absolute(strings) as *const libc::c_char;
    let symbols = absolute(symbols) as *const Sym;
    let header = absolute(hashes) as *const u32;
    // SAFETY: layout of DT_GNU_HASH: bucket count, first hashed symbol, bloom words (64 bit), bloom shift,
    // then bloom, buckets and chains; a chain ends at the entry with its lowest bit set.
    unsafe {
        let (buckets, first, bloom) = (*header, *header.add(1), *header.add(2));
        let bucket_table = header.add(4 + 2 * bloom as usize);
        let chains = bucket_table.add(buckets as usize);
        let hash = gnu_hash(symbol);
        let mut index = *bucket_table.add((hash % buckets) as usize);
        if index < first {
            return None;
        }
        loop {
            let chain = *chains.add((index - first) as usize);
            if chain | 1 == hash | 1 {
                let sym = &*symbols.add(index as usize);
                if sym.section != 0 && CStr::from_ptr(strings.add(sym.name as usize)) == symbol {
                    return Some((map.base + sym.value) as *mut c_void);
                }
            }
            if chain & 1 == 1 {
                return None;
            }
            index += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_is_found_where_the_dynamic_linker_finds_it() {
        for name in [c"dlsym", c"malloc", c"getpid", c"pthread_create"] {
            // SAFETY: a look-up by a valid name.
            let theirs = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            let ours = symbol_of(c"libc.so.6", name);
            assert!(!ours.is_null(), "{name:?} is not found");
            assert_eq!(ours, theirs, "{name:?}");
        }
    }

    #[test]
    fn the_c_library_is_in_the_dynamic_linkers_list() {
        // SAFETY: a plain query.
        let handle = unsafe { libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        assert_eq!(listed(c"libc.so.6"), Some(handle.cast_const().cast()));
        assert_eq!(listed(c"libno-such-object.so.9"), None);
    }

    #[test]
    fn what_does_not_exist_is_not_found() {
        assert!(symbol_of(c"libc.so.6", c"no_such_symbol_here").is_null());
        assert!(symbol_of(c"libno-such-object.so.9", c"malloc").is_null());
    }
}
