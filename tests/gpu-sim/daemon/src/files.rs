//! The files of the simulated host, beside the mounted ones.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nvshare_abi::uvm::{DriverVersion, Processor};

/// What the simulator makes in its directory, and removes again. `dev` is the mount point.
const OWN: [&str; 9] =
    ["ready", "agent.toml", "fault-threads", "sim.sock", "state", "lib", "proc", "sys", "dev"];

/// The directory; emptied of the simulator's files on drop.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    made: bool,
}

impl Directory {
    /// Makes the directory, or takes over what a simulator that was killed left there.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let made = !path.exists();
        fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
        let path = path.canonicalize().with_context(|| format!("resolving {}", path.display()))?;
        let socket = path.join("sim.sock");
        ensure!(
            std::os::unix::net::UnixStream::connect(&socket).is_err(),
            "a simulator is running in {}: stop it, or name another directory with --dir",
            path.display()
        );
        // A private mount of a simulator that was killed answers nothing any more.
        while crate::fuse::detach(&path.join("dev")) {}
        let directory = Self { path, made };
        directory.clear();
        for name in fs::read_dir(&directory.path)?.flatten().map(|entry| entry.file_name()) {
            ensure!(
                OWN.iter().all(|own| *own != name),
                "{} cannot be removed: is it in use?",
                directory.path.join(name).display()
            );
        }
        for sub in
            ["lib", "dev", "proc/driver/nvidia", "proc/driver/nvidia-uvm/gpus", "sys/module/nvidia_uvm"]
        {
            let sub = directory.path.join(sub);
            fs::create_dir_all(&sub).with_context(|| format!("creating {}", sub.display()))?;
        }
        fs::set_permissions(&directory.path, fs::Permissions::from_mode(0o755))?;
        Ok(directory)
    }

    /// Its absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file below it.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// What the driver shows in procfs and sysfs.
    pub(crate) fn write_driver(&self, version: DriverVersion, uuids: &[[u8; 16]]) -> Result<()> {
        self.write("sys/module/nvidia_uvm/version", &format!("{version}\n"))?;
        let line = format!(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (simulated)\n"
        );
        self.write("proc/driver/nvidia/version", &line)?;
        let gpus = self.path.join("proc/driver/nvidia-uvm/gpus");
        for (index, uuid) in uuids.iter().enumerate() {
            let Processor(processor) = processor(version, index as u32);
            let number = version.procfs_gpu(processor).context("more cards than the driver numbers")?;
            // Branches to 560 wrote the name of their own prefix before it.
            let prefix = if version.branch <= 560 { "UVM-" } else { "" };
            let target = format!("{prefix}{}/0", uuid_text(uuid));
            fs::create_dir_all(gpus.join(&target))?;
            symlink(&target, gpus.join(number.to_string()))?;
        }
        Ok(())
    }

    /// Copies the simulated driver libraries under the names by which programs load them. Returns those that are missing.
    pub(crate) fn stage(&self, from: &Path) -> Result<Vec<&'static str>> {
        let mut missing = Vec::new();
        for (built, name) in [("libcuda.so", "libcuda.so.1"), ("libnvidia_ml.so", "libnvidia-ml.so.1")] {
            let source = from.join(built);
            if !source.exists() {
                missing.push(built);
                continue;
            }
            let target = self.path.join("lib").join(name);
            fs::copy(&source, &target)
                .with_context(|| format!("copying {} to {}", source.display(), target.display()))?;
        }
        Ok(missing)
    }

    /// The agent's configuration for this host.
    pub(crate) fn write_agent_configuration(&self) -> Result<()> {
        let program = std::env::current_exe().context("finding this program")?;
        let sub = |name: &str| quoted(&self.path.join(name));
        let mut text = String::from("[driver]\n");
        for (key, name) in [
            ("dev_dir", "dev"),
            ("proc_dir", "proc/driver"),
            ("module_dir", "sys/module/nvidia_uvm"),
            ("libcuda", "lib/libcuda.so.1"),
            ("nvml", "lib/libnvidia-ml.so.1"),
            ("fault_threads", "fault-threads"),
        ] {
            writeln!(text, "{key} = {}", sub(name)?)?;
        }
        // What runs in a program's own context is announced by its libcuda.
        let mut objects = quoted(&program)?;
        if self.path.join("lib/libcuda.so.1").exists() {
            write!(objects, ", {}", sub("lib/libcuda.so.1")?)?;
        }
        writeln!(text, "uvm_objects = [{objects}]")?;
        self.write("agent.toml", &text)
    }

    fn clear(&self) {
        for name in OWN {
            let path = self.path.join(name);
            // What is not there needs no removing; what cannot be removed shows when it is made again.
            drop(if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) });
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.clear();
        if self.made {
            drop(fs::remove_dir(&self.path));
        }
    }
}

/// A path as a TOML string.
fn quoted(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => write!(quoted, "\\u{:04X}", u32::from(control))?,
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    Ok(quoted)
}

/// The number that events of this driver give to the card with this index: up to branch 545 plainly counted from 1, later with
/// eight numbers for each card, for its partitions.
pub(crate) fn processor(version: DriverVersion, index: u32) -> Processor {
    Processor(if version.branch <= 545 { index + 1 } else { index * 8 + 1 })
}

/// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::from("GPU");
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 0 | 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing into a String cannot fail.
        write!(text, "{byte:02x}").ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_nvml_writes_it() {
        let uuid = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
        assert_eq!(uuid_text(&uuid), "GPU-01234567-89ab-cdef-0123-456789abcdef");
    }

    #[test]
    fn any_path_is_one_toml_string() {
        assert_eq!(quoted(Path::new("/a \"b\"\\c\n")).unwrap(), r#""/a \"b\"\\c\u000A""#);
    }

    #[test]
    fn what_a_killed_simulator_left_is_taken_over_and_other_files_stay() {
        let temporary = tempfile::tempdir().unwrap();
        let sim = temporary.path().join("sim");
        std::mem::forget(Directory::create(&sim).unwrap());
        fs::write(sim.join("ready"), "").unwrap();
        fs::write(sim.join("notes"), "").unwrap();
        let directory = Directory::create(&sim).unwrap();
        assert!(!sim.join("ready").exists());
        assert!(sim.join("dev").is_dir());
        drop(directory);
        assert_eq!(
            fs::read_dir(&sim).unwrap().flatten().map(|entry| entry.file_name()).collect::<Vec<_>>(),
            ["notes"]
        );
    }
}
