//! Where programs run: this machine's C library, that of another architecture under an emulator, and an older one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use nvshare_tests::skip;

/// An architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    X86_64,
    Aarch64,
}

/// The Debian release whose C library is the oldest that its archive still holds. It is from before 2.34: `dlsym` and
/// threads have libraries of their own. The packages are unpacked, not installed.
const OLD_VERSION: &str = "2.31-13+deb11u11";
/// Where Debian keeps it, and where it will keep it.
const ARCHIVES: [&str; 2] = ["http://deb.debian.org/debian", "http://archive.debian.org/debian"];

impl Machine {
    /// Those whose programs can be built and run here; the others are skipped loudly.
    pub(crate) fn usable() -> Vec<Self> {
        [Self::X86_64, Self::Aarch64].into_iter().filter(|machine| machine.is_usable()).collect()
    }

    fn is_usable(self) -> bool {
        let tools = [Some(self.compiler()), self.emulator()];
        let missing: Vec<_> = tools.into_iter().flatten().filter(|tool| !is_program(tool)).collect();
        if !missing.is_empty() {
            skip(&format!("programs for {}", self.name()), &format!("{} missing", missing.join(", ")));
        }
        missing.is_empty()
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    fn is_native(self) -> bool {
        self.name() == std::env::consts::ARCH
    }

    fn compiler(self) -> &'static str {
        match (self, self.is_native()) {
            (_, true) => "gcc",
            (Self::X86_64, _) => "x86_64-linux-gnu-gcc",
            (Self::Aarch64, _) => "aarch64-linux-gnu-gcc",
        }
    }

    fn emulator(self) -> Option<&'static str> {
        match (self, self.is_native()) {
            (_, true) => None,
            (Self::X86_64, _) => Some("qemu-x86_64"),
            (Self::Aarch64, _) => Some("qemu-aarch64"),
        }
    }

    /// The version of the C library's first symbols, which `dlsym` had before 2.34.
    pub(crate) fn first_version(self) -> &'static str {
        match self {
            Self::X86_64 => "GLIBC_2.2.5",
            Self::Aarch64 => "GLIBC_2.17",
        }
    }

    fn dynamic_linker(self) -> &'static str {
        match self {
            Self::X86_64 => "ld-linux-x86-64.so.2",
            Self::Aarch64 => "ld-linux-aarch64.so.1",
        }
    }

    fn triple(self) -> String {
        format!("{}-linux-gnu", self.name())
    }

    /// As Debian calls it, and its packages of the old C library with their hashes.
    fn packages(self) -> (&'static str, [(&'static str, &'static str); 2]) {
        match self {
            Self::X86_64 => (
                "amd64",
                [
                    ("libc6", "05f7264da867b37f4c5ce49266b558ea1e81e05a9464f623152fca70f3550282"),
                    ("libc6-dev", "e7f7b45d9c5cfcf37609f0b6efd3c645272c812144703af89dfd32218fcb0fd3"),
                ],
            ),
            Self::Aarch64 => (
                "arm64",
                [
                    ("libc6", "baaa9aa184e2f21738c5819055e6740cc5b22f198e3f416e33f82b40ff6933d8"),
                    ("libc6-dev", "28d478134722dcd4b0bd2045a199301d18713bf95947b9fce66634e7aeacab2e"),
                ],
            ),
        }
    }
}

/// A C library that programs are linked with, or run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Userland {
    pub(crate) machine: Machine,
    /// Where the old one is unpacked; `None` is the compiler's own.
    old: Option<PathBuf>,
}

impl Userland {
    pub(crate) fn current(machine: Machine) -> Self {
        Self { machine, old: None }
    }

    /// Both of a machine, or the current one where the old one cannot be had.
    pub(crate) fn all(machine: Machine) -> Vec<Self> {
        let mut all = vec![Self::current(machine)];
        match old_root(machine) {
            Ok(root) => all.push(Self { machine, old: Some(root) }),
            Err(why) => skip(&format!("glibc {OLD_VERSION} for {}", machine.name()), &why),
        }
        all
    }

    pub(crate) fn is_old(&self) -> bool {
        self.old.is_some()
    }

