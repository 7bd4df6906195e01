//! The C library of 2.17 (2012) as far as the shim uses it, and stand-ins that a linker takes for it.
//!
//! A symbol that is not listed cannot be linked. Who adds one looks up in which library and version 2.17 had it; the
//! newest version up to 2.17 is the one to take. Weak references of std to later functions (`gettid`, `statx`,
//! `__cxa_thread_atexit_impl`) are not listed: they are null where the C library is older, and std copes.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{Linker, Machine};
use crate::cargo::run as run_command;

/// The newest version that the shim may need.
pub(super) const NEWEST: (u32, u32) = (2, 17);

/// The first glibc for aarch64: there, each symbol of that time has this version.
const FIRST_FOR_AARCH64: &str = "GLIBC_2.17";

/// One library of glibc.
struct Part {
    soname: &'static str,
    /// Version on x86-64, and the symbols that have it.
    symbols: &'static [(&'static str, &'static [&'static str])],
}

/// In 2.34, libc took in the other two. They stay as empty files, because every program linked before needs them, and
/// so does NVIDIA's libcuda.so.1: a container in which CUDA works has all three.
const PARTS: [Part; 3] = [
    Part {
        soname: "libc.so.6",
        symbols: &[
            (
                "GLIBC_2.2.5",
                &[
                    "__errno_location",
                    "abort",
                    "bcmp",
                    "calloc",
                    "close",
                    "closedir",
                    "connect",
                    "dirfd",
                    "dl_iterate_phdr",
                    "fcntl",
                    "free",
                    "ftruncate",
                    "getenv",
                    "getpid",
                    "malloc",
                    "memcmp",
                    "memmove",
                    "memset",
                    "mmap",
                    "mprotect",
                    "open",
                    "open64",
                    "opendir",
                    "pause",
                    "poll",
                    "posix_memalign",
                    "pthread_attr_destroy",
                    "pthread_attr_init",
                    "pthread_self",
                    "pthread_setcancelstate",
                    "read",
                    "readdir64",
                    "readlink",
                    "realloc",
                    "recv",
                    "sched_yield",
                    "send",
                    "sendmsg",
                    "sigaltstack",
                    "sigfillset",
                    "socket",
                    "socketpair",
                    "strlen",
                    "syscall",
                    "sysconf",
                    "write",
                    "writev",
                ],
            ),
            ("GLIBC_2.3.4", &["__xpg_strerror_r"]),
            ("GLIBC_2.7", &["eventfd"]),
            ("GLIBC_2.14", &["memcpy"]),
            ("GLIBC_2.16", &["getauxval"]),
            ("GLIBC_2.17", &["clock_gettime", "clock_nanosleep"]),
        ],
    },
    Part { soname: "libdl.so.2", symbols: &[("GLIBC_2.2.5", &["dladdr", "dlopen"])] },
    Part {
        soname: "libpthread.so.0",
        symbols: &[
            (
                "GLIBC_2.2.5",
                &[
                    "pthread_attr_setstacksize",
                    "pthread_create",
                    "pthread_detach",
                    "pthread_key_create",
                    "pthread_key_delete",
                    "pthread_setspecific",
                    "pthread_sigmask",
                ],
            ),
            ("GLIBC_2.12", &["pthread_setname_np"]),
        ],
    },
];

/// The libraries that the shim may need.
pub(super) fn sonames() -> impl Iterator<Item = &'static str> {
    PARTS.iter().map(|part| part.soname)
}

/// Libraries with these names and versions and nothing behind them, in `directory`.
pub(super) fn stand_ins(machine: Machine, linker: &Linker, directory: &Path) -> Result<Vec<PathBuf>> {
    // The linker wants some input.
    let nothing = directory.join("nothing");
    fs::write(&nothing, []).with_context(|| format!("writing {}", nothing.display()))?;
    PARTS.iter().map(|part| part.stand_in(machine, linker, directory, &nothing)).collect()
}

impl Part {
    fn stand_in(&self, machine: Machine, linker: &Linker, directory: &Path, input: &Path) -> Result<PathBuf> {
        let path = directory.join(self.soname);
        let write = |extension: &str, text: String| {
            let file = path.with_extension(extension);
            fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
            anyhow::Ok(file)
        };
        let mut symbols = String::new();
        for name in self.names() {
            writeln!(symbols, "{name} = 0;")?;
        }
        run_command(
            linker
                .command()
                .args(["-soname", self.soname, "-o"])
                .arg(&path)
                .arg("--version-script")
                .arg(write("versions", self.versions(machine))?)
                .arg(write("symbols", symbols)?)
                .arg("--format=binary")
                .arg(input),
        )?;
        Ok(path)
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.symbols.iter().flat_map(|(_, names)| names.iter().copied())
    }

    /// A version script.
    fn versions(&self, machine: Machine) -> String {
        let mut script = String::new();
        let mut node = |version: &str, names: &[&str]| {
            writeln!(script, "{version} {{ global: {}; }};", names.join("; ")).unwrap_or_default();
        };
        match machine {
            Machine::X86_64 => self.symbols.iter().for_each(|(version, names)| node(version, names)),
            Machine::Aarch64 => node(FIRST_FOR_AARCH64, &self.names().collect::<Vec<_>>()),
        }
        script
    }
}
