//! Why a program could not be loaded or attached, in words that say what to do.

use std::{error::Error, io};

use aya::programs::ProgramError;

/// One line for a person. The system's own error decides where there is one: the libraries' texts above it name
/// system calls, not causes.
pub(super) fn reason(error: &(dyn Error + 'static)) -> String {
    // The verifier, too, answers that something is not permitted; but it says what.
    if let Some(log) = verifier_log(error) {
        return format!(
            "the kernel's verifier does not accept the program: {log}; please report this kernel"
        );
    }
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

/// The end of what the verifier said, which is where it says why.
fn verifier_log(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(ProgramError::LoadError { verifier_log, .. }) = error.downcast_ref::<ProgramError>() {
            let log = verifier_log.to_string();
            let said = log.lines().map(str::trim).filter(|line| !line.is_empty());
            let said: Vec<&str> = said
                .filter(|line| !line.starts_with("processed ") && !line.starts_with("verification time"))
                .collect();
            return (!said.is_empty()).then(|| said[said.len().saturating_sub(4)..].join(" | "));
        }
        next = error.source();
    }
    None
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
