//! Probes on the rare calls of libcuda: which processes use CUDA, with the shim or without.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        ProgramError, UProbe,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeError, UProbeLink, UProbeScope},
    },
};
use nvshare_abi::maps::CudaCall;
use nvshare_core::Bytes;

use super::{
    maps::Maps,
    program::{let_go, loaded},
    reason::reason,
    uvm::file_identity,
};
use crate::{
    config::DriverConfig,
    observe::source::{CudaProcess, SensorState},
};

/// The name of the program.
pub(super) const PROGRAMS: [&str; 1] = ["cuda_call"];
/// The driver library's name; alone, it is looked up in the loader's cache.
const LIBRARY: &str = "libcuda.so.1";
/// Where container runtimes and driver containers put it without telling the loader's cache.
const USUAL_DIRS: [&str; 5] = [
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
];

pub(super) struct CudaProbes {
    state: SensorState,
    links: Vec<UProbeLink>,
    library: Option<(u64, u64)>,
}

impl CudaProbes {
    pub(super) fn attach(ebpf: &mut Ebpf, driver: &DriverConfig) -> Self {
        let library = file_identity(&find_library(driver));
        let (state, links) = match attach(ebpf, driver) {
            Ok((detail, links)) => (SensorState::Attached(detail), links),
            Err(reason) => (SensorState::Unavailable(reason), Vec::new()),
        };
        Self { state, links, library }
    }

    pub(super) fn state(&self) -> &SensorState {
        &self.state
    }

    /// Attaches anew when the library appeared or was replaced.
    pub(super) fn refresh(&mut self, ebpf: &mut Ebpf, driver: &DriverConfig) {
        if file_identity(&find_library(driver)) != self.library {
            let_go(std::mem::take(&mut self.links));
            *self = Self::attach(ebpf, driver);
        }
    }

    pub(super) fn read(maps: &mut Maps) -> BTreeMap<u32, CudaProcess> {
        let mut processes = BTreeMap::new();
        for (tgid, calls) in maps.cuda_calls() {
            if !Path::new("/proc").join(tgid.to_string()).exists() {
                maps.forget_process(tgid);
                continue;
            }
            let process = CudaProcess {
                contexts: calls.contexts,
                allocations: calls.managed_allocations + calls.device_allocations,
                allocated: Bytes(calls.managed_bytes + calls.device_bytes),
            };
            processes.insert(tgid, process);
        }
        processes
    }
}

/// The configured library, else where the loader would look first, else where it usually is, else its name.
fn find_library(driver: &DriverConfig) -> PathBuf {
    if let Some(library) = &driver.libcuda {
        return library.clone();
    }
    let loader_path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    std::env::split_paths(&loader_path)
        .chain(USUAL_DIRS.map(PathBuf::from))
        .map(|dir| dir.join(LIBRARY))
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(LIBRARY))
}

fn attach(ebpf: &mut Ebpf, driver: &DriverConfig) -> Result<(String, Vec<UProbeLink>), String> {
    let [name] = PROGRAMS;
    let library = find_library(driver);
    let program: &mut UProbe = loaded(ebpf, name)?;
    let mut links = Vec::new();
    for &(symbol, call) in CudaCall::SYMBOLS {
        let point =
            UProbeAttachPoint { location: UProbeAttachLocation::Symbol(symbol), cookie: Some(call as u64) };
        match program.attach(point, &library, UProbeScope::AllProcesses).and_then(|id| program.take_link(id))
        {
            Ok(link) => links.push(link),
            // Each driver has some of the versions of each call.
            Err(ProgramError::UProbeError(UProbeError::SymbolError { .. }))
                if driver.libcuda.as_deref().is_none_or(Path::exists) => {}
            Err(error) => {
                return Err(format!("uprobe on {symbol} of {}: {}", library.display(), reason(&error)));
            }
        }
    }
    if links.is_empty() {
        return Err(format!("{} exports none of the calls to count; is it the driver's?", library.display()));
    }
    Ok((format!("{} calls of {}", links.len(), library.display()), links))
}
