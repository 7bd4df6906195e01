//! Kernel modules in general: loading, unloading, and clearing away what a failed test left.

use std::{
    ffi::CString,
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    system::{delete_module, finit_module},
};

/// Every module that a test may load, in the order of unloading.
const ALL: [&str; 3] = ["nvshare_inject", "nvidia_uvm", "nvshare_rm"];

/// Loads the file of this name below `/modules`.
pub(crate) fn load(name: &str, parameters: &str) {
    let path = format!("/modules/{name}.ko");
    let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let parameters = CString::new(parameters).unwrap();
    finit_module(&file, &parameters, 0).unwrap_or_else(|error| panic!("loading {path}: {error}"));
}

/// Unloads a module, which must not need anybody to let go of it first.
pub(crate) fn unload(name: &str) {
    try_unload(name).unwrap_or_else(|error| panic!("unloading {name}: {error}"));
    assert!(!shown(name));
}

/// Unloads what a failed test has left behind.
pub(crate) fn clear_away() {
    for name in ALL {
        if let Err(error) = try_unload(name)
            && error != Errno::NOENT
        {
            crate::say(&format!("the module {name} stays loaded: {error}"));
        }
    }
}

/// Whether the kernel shows a module of this name.
pub(crate) fn shown(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

fn try_unload(name: &str) -> Result<(), Errno> {
    let name = CString::new(name).unwrap();
    delete_module(&name, rustix::fs::OFlags::NONBLOCK.bits() as i32)
}

/// Returns when something has come true; a panic after half a minute.
pub(crate) fn until(what: &str, mut come: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !come() {
        assert!(begin.elapsed() < Duration::from_secs(30), "{what}: not within 30 s");
        std::thread::yield_now();
    }
}
