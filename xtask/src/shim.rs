//! `cargo xtask shim`: `libnvshare.so` as it ships, for any container.
//!
//! Problem: a preloaded library that needs a library or a symbol version which a container lacks keeps *every* program
//! of that container from starting. What `cargo build` links needs those of the build machine, and libgcc_s.
//!
//! Approach: cargo builds the shim with a std of its own (from the compiler's library sources: for any architecture,
//! without the code that prints backtraces, optimised as one program) into an archive. The toolchain's own linker links
//! it against stand-ins for glibc's libraries which hold the names and versions of 2.17 and nothing else
//! ([`glibc`]). What is newer does not exist there, so it cannot slip in. What std wants beyond that, and the unwinder,
//! is in `shim/src/portable.rs`. So no C compiler, no foreign sysroot and no download is needed. `zig cc` would be a
//! download of 100 MB, and brings an unwinder of its own, which is wrong here (same file).
//!
//! Invariant: whatever lies at `target/portable/<arch>/libnvshare.so` has passed [`check`].

mod check;
mod glibc;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use self::check::Library;
use crate::cargo::{cargo, root, run as run_command, target_dir};

/// Build libnvshare.so for any container: glibc 2.17 or newer, nothing else needed.
///
/// The library lands in target/portable/<arch>/libnvshare.so, is checked (libraries and symbol versions it needs,
/// what it exports, hardening, size), and what was found is printed. Mount that file into containers; the one that
/// `cargo build` makes is for the machine it was built on.
///
/// Needs the compiler's library sources (`rustup component add rust-src`), no cross compiler.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For which machines.
    #[arg(long, value_enum, default_value_t = Target::native())]
    pub(crate) target: Target,

    /// Build another library in the same way, for a test.
    #[arg(long, hide = true, value_enum, default_value_t = Source::Shim)]
    pub(crate) library: Source,
}

/// What can be built this way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    Shim,
    /// Panics and recovers.
    Panics,
}

impl Source {
    fn package(self) -> &'static str {
        match self {
            Self::Shim => "nvshare-shim",
            Self::Panics => "nvshare-panics",
        }
    }

    fn features(self) -> &'static [&'static str] {
        match self {
            Self::Shim => &["--features", "portable"],
            Self::Panics => &[],
        }
    }

    /// Name of the library, without its ending.
    fn stem(self) -> &'static str {
        match self {
            Self::Shim => "libnvshare",
            Self::Panics => "libpanics",
        }
    }
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// Intel and AMD.
    #[value(name = "x86_64")]
    X86_64,
    /// Arm: Grace, Jetson, Graviton.
    #[value(name = "aarch64")]
    Aarch64,
    /// Both.
    All,
}

impl Target {
    const fn native() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 }
    }

    fn machines(self) -> &'static [Machine] {
        match self {
            Self::X86_64 => &[Machine::X86_64],
            Self::Aarch64 => &[Machine::Aarch64],
            Self::All => &[Machine::X86_64, Machine::Aarch64],
        }
    }
}

/// What a library is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    X86_64,
    Aarch64,
}

impl Machine {
    /// As in target triples and in the path of the library.
    fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As the linker calls it.
    fn emulation(self) -> &'static str {
        match self {
            Self::X86_64 => "elf_x86_64",
            Self::Aarch64 => "aarch64linux",
        }
    }
}

/// Where the libraries land, one directory for each machine.
const DIRECTORY: &str = "portable";
/// The names that programs and the driver's users look up; all others stay inside.
const EXPORTS: &str =
    "{ global: dlsym; dlvsym; cu[A-Z]*; nvmlDeviceGetMemoryInfo; nvmlDeviceGetMemoryInfo_v2; local: *; };\n";

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(why) = obstacle()? {
        anyhow::bail!("{why}");
    }
    for &machine in args.target.machines() {
        build(machine, args.library)?;
    }
    Ok(())
}

/// The shim for this machine.
pub(crate) fn build_native() -> Result<PathBuf> {
    if let Some(why) = obstacle()? {
        anyhow::bail!("{why}");
    }
    let &machine = Target::native().machines().first().context("this machine is none that is built for")?;
    build(machine, Source::Shim)
}

/// The version of glibc that a program or library needs, as (2, 36).
pub(crate) fn glibc_needed(file: &Path) -> Result<(u32, u32)> {
    Library::read(file)?.newest_glibc().with_context(|| format!("{} needs no glibc", file.display()))
}

/// The shim for every machine; gives this machine's.
pub(crate) fn build_all() -> Result<PathBuf> {
    let mut native = PathBuf::new();
    for &machine in Target::All.machines() {
        let library = build(machine, Source::Shim)?;
        if machine.name() == std::env::consts::ARCH {
            native = library;
        }
    }
    Ok(native)
}

