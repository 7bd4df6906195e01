//! Where the built programs and libraries are.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// A folder of one cargo profile, holding everything that the product consists of.
#[derive(Clone, Debug)]
pub struct Binaries {
    dir: PathBuf,
    /// The root that a package was unpacked to; what it holds is taken from there.
    installed: Option<PathBuf>,
}

impl Binaries {
    /// The programs in `dir`, a cargo profile's output folder such as `target/debug`.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        let binaries = Self::for_real_gpu(dir)?;
        require(&[binaries.simulator()])?;
        Ok(binaries)
    }

    /// The same without the simulator, which a machine with a GPU does not need.
    pub fn for_real_gpu(dir: &Path) -> Result<Self> {
        let binaries = Self::unchecked(dir);
        require(&[binaries.agent(), binaries.ctl(), binaries.workload(), binaries.shim()])?;
        Ok(binaries)
    }

    /// The programs in `dir`, for who needs but some of them and has just built those.
    pub(crate) fn unchecked(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), installed: None }
    }

    /// The programs beside the running test executable.
    pub fn of_this_test() -> Result<Self> {
        let test = std::env::current_exe().context("finding the running test")?;
        let dir = test.parent().and_then(Path::parent).context("the test has no profile folder")?;
        Self::in_dir(dir)
    }

    /// What a package has brought below `root`, and the rest from `dir`.
    pub fn installed_in(root: &Path, dir: &Path) -> Self {
        Self { dir: dir.to_owned(), installed: Some(root.to_owned()) }
    }

    fn shipped(&self, folder: &str, name: &str) -> PathBuf {
        match &self.installed {
            Some(root) => root.join(folder).join(name),
            None => self.dir.join(name),
        }
    }

    /// The folder that holds them all.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The agent.
    pub fn agent(&self) -> PathBuf {
        self.shipped("usr/bin", "nvshare-agent")
    }

    /// The operator's tool.
    pub fn ctl(&self) -> PathBuf {
        self.shipped("usr/bin", "nvsharectl")
    }

    /// The Kubernetes device plugin.
    pub fn device_plugin(&self) -> PathBuf {
        self.shipped("usr/bin", "nvshare-device-plugin")
    }

    /// The simulator.
    pub fn simulator(&self) -> PathBuf {
        self.dir.join("nvshare-gpu-sim")
    }

    /// The program that stands for a user's.
    pub fn workload(&self) -> PathBuf {
        self.dir.join("nvshare-workload")
    }

    /// The library that makes managed memory of what a program allocates through the CUDA runtime.
    pub fn managed_malloc(&self) -> PathBuf {
        self.dir.join("libnvshare_managed_malloc.so")
    }

    /// The library that is preloaded into users' programs.
    pub fn shim(&self) -> PathBuf {
        self.shipped("usr/lib/nvshare", "libnvshare.so")
    }
}

fn require(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        ensure!(
            path.exists(),
            "{} is missing: build everything first with `cargo build` (`cargo xtask test` does)",
            path.display()
        );
    }
    Ok(())
}
