//! The object that holds the programs: embedded, or the file that `NVSHARE_BPF_OBJECT` names.

use std::{borrow::Cow, path::PathBuf};

use aya::{Ebpf, EbpfLoader};
use nvshare_abi::maps::{ABI_SECTION, ABI_VERSION};
use object::{Object as _, ObjectSection as _};

use super::reason::reason;

/// Environment variable with the path of an object to use instead of the embedded one.
pub(super) const OVERRIDE: &str = "NVSHARE_BPF_OBJECT";

#[cfg(target_arch = "x86_64")]
static EMBEDDED: &[u8] =
    aya::include_bytes_aligned!("../../../../nvshare-ebpf/prebuilt/nvshare-x86_64.bpf.o");
#[cfg(target_arch = "aarch64")]
static EMBEDDED: &[u8] =
    aya::include_bytes_aligned!("../../../../nvshare-ebpf/prebuilt/nvshare-aarch64.bpf.o");

/// Creates the maps. The error is a line for a person.
pub(super) fn load() -> Result<Ebpf, String> {
    let (bytes, origin) = match std::env::var_os(OVERRIDE).map(PathBuf::from) {
        None => (Cow::Borrowed(EMBEDDED), "the embedded BPF object".to_owned()),
        Some(path) => {
            let bytes = std::fs::read(&path).map_err(|error| {
                format!("{OVERRIDE}={}: {error}; unset it to use the embedded object", path.display())
            })?;
            (Cow::Owned(bytes), path.display().to_string())
        }
    };
    check_abi(&bytes).map_err(|problem| format!("{origin} {problem}; rebuild it with `cargo xtask ebpf`"))?;
    // No kernel structure is read, so the kernel's type information (a large parse) is not needed.
    EbpfLoader::new().btf(None).load(&bytes).map_err(|error| reason(&error))
}

/// Refuses an object whose maps have other types than this program's.
fn check_abi(bytes: &[u8]) -> Result<(), String> {
    let file = object::File::parse(bytes).map_err(|error| format!("is not an ELF file ({error})"))?;
    let found = file
        .section_by_name(ABI_SECTION)
        .and_then(|section| section.data().ok())
        .and_then(|data| data.first_chunk())
        .map(|&word| u32::from_ne_bytes(word));
    match found {
        Some(ABI_VERSION) => Ok(()),
        Some(other) => Err(format!("has ABI version {other}, this agent needs {ABI_VERSION}")),
        None => Err("carries no ABI version".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_object_fits_this_agent_and_others_are_refused() {
        assert_eq!(check_abi(EMBEDDED), Ok(()));
        assert!(check_abi(b"not an object").is_err());
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(check_abi(&own), Err("carries no ABI version".to_owned()));
    }
}
