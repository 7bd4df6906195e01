//! Preloaded before everything else, it notes each `cuGetProcAddress` call of a program, and what the program gets, in
//! the file that `NVSHARE_TEST_RECORD` names: name, version, flags, code, status, owner of the answer.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fs::{File, OpenOptions},
    io::Write,
    mem::transmute,
    ptr,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicPtr, Ordering::SeqCst},
    },
};

type Ptr = *mut c_void;
type Dlsym = unsafe extern "C" fn(Ptr, *const c_char) -> Ptr;
type Get = unsafe extern "C" fn(*const c_char, *mut Ptr, c_int, u64) -> c_int;
type Get2 = unsafe extern "C" fn(*const c_char, *mut Ptr, c_int, u64, *mut c_int) -> c_int;

const NEXT: Ptr = -1isize as Ptr;

unsafe extern "C" {
    fn dlvsym(handle: Ptr, name: *const c_char, version: *const c_char) -> Ptr;
    fn dladdr(address: Ptr, info: *mut [*const c_char; 4]) -> c_int;
}

static GET: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static GET2: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// The next `dlsym` after this library: the shim's, if it is preloaded.
fn next() -> Dlsym {
    static FOUND: OnceLock<usize> = OnceLock::new();
    let found = *FOUND.get_or_init(|| unsafe {
        let libc: Dlsym = transmute(dlvsym(NEXT, c"dlsym".as_ptr(), c"GLIBC_2.2.5".as_ptr()));
        libc(NEXT, c"dlsym".as_ptr()) as usize
    });
    unsafe { transmute(found) }
}

/// Our function in place of `cuGetProcAddress` at `found`, called by any of its names.
fn instead(found: Ptr) -> Option<Ptr> {
    if found.is_null() {
        return None;
    }
    match owner(found).rsplit(' ').next()? {
        "cuGetProcAddress" => {
            GET.store(found, SeqCst);
            Some(get as *const () as Ptr)
        }
        "cuGetProcAddress_v2" => {
            GET2.store(found, SeqCst);
            Some(get2 as *const () as Ptr)
        }
        _ => None,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlsym(handle: Ptr, name: *const c_char) -> Ptr {
    let found = unsafe { next()(handle, name) };
    if unsafe { CStr::from_ptr(name) }.to_bytes().starts_with(b"cuGetProcAddress") {
        return instead(found).unwrap_or(found);
    }
    found
}

fn owner(function: Ptr) -> String {
    let mut info = [ptr::null(); 4];
    if function.is_null() || unsafe { dladdr(function, &raw mut info) } == 0 || info[2].is_null() {
        return "null".to_owned();
    }
    let text = |at: usize| unsafe { CStr::from_ptr(info[at]) }.to_str().unwrap();
    format!("{} {}", text(0).rsplit('/').next().unwrap(), text(2))
}

fn note(name: *const c_char, version: c_int, flags: u64, code: c_int, status: &str, place: *mut Ptr) {
    static FILE: OnceLock<Mutex<File>> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let path = std::env::var_os("NVSHARE_TEST_RECORD").unwrap();
        Mutex::new(OpenOptions::new().create(true).append(true).open(path).unwrap())
    });
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    // A refused look-up leaves the place alone; nobody has written there.
    let answer = if code == 0 { owner(unsafe { *place }) } else { "untouched".to_owned() };
    writeln!(file.lock().unwrap(), "{name}|{version}|{flags}|{code}|{status}|{answer}").unwrap();
    if code == 0
        && let Some(ours) = instead(unsafe { *place })
    {
        unsafe { *place = ours };
    }
}

unsafe extern "C" fn get(name: *const c_char, place: *mut Ptr, version: c_int, flags: u64) -> c_int {
    let real: Get = unsafe { transmute(GET.load(SeqCst)) };
    let code = unsafe { real(name, place, version, flags) };
    note(name, version, flags, code, "-", place);
    code
}

unsafe extern "C" fn get2(
    name: *const c_char,
    place: *mut Ptr,
    version: c_int,
    flags: u64,
    status: *mut c_int,
) -> c_int {
    let real: Get2 = unsafe { transmute(GET2.load(SeqCst)) };
    let code = unsafe { real(name, place, version, flags, status) };
    let said = if status.is_null() { "-".to_owned() } else { unsafe { *status }.to_string() };
    note(name, version, flags, code, &said, place);
    code
}
