//! From a process's control groups to its pod.

use std::fmt;

/// A pod's identity, as its `metadata.uid` says it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(String);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for PodUid {
    fn from(uid: String) -> Self {
        Self(uid)
    }
}

impl PodUid {
    /// The pod in the text of `/proc/PID/cgroup`.
    ///
    /// The kubelet names a pod's group `pod<uid>` (cgroupfs) or `kubepods[-<class>]-pod<uid>.slice`, with `_` for `-`
    /// (systemd). The outermost counts: below its own group, a container may name groups as it likes. From inside a
    /// container the path begins with `/..`, as often as it takes to leave the reader's own group.
    pub fn of(groups: &str) -> Option<Self> {
        groups.lines().find_map(|line| {
            // hierarchy:controllers:path; a path may have colons.
            let path = line.splitn(3, ':').nth(2)?;
            path.split('/').find_map(Self::of_component)
        })
    }

    fn of_component(name: &str) -> Option<Self> {
        let uid = match name.strip_suffix(".slice") {
            Some(slice) => {
                let rest = slice.strip_prefix("kubepods-")?;
                let pod = rest.strip_prefix("burstable-").or_else(|| rest.strip_prefix("besteffort-"));
                pod.unwrap_or(rest).strip_prefix("pod")?.replace('_', "-")
            }
            None => name.strip_prefix("pod")?.to_owned(),
        };
        // A UUID, or the hash that names a static pod.
        let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
        let dashes = uid.bytes().filter(|&byte| byte == b'-').count();
        (digits == 32 && digits + dashes == uid.len() && matches!(dashes, 0 | 4)).then_some(Self(uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b7ee0e5-3ac0-4b38-9c4a-6e9b1d1f2a3c";

    fn pod(text: &str) -> Option<String> {
        PodUid::of(text).map(|uid| uid.to_string())
    }

    #[test]
    fn a_pod_is_found_under_every_driver_class_and_version() {
        let systemd = UID.replace('-', "_");
        for text in [
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-ab.scope\n"
            ),
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/crio-ab.scope\n"
            ),
            format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/cri-containerd-ab.scope\n"),
            format!("0::/kubepods/burstable/pod{UID}/ab\n"),
            format!("0::/kubepods/pod{UID}/ab\n"),
            // Version 1, and the agent in a group of its own.
            format!("12:memory:/kubepods/besteffort/pod{UID}/ab\n11:cpu,cpuacct:/\n0::/\n"),
            format!(
                "0::/../../../kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-ab.scope\n"
            ),
            format!(
                "1:name=systemd:/system.slice/containerd.service/kubepods-burstable-pod{systemd}.slice:cri-containerd:ab\n0::/kubepods/pod{UID}/x"
            ),
        ] {
            assert_eq!(pod(&text).as_deref(), Some(UID), "{text}");
        }
        let hash = "7f3c1d2e4b5a69788796a5b4c3d2e1f0";
        assert_eq!(pod(&format!("0::/kubepods/burstable/pod{hash}/ab")).as_deref(), Some(hash));
    }

    #[test]
    fn what_is_no_pod_is_none() {
        for text in [
            "",
            "0::/\n",
            "0::/user.slice/user-1000.slice/session-2.scope\n",
            "0::/system.slice/docker-0b7ee0e53ac04b389c4a6e9b1d1f2a3c.scope\n",
            "0::/kubepods.slice/kubepods-burstable.slice\n",
            "0::/pod/podman/pods\n",
            "0::/kubepods/pod0b7ee0e5\n",
            "nonsense",
        ] {
            assert_eq!(pod(text), None, "{text}");
        }
    }

    #[test]
    fn a_container_cannot_pass_for_another_pod_by_a_group_of_its_own() {
        let other = "11111111-2222-3333-4444-555555555555";
        let text = format!("0::/kubepods/pod{UID}/ab/kubepods/pod{other}/cd\n");
        assert_eq!(pod(&text).as_deref(), Some(UID));
    }
}
