//! `cargo xtask ebpf`: the BPF object from its source, and the check that both belong together.
//!
//! Problem: building the object needs an exact compiler, its library sources and a matching linker; a user with
//! stable Rust alone has none of that.
//!
//! Approach: the object is committed, one per CPU architecture (a probe finds its arguments in registers), with a
//! record of what it was made from. `--check` compares the record with the sources and, where the toolchain is
//! at hand, builds again and compares the bytes.
//!
//! Invariant: the same sources and toolchain give the same bytes in every checkout: paths are remapped, and debug
//! sections (which the kernel does not take) are cut out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use nvshare_tests::everything_required;
use object::build::elf::{Builder, SectionData};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::cargo::{cargo, root, run as run_command};

/// Build the BPF object from its source, or check the committed one.
///
/// Needs the tools that `cargo xtask setup-ebpf` installs. Without this command the committed object is used.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing; fail if the committed object does not belong to the sources.
    #[arg(long)]
    pub(crate) check: bool,
}

/// Architectures whose registers the probes know.
const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];
const PACKAGE: &str = "nvshare-ebpf";
const PREBUILT: &str = "nvshare-ebpf/prebuilt";
const RECORD: &str = "nvshare.bpf.toml";
/// What the object is made from, besides locked dependencies and the build profile.
const SOURCES: [&str; 4] =
    ["nvshare-ebpf/Cargo.toml", "nvshare-ebpf/src", "nvshare-ebpf/abi/Cargo.toml", "nvshare-ebpf/abi/src"];

/// What the committed objects were made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Hash of sources, locked dependencies and build profile.
    sources: String,
    /// `rustc --version` of the compiler.
    rustc: String,
    /// `bpf-linker --version`.
    bpf_linker: String,
    /// Hash of each object, by file name.
    objects: BTreeMap<String, String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.check { check() } else { build() }
}

fn build() -> Result<()> {
    let toolchain = Toolchain::find()?;
    let sources = sources_hash()?;
    let mut objects = BTreeMap::new();
    let prebuilt = root().join(PREBUILT);
    fs::create_dir_all(&prebuilt).with_context(|| format!("creating {}", prebuilt.display()))?;
    for architecture in ARCHITECTURES {
        let name = object_name(architecture);
        let bytes = toolchain.build(architecture)?;
        objects.insert(name.clone(), hex(&Sha256::digest(&bytes)));
        fs::write(prebuilt.join(&name), &bytes).with_context(|| format!("writing {name}"))?;
        println!("{PREBUILT}/{name}: {} bytes", bytes.len());
    }
    let record = Record { sources, rustc: toolchain.rustc, bpf_linker: toolchain.bpf_linker, objects };
    let text = format!(
        "# What the objects beside this file were made from. Written by `cargo xtask ebpf`.\n{}",
        toml::to_string(&record)?
    );
    fs::write(prebuilt.join(RECORD), text).with_context(|| format!("writing {RECORD}"))?;
    println!("{PREBUILT}/{RECORD}: sources {}", record.sources);
    Ok(())
}

fn check() -> Result<()> {
    let prebuilt = root().join(PREBUILT);
    let path = prebuilt.join(RECORD);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let record: Record = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
    let sources = sources_hash()?;
    ensure!(
        sources == record.sources,
        "the sources of the BPF object have moved on (they hash to {sources}, the object was made from {}); run `cargo xtask ebpf` and commit {PREBUILT}",
        record.sources
    );
    let mut committed = BTreeMap::new();
    for architecture in ARCHITECTURES {
        let name = object_name(architecture);
        let bytes = fs::read(prebuilt.join(&name)).with_context(|| format!("reading {PREBUILT}/{name}"))?;
        ensure!(
            record.objects.get(&name) == Some(&hex(&Sha256::digest(&bytes))),
            "{PREBUILT}/{name} is not the object that {RECORD} describes; run `cargo xtask ebpf`"
        );
        committed.insert(name, bytes);
    }
    println!("the BPF objects belong to sources {sources}");
    let toolchain = match Toolchain::find() {
        Ok(toolchain) if toolchain.rustc == record.rustc && toolchain.bpf_linker == record.bpf_linker => {
            toolchain
        }
        Ok(other) => {
            return skip(&format!(
                "they were made by {} and {}, here are {} and {}",
                record.rustc, record.bpf_linker, other.rustc, other.bpf_linker
            ));
        }
        Err(error) => return skip(&format!("{error:#}")),
    };
    for architecture in ARCHITECTURES {
        let name = object_name(architecture);
        ensure!(
            committed.get(&name) == Some(&toolchain.build(architecture)?),
            "building {name} from the same sources with the same tools gives other bytes; run `cargo xtask ebpf` and look at the difference"
        );
        println!("{name}: rebuilt, the same bytes");
    }
    Ok(())
}

/// Says what was not checked; an error where everything must be.
fn skip(why: &str) -> Result<()> {
    if everything_required() {
        bail!("the BPF objects cannot be rebuilt: {why}; NVSHARE_REQUIRE_ALL=1 forbids skipping");
    }
    eprintln!("SKIPPED: the BPF objects were not rebuilt and compared: {why}");
    Ok(())
}

