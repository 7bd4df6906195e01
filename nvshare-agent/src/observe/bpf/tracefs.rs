//! Tracepoints are attached by numbers that tracefs tells.
//!
//! Containers and minimal systems often have tracefs unmounted. Then it is mounted for one short-lived thread in a
//! mount namespace of its own, so that nothing changes for anybody else.

use std::{fmt::Write as _, fs, io, path::Path};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::UnshareFlags,
};

/// Where it belongs, and where the map library looks for it.
const TRACEFS: &str = "/sys/kernel/tracing";

/// A field that a program reads at a fixed place: name, offset, size.
pub(super) type Field = (&'static str, usize, usize);

/// Runs `work` where tracefs is mounted.
pub(super) fn with_tracefs<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    if is_mounted() {
        return work();
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("tracefs".to_owned()).spawn_scoped(scope, || {
            mount_privately().map_err(|error| {
                format!("tracefs is not mounted at {TRACEFS} and cannot be mounted ({error}); run `mount -t tracefs tracefs {TRACEFS}`")
            })?;
            work()
        });
        match thread.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(result)) => result,
            Ok(Err(_panic)) => Err("the thread that attaches tracepoints panicked".to_owned()),
            Err(error) => Err(format!("no thread to mount tracefs in: {error}")),
        }
    })
}

/// Whether the kernel describes a tracepoint's record as the program expects it. `Ok(false)`: no such tracepoint.
pub(super) fn check_record(category: &str, event: &str, fields: &[Field]) -> Result<bool, String> {
    let path = Path::new(TRACEFS).join("events").join(category).join(event).join("format");
    let format = match fs::read_to_string(&path) {
        Ok(format) => format,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    match unlike(&format, fields) {
        None => Ok(true),
        Some(problem) => {
            Err(format!("tracepoint {category}:{event} has another form in this kernel ({problem})"))
        }
    }
}

/// The first field that is not where it should be.
fn unlike(format: &str, fields: &[Field]) -> Option<String> {
    for &(name, offset, size) in fields {
        let found = format.lines().filter_map(parse_field).find(|field| field.0 == name);
        match found {
            Some((_, at, bytes)) if (at, bytes) == (offset, size) => {}
            Some((_, at, bytes)) => {
                let mut text = format!("{name} is at {at} with {bytes} bytes");
                let _ = write!(text, ", expected at {offset} with {size}");
                return Some(text);
            }
            None => return Some(format!("it has no {name}")),
        }
    }
    None
}

/// One line of the description, as `field:pid_t prev_pid; offset:24; size:4; signed:1;` with tabs between.
fn parse_field(line: &str) -> Option<(&str, usize, usize)> {
    let mut parts = line.trim().strip_prefix("field:")?.split(';').map(str::trim);
    let declaration = parts.next()?;
    let name = declaration.rsplit(' ').next()?.split('[').next()?;
    let offset = parts.next()?.strip_prefix("offset:")?.parse().ok()?;
    let size = parts.next()?.strip_prefix("size:")?.parse().ok()?;
    Some((name, offset, size))
}

fn is_mounted() -> bool {
    Path::new(TRACEFS).join("events").is_dir()
}

fn mount_privately() -> io::Result<()> {
    // SAFETY: only this thread's view of mounts is separated; it shares no file-system state that others rely on,
    // and it ends after its work.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("tracefs", TRACEFS, "tracefs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: &str = "name: sched_wakeup\nID: 374\nformat:\n\tfield:char comm[16];\toffset:8;\tsize:16;\tsigned:0;\n\tfield:pid_t pid;\toffset:24;\tsize:4;\tsigned:1;\n";

    #[test]
    fn fuzz_a_tracepoints_description() {
        let words: &[&[u8]] = &[b"field:", b"\toffset:", b"size:", b";", b"pid", b"[16]"];
        nvshare_fuzz::fuzz(env!("CARGO_MANIFEST_DIR"), "tracepoint", words, |input| {
            let text = String::from_utf8_lossy(input);
            let fields = &[("comm", 8, 16), ("pid", 24, 4)];
            if let Some(problem) = unlike(&text, fields) {
                return nvshare_fuzz::outcome(&problem);
            }
            // Whoever is believed says where both fields are.
            assert!(text.contains("offset:8") && text.contains("offset:24"));
            1
        });
    }

    #[test]
    fn a_record_that_differs_from_what_the_program_reads_is_refused() {
        assert_eq!(unlike(FORMAT, &[("comm", 8, 16), ("pid", 24, 4)]), None);
        assert_eq!(
            unlike(FORMAT, &[("pid", 28, 4)]),
            Some("pid is at 24 with 4 bytes, expected at 28 with 4".to_owned())
        );
        assert_eq!(unlike(FORMAT, &[("prio", 28, 4)]), Some("it has no prio".to_owned()));
    }
}
