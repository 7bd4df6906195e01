//! Where the driver lives on this machine: the `[driver]` table.

use std::path::PathBuf;

use nvshare_core::GpuId;
use serde::{Deserialize, Serialize};

/// Paths of the NVIDIA driver. The defaults are right for a driver installed in the usual way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DriverConfig {
    /// Directory of the device files `nvidia-uvm` and `nvidia-uvm-tools`.
    pub dev_dir: PathBuf,
    /// Directory that holds `nvidia/version` and `nvidia-uvm/gpus`.
    pub proc_dir: PathBuf,
    /// Directory of the loaded module, holds `version`.
    pub module_dir: PathBuf,
    /// Directory where the kernel shows type information, for drivers newer than this agent.
    pub btf_dir: PathBuf,
    /// The CUDA driver library for the `cuda-uprobe` sensor; absent: found through the loader cache.
    pub libcuda: Option<PathBuf>,
    /// The management library; absent: found by the loader.
    pub nvml: Option<PathBuf>,
    /// File with lines `<tid> <GPU-uuid>` that names the fault-service threads; absent: kernel threads
    /// named `UVM GPU<n> BH`.
    pub fault_threads: Option<PathBuf>,
    /// ELF files that export the functions of nvidia-uvm, observed with uprobes; empty: kprobes on the
    /// kernel module.
    pub uvm_objects: Vec<PathBuf>,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            dev_dir: "/dev".into(),
            proc_dir: "/proc/driver".into(),
            module_dir: "/sys/module/nvidia_uvm".into(),
            btf_dir: "/sys/kernel/btf".into(),
            libcuda: None,
            nvml: None,
            fault_threads: None,
            uvm_objects: Vec::new(),
        }
    }
}

impl DriverConfig {
    /// The device file on which processes have their VA spaces.
    pub fn uvm_device(&self) -> PathBuf {
        self.dev_dir.join("nvidia-uvm")
    }

    /// The device file of the counter and event interface.
    pub fn uvm_tools_device(&self) -> PathBuf {
        self.dev_dir.join("nvidia-uvm-tools")
    }

    /// The file that tells the driver's version.
    pub fn version_file(&self) -> PathBuf {
        self.module_dir.join("version")
    }

    /// The directory whose links `<id> -> GPU-<uuid>/<sub>` name the GPUs that nvidia-uvm knows.
    pub fn uvm_gpus_dir(&self) -> PathBuf {
        self.proc_dir.join("nvidia-uvm/gpus")
    }

    /// The GPU behind the link `<name>` there, whose text is `GPU-<uuid>/<sub>` (to branch 560: `UVM-GPU-<uuid>/<sub>`).
    pub fn gpu_named(&self, name: u32) -> Option<GpuId> {
        let target = std::fs::read_link(self.uvm_gpus_dir().join(name.to_string())).ok()?;
        target.components().rev().find_map(|part| {
            let text = part.as_os_str().to_str()?;
            text.strip_prefix("UVM-").unwrap_or(text).parse().ok()
        })
    }
}
