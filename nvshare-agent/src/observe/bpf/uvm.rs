//! Probes on the functions of nvidia-uvm, and what they counted per process and GPU.
//!
//! Problem: the module comes and goes, spaces begin and end between readings, and one process may have several.
//!
//! Approach: the module (or the files that export its functions) has an identity; when it changes, everything is
//! attached anew. Counts of a space that has ended move from the map into the totals of its process, and these are
//! dropped once the process is gone.
//!
//! Invariants: totals of a process that lives never shrink while the probes stay attached; nothing is attributed
//! to a process by guess except a space's *probable* owner, who is not listed as known.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use aya::{
    Ebpf,
    programs::{
        KProbe, ProgramError, UProbe,
        kprobe::KProbeLink,
        uprobe::{UProbeError, UProbeLink, UProbeScope},
    },
};
use nvshare_abi::{
    maps::{BlockFigures, Config, CounterKey, Counters, EvictionKey, Health, Ownership, Space, SpaceId},
    uvm::{DriverVersion, EventLayout, MakeResidentCause, symbol},
};
use nvshare_core::{Bytes, GpuId};

use super::{
    maps::Maps,
    program::{let_go, loaded},
    reason::{is_absent, reason},
};
use crate::{
    config::DriverConfig,
    observe::{
        btf,
        source::{BlockTotals, SensorState, UvmReading, UvmTotals},
    },
};

/// One function to probe: its names in the order of preference, and the programs for a kprobe and a uprobe.
struct Point {
    symbols: &'static [&'static str],
    kprobe: &'static str,
    uprobe: &'static str,
    required: bool,
}

const POINTS: [Point; 5] = [
    // Ownership first, so that no event of a known space is seen without its owner.
    Point { symbols: &[symbol::INIT], kprobe: "uvm_init_k", uprobe: "uvm_init_u", required: true },
    Point { symbols: &[symbol::DESTROY], kprobe: "uvm_destroy_k", uprobe: "uvm_destroy_u", required: true },
    Point {
        symbols: &[symbol::SERVICE, symbol::SERVICE_TO_555],
        kprobe: "uvm_service_k",
        uprobe: "uvm_service_u",
        required: false,
    },
    // The same thread, and nobody's fault either. The same program: what it did before is over.
    Point {
        symbols: &[symbol::ACCESS_COUNTERS],
        kprobe: "uvm_service_k",
        uprobe: "uvm_service_u",
        required: false,
    },
    Point { symbols: &[symbol::NOTIFY], kprobe: "uvm_notify_k", uprobe: "uvm_notify_u", required: true },
];

/// The names of all programs of this sensor.
pub(super) const PROGRAMS: [&str; 8] = [
    "uvm_notify_k",
    "uvm_notify_u",
    "uvm_init_k",
    "uvm_init_u",
    "uvm_destroy_k",
    "uvm_destroy_u",
    "uvm_service_k",
    "uvm_service_u",
];

/// The kernel offers kprobes to programs where this exists.
const KPROBE_PMU: &str = "/sys/bus/event_source/devices/kprobe";
/// Events before the share of those that make no sense is judged.
const JUDGED_FROM: u64 = 100;

/// Which driver, loaded when: equal only while it is the same instance.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    version: Option<String>,
    module: Option<(u64, u64)>,
    objects: Vec<Option<(u64, u64)>>,
}

#[derive(Default)]
struct Links {
    kprobes: Vec<KProbeLink>,
    uprobes: Vec<UProbeLink>,
}

pub(super) struct UvmProbes {
    state: SensorState,
    identity: Option<Identity>,
    version: Option<DriverVersion>,
    links: Links,
    /// Health when the probes were attached.
    health: Health,
    gpus: BTreeMap<u32, GpuId>,
    totals: BTreeMap<(u32, GpuId), UvmTotals>,
    /// The same of single blocks.
    blocks: BTreeMap<(u32, GpuId), BlockTotals>,
    evictions: BTreeMap<(u32, u32, GpuId), Bytes>,
    /// What the agent knows of the processes, and what the programs were told.
    room: BTreeMap<(u32, GpuId), i64>,
    told: BTreeMap<CounterKey, i64>,
    /// Owners of spaces that have ended, as long as eviction counts may name them.
    ended: BTreeMap<SpaceId, u32>,
}