/// What this machine lacks for a build.
pub(crate) fn obstacle() -> Result<Option<String>> {
    let sources = sysroot()?.join("lib/rustlib/src/rust/library/std/src/lib.rs");
    Ok((!sources.exists()).then(|| {
        "the compiler's library sources are missing: `rustup component add rust-src`, or unpack the rust-src archive of \
         this very rustc version into its sysroot"
            .to_owned()
    }))
}

fn build(machine: Machine, source: Source) -> Result<PathBuf> {
    let archive = archive(machine, source)?;
    let directory = target_dir()?.join(DIRECTORY).join(machine.name());
    let parts = directory.join("parts");
    fs::create_dir_all(&parts).with_context(|| format!("creating {}", parts.display()))?;
    let linker = Linker::find(machine)?;
    let name = format!("{}.so", source.stem());
    let fresh = parts.join(&name);
    let stand_ins = glibc::stand_ins(machine, &linker, &parts)?;
    linker.library(&archive, &stand_ins, &name, &fresh)?;
    let library = Library::read(&fresh)?;
    if source == Source::Shim {
        let complaints = library.complaints();
        ensure!(complaints.is_empty(), "{} must not ship: {}", fresh.display(), complaints.join("; "));
    }
    let path = directory.join(&name);
    fs::rename(&fresh, &path).with_context(|| format!("moving {name} to {}", path.display()))?;
    println!("{}: {library}", path.strip_prefix(root()).unwrap_or(&path).display());
    Ok(path)
}

/// The shim, std and the unwinder in one archive.
fn archive(machine: Machine, source: Source) -> Result<PathBuf> {
    let target = target_dir()?.join(DIRECTORY).join("build");
    let triple = format!("{}-unknown-linux-gnu", machine.name());
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    // The last prefix that fits is taken.
    let flags = [
        remap(&cargo_home()?, "/cargo"),
        remap(&sysroot()?, "/rust"),
        remap(&root(), "/nvshare"),
        remap(&target, "/target"),
        // The dynamic linker gives a library that it loads at the start its thread-local variables in the block of
        // each thread: no call and no allocation stands between a launch and its counter.
        "-Ztls-model=initial-exec".to_owned(),
    ];
    let mut command = cargo();
    command
        .args(["rustc", "--locked", "--quiet", "--lib", "--package", source.package()])
        .args(source.features())
        .args(["--profile", "portable", "--target", &triple, "--crate-type", "staticlib"])
        .args(["-Z", "build-std=std,panic_unwind", "-Z", "build-std-features=panic-unwind,optimize_for_size"])
        .arg("--target-dir")
        .arg(&target)
        // Unstable features are for this build alone.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    run_command(&mut command)?;
    Ok(target.join(triple).join("portable").join(source.stem()).with_extension("a"))
}

/// The linker that comes with the toolchain, for one machine.
struct Linker {
    program: PathBuf,
    machine: Machine,
}

impl Linker {
    fn find(machine: Machine) -> Result<Self> {
        let host = crate::cargo::host_triple()?;
        let own = sysroot()?.join("lib/rustlib").join(host).join("bin/rust-lld");
        // A distribution's Rust leaves it out.
        let program = if own.exists() { own } else { PathBuf::from("ld.lld") };
        Ok(Self { program, machine })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if self.program.ends_with("rust-lld") {
            command.args(["-flavor", "gnu"]);
        }
        command.args(["-m", self.machine.emulation(), "-shared", "--hash-style=gnu"]);
        command
    }

    /// The library from its archive.
    fn library(&self, archive: &Path, stand_ins: &[PathBuf], soname: &str, to: &Path) -> Result<()> {
        let exports = to.with_extension("exports");
        fs::write(&exports, EXPORTS).with_context(|| format!("writing {}", exports.display()))?;
        run_command(
            self.command()
                .args(["--gc-sections", "--strip-all", "-O2", "--eh-frame-hdr", "--build-id=sha1"])
                // Never unloaded: its threads and the pointers that it has given to programs outlive any `dlclose`.
                .args([
                    "-z",
                    "defs",
                    "-z",
                    "now",
                    "-z",
                    "relro",
                    "-z",
                    "noexecstack",
                    "-z",
                    "text",
                    "-z",
                    "nodelete",
                ])
                .args(["-soname", soname, "-o"])
                .arg(to)
                // What is missing among the exports, the check finds.
                .arg("--undefined-version")
                .arg("--version-script")
                .arg(&exports)
                .arg("--whole-archive")
                .arg(archive)
                .arg("--no-whole-archive")
                .args(stand_ins),
        )
    }
}

fn sysroot() -> Result<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("running rustc")?;
    ensure!(output.status.success(), "rustc --print sysroot ended with {}", output.status);
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

fn cargo_home() -> Result<PathBuf> {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => Ok(PathBuf::from(home)),
        None => Ok(PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo")),
    }
}
