//! The fault-service threads: which there are, and how long each was busy.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use aya::{
    Ebpf,
    programs::{TracePoint, trace_point::TracePointLink},
};
use nvshare_abi::uvm::{DriverVersion, FAULT_THREAD_PREFIX, FAULT_THREAD_SUFFIX};
use nvshare_core::{GpuId, Nanos};

use super::{
    maps::Maps,
    program::loaded,
    reason::reason,
    tracefs::{Field, check_record, with_tracefs},
};
use crate::{clock, config::DriverConfig, observe::source::SensorState};

/// The names of all programs of this sensor, which are also those of the tracepoints.
pub(super) const PROGRAMS: [&str; 2] = ["sched_switch", "sched_wakeup"];

/// What the programs read, as the kernel describes it.
const RECORDS: [(&str, &[Field]); 2] = [
    ("sched_switch", &[("prev_pid", 24, 4), ("prev_state", 32, 8), ("next_pid", 56, 4)]),
    ("sched_wakeup", &[("pid", 24, 4)]),
];

/// The process whose children are the kernel threads, and nothing else.
const KTHREADD: u32 = 2;

pub(super) struct FaultThreads {
    links: Result<Vec<TracePointLink>, String>,
    state: SensorState,
    watched: BTreeMap<u32, GpuId>,
    /// Time of threads that are gone.
    retired: BTreeMap<GpuId, Nanos>,
    /// Kernel threads that are something else.
    others: BTreeSet<u32>,
}

impl FaultThreads {
    pub(super) fn attach(ebpf: &mut Ebpf) -> Self {
        let links = with_tracefs(|| {
            let mut links = Vec::new();
            for (event, fields) in RECORDS {
                if !check_record("sched", event, fields)? {
                    return Err(format!("this kernel has no tracepoint sched:{event}"));
                }
                let program: &mut TracePoint = loaded(ebpf, event)?;
                let link = program.attach("sched", event).and_then(|id| program.take_link(id));
                links.push(link.map_err(|error| format!("tracepoint sched:{event}: {}", reason(&error)))?);
            }
            Ok(links)
        });
        let state = SensorState::Unavailable(String::new());
        Self { links, state, watched: BTreeMap::new(), retired: BTreeMap::new(), others: BTreeSet::new() }
    }

    pub(super) fn state(&self) -> &SensorState {
        &self.state
    }

    /// Looks for threads that have come or gone.
    pub(super) fn refresh(&mut self, maps: &mut Maps, driver: &DriverConfig) {
        let found = match &self.links {
            Err(reason) => Err(reason.clone()),
            Ok(_) => match &driver.fault_threads {
                Some(file) => read_list(file),
                None => Ok(self.kernel_threads(driver)),
            },
        };
        let found = match found {
            Ok(found) => found,
            Err(reason) => {
                self.state = SensorState::Unavailable(reason);
                BTreeMap::new()
            }
        };
        let gone: Vec<u32> = self.watched.keys().copied().filter(|tid| !found.contains_key(tid)).collect();
        for tid in gone {
            if let (Some(gpu), Some(thread)) = (self.watched.remove(&tid), maps.thread(tid)) {
                *self.retired.entry(gpu).or_default() += Nanos(thread.busy_ns);
            }
            maps.forget_thread(tid);
        }
        if self.links.is_err() {
            return;
        }
        for (tid, gpu) in found {
            if self.watched.contains_key(&tid) {
                continue;
            }
            match maps.watch_thread(tid) {
                Ok(()) => {
                    self.watched.insert(tid, gpu);
                }
                Err(reason) => {
                    self.state = SensorState::Unavailable(reason);
                    return;
                }
            }
        }
        let gpus: BTreeSet<&GpuId> = self.watched.values().collect();
        self.state = if gpus.is_empty() {
            SensorState::Unavailable(match &driver.fault_threads {
                Some(file) => format!("{} names no thread that lives", file.display()),
                None => "there is no fault-service thread; it comes with the first CUDA program".to_owned(),
            })
        } else {
            SensorState::Attached(format!("{} thread(s) of {} GPU(s)", self.watched.len(), gpus.len()))
        };
    }

