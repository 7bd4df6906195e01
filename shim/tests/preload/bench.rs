//! A place with the fake driver in it, and the programs that a test puts before that driver.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Where they are built.
pub(crate) struct Bench {
    pub(crate) dir: PathBuf,
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/preload").join(name)
}

impl Bench {
    /// A place of this test's own, with the driver.
    pub(crate) fn new(test: &str) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let bench = Self { dir };
        bench.rustc(
            "fake_libcuda",
            "libcuda.so.1",
            &["--crate-type=cdylib", "-Clink-arg=-Wl,-soname,libcuda.so.1"],
        );
        bench
    }

    /// Builds a program of Rust.
    pub(crate) fn rustc(&self, name: &str, output: &str, more: &[&str]) {
        let status = Command::new("rustc")
            .args(["--edition=2024", "-O", "-Anon_snake_case", "-o"])
            .arg(self.dir.join(output))
            .arg(source(name).with_extension("rs"))
            .args(more)
            .status()
            .unwrap();
        assert!(status.success(), "cannot build {output}");
    }

    /// Builds a program of C.
    pub(crate) fn cc(&self, name: &str, output: &str, more: &[&str]) {
        let source = source(name).with_extension("c");
        let status =
            Command::new("cc").arg("-o").arg(self.dir.join(output)).arg(source).args(more).status().unwrap();
        assert!(status.success(), "cannot build {output}");
    }

    /// A program that was built here, under this shim. No agent is there, unless a test says otherwise.
    pub(crate) fn program(&self, name: &str, shim: &Path, mode: &str) -> Command {
        let mut command = Command::new(self.dir.join(name));
        command
            .arg(mode)
            .env_clear()
            .env("LD_LIBRARY_PATH", &self.dir)
            .env("LD_PRELOAD", shim)
            .env("NVSHARE_RUN_DIR", self.dir.join("nobody"));
        command
    }
}

/// Builds the shim; the library of a cdylib is not built for its own tests. `NVSHARE_TEST_SHIM` names another to test.
pub(crate) fn shim(profile: &str) -> PathBuf {
    if let Some(path) = std::env::var_os("NVSHARE_TEST_SHIM") {
        return path.into();
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package=nvshare-shim", "--profile", profile, "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "cannot build the shim");
    target.join(if profile == "dev" { "debug" } else { profile }).join("libnvshare.so")
}