fn object_name(architecture: &str) -> String {
    format!("nvshare-{architecture}.bpf.o")
}

/// The tools that build the object.
struct Toolchain {
    rustc: String,
    bpf_linker: String,
    sysroot: PathBuf,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let rustc = output_of(Command::new("rustc").arg("--version"))?;
        let sysroot = PathBuf::from(output_of(Command::new("rustc").args(["--print", "sysroot"]))?);
        ensure!(
            sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists(),
            "{rustc} has no library sources; run `cargo xtask setup-ebpf`"
        );
        let bpf_linker = output_of(Command::new("bpf-linker").arg("--version"))
            .context("bpf-linker is not installed; run `cargo xtask setup-ebpf`")?;
        Ok(Self { rustc, bpf_linker, sysroot })
    }

    /// The object for one architecture, without debug sections.
    fn build(&self, architecture: &str) -> Result<Vec<u8>> {
        // One directory for each: they differ in the flags of every crate.
        let target = root().join("target/ebpf").join(architecture);
        let home = match std::env::var_os("CARGO_HOME") {
            Some(home) => PathBuf::from(home),
            None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
        };
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        // The last prefix that fits is taken.
        let flags = [
            format!("--cfg=bpf_target_arch=\"{architecture}\""),
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            remap(&home, "/cargo"),
            remap(&self.sysroot, "/rust"),
            remap(&root(), "/nvshare"),
            remap(&target, "/target"),
        ];
        let mut command = cargo();
        command
            .args(["build", "--locked", "--quiet", "--package", PACKAGE, "--bins", "--release"])
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
            .arg(&target)
            // Unstable features are for this build alone.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_INCREMENTAL", "0")
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER");
        run_command(&mut command)?;
        let path = target.join("bpfel-unknown-none/release").join(PACKAGE);
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        without_debug(&bytes)
    }
}

/// The object without DWARF; the kernel's own type information stays.
fn without_debug(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(bytes).context("reading what the linker made")?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        if name.starts_with(b".debug_") || name.starts_with(b".rel.debug_") {
            section.delete = true;
        }
    }
    builder.delete_orphans();
    // LLVM keeps the names of sections among those of symbols; the writer wants them apart.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("writing the object")?;
    Ok(stripped)
}

/// Hash of all that decides what the object does: sources, locked dependencies, build profile.
fn sources_hash() -> Result<String> {
    let mut hash = Sha256::new();
    let mut entry = |name: &str, bytes: &[u8]| {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    for path in source_files()? {
        let bytes = fs::read(root().join(&path)).with_context(|| format!("reading {}", path.display()))?;
        entry(&path.to_string_lossy(), &bytes);
    }
    for line in locked_dependencies()? {
        entry("lock", line.as_bytes());
    }
    let manifest: toml::Value = toml::from_str(&fs::read_to_string(root().join("Cargo.toml"))?)?;
    let profile = manifest.get("profile").and_then(|profiles| profiles.get("release"));
    entry("profile", profile.map(toml::Value::to_string).unwrap_or_default().as_bytes());
    Ok(hex(&hash.finalize()))
}

/// Every source file, relative to the checkout, in order.
fn source_files() -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut open: Vec<PathBuf> = SOURCES.iter().map(PathBuf::from).collect();
    while let Some(path) = open.pop() {
        let full = root().join(&path);
        if full.is_dir() {
            for child in fs::read_dir(&full).with_context(|| format!("listing {}", full.display()))? {
                open.push(path.join(child?.file_name()));
            }
        } else {
            found.insert(path);
        }
    }
    Ok(found)
}

/// A line for each package that the object is built from, in order.
fn locked_dependencies() -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
        checksum: Option<String>,
        #[serde(default)]
        dependencies: Vec<String>,
    }
    let lock: Lock =
        toml::from_str(&fs::read_to_string(root().join("Cargo.lock"))?).context("in Cargo.lock")?;
    let mut lines = BTreeSet::new();
    let mut open = vec![PACKAGE.to_owned()];
    while let Some(wanted) = open.pop() {
        // A dependency is a name, followed by a version where the name alone is ambiguous.
        let mut words = wanted.split(' ');
        let (name, version) = (words.next().unwrap_or_default(), words.next());
        let package = lock
            .package
            .iter()
            .find(|package| package.name == name && version.is_none_or(|version| version == package.version))
            .with_context(|| format!("Cargo.lock has no package {wanted}"))?;
        let checksum = package.checksum.as_deref().unwrap_or("in this checkout");
        if lines.insert(format!("{} {} {checksum}", package.name, package.version)) {
            open.extend(package.dependencies.iter().cloned());
        }
    }
    Ok(lines)
}

fn output_of(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{program} ended with {}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_covers_programs_shared_types_and_their_dependencies() {
        let files = source_files().unwrap();
        for file in ["nvshare-ebpf/src/uvm.rs", "nvshare-ebpf/abi/src/maps.rs", "nvshare-ebpf/Cargo.toml"] {
            assert!(files.contains(Path::new(file)), "{file}");
        }
        let locked = locked_dependencies().unwrap();
        assert!(locked.iter().any(|line| line.starts_with("aya-ebpf ")));
        assert!(locked.iter().all(|line| !line.starts_with("tokio ")));
    }
}