    /// The version with which a program linked here refers to `dlsym`.
    pub(crate) fn dlsym_version(&self) -> &'static str {
        if self.is_old() { self.machine.first_version() } else { "GLIBC_2.34" }
    }

    /// Compiles C against this C library.
    pub(crate) fn compile(&self, source: &Path, output: &Path, more: &[&str]) {
        let object = output.with_extension("o");
        let version = format!("-DVERSION=\"{}\"", self.machine.first_version());
        done(
            Command::new(self.machine.compiler())
                .args(["-std=gnu11", "-O2", "-fPIC", "-fexceptions", "-w", "-c", &version, "-I"])
                .arg(output.parent().unwrap())
                .arg("-o")
                .arg(&object)
                .arg(source),
        );
        let mut link = Command::new(self.machine.compiler());
        if let Some(root) = &self.old {
            let (libraries, parts) =
                (self.libraries().unwrap(), root.join("usr/lib").join(self.machine.triple()));
            link.arg("-nostdlib").arg(format!("-Wl,--as-needed,-rpath-link,{}", libraries.display()));
            if !more.contains(&"-shared") {
                link.arg("-pie")
                    .arg(parts.join("Scrt1.o"))
                    .arg(parts.join("crti.o"))
                    .arg(parts.join("crtn.o"));
            }
            link.arg(&object)
                .args(["libdl.so.2", "libpthread.so.0", "libc.so.6"].map(|name| libraries.join(name)))
                .arg(parts.join("libc_nonshared.a"));
        } else {
            link.arg(&object);
        }
        done(link.args(more).arg("-o").arg(output));
    }

    /// Runs a program with this C library, with libraries of `directory`, and with `preload` if there is any.
    pub(crate) fn command(&self, program: &Path, directory: &Path, preload: &[&Path]) -> Command {
        let mut words: Vec<PathBuf> = Vec::new();
        let mut environment = vec![format!("LD_LIBRARY_PATH={}", directory.display())];
        if !preload.is_empty() {
            let list: Vec<_> = preload.iter().map(|path| path.display().to_string()).collect();
            environment.push(format!("LD_PRELOAD={}", list.join(":")));
        }
        // No agent is there.
        environment.push(format!("NVSHARE_RUN_DIR={}", directory.join("nobody").display()));
        if let Some(emulator) = self.machine.emulator() {
            words.push(emulator.into());
            if !self.is_old() {
                words.extend(["-L".into(), Path::new("/usr").join(self.machine.triple())]);
            }
            // The emulator itself is a program of this machine.
            words.extend(environment.drain(..).flat_map(|setting| ["-E".into(), setting.into()]));
        }
        if let Some(libraries) = self.libraries() {
            words.push(libraries.join(self.machine.dynamic_linker()));
            // In this form the environment does not count.
            let search = format!("{}:{}", libraries.display(), directory.display());
            words.extend(["--library-path".into(), search.into()]);
        }
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env_clear();
        for setting in &environment {
            let (name, value) = setting.split_once('=').unwrap();
            command.env(name, value);
        }
        command
    }

    fn libraries(&self) -> Option<PathBuf> {
        self.old.as_ref().map(|root| root.join("lib").join(self.machine.triple()))
    }
}

fn old_root(machine: Machine) -> Result<PathBuf, String> {
    static ROOTS: [OnceLock<Result<PathBuf, String>>; 2] = [const { OnceLock::new() }; 2];
    ROOTS[machine as usize].get_or_init(|| unpack(machine)).clone()
}

/// Downloads with apt's own program, which checks the hash.
fn unpack(machine: Machine) -> Result<PathBuf, String> {
    let (debian, packages) = machine.packages();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("glibc-{OLD_VERSION}-{debian}"));
    if cache.exists() {
        return Ok(cache);
    }
    let fresh = cache.with_extension(format!("{}", std::process::id()));
    fs::create_dir_all(&fresh).unwrap();
    for (package, hash) in packages {
        let file = format!("{package}_{OLD_VERSION}_{debian}.deb");
        let path = fresh.join(&file);
        let downloaded = ARCHIVES.iter().any(|archive| {
            Command::new("/usr/lib/apt/apt-helper")
                .arg("download-file")
                .arg(format!("{archive}/pool/main/g/glibc/{file}"))
                .arg(&path)
                .arg(format!("SHA256:{hash}"))
                .output()
                .is_ok_and(|output| output.status.success())
        });
        if !downloaded {
            return Err(format!("{file} cannot be downloaded"));
        }
        done(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&fresh));
    }
    match fs::rename(&fresh, &cache) {
        Ok(()) => Ok(cache),
        // Another test was faster.
        Err(_) if cache.exists() => Ok(cache),
        Err(error) => Err(format!("moving {}: {error}", fresh.display())),
    }
}

pub(crate) fn is_program(name: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

/// Runs a command that must succeed, and gives what it printed.
pub(crate) fn done(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{said}{complained}", output.status);
    said.into_owned()
}
