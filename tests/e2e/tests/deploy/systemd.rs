//! The systemd unit.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use nvshare_tests::skip;

use crate::root;

/// The highest exposure that the unit may have, in tenths. docs/kubernetes.md and the unit say what is left and why.
const EXPOSURE_MAX: u32 = 31;

/// System calls that the agent makes from its start to its end with all sensors, a client and an operator (`strace -f` of
/// a run on the simulated GPU), and those of other kernels and C libraries in their place. Less `mount` and `unshare`:
/// systemd has tracefs mounted.
const MADE: &str = "access accept4 arch_prctl bind bpf brk chmod chown clock_nanosleep clone3 close connect epoll_create1 epoll_ctl \
    epoll_wait eventfd2 execve exit exit_group fcntl flock fstat futex getdents64 getpid getrandom getsockname \
    getsockopt gettid ioctl listen lseek madvise mkdir mmap mprotect mremap munmap newfstatat openat perf_event_open \
    pidfd_open poll prctl pread64 prlimit64 read readlink readlinkat recvfrom recvmsg restart_syscall rseq \
    rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity sendmsg sendto set_robust_list set_tid_address \
    setsockopt shutdown sigaltstack socket socketpair statx uname unlink write writev";

fn unit() -> PathBuf {
    root().join("deploy/systemd/nvshare-agent.service")
}

fn systemd_analyze(arguments: &[&str]) -> Option<String> {
    match Command::new("systemd-analyze").args(arguments).output() {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "systemd-analyze {arguments:?}: {errors}");
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Err(error) => {
            skip("a check of the systemd unit", &format!("systemd-analyze cannot be run: {error}"));
            None
        }
    }
}

#[test]
fn the_unit_is_as_closed_as_the_documents_say() {
    let unit = unit();
    let Some(said) = systemd_analyze(&["security", "--offline=true", "--no-pager", unit.to_str().unwrap()])
    else {
        return;
    };
    let overall = said.lines().find(|line| line.contains("Overall exposure level")).expect("a level");
    let level = overall.split(": ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a number");
    let tenths: u32 = level.replace('.', "").parse().expect("a number");
    assert!(tenths <= EXPOSURE_MAX, "{overall}\n{said}");
    let document = std::fs::read_to_string(root().join("docs/packages.md")).unwrap();
    let recorded = format!("`systemd-analyze security`: {level}");
    assert!(document.contains(&recorded), "docs/packages.md should say `{recorded}`");
}

/// The system calls of a group, with those of the groups in it.
fn group(name: &str, into: &mut BTreeSet<String>) -> Option<()> {
    let listed = systemd_analyze(&["syscall-filter", name])?;
    for member in
        listed.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if member.starts_with('@') {
            group(member, into)?;
        } else {
            into.insert(member.to_owned());
        }
    }
    Some(())
}

#[test]
fn the_unit_lets_the_agent_make_its_system_calls() {
    let text = std::fs::read_to_string(unit()).unwrap();
    let mut allowed = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        let (forbid, names) = line.strip_prefix('~').map_or((false, line), |names| (true, names));
        for name in names.split_whitespace() {
            let mut members = BTreeSet::new();
            if name.starts_with('@') {
                if group(name, &mut members).is_none() {
                    return;
                }
            } else {
                members.insert(name.to_owned());
            }
            if forbid {
                allowed.retain(|known| !members.contains(known));
            } else {
                allowed.extend(members);
            }
        }
    }
    let missing: Vec<&str> = MADE.split_whitespace().filter(|&made| !allowed.contains(made)).collect();
    assert_eq!(missing, Vec::<&str>::new());
    for power in ["init_module", "reboot", "settimeofday", "mount", "ptrace"] {
        assert!(!allowed.contains(power), "{power}");
    }
}
