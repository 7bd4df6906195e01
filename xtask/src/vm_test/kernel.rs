//! Debian's kernel and what modules for it are built with: downloaded, unpacked, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cargo::{root, run as run_command};

/// The package that always depends on the newest kernel for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";
/// Present in the directory of a kernel once all of it is there.
const COMPLETE: &str = "complete";

/// An unpacked kernel.
pub(super) struct Kernel {
    /// The bootable image.
    pub(super) image: PathBuf,
    headers: PathBuf,
}

impl Kernel {
    /// The kernel that the package lists name; a cached one where they name none.
    pub(super) fn get(cache: &Path) -> Result<Self> {
        let release = match release() {
            Ok(release) => release,
            Err(error) => match cached(cache) {
                Some(release) => {
                    eprintln!("using the cached kernel {release}: {error:#}");
                    release
                }
                None => update_lists().and_then(|()| release()).map_err(|second| {
                    error.context(format!("{second:#}; run `apt-get update` on a Debian machine"))
                })?,
            },
        };
        let directory = cache.join(&release);
        if !directory.join(COMPLETE).exists()
            && let Err(error) = download(&directory, &release)
        {
            // Old package lists name files that the archive has replaced.
            eprintln!("{error:#}; trying again with fresh package lists");
            update_lists()?;
            download(&directory, &release)?;
        }
        let unpacked = directory.join("root");
        Ok(Self {
            image: unpacked.join(format!("boot/vmlinuz-{release}")),
            headers: unpacked.join(format!("usr/src/linux-headers-{release}")),
        })
    }

    /// Builds the test module as one driver version.
    pub(super) fn build_module(&self, directory: &Path, version: &str, branch: &str) -> Result<PathBuf> {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
        for file in ["Kbuild", "nvidia_uvm.c"] {
            let source = root().join("tests/vm/module").join(file);
            fs::copy(&source, directory.join(file))
                .with_context(|| format!("copying {}", source.display()))?;
        }
        run_command(
            Command::new("make")
                .arg("-s")
                .arg("-C")
                .arg(&self.headers)
                .arg(format!("M={}", directory.display()))
                .args([format!("DRIVER_VERSION={version}"), format!("DRIVER_BRANCH={branch}")])
                .arg("modules"),
        )?;
        Ok(directory.join("nvidia_uvm.ko"))
    }
}

/// The release of the newest kernel, as in `6.1.0-56-cloud-amd64`.
fn release() -> Result<String> {
    depends(NEWEST)?
        .iter()
        .find_map(|name| name.strip_prefix("linux-image-").map(str::to_owned))
        .with_context(|| format!("{NEWEST} depends on no kernel"))
}

/// The packages that one depends on.
fn depends(package: &str) -> Result<Vec<String>> {
    let output = Command::new("apt-cache")
        .args(["depends", package])
        .env("LC_ALL", "C")
        .output()
        .context("running apt-cache")?;
    ensure!(output.status.success(), "the package lists do not name {package}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned).collect())
}

fn update_lists() -> Result<()> {
    if !nvshare_tests::is_root() {
        bail!("the package lists are missing or old, and renewing them needs root");
    }
    run_command(Command::new("apt-get").args(["update", "-qq"]))
}

/// The newest complete kernel of the cache.
fn cached(cache: &Path) -> Option<String> {
    let complete = fs::read_dir(cache).ok()?.flatten().filter(|entry| entry.path().join(COMPLETE).exists());
    let newest =
        complete.max_by_key(|entry| entry.metadata().and_then(|metadata| metadata.modified()).ok())?;
    newest.file_name().into_string().ok()
}

fn download(directory: &Path, release: &str) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let headers = format!("linux-headers-{release}");
    let mut packages = vec![format!("linux-image-{release}"), headers.clone()];
    packages.extend(
        depends(&headers)?
            .into_iter()
            .filter(|name| name.starts_with("linux-headers-") || name.starts_with("linux-kbuild-")),
    );
    run_command(Command::new("apt-get").args(["download", "-qq"]).args(&packages).current_dir(directory))?;
    let unpacked = directory.join("root");
    for entry in fs::read_dir(directory).context("listing what was downloaded")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run_command(Command::new("dpkg").arg("-x").arg(&path).arg(&unpacked))?;
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    // Drivers are not needed: the machine has nothing but a console.
    fs::remove_dir_all(unpacked.join("lib/modules")).ok();
    relocate(&unpacked, &headers)?;
    fs::write(directory.join(COMPLETE), "").context("marking the kernel as complete")
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
