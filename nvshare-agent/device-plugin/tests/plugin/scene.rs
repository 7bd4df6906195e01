//! A node: a kubelet's directory, a list of GPUs in a file, and the plugin.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use nvshare_tests::process::Guarded;
use tempfile::TempDir;

use crate::{
    kubelet::{Kubelet, Plugin, Watch},
    wire::Wire,
};

/// The plugin's socket as it registers it.
pub(crate) const ENDPOINT: &str = "nvshare.com-gpu.sock";

pub(crate) fn uuid(number: usize) -> String {
    format!("GPU-00000000-0000-0000-0000-{number:012x}")
}

pub(crate) fn share(gpu: usize, number: usize) -> String {
    format!("{}::{number}", uuid(gpu))
}

pub(crate) struct Node {
    dir: TempDir,
}

impl Node {
    /// A node with the library installed and no GPU.
    pub(crate) fn new() -> Self {
        let node = Self { dir: tempfile::tempdir().expect("a directory") };
        std::fs::create_dir_all(node.library_dir()).expect("a place for the library");
        std::fs::write(node.library_dir().join("libnvshare.so"), "").expect("a library");
        node
    }

    pub(crate) fn with_gpus(count: usize) -> Self {
        let node = Self::new();
        node.list(true, 0..count);
        node
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn kubelet_dir(&self) -> PathBuf {
        self.dir().join("kubelet")
    }

    pub(crate) fn library_dir(&self) -> PathBuf {
        self.dir().join("lib")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    pub(crate) fn inventory(&self) -> PathBuf {
        self.dir().join("gpus.json")
    }

    /// Lists these GPUs.
    pub(crate) fn list(&self, complete: bool, numbers: impl IntoIterator<Item = usize>) {
        self.list_with(
            complete,
            numbers.into_iter().map(|number| format!(r#"{{"uuid": "{}"}}"#, uuid(number))),
        );
    }

    /// Lists GPUs by their JSON.
    pub(crate) fn list_with(&self, complete: bool, gpus: impl Iterator<Item = String>) {
        let gpus: Vec<String> = gpus.collect();
        let text = format!(r#"{{"complete": {complete}, "gpus": [{}]}}"#, gpus.join(","));
        let part = self.dir().join("gpus.part");
        std::fs::write(&part, text).expect("a list");
        std::fs::rename(part, self.inventory()).expect("a list");
    }

    /// The plugin's command line.
    pub(crate) fn command(&self, inventory: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-device-plugin"));
        command
            .args(["--inventory", inventory])
            .arg("--kubelet-dir")
            .arg(self.kubelet_dir())
            .arg("--library-dir")
            .arg(self.library_dir())
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(more);
        command
    }

    /// Starts the plugin on the list in the file.
    pub(crate) fn plugin(&self, more: &[&str]) -> Guarded {
        self.plugin_on(&self.inventory().display().to_string(), more)
    }

    pub(crate) fn plugin_on(&self, inventory: &str, more: &[&str]) -> Guarded {
        let mut command = self.command(inventory, more);
        Guarded::spawn("the device plugin", &mut command, &self.dir().join("plugin.log"), false)
            .expect("a plugin")
    }
}

/// A node whose plugin has registered, and the kubelet's connection to it.
pub(crate) struct Scene {
    pub(crate) node: Node,
    pub(crate) process: Guarded,
    pub(crate) kubelet: Kubelet,
    pub(crate) registration: Wire,
    pub(crate) plugin: Plugin,
    pub(crate) watch: Watch,
}

impl Scene {
    pub(crate) async fn open(node: Node, more: &[&str]) -> Self {
        let mut kubelet = Kubelet::start(&node.kubelet_dir());
        let process = node.plugin(more);
        let registration = kubelet.registration().await;
        let mut plugin = kubelet.plugin(&registration.one_text(2)).await;
        let watch = plugin.watch().await;
        Self { node, process, kubelet, registration, plugin, watch }
    }
}
