//! The driver's own functions, past every library that comes between: found in the file of the library that is loaded,
//! not by a look-up.

use std::{
    ffi::{CStr, c_void},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSymbol as _};

/// Where the driver's function of this name is, given any other function of the driver.
pub(crate) fn address(name: &str, other: *mut c_void) -> Result<*mut c_void> {
    // SAFETY: all-zero is a valid `Dl_info`, and `dladdr` accepts any address.
    let (info, found) = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let found = libc::dladdr(other, &raw mut info) != 0;
        (info, found)
    };
    ensure!(found && !info.dli_fname.is_null(), "the driver's library cannot be found in memory");
    // SAFETY: `dladdr` gave a C string that lives as long as the library.
    let file =
        unsafe { CStr::from_ptr(info.dli_fname) }.to_str().context("the path of the driver's library")?;
    ensure!(
        Path::new(file).file_name().is_some_and(|name| name.to_string_lossy().starts_with("libcuda.so")),
        "{file} is not the driver's library"
    );
    let bytes = std::fs::read(file).with_context(|| format!("reading {file}"))?;
    let library = object::File::parse(&*bytes).with_context(|| format!("reading {file}"))?;
    let symbol = library
        .dynamic_symbols()
        .find(|symbol| symbol.is_definition() && symbol.name() == Ok(name))
        .with_context(|| format!("{file} does not export {name}"))?;
    Ok((info.dli_fbase as usize + symbol.address() as usize) as *mut c_void)
}
