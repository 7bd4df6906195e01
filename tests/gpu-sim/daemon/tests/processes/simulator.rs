//! A running simulator.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use serde::Deserialize;

/// What the simulator counted for one program on its first card.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Counted {
    pub(crate) pid: u32,
    pub(crate) connected: bool,
    pub(crate) ended: bool,
    pub(crate) resident_bytes: u64,
    pub(crate) cpu_faults: u64,
    pub(crate) faults: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) evictions: u64,
}

#[derive(Deserialize)]
struct Report {
    gpus: Vec<Gpu>,
}

#[derive(Deserialize)]
struct Gpu {
    busy_ns: u64,
    clients: Vec<Counted>,
}

pub(crate) struct Simulator {
    process: Child,
    dir: PathBuf,
    temporary: Option<tempfile::TempDir>,
}

/// `nvshare-gpu-sim run --dir DIR`.
pub(crate) fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-gpu-sim"));
    command.arg("run").arg("--dir").arg(dir);
    command
}

/// Waits for something that is bound to happen.
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !happened() {
        assert!(Instant::now() < deadline, "waited 30 s for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Simulator {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let mut simulator = Self::start_in(&temporary.path().join("sim"), arguments);
        simulator.temporary = Some(temporary);
        simulator
    }

    pub(crate) fn start_in(dir: &Path, arguments: &[&str]) -> Self {
        // A killed simulator's file says "ready", too.
        drop(std::fs::remove_file(dir.join("ready")));
        let mut process = command(dir).args(arguments).spawn().unwrap();
        wait_until("the simulator to be ready", || {
            assert_eq!(process.try_wait().unwrap(), None, "the simulator ended");
            dir.join("ready").exists()
        });
        Self { process, dir: dir.to_owned(), temporary: None }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// True, loudly, where the device files could not be mounted; a failure where nothing may be skipped.
    pub(crate) fn lacks_device_files(&self) -> bool {
        let lacks = !self.dir.join("dev/nvidia-uvm").exists();
        assert!(
            !lacks || std::env::var_os("NVSHARE_REQUIRE_ALL").is_none_or(|value| value != "1"),
            "the device files could not be mounted"
        );
        if lacks {
            eprintln!("SKIPPED: the device files could not be mounted (needs root and /dev/fuse)");
        }
        lacks
    }

    fn report(&self) -> Gpu {
        let json = nvshare_gpu_sim_model::client::stats(&self.dir).unwrap();
        let mut report: Report = serde_json::from_str(&json).unwrap();
        report.gpus.swap_remove(0)
    }

    pub(crate) fn client(&self, pid: u32) -> Counted {
        let clients = self.report().clients;
        *clients.iter().find(|client| client.pid == pid).unwrap_or_else(|| panic!("{pid} not in {clients:?}"))
    }

    pub(crate) fn busy_ns(&self) -> u64 {
        self.report().busy_ns
    }

    /// Ends it as if it had crashed. The files stay as long as what is returned.
    pub(crate) fn kill_and_keep_files(mut self) -> (PathBuf, Option<tempfile::TempDir>) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        (self.dir.clone(), self.temporary.take())
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // SAFETY: takes numbers; the child has not been waited for, or the call fails.
        unsafe { libc::kill(self.process.id() as i32, libc::SIGTERM) };
        drop(self.process.wait());
    }
}