impl UvmProbes {
    pub(super) fn new() -> Self {
        Self {
            state: SensorState::Unavailable("not tried".to_owned()),
            identity: None,
            version: None,
            links: Links::default(),
            health: Health::default(),
            gpus: BTreeMap::new(),
            totals: BTreeMap::new(),
            blocks: BTreeMap::new(),
            evictions: BTreeMap::new(),
            room: BTreeMap::new(),
            told: BTreeMap::new(),
            ended: BTreeMap::new(),
        }
    }

    pub(super) fn state(&self) -> &SensorState {
        &self.state
    }

    /// Updates lost in full maps since the probes were attached.
    pub(super) fn lost(&self, maps: &Maps) -> u64 {
        let Health { notifications: _, insane: _, unreadable, lost } = maps.health();
        (lost + unreadable).saturating_sub(self.health.lost + self.health.unreadable)
    }

    /// Attaches to a driver that has come, lets go of one that has gone.
    pub(super) fn refresh(&mut self, ebpf: &mut Ebpf, maps: &mut Maps, driver: &DriverConfig) {
        let identity = identity(driver);
        if self.identity.as_ref() == Some(&identity) {
            // A module is visible a moment before its functions can be probed: absent ones are worth another try.
            let retry = driver.uvm_objects.is_empty() && identity.module.is_some() && self.links.is_empty();
            if self.state.is_attached() || !retry || self.health_is_bad(maps) {
                return;
            }
        }
        self.detach(maps);
        let attached = self.attach(ebpf, maps, driver, &identity);
        self.identity = Some(identity);
        self.state = match attached {
            Ok(detail) => SensorState::Attached(detail),
            Err(reason) => {
                let_go(std::mem::take(&mut self.links));
                SensorState::Unavailable(reason)
            }
        };
    }

    fn detach(&mut self, maps: &mut Maps) {
        let_go(std::mem::take(&mut self.links));
        self.gpus.clear();
        self.totals.clear();
        self.blocks.clear();
        self.told.clear();
        self.evictions.clear();
        self.ended.clear();
        for key in maps.evictions().into_keys() {
            maps.forget_eviction(key);
        }
        for CounterKey { space, processor, reserved: _ } in maps.counters().into_keys() {
            maps.forget_space(space, [processor]);
        }
        for space in maps.spaces().into_keys() {
            maps.forget_space(space, []);
        }
        maps.forget_driver();
    }

    fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        driver: &DriverConfig,
        identity: &Identity,
    ) -> Result<String, String> {
        let on_module = driver.uvm_objects.is_empty();
        if on_module && identity.module.is_none() {
            return Err(
                "the module nvidia_uvm is not loaded; it comes with the first CUDA program".to_owned()
            );
        }
        let version = identity.version.as_deref().and_then(DriverVersion::find_in).ok_or_else(|| {
            format!(
                "the driver's version is not known: neither {} nor {} tells it",
                driver.version_file().display(),
                driver.proc_dir.join("nvidia/version").display()
            )
        })?;
        let (layout, from) = match EventLayout::of(version) {
            Some(layout) => (layout, ""),
            None => match btf::event_layout_in(&driver.btf_dir) {
                Ok(layout) => (layout, ", whose event layout the module itself tells"),
                Err(reason) => {
                    return Err(format!(
                        "the event layout of driver {version} is not known to this agent, and the module does not tell it \
                         ({reason}); a newer agent may know it"
                    ));
                }
            },
        };
        maps.configure(&Config { layout_known: 1, reserved: 0, layout })?;
        self.version = Some(version);
        self.health = maps.health();
        for point in &POINTS {
            if on_module {
                self.links.attach_module(ebpf, point)?;
            } else {
                self.links.attach_objects(ebpf, point, driver)?;
            }
        }
        Ok(if on_module {
            format!("kprobes on nvidia_uvm {version}{from}")
        } else {
            format!(
                "uprobes on {} file(s) with the functions of nvidia_uvm {version}{from}",
                driver.uvm_objects.len()
            )
        })
    }

    /// Whether more than one event in a hundred made no sense: then the layout is not this driver's.
    fn health_is_bad(&self, maps: &Maps) -> bool {
        let now = maps.health();
        let seen = now.notifications - self.health.notifications.min(now.notifications);
        let insane = now.insane - self.health.insane.min(now.insane);
        seen >= JUDGED_FROM && insane * 100 > seen
    }

    /// What was counted since the probes were attached.
    pub(super) fn read(&mut self, maps: &mut Maps, driver: &DriverConfig) -> Option<UvmReading> {
        if !self.state.is_attached() {
            return None;
        }
        if self.health_is_bad(maps) {
            let version = self.version.map_or_else(String::new, |version| version.to_string());
            self.state = SensorState::Unavailable(format!(
                "events of driver {version} do not have the expected layout; please report this driver"
            ));
            let_go(std::mem::take(&mut self.links));
            return None;
        }
        // Spaces after counters: a counter whose space is not in the older list would have no owner.
        let counters = maps.counters();
        let evictions = maps.evictions();
        let spaces = maps.spaces();
        let mut reading = UvmReading {
            clients: self.totals.clone(),
            blocks: self.blocks.clone(),
            evictions: self.evictions.clone(),
            known: Vec::new(),
        };
        self.add_counters(&mut reading.clients, &spaces, &counters, driver);
        self.add_evictions(&mut reading.evictions, &spaces, &evictions, driver);
        self.follow_blocks(&mut reading.blocks, maps, &spaces, &counters, driver);
        let known: BTreeSet<u32> = spaces
            .values()
            .filter(|space| space.ended_ns == 0 && space.ownership == Ownership::Certain as u32)
            .map(|space| space.tgid)
            .collect();
        reading.known = known.into_iter().collect();
        self.retire(maps, &spaces, &counters, &evictions, driver);
        Some(reading)
    }

    fn add_counters(
        &mut self,
        totals: &mut BTreeMap<(u32, GpuId), UvmTotals>,
        spaces: &BTreeMap<SpaceId, Space>,
        counters: &BTreeMap<CounterKey, Counters>,
        driver: &DriverConfig,
    ) {
        let mut cpu_faults: BTreeMap<u32, u64> = BTreeMap::new();
        for (key, counters) in counters {
            let Some(tgid) = spaces.get(&key.space).map(|space| space.tgid).filter(|&tgid| tgid != 0) else {
                continue;
            };
            if key.processor == 0 {
                *cpu_faults.entry(tgid).or_default() += counters.cpu_faults;
            } else if let Some(gpu) = self.gpu(key.processor, driver) {
                add(totals.entry((tgid, gpu)).or_default(), counters);
            }
        }
        for ((tgid, _), totals) in totals {
            totals.cpu_faults += cpu_faults.get(tgid).copied().unwrap_or_default();
        }
    }

    fn add_evictions(
        &mut self,
        totals: &mut BTreeMap<(u32, u32, GpuId), Bytes>,
        spaces: &BTreeMap<SpaceId, Space>,
        evictions: &BTreeMap<EvictionKey, u64>,
        driver: &DriverConfig,
    ) {
        for (key, &bytes) in evictions {
            let owner = |id: SpaceId| {
                let known = spaces.get(&id).map(|space| space.tgid).or_else(|| self.ended.get(&id).copied());
                known.filter(|&tgid| tgid != 0)
            };
            let evictor = match key.evictor_is_process {
                0 => owner(SpaceId(key.evictor)),
                _ => u32::try_from(key.evictor).ok(),
            };
            let (Some(evictor), Some(victim)) = (evictor, owner(key.victim)) else {
                continue;
            };
            if let Some(gpu) = self.gpu(key.processor, driver) {
                *totals.entry((evictor, victim, gpu)).or_default() += Bytes(bytes);
            }
        }
    }

    /// What a GPU can hold less what a process allocated there, for each process of which that is known.
    pub(super) fn set_room(&mut self, room: BTreeMap<(u32, GpuId), i64>) {
        self.room = room;
    }

    /// Adds what happened to blocks, and tells the programs what there is room for.
    fn follow_blocks(
        &mut self,
        totals: &mut BTreeMap<(u32, GpuId), BlockTotals>,
        maps: &mut Maps,
        spaces: &BTreeMap<SpaceId, Space>,
        counters: &BTreeMap<CounterKey, Counters>,
        driver: &DriverConfig,
    ) {
        for &key in counters.keys().filter(|key| key.processor != 0) {
            let tgid = spaces.get(&key.space).map_or(0, |space| space.tgid);
            let Some(gpu) = self.gpu(key.processor, driver).filter(|_| tgid != 0) else { continue };
            let room = self.room.get(&(tgid, gpu)).copied();
            if self.told.get(&key).copied() != room {
                maps.set_room(key, room);
                match room {
                    Some(room) => self.told.insert(key, room),
                    None => self.told.remove(&key),
                };
            }
            let Some(figures) = maps.blocks(key) else { continue };
            let BlockFigures { evicted, returned, curable, own, unjudged, .. } = figures;
            let totals = totals.entry((tgid, gpu)).or_default();
            totals.evicted += Bytes(evicted);
            totals.returned += Bytes(returned);
            totals.curable += Bytes(curable);
            totals.own += Bytes(own);
            totals.unjudged += Bytes(unjudged);
        }
    }

    /// Moves the counts of spaces that have ended out of the maps, and drops those of processes that are gone.
    fn retire(
        &mut self,
        maps: &mut Maps,
        spaces: &BTreeMap<SpaceId, Space>,
        counters: &BTreeMap<CounterKey, Counters>,
        evictions: &BTreeMap<EvictionKey, u64>,
        driver: &DriverConfig,
    ) {
        let alive: BTreeSet<u32> =
            spaces.values().filter(|space| space.ended_ns == 0).map(|space| space.tgid).collect();
        let gone = |tgid: u32| !alive.contains(&tgid) && !Path::new("/proc").join(tgid.to_string()).exists();
        self.totals.retain(|(tgid, _), _| !gone(*tgid));
        self.blocks.retain(|(tgid, _), _| !gone(*tgid));
        self.evictions.retain(|(_, victim, _), _| !gone(*victim));

        let ended: BTreeMap<SpaceId, Space> =
            spaces.iter().filter(|(_, space)| space.ended_ns != 0).map(|(&id, &space)| (id, space)).collect();
        if ended.is_empty() {
            return;
        }
        let of_ended = |id: &SpaceId| ended.contains_key(id);
        let counters: BTreeMap<_, _> =
            counters.iter().filter(|(key, _)| of_ended(&key.space)).map(|(&k, &v)| (k, v)).collect();
        let mut totals = std::mem::take(&mut self.totals);
        self.add_counters(&mut totals, &ended, &counters, driver);
        self.totals = totals;
        let mut blocks = std::mem::take(&mut self.blocks);
        self.follow_blocks(&mut blocks, maps, &ended, &counters, driver);
        self.blocks = blocks;
        self.told.retain(|key, _| !of_ended(&key.space));

        let evictions: BTreeMap<_, _> = evictions
            .iter()
            .filter(|(key, _)| {
                of_ended(&key.victim) || (key.evictor_is_process == 0 && of_ended(&SpaceId(key.evictor)))
            })
            .map(|(&key, &bytes)| (key, bytes))
            .collect();
        let mut pairs = std::mem::take(&mut self.evictions);
        self.add_evictions(&mut pairs, spaces, &evictions, driver);
        self.evictions = pairs;
        for &key in evictions.keys() {
            maps.forget_eviction(key);
        }
        for (&id, space) in &ended {
            self.ended.insert(id, space.tgid);
            let processors = counters.keys().filter(|key| key.space == id).map(|key| key.processor);
            maps.forget_space(id, processors);
        }
        // A number that is never reused may be forgotten when the map no longer names it.
        let named: BTreeSet<u64> =
            maps.evictions().into_keys().flat_map(|key| [key.victim.0, key.evictor]).collect();
        self.ended.retain(|id, _| named.contains(&id.0));
    }

    /// The GPU that events call `processor`. The driver shows it while somebody uses it; it is remembered.
    fn gpu(&mut self, processor: u32, driver: &DriverConfig) -> Option<GpuId> {
        if let Some(&gpu) = self.gpus.get(&processor) {
            return Some(gpu);
        }
        let gpu = driver.gpu_named(self.version?.procfs_gpu(processor)?)?;
        self.gpus.insert(processor, gpu);
        Some(gpu)
    }
}

