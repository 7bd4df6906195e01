//! The driver's own nvidia-uvm, built for a kernel, and beside it what it needs without a GPU.
//!
//! The source is Debian's, fetched when it is needed. Of the driver only this one module is built; what it asks of
//! the driver's main module is answered by one of ours.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use object::{Object as _, ObjectSymbol as _};

use super::{
    archive::Archive,
    build::{Stamp, source as ours, write},
    kernel::Kernel,
};
use crate::cargo::run as run_command;

const PACKAGE: &str = "nvidia-open-kernel-source";
/// Where the package has the source, and what lies above it inside.
const ARCHIVE: &str = "usr/src/nvidia-open-kernel.tar.xz";
const INSIDE: &str = "modules/nvidia-open-kernel";
/// Of the driver's main module: which properties of the kernel the headers below `common` want to know.
const MAIN_KBUILD: &str = "nvidia/nvidia.Kbuild";
/// Parts of the source that nvidia-uvm does without.
const LEFT_OUT: [&str; 5] = ["nvidia-drm", "nvidia-modeset", "nvidia-peermem", "nvidia/*.c", "*.o_binary"];
/// The module, in the order of loading, beside ours.
const MODULES: [&str; 3] = ["nvshare_rm.ko", "nvidia-uvm.ko", "nvshare_inject.ko"];
/// What rm.c answers itself.
const ANSWERED: [&str; 4] = [
    "nvUvmInterfaceSessionCreate",
    "nvUvmInterfaceSessionDestroy",
    "nvUvmInterfaceRegisterUvmCallbacks",
    "nvUvmInterfaceDeRegisterUvmOps",
];

/// The source, unpacked for one kernel.
pub(super) struct Source {
    directory: PathBuf,
    /// Its Kbuild file, as it came.
    kbuild: String,
}

/// Unpacks nvidia-uvm's source from a suite, once.
pub(super) fn source(cache: &Path, kernel: &Kernel, suite: &str) -> Result<Source> {
    let directory = kernel.directory.join("driver");
    let original = directory.join("Kbuild.original");
    if let Ok(kbuild) = fs::read_to_string(&original) {
        return Ok(Source { directory, kbuild });
    }
    let package = directory.join("package");
    Archive::of(cache, suite, "contrib")?.unpack(&[PACKAGE.to_owned()], &package)?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--xz", "--file"]).arg(package.join(ARCHIVE)).arg("--directory").arg(&directory);
    tar.args(LEFT_OUT.map(|part| format!("--exclude={INSIDE}/{part}")));
    run_command(tar.args(["--strip-components=2", INSIDE]))?;
    fs::remove_dir_all(&package).with_context(|| format!("removing {}", package.display()))?;
    let main = directory.join(MAIN_KBUILD);
    let text = fs::read_to_string(&main).with_context(|| format!("reading {}", main.display()))?;
    let questions: Vec<&str> = text.lines().filter(|line| line.starts_with("NV_CONFTEST_")).collect();
    write(&main, &(questions.join("\n") + "\n"))?;
    let path = directory.join("Kbuild");
    let kbuild = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    write(&original, &kbuild)?;
    Ok(Source { directory, kbuild })
}

impl Source {
    /// Builds the modules. Gives their files and the names for the tests.
    pub(super) fn build(&self, kernel: &Kernel) -> Result<Vec<(PathBuf, String)>> {
        let Self { directory, kbuild } = self;
        let (rm, inject) = (ours("driver/rm.c")?, ours("driver/inject.c")?);
        let (thread, more) = (ours("service_thread.h")?, ours("driver/Kbuild")?);
        let stamp = Stamp::new(directory, &[kbuild, &rm, &inject, &thread, &more]);
        if !stamp.is_current() {
            for (name, text) in [("rm.c", &rm), ("inject.c", &inject), ("service_thread.h", &thread)] {
                write(&directory.join("nvshare").join(name), text)?;
            }
            let arguments = [
                format!("NV_KERNEL_SOURCES={}", kernel.common_headers().display()),
                format!("NV_KERNEL_OUTPUT={}", kernel.headers().display()),
                "NV_KERNEL_MODULES=nvidia nvidia-uvm".to_owned(),
                "NV_SPECTRE_V2=0".to_owned(),
                "ARCH=x86_64".to_owned(),
            ];
            // The object first: what it lacks is not known before.
            write(&directory.join("Kbuild"), kbuild)?;
            kernel.build(directory, &arguments, "nvidia-uvm.o")?;
            let symvers = kernel.headers().join("Module.symvers");
            let missing = missing(&directory.join("nvidia-uvm.o"), &symvers)?;
            let lines: Vec<String> = missing.iter().map(|name| format!("MISSING({name});\n")).collect();
            write(&directory.join("nvshare/rm_missing.h"), &lines.concat())?;
            write(&directory.join("Kbuild"), &format!("{kbuild}\n{more}"))?;
            kernel.build(directory, &arguments, "modules")?;
            stamp.set()?;
        }
        Ok(MODULES.iter().map(|name| (directory.join(name), format!("driver/{name}"))).collect())
    }
}

/// The functions that the object asks for and neither the kernel nor rm.c has.
fn missing(object: &Path, symvers: &Path) -> Result<BTreeSet<String>> {
    let bytes = fs::read(object).with_context(|| format!("reading {}", object.display()))?;
    let file = object::File::parse(&*bytes).with_context(|| format!("parsing {}", object.display()))?;
    let text = fs::read_to_string(symvers).with_context(|| format!("reading {}", symvers.display()))?;
    let kernel: BTreeSet<&str> = text.lines().filter_map(|line| line.split('\t').nth(1)).collect();
    let names = file.symbols().filter(object::ObjectSymbol::is_undefined);
    let names = names.map(|symbol| symbol.name()).collect::<Result<BTreeSet<&str>, _>>()?;
    let known = |name: &&str| name.is_empty() || *name == "__this_module" || kernel.contains(name);
    let names = names.into_iter().filter(|name| !known(name) && !ANSWERED.contains(name));
    Ok(names.map(str::to_owned).collect())
}
