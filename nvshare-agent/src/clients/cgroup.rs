//! Which container a process is in, by its control group.

use std::sync::Arc;

/// The control group that limits are counted for: a container's, or that of a service or session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cgroup(Arc<str>);

/// Longer paths are cut: they are keys, and their owner may make them long.
const PATH_MAX: usize = 512;
/// Digits of a container's id, as all runtimes write it.
const ID_DIGITS: usize = 64;

impl Cgroup {
    /// That of a process; none where the system puts processes of any sort into its topmost group. Processes that have
    /// ended share one.
    pub fn of_process(pid: u32) -> Option<Self> {
        let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
            return Some(Self("".into()));
        };
        let path = path(&text);
        (!path.is_empty()).then(|| Self(container(path).into()))
    }

    #[cfg(test)]
    pub(super) fn named(path: &str) -> Self {
        Self(path.into())
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The path in the text of `/proc/PID/cgroup`: the unified hierarchy's, else the memory controller's.
fn path(text: &str) -> &str {
    let of = |wanted: fn(&str) -> bool| {
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            (wanted(controllers) && path != "/").then_some(path)
        })
    };
    of(str::is_empty).or_else(|| of(|names| names.split(',').any(|name| name == "memory"))).unwrap_or("")
}

/// Cut after the container's own group: what a container makes below it counts as the container.
fn container(path: &str) -> &str {
    let mut end = 0;
    for part in path.split_inclusive('/') {
        end += part.len();
        let mut run = 0;
        let longest = part.bytes().fold(0, |longest: usize, byte| {
            run = if byte.is_ascii_hexdigit() { run + 1 } else { 0 };
            longest.max(run)
        });
        if longest >= ID_DIGITS {
            return path[..end].trim_end_matches('/');
        }
    }
    let cut = (0..=path.len().min(PATH_MAX)).rev().find(|&at| path.is_char_boundary(at));
    &path[..cut.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn a_container_cannot_leave_its_limit_by_groups_of_its_own() {
        for around in [("/kubepods.slice/pod1/cri-containerd-", ".scope"), ("/docker/", "")] {
            let group = format!("{}{ID}{}", around.0, around.1);
            assert_eq!(container(&format!("{group}/mine/deeper")), group);
            assert_eq!(container(&group), group);
        }
        assert_eq!(container("/user.slice/user-7.slice/a.scope"), "/user.slice/user-7.slice/a.scope");
        assert_eq!(container(&format!("/{}", "ü".repeat(4000))).len(), PATH_MAX - 1);
    }

    #[test]
    fn fuzz_the_text_of_a_process() {
        let words: &[&[u8]] = &[b"0::", b"memory", b"\n", b"/", b"..", b":", ID.as_bytes(), b".scope"];
        nvshare_fuzz::fuzz(env!("CARGO_MANIFEST_DIR"), "cgroup", words, |input| {
            let text = String::from_utf8_lossy(input);
            let group = container(path(&text));
            assert!(text.contains(group) && group.len() <= text.len());
            // A group of its own does not get a container another account.
            if group.len() < PATH_MAX {
                assert_eq!(container(group), group);
            }
            (group.is_empty() as u64) << 1 | u64::from(path(&text) == group)
        });
    }

    #[test]
    fn the_unified_hierarchy_counts_and_without_it_the_memory_controllers() {
        assert_eq!(path("12:pids:/p\n4:cpu,memory:/m\n0::/u\n"), "/u");
        assert_eq!(path("12:pids:/p\n4:cpu,memory:/m:x\n0::/\n"), "/m:x");
        assert_eq!(path("0::/\n"), "");
        assert_eq!(path(""), "");
    }

    #[test]
    fn a_process_that_has_ended_has_the_one_of_all_such() {
        assert_eq!(Cgroup::of_process(u32::MAX).unwrap().as_str(), "");
        assert_ne!(Cgroup::of_process(std::process::id()), Cgroup::of_process(u32::MAX));
    }
}