impl Links {
    fn is_empty(&self) -> bool {
        let Self { kprobes, uprobes } = self;
        kprobes.is_empty() && uprobes.is_empty()
    }

    fn attach_module(&mut self, ebpf: &mut Ebpf, point: &Point) -> Result<(), String> {
        if !Path::new(KPROBE_PMU).exists() {
            return Err(
                "this kernel has no kprobes (CONFIG_KPROBES is off); the driver's own counters serve instead"
                    .to_owned(),
            );
        }
        let program: &mut KProbe = loaded(ebpf, point.kprobe)?;
        for symbol in point.symbols {
            match program.attach(symbol, 0).and_then(|id| program.take_link(id)) {
                Ok(link) => {
                    self.kprobes.push(link);
                    return Ok(());
                }
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(format!("kprobe on {symbol}: {}", reason(&error))),
            }
        }
        missing(point, "nvidia_uvm does not have the function")
    }

    fn attach_objects(
        &mut self,
        ebpf: &mut Ebpf,
        point: &Point,
        driver: &DriverConfig,
    ) -> Result<(), String> {
        let program: &mut UProbe = loaded(ebpf, point.uprobe)?;
        let before = self.uprobes.len();
        for object in &driver.uvm_objects {
            for &symbol in point.symbols {
                let attached = program.attach(symbol, object, UProbeScope::AllProcesses);
                match attached.and_then(|id| program.take_link(id)) {
                    Ok(link) => self.uprobes.push(link),
                    Err(ProgramError::UProbeError(UProbeError::SymbolError { .. })) if object.exists() => {}
                    Err(error) => {
                        return Err(format!(
                            "uprobe on {symbol} of {}: {}",
                            object.display(),
                            reason(&error)
                        ));
                    }
                }
            }
        }
        if self.uprobes.len() > before { Ok(()) } else { missing(point, "no configured file exports") }
    }
}

fn missing(point: &Point, what: &str) -> Result<(), String> {
    if point.required { Err(format!("{what} {}", point.symbols.join(" or "))) } else { Ok(()) }
}

fn add(totals: &mut UvmTotals, counters: &Counters) {
    let evicted = counters.bytes_out[MakeResidentCause::Eviction as usize];
    totals.gpu_faults += counters.gpu_faults;
    totals.gpu_fault_instances += counters.gpu_fault_instances;
    totals.bytes_in += Bytes(counters.bytes_in.iter().sum());
    totals.bytes_out += Bytes(counters.bytes_out.iter().sum());
    totals.evicted += Bytes(evicted);
    totals.evicted_by_others += Bytes(counters.evicted_by_others);
}

/// What the driver's files say of its instance.
fn identity(driver: &DriverConfig) -> Identity {
    let version = fs::read_to_string(driver.version_file())
        .or_else(|_| fs::read_to_string(driver.proc_dir.join("nvidia/version")))
        .ok();
    Identity {
        version,
        module: file_identity(&driver.module_dir),
        objects: driver.uvm_objects.iter().map(|object| file_identity(object)).collect(),
    }
}

/// Device and number of a file: another file at the same place has others.
pub(super) fn file_identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
