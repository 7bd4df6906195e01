//! `cargo xtask setup-ebpf`: what building the BPF object needs beyond stable Rust.
//!
//! Problem: `core` must be built for the BPF target from the sources of the very compiler in use, and the linker
//! must read the bitcode of that compiler, so both must come from one LLVM.
//!
//! Approach: rustup brings the sources; the linker is built against the LLVM library that rustc itself uses, so no
//! LLVM of the system is needed and none can disagree.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::cargo::{cargo, run as run_command};

/// Install what `cargo xtask ebpf` needs: the compiler's library sources and bpf-linker.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// The linker, and the LLVM versions that it can be built for.
const BPF_LINKER: &str = "0.13.0";
const LLVM_SUPPORTED: [u32; 2] = [22, 23];

pub(crate) fn run(_: &Args) -> Result<()> {
    let sysroot = PathBuf::from(text_of(Command::new("rustc").args(["--print", "sysroot"]))?);
    library_sources(&sysroot)?;
    linker(&sysroot)?;
    println!(
        "ready: `cargo xtask ebpf` builds the BPF object, `cargo xtask ebpf --check` checks the committed one"
    );
    Ok(())
}

fn library_sources(sysroot: &Path) -> Result<()> {
    let core = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !core.exists() {
        run_command(Command::new("rustup").args(["component", "add", "rust-src"])).context(
            "without rustup, unpack the rust-src archive of this very rustc version into its sysroot",
        )?;
        ensure!(core.exists(), "rustup reported success, but {} is not there", core.display());
    }
    println!("library sources: present");
    Ok(())
}

fn linker(sysroot: &Path) -> Result<()> {
    let wanted = format!("bpf-linker {BPF_LINKER}");
    if text_of(Command::new("bpf-linker").arg("--version")).is_ok_and(|version| version == wanted) {
        println!("{wanted}: present");
        return Ok(());
    }
    let verbose = text_of(Command::new("rustc").arg("-vV"))?;
    let llvm = verbose
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse::<u32>().ok())
        .context("rustc -vV names no LLVM version")?;
    ensure!(
        LLVM_SUPPORTED.contains(&llvm),
        "rustc uses LLVM {llvm}; bpf-linker {BPF_LINKER} can be built for {LLVM_SUPPORTED:?} only"
    );
    // The build script looks for a directory with lib/libLLVM.so; the toolchain's library has a version in its name.
    let prefix = tempfile::tempdir()?;
    let libraries = prefix.path().join("lib");
    fs::create_dir(&libraries)?;
    symlink(llvm_library(sysroot, llvm)?, libraries.join("libLLVM.so"))?;
    run_command(
        cargo()
            .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"])
            .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
            .env("LLVM_PREFIX", prefix.path())
            .env("RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", sysroot.join("lib").display())),
    )
}

/// rustc's own LLVM.
fn llvm_library(sysroot: &Path, llvm: u32) -> Result<PathBuf> {
    let directory = sysroot.join("lib");
    let start = format!("libLLVM.so.{llvm}.");
    let entries = fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))?;
    entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&start))
        .map(|entry| entry.path())
        .with_context(|| {
            format!("{} has no {start}*; this rustc brings no LLVM library", directory.display())
        })
}

fn text_of(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{program} ended with {}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