    /// Busy time of each GPU's threads, up to this moment.
    pub(super) fn busy(&self, maps: &Maps) -> BTreeMap<GpuId, Nanos> {
        let now = clock::now();
        let mut busy = BTreeMap::new();
        for (&tid, &gpu) in &self.watched {
            let Some(thread) = maps.thread(tid) else {
                continue;
            };
            let running = if thread.since_ns == 0 { Nanos::ZERO } else { now.since(Nanos(thread.since_ns)) };
            let retired = self.retired.get(&gpu).copied().unwrap_or_default();
            *busy.entry(gpu).or_insert(retired) += Nanos(thread.busy_ns) + running;
        }
        busy
    }

    /// Fault-service threads of the kernel. A thread that is no kernel thread is never one, whatever its name.
    fn kernel_threads(&mut self, driver: &DriverConfig) -> BTreeMap<u32, GpuId> {
        let all = kernel_threads();
        self.others.retain(|tid| all.contains(tid));
        let mut found = BTreeMap::new();
        for &tid in &all {
            if self.others.contains(&tid) {
                continue;
            }
            if let Some(&gpu) = self.watched.get(&tid) {
                found.insert(tid, gpu);
                continue;
            }
            let Ok(name) = fs::read_to_string(format!("/proc/{tid}/comm")) else {
                continue;
            };
            match parent_id(name.trim_end()) {
                // A GPU is named in procfs while it is in use; until then the thread has nothing to do.
                Some(parent) => {
                    if let Some(gpu) =
                        DriverVersion::procfs_gpu_of_parent(parent).and_then(|name| driver.gpu_named(name))
                    {
                        found.insert(tid, gpu);
                    }
                }
                // A thread bears its creator's name until it gets its own.
                None if name.trim_end() == "kthreadd" => {}
                None => {
                    self.others.insert(tid);
                }
            }
        }
        found
    }
}

/// The parent id in `UVM GPU<n> BH`.
fn parent_id(name: &str) -> Option<u32> {
    name.strip_prefix(FAULT_THREAD_PREFIX)?.strip_suffix(FAULT_THREAD_SUFFIX)?.parse().ok()
}

/// Every kernel thread: the children of kthreadd. User processes cannot become its children.
fn kernel_threads() -> BTreeSet<u32> {
    if let Ok(children) = fs::read_to_string(format!("/proc/{KTHREADD}/task/{KTHREADD}/children")) {
        return children.split_ascii_whitespace().filter_map(|tid| tid.parse().ok()).collect();
    }
    // Without CONFIG_PROC_CHILDREN every process says whose child it is.
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeSet::new();
    };
    let tids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    tids.filter(|&tid| parent_of(tid) == Some(KTHREADD)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, so count from its closing parenthesis.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Lines `<tid> <GPU-uuid>`, as configured. Threads that are gone are left out.
fn read_list(file: &Path) -> Result<BTreeMap<u32, GpuId>, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut threads = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (tid, gpu) = parse_line(line).ok_or_else(|| {
            format!("{} line {}: `{line}` is not `<tid> <GPU-uuid>`", file.display(), number + 1)
        })?;
        if Path::new("/proc").join(tid.to_string()).exists() {
            threads.insert(tid, gpu);
        }
    }
    Ok(threads)
}

fn parse_line(line: &str) -> Option<(u32, GpuId)> {
    let (tid, gpu) = line.trim().split_once(' ')?;
    Some((tid.parse().ok()?, gpu.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_driver_s_pattern_names_a_fault_thread() {
        assert_eq!(parent_id("UVM GPU1 BH"), Some(1));
        assert_eq!(parent_id("UVM GPU12 BH"), Some(12));
        assert_eq!(parent_id("UVM GPU1 KC"), None);
        assert_eq!(parent_id("UVM deferred release queue"), None);
    }

    #[test]
    fn a_list_with_a_bad_line_is_refused_and_says_which() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("fault-threads");
        let own = std::process::id();
        fs::write(
            &file,
            format!("{own} GPU-00112233-4455-6677-8899-aabbccddeeff\n4194304 GPU-{}\n", "0".repeat(32)),
        )
        .unwrap();
        assert_eq!(read_list(&file).unwrap().into_keys().collect::<Vec<_>>(), [own]);
        fs::write(&file, "12 34\n").unwrap();
        assert!(read_list(&file).unwrap_err().contains("line 1"));
    }

    #[test]
    fn this_process_is_no_kernel_thread() {
        assert!(!kernel_threads().contains(&std::process::id()));
        assert_ne!(parent_of(std::process::id()), None);
    }
}
