//! Modules of ours with the driver's names, as every layout of events and every lack that the agent must survive.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::Result;

use super::{
    build::{Stamp, source, write},
    kernel::Kernel,
};

/// One module: its name for the tests, what version it says it is, the branch whose names it has, and a function
/// that it lacks.
struct StandIn {
    name: &'static str,
    version: &'static str,
    branch: u16,
    lacks: Option<&'static str>,
}

const fn plain(version: &'static str, branch: u16) -> StandIn {
    StandIn { name: version, version, branch, lacks: None }
}

const fn without(name: &'static str, lacks: &'static str) -> StandIn {
    StandIn { name, version: "580.126.20", branch: 580, lacks: Some(lacks) }
}

/// Each epoch of event data, 560, whose fault entries differ from those of its epoch, and 999, which nobody knows.
const ALL: [StandIn; 10] = [
    plain("525.147.05", 525),
    plain("535.288.01", 535),
    plain("550.163.01", 550),
    plain("560.35.03", 560),
    plain("575.64.05", 575),
    plain("580.126.20", 580),
    plain("999.10", 999),
    without("without-notify", "uvm_perf_event_notify"),
    without("without-init", "uvm_perf_init_va_space_events"),
    without("without-service", "uvm_parent_gpu_service_replayable_faults"),
];

/// Builds all. Gives their files and the names for the tests.
pub(super) fn build(kernel: &Kernel) -> Result<Vec<(PathBuf, String)>> {
    let directory = kernel.directory.join("stand-in");
    // One at a time on each CPU: kbuild refuses modules of one name together, and one has little to do in parallel.
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some(stand_in) = ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
                stand_in.build(kernel, &directory.join(stand_in.name))?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let file = |name: &str| (directory.join(name).join("nvidia_uvm.ko"), format!("stand-in/{name}.ko"));
    Ok(ALL.iter().map(|stand_in| file(stand_in.name)).collect())
}

impl StandIn {
    fn build(&self, kernel: &Kernel, directory: &Path) -> Result<()> {
        let Self { name: _, version, branch, lacks } = self;
        let lacking = lacks.map(|function| format!("-D{function}=lacking")).unwrap_or_default();
        let arguments = [
            format!("DRIVER_VERSION={version}"),
            format!("DRIVER_BRANCH={branch}"),
            format!("LACKING={lacking}"),
        ];
        let files = [
            ("Kbuild", source("stand_in/Kbuild")?),
            ("nvidia_uvm.c", source("stand_in/nvidia_uvm.c")?),
            ("service_thread.h", source("service_thread.h")?),
        ];
        let made_of: Vec<&str> =
            arguments.iter().chain(files.iter().map(|(_, text)| text)).map(String::as_str).collect();
        let stamp = Stamp::new(directory, &made_of);
        if stamp.is_current() {
            return Ok(());
        }
        for (name, text) in &files {
            write(&directory.join(name), text)?;
        }
        kernel.build(directory, &arguments, "modules")?;
        stamp.set()
    }
}
