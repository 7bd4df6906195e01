//! What goes into a container so that its programs find their GPU and are clients of the agent.
//!
//! Directories are mounted, never single files: a container runtime makes a directory of a file that is not there yet,
//! and a mounted socket is dead as soon as the agent is restarted. Both are read-only: a program connects to a socket
//! on a read-only mount, but cannot remove it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use nvshare_core::GpuId;

use crate::api::{CdiDevice, ContainerAllocateResponse, Mount};

/// The library's name in its directory.
pub const LIBRARY: &str = "libnvshare.so";
/// Where containers see the library's directory.
pub const LIBRARY_IN_CONTAINER: &str = "/usr/lib/nvshare";
/// Where containers see the run directory.
pub const RUN_IN_CONTAINER: &str = "/run/nvshare";

/// How a container gets the GPU itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum GpuAccess {
    /// The NVIDIA container runtime reads the variable NVIDIA_VISIBLE_DEVICES.
    Env,
    /// The container runtime takes a CDI device that nvidia-ctk has described.
    Cdi,
}

/// Where things are, and how the GPU is handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injection {
    /// The library's directory on the node.
    pub library_dir: PathBuf,
    /// The agent's run directory on the node.
    pub run_dir: PathBuf,
    /// How the GPU is handed over.
    pub access: GpuAccess,
    /// The kind of CDI device, as in nvidia.com/gpu.
    pub cdi_kind: String,
}

impl Injection {
    /// What a container needs that shares these GPUs.
    pub fn of(&self, gpus: &BTreeSet<GpuId>) -> ContainerAllocateResponse {
        let Self { library_dir, run_dir, access, cdi_kind } = self;
        let names: Vec<String> = gpus.iter().map(GpuId::to_string).collect();
        let (visible, cdi_devices) = match access {
            GpuAccess::Env => (names.join(","), Vec::new()),
            // With `void` a NVIDIA runtime that is the default adds no GPU of its own accord.
            GpuAccess::Cdi => (
                "void".to_owned(),
                names.iter().map(|name| CdiDevice { name: format!("{cdi_kind}={name}") }).collect(),
            ),
        };
        let envs = BTreeMap::from([
            ("LD_PRELOAD".to_owned(), format!("{LIBRARY_IN_CONTAINER}/{LIBRARY}")),
            ("NVSHARE_RUN_DIR".to_owned(), RUN_IN_CONTAINER.to_owned()),
            ("NVIDIA_VISIBLE_DEVICES".to_owned(), visible),
        ]);
        ContainerAllocateResponse {
            envs,
            mounts: vec![mount(library_dir, LIBRARY_IN_CONTAINER), mount(run_dir, RUN_IN_CONTAINER)],
            cdi_devices,
            ..ContainerAllocateResponse::default()
        }
    }
}

fn mount(host: &Path, container: &str) -> Mount {
    Mount { container_path: container.to_owned(), host_path: host.display().to_string(), read_only: true }
}
