//! Debian's kernels, and how modules for them are built.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{archive::Archive, on_path};
use crate::cargo::run as run_command;

/// The package that always depends on the newest kernel for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";
/// Holds the kernel's release, as in `6.1.0-56-cloud-amd64`, once all of it is there.
const RELEASE: &str = "release";

/// An unpacked kernel.
pub(super) struct Kernel {
    /// What belongs to this kernel.
    pub(super) directory: PathBuf,
    pub(super) release: String,
}

impl Kernel {
    /// The kernel of a suite: the cached one, else the newest.
    pub(super) fn get(cache: &Path, suite: &str) -> Result<Self> {
        let directory = cache.join(suite);
        let release = match fs::read_to_string(directory.join(RELEASE)) {
            Ok(release) => release,
            Err(_) => download(cache, suite, &directory)?,
        };
        Ok(Self { directory, release })
    }

    /// The bootable image.
    pub(super) fn image(&self) -> PathBuf {
        self.unpacked().join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Builds what a directory's Kbuild file says.
    pub(super) fn build(&self, directory: &Path, arguments: &[String], target: &str) -> Result<()> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        // The kernel's own compiler where there is one. Debug information is left out: it takes as long to write as
        // the code, and the description of types that is made of it needs a program more.
        let compiler = if on_path("gcc-12") { "gcc-12" } else { "gcc" };
        run_command(
            Command::new("make")
                .args(["-s", &format!("-j{jobs}"), "-C"])
                .arg(self.headers())
                .arg(format!("M={}", directory.display()))
                .arg(format!("CC={compiler}"))
                .args(["DEBUG_CFLAGS=", "CONFIG_DEBUG_INFO_BTF_MODULES=", "KBUILD_VERBOSE=0"])
                .args(arguments)
                .arg(target)
                .stdout(Stdio::null()),
        )
    }

    /// What modules are built with.
    pub(super) fn headers(&self) -> PathBuf {
        self.unpacked().join(format!("usr/src/linux-headers-{}", self.release))
    }

    /// The part of it that all kernels of the release share.
    pub(super) fn common_headers(&self) -> PathBuf {
        let version = self.release.trim_end_matches("-cloud-amd64");
        self.unpacked().join(format!("usr/src/linux-headers-{version}-common"))
    }

    fn unpacked(&self) -> PathBuf {
        self.directory.join("root")
    }
}

/// Gives the release.
fn download(cache: &Path, suite: &str, directory: &Path) -> Result<String> {
    let archive = Archive::of(cache, suite, "main")?;
    let release = archive
        .depends(NEWEST)?
        .iter()
        .find_map(|name| name.strip_prefix("linux-image-").map(str::to_owned))
        .with_context(|| format!("{NEWEST} depends on no kernel"))?;
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let headers = format!("linux-headers-{release}");
    let mut packages = vec![format!("linux-image-{release}"), headers.clone()];
    packages.extend(
        archive
            .depends(&headers)?
            .into_iter()
            .filter(|name| name.starts_with("linux-headers-") || name.starts_with("linux-kbuild-")),
    );
    let unpacked = directory.join("root");
    archive.unpack(&packages, &unpacked)?;
    // Drivers are not needed: the machine has nothing but a console.
    fs::remove_dir_all(unpacked.join("lib/modules")).ok();
    relocate(&unpacked, &headers)?;
    fs::write(directory.join(RELEASE), &release).context("marking the kernel as complete")?;
    Ok(release)
}

/// The headers name each other by the place where they would be installed.
fn relocate(unpacked: &Path, headers: &str) -> Result<()> {
    let makefile = unpacked.join("usr/src").join(headers).join("Makefile");
    let text = fs::read_to_string(&makefile).with_context(|| format!("reading {}", makefile.display()))?;
    let installed = "include /usr/src/";
    ensure!(text.contains(installed), "{} has another form: {text}", makefile.display());
    let place = format!("include {}/usr/src/", unpacked.display());
    fs::write(&makefile, text.replace(installed, &place))
        .with_context(|| format!("writing {}", makefile.display()))
}
