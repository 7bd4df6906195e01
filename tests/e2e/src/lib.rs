//! Runs the whole product on one machine without a GPU: the simulator, the real agent, real programs under
//! the real shim. Used by the end-to-end tests and by `cargo xtask demo`.
//!
//! Every process started here is a [`process::Guarded`] child: it ends when its handle is dropped, also
//! when a test panics.

pub mod agent;
pub mod api;
pub mod binaries;
pub mod browser;
pub mod chaos;
pub mod compile;
pub mod cuda;
pub mod dashboards;
pub mod denied;
pub mod headers;
pub mod process;
pub mod program;
pub mod prometheus;
pub mod pypi;
pub mod runtime;
pub mod scene;
pub mod scripted;
pub mod simulator;
pub mod terminal;
pub mod workload;

pub use agent::Agent;
pub use binaries::Binaries;
pub use browser::Browser;
pub use cuda::Cuda;
pub use dashboards::Dashboard;
pub use process::{monotonic_ms, wait_until};
pub use prometheus::Prometheus;
pub use scene::Scene;
pub use scripted::ScriptedAgent;
pub use simulator::{Simulator, SimulatorOptions};
pub use terminal::Terminal;
pub use workload::{Workload, WorkloadOptions};

/// Whether a missing part of the machine (root, FUSE, a package) must fail instead of being skipped.
///
/// `.ci/run` sets `NVSHARE_REQUIRE_ALL=1`, so that nothing is skipped unnoticed there.
pub fn everything_required() -> bool {
    std::env::var_os("NVSHARE_REQUIRE_ALL").is_some_and(|value| value == "1")
}

/// Says loudly that a test cannot run here, or fails where nothing may be skipped.
#[expect(clippy::print_stderr, reason = "a skip must be seen by whoever runs the tests")]
pub fn skip(what: &str, why: &str) {
    assert!(!everything_required(), "{what} cannot run here: {why} (NVSHARE_REQUIRE_ALL=1 forbids skipping)");
    eprintln!("SKIPPED: {what}: {why}");
}

/// Whether this process has root's powers, which BPF and FUSE mounts need.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}
