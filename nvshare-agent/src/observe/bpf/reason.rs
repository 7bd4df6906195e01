//! Why a program could not be loaded or attached, in words that say what to do.

use std::{error::Error, io};

/// One line for a person. The system's own error decides where there is one: the libraries' texts above it name
/// system calls, not causes.
pub(super) fn reason(error: &(dyn Error + 'static)) -> String {
    if os_error(error).is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        return "the kernel refuses BPF to this process; run the agent as root, or with CAP_BPF and CAP_PERFMON".to_owned();
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    // A refusal by the verifier carries its whole log.
    let first: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
    first.join(" ")
}

/// Whether what was asked for does not exist.
pub(super) fn is_absent(error: &(dyn Error + 'static)) -> bool {
    os_error(error).is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn os_error(error: &(dyn Error + 'static)) -> Option<io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            // EPERM and EACCES both mean a missing privilege here.
            return Some(io::Error::from_raw_os_error(code));
        }
        next = error.source();
    }
    None
}
