//! Type information of a kernel module (BTF): where the fields of its structures lie, by name.
//!
//! **Problem.** The layouts of nvidia-uvm's events are known by driver branch; a branch that came later than this agent
//! has none. A module that was built beside its kernel carries the layouts itself.
//!
//! **Approach.** A module's BTF continues the kernel's: its types are numbered after those of `vmlinux`, and its names lie
//! behind that one's names. Of both only what is needed is read: structures, unions, enumerations and what leads to them.
//!
//! **Invariants.** Total on any bytes: what is cut, points outside or runs in circles is an error or an absent field,
//! never a panic or an endless loop.

use std::path::Path;

use nvshare_abi::uvm::{ABSENT, EventLayout, MakeResidentCause};

const MAGIC: u16 = 0xeb9f;
/// Modifiers and names on the way to a type; more are a circle.
const DEPTH: u32 = 32;
/// A structure that needs more members, or more nameless structures, to be looked at is none of ours.
const MEMBERS_MAX: usize = 4096;
const RECORDS_MAX: u32 = 1024;

/// Why there is no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// Not BTF, or cut short.
    #[error("it is no type information, or cut short")]
    Format,
    /// Something that must be there is not.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// Something means something else than it did.
    #[error("{0} has another value than in every known driver")]
    Changed(&'static str),
}

/// One object's type information, behind that of its base.
#[derive(Debug)]
pub struct Btf<'a> {
    base: Option<&'a Btf<'a>>,
    bytes: &'a [u8],
    strings: &'a [u8],
    /// Number of the first type here.
    first_type: u32,
    /// Offset of the first name here.
    first_name: u32,
    /// Where each type begins in `bytes`.
    types: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Struct,
    Union,
    Enum,
    Enum64,
    /// A name for, or a quality of, another type.
    Alias,
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Type {
    kind: Kind,
    name: u32,
    entries: usize,
    /// Members' offsets share their word with a width.
    narrow: bool,
    /// Size, or the number of the type behind.
    rest: u32,
    /// Where the entries begin.
    at: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

impl<'a> Btf<'a> {
    /// Reads an object's type information; a module's goes on from the kernel's.
    pub fn parse(bytes: &'a [u8], base: Option<&'a Self>) -> Result<Self, BtfError> {
        Self::try_parse(bytes, base).ok_or(BtfError::Format)
    }

    fn try_parse(bytes: &'a [u8], base: Option<&'a Self>) -> Option<Self> {
        let magic = u16::from_ne_bytes(*bytes.first_chunk()?);
        let head = word(bytes, 4)? as usize;
        let part = |offset: usize, length: usize| {
            let begin = head.checked_add(word(bytes, offset)? as usize)?;
            bytes.get(begin..begin.checked_add(word(bytes, length)? as usize)?)
        };
        let (types, strings) = (part(8, 12)?, part(16, 20)?);
        if magic != MAGIC {
            return None;
        }
        let mut btf = Self {
            base,
            bytes: types,
            strings,
            first_type: base.map_or(1, |base| base.first_type.saturating_add(base.types.len() as u32)),
            first_name: base.map_or(0, |base| base.first_name.saturating_add(base.strings.len() as u32)),
            types: Vec::new(),
        };
        let mut at = 0;
        while at < types.len() {
            btf.types.push(u32::try_from(at).ok()?);
            at = btf.end_of(at)?;
        }
        Some(btf)
    }

    /// Where the type that begins here ends.
    fn end_of(&self, at: usize) -> Option<usize> {
        let info = word(self.bytes, at.checked_add(4)?)?;
        let entries = (info & 0xffff) as usize;
        let extra = match info >> 24 & 0x1f {
            1 | 14 | 17 => 4,
            3 => 12,
            4 | 5 | 15 | 19 => entries * 12,
            6 | 13 => entries * 8,
            2 | 7..=12 | 16 | 18 => 0,
            _ => return None,
        };
        let end = at.checked_add(12)?.checked_add(extra)?;
        (end <= self.bytes.len()).then_some(end)
    }

    fn name(&self, offset: u32) -> Option<&'a [u8]> {
        if offset < self.first_name {
            return self.base?.name(offset);
        }
        let rest = self.strings.get((offset - self.first_name) as usize..)?;
        rest.split(|&byte| byte == 0).next()
    }

    /// A type, and the object that holds it.
    fn get(&self, id: u32) -> Option<(&Self, Type)> {
        if id < self.first_type {
            return self.base?.get(id);
        }
        let at = *self.types.get((id - self.first_type) as usize)? as usize;
        let info = word(self.bytes, at + 4)?;
        let kind = match info >> 24 & 0x1f {
            4 => Kind::Struct,
            5 => Kind::Union,
            6 => Kind::Enum,
            19 => Kind::Enum64,
            8..=11 | 18 => Kind::Alias,
            _ => Kind::Other,
        };
        let found = Type {
            kind,
            name: word(self.bytes, at)?,
            entries: (info & 0xffff) as usize,
            narrow: info >> 31 != 0,
            rest: word(self.bytes, at + 8)?,
            at: at + 12,
        };
        Some((self, found))
    }

    /// The type behind names and qualities.
    fn behind(&self, mut id: u32) -> Option<(&Self, Type)> {
        for _ in 0..DEPTH {
            let (holder, found) = self.get(id)?;
            if found.kind != Kind::Alias {
                return Some((holder, found));
            }
            id = found.rest;
        }
        None
    }

    /// The structure, union or enumeration of this name, or behind this name, among the object's own types.
    fn named(&self, name: &str) -> Option<(&Self, Type)> {
        (self.first_type..).zip(&self.types).find_map(|(id, _)| {
            let (_, found) = self.get(id)?;
            let ours = self.name(found.name)? == name.as_bytes();
            let (holder, found) = if ours { self.behind(id)? } else { return None };
            (found.kind != Kind::Other && found.entries > 0).then_some((holder, found))
        })
    }

    /// Offset in bytes of a member, looked for in nameless members too, and the member's type.
    ///
    /// `records` is how many structures may yet be looked at, `depth` how many within each other.
    fn member(&self, of: Type, name: &str, records: &mut u32, depth: u32) -> Option<(u32, u32)> {
        if !matches!(of.kind, Kind::Struct | Kind::Union) || depth == 0 || of.entries > MEMBERS_MAX {
            return None;
        }
        *records = records.checked_sub(1)?;
        let entry = |index: usize| {
            let at = of.at + index * 12;
            let (name, id) = (word(self.bytes, at)?, word(self.bytes, at + 4)?);
            let bits = word(self.bytes, at + 8)? & if of.narrow { 0x00ff_ffff } else { u32::MAX };
            Some((name, id, bits / 8))
        };
        let own = (0..of.entries).filter_map(entry).find(|(n, ..)| self.name(*n) == Some(name.as_bytes()));
        if let Some((_, id, offset)) = own {
            return Some((offset, id));
        }
        (0..of.entries).filter_map(entry).filter(|(n, ..)| self.name(*n) == Some(b"")).find_map(
            |(_, id, offset)| {
                let (holder, inner) = self.behind(id)?;
                let (within, id) = holder.member(inner, name, records, depth - 1)?;
                Some((offset.checked_add(within)?, id))
            },
        )
    }

    /// Offset in bytes of a member of a structure or union, by the path to it.
    fn offset(&self, of: &str, path: &[&str]) -> Option<u32> {
        let (mut holder, mut at) = self.named(of)?;
        let mut offset = 0_u32;
        for (index, name) in path.iter().enumerate() {
            let (within, id) = holder.member(at, name, &mut { RECORDS_MAX }, DEPTH)?;
            offset = offset.checked_add(within)?;
            if index + 1 < path.len() {
                (holder, at) = holder.behind(id)?;
            }
        }
        Some(offset)
    }

    /// The value of an enumeration's constant.
    fn constant(&self, of: &str, name: &str) -> Option<u32> {
        let (holder, found) = self.named(of)?;
        let stride = match found.kind {
            Kind::Enum => 8,
            Kind::Enum64 => 12,
            Kind::Struct | Kind::Union | Kind::Alias | Kind::Other => return None,
        };
        (0..found.entries).find_map(|index| {
            let at = found.at + index * stride;
            let ours = holder.name(word(holder.bytes, at)?)? == name.as_bytes();
            if ours { word(holder.bytes, at + 4) } else { None }
        })
    }
}

/// The layout of events by a loaded module's own word. `dir` is where the kernel shows type information.
pub fn event_layout_in(dir: &Path) -> Result<EventLayout, String> {
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
    };
    let (kernel, module) = (read("vmlinux")?, read("nvidia_uvm")?);
    let of = |name: &'static str| move |error: BtfError| format!("{}: {error}", dir.join(name).display());
    let kernel = Btf::parse(&kernel, None).map_err(of("vmlinux"))?;
    let module = Btf::parse(&module, Some(&kernel)).map_err(of("nvidia_uvm"))?;
    event_layout(&module).map_err(of("nvidia_uvm"))
}

/// The layout of events by nvidia-uvm's type information.
pub fn event_layout(btf: &Btf<'_>) -> Result<EventLayout, BtfError> {
    const DATA: &str = "uvm_perf_event_data_t";
    const EVENT: &str = "uvm_perf_event_t";
    const ENTRY: &str = "uvm_fault_buffer_entry_t";
    const CAUSES: [(MakeResidentCause, &str); 6] = [
        (MakeResidentCause::ReplayableFault, "UVM_MAKE_RESIDENT_CAUSE_REPLAYABLE_FAULT"),
        (MakeResidentCause::NonReplayableFault, "UVM_MAKE_RESIDENT_CAUSE_NON_REPLAYABLE_FAULT"),
        (MakeResidentCause::Prefetch, "UVM_MAKE_RESIDENT_CAUSE_PREFETCH"),
        (MakeResidentCause::Eviction, "UVM_MAKE_RESIDENT_CAUSE_EVICTION"),
        (MakeResidentCause::ApiMigrate, "UVM_MAKE_RESIDENT_CAUSE_API_MIGRATE"),
        (MakeResidentCause::ApiHint, "UVM_MAKE_RESIDENT_CAUSE_API_HINT"),
    ];
    for (cause, name) in CAUSES {
        match btf.constant("uvm_make_resident_cause_t", name) {
            Some(value) if value == cause.value() => {}
            Some(_) => return Err(BtfError::Changed(name)),
            None => return Err(BtfError::Missing(name)),
        }
    }
    let id = |name: &'static str| btf.constant(EVENT, name).ok_or(BtfError::Missing(name));
    let field = |path: &[&str], name: &'static str| btf.offset(DATA, path).ok_or(BtfError::Missing(name));
    let may_be = |path: &[&str]| btf.offset(DATA, path).unwrap_or(ABSENT);
    let entry = |name: &'static str| btf.offset(ENTRY, &[name]).ok_or(BtfError::Missing(name));
    let (_, data) = btf.named(DATA).ok_or(BtfError::Missing(DATA))?;
    Ok(EventLayout {
        fault_id: id("UVM_PERF_EVENT_FAULT")?,
        migration_id: id("UVM_PERF_EVENT_MIGRATION")?,
        revocation_id: id("UVM_PERF_EVENT_REVOCATION")?,
        event_count: id("UVM_PERF_EVENT_COUNT")?,
        data_size: data.rest,
        fault_proc_id: field(&["fault", "proc_id"], "fault.proc_id")?,
        fault_preferred: may_be(&["fault", "preferred_location"]),
        fault_gpu_entry: field(&["fault", "gpu", "buffer_entry"], "fault.gpu.buffer_entry")?,
        fault_gpu_batch_id: may_be(&["fault", "gpu", "batch_id"]),
        fault_gpu_is_dup: may_be(&["fault", "gpu", "is_duplicate"]),
        fault_cpu_va: may_be(&["fault", "cpu", "fault_va"]),
        fault_cpu_num: may_be(&["fault", "cpu", "cpu_num"]),
        fault_cpu_is_write: may_be(&["fault", "cpu", "is_write"]),
        fault_cpu_pc: may_be(&["fault", "cpu", "pc"]),
        migration_block: field(&["migration", "block"], "migration.block")?,
        migration_dst: field(&["migration", "dst"], "migration.dst")?,
        migration_src: field(&["migration", "src"], "migration.src")?,
        migration_dst_nid: may_be(&["migration", "dst_nid"]),
        migration_src_nid: may_be(&["migration", "src_nid"]),
        migration_address: field(&["migration", "address"], "migration.address")?,
        migration_bytes: field(&["migration", "bytes"], "migration.bytes")?,
        migration_transfer_mode: may_be(&["migration", "transfer_mode"]),
        migration_access_counters_buffer: may_be(&["migration", "access_counters_buffer_index"]),
        migration_cause: field(&["migration", "cause"], "migration.cause")?,
        revocation_block: may_be(&["revocation", "block"]),
        revocation_proc_id: may_be(&["revocation", "proc_id"]),
        revocation_address: may_be(&["revocation", "address"]),
        revocation_bytes: may_be(&["revocation", "bytes"]),
        entry_fault_address: entry("fault_address")?,
        entry_timestamp: btf.offset(ENTRY, &["timestamp"]).unwrap_or(ABSENT),
        entry_va_space: btf.offset(ENTRY, &["va_space"]).unwrap_or(ABSENT),
        entry_num_instances: entry("num_instances")?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use nvshare_abi::uvm::{DriverVersion, Epoch};

    use super::*;

    /// Writes type information as a compiler would.
    pub(crate) struct Writer {
        types: Vec<u8>,
        strings: Vec<u8>,
        next: u32,
        first_name: u32,
    }

    const STRUCT: u32 = 4;
    const UNION: u32 = 5;

    impl Writer {
        /// After a base with this many types and bytes of names.
        pub(crate) fn after(types: u32, names: u32) -> Self {
            // Only a base has the empty name; a module refers to that one.
            let strings = if names == 0 { vec![0] } else { Vec::new() };
            Self { types: Vec::new(), strings, next: types + 1, first_name: names }
        }

        fn name(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let at = self.first_name + self.strings.len() as u32;
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            at
        }

        fn put(&mut self, words: &[u32]) {
            self.types.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        }

        fn begin(&mut self, kind: u32, name: &str, entries: usize, rest: u32) -> u32 {
            let name = self.name(name);
            self.put(&[name, kind << 24 | entries as u32, rest]);
            self.next += 1;
            self.next - 1
        }

        pub(crate) fn int(&mut self) -> u32 {
            let id = self.begin(1, "int", 0, 4);
            self.put(&[32]);
            id
        }

        fn record(&mut self, kind: u32, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
            let names: Vec<u32> = members.iter().map(|(name, ..)| self.name(name)).collect();
            let id = self.begin(kind, name, members.len(), size);
            for (name, &(_, of, offset)) in names.into_iter().zip(members) {
                self.put(&[name, of, offset * 8]);
            }
            id
        }

        fn enumeration(&mut self, constants: &[(&str, u32)]) -> u32 {
            let names: Vec<u32> = constants.iter().map(|(name, _)| self.name(name)).collect();
            let id = self.begin(6, "", constants.len(), 4);
            for (name, &(_, value)) in names.into_iter().zip(constants) {
                self.put(&[name, value]);
            }
            id
        }

        fn typedef(&mut self, name: &str, of: u32) -> u32 {
            self.begin(8, name, 0, of)
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            let mut bytes = MAGIC.to_ne_bytes().to_vec();
            bytes.extend([1, 0]);
            for word in [24, 0, types, types, strings] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(&self.types);
            bytes.extend(&self.strings);
            bytes
        }
    }

    /// A kernel's type information: one type.
    pub(crate) fn kernel() -> Vec<u8> {
        let mut writer = Writer::after(0, 0);
        writer.int();
        writer.bytes()
    }

    /// Members that there are.
    fn there(members: &[(&'static str, u32, u32)]) -> Vec<(&'static str, u32, u32)> {
        members.iter().filter(|(.., offset)| *offset != ABSENT).copied().collect()
    }

    /// A module's with events of this layout, behind [`kernel`].
    pub(crate) fn module(layout: &EventLayout) -> Vec<u8> {
        let kernel = kernel();
        let kernel = Btf::parse(&kernel, None).unwrap();
        let mut w = Writer::after(kernel.types.len() as u32, kernel.strings.len() as u32);
        // The first type of the kernel.
        let int = 1;
        let l = layout;
        let inner = l.fault_gpu_entry.min(l.fault_cpu_va);
        let within = |offset: u32| if offset == ABSENT { ABSENT } else { offset - inner };
        let gpu = there(&[
            ("buffer_entry", int, within(l.fault_gpu_entry)),
            ("batch_id", int, within(l.fault_gpu_batch_id)),
            ("is_duplicate", int, within(l.fault_gpu_is_dup)),
        ]);
        let cpu = there(&[
            ("fault_va", int, within(l.fault_cpu_va)),
            ("cpu_num", int, within(l.fault_cpu_num)),
            ("is_write", int, within(l.fault_cpu_is_write)),
            ("pc", int, within(l.fault_cpu_pc)),
        ]);
        let (gpu, cpu) = (w.record(STRUCT, "", 16, &gpu), w.record(STRUCT, "", 32, &cpu));
        let descriptor = w.record(UNION, "", 32, &[("gpu", gpu, 0), ("cpu", cpu, 0)]);
        let fault = w.record(
            STRUCT,
            "",
            56,
            &[
                ("proc_id", int, l.fault_proc_id),
                ("preferred_location", int, l.fault_preferred),
                ("", descriptor, inner),
            ],
        );
        let members = there(&[
            ("block", int, l.migration_block),
            ("dst", int, l.migration_dst),
            ("src", int, l.migration_src),
            ("dst_nid", int, l.migration_dst_nid),
            ("src_nid", int, l.migration_src_nid),
            ("address", int, l.migration_address),
            ("bytes", int, l.migration_bytes),
            ("transfer_mode", int, l.migration_transfer_mode),
            ("access_counters_buffer_index", int, l.migration_access_counters_buffer),
            ("cause", int, l.migration_cause),
        ]);
        let migration = w.record(STRUCT, "", 64, &members);
        let members = there(&[
            ("block", int, l.revocation_block),
            ("proc_id", int, l.revocation_proc_id),
            ("address", int, l.revocation_address),
            ("bytes", int, l.revocation_bytes),
        ]);
        let revocation = w.record(STRUCT, "", 40, &members);
        let parts = [("fault", fault, 0), ("migration", migration, 0), ("revocation", revocation, 0)];
        let data = w.record(UNION, "", l.data_size, &parts);
        w.typedef("uvm_perf_event_data_t", data);
        let events = w.enumeration(&[
            ("UVM_PERF_EVENT_FAULT", l.fault_id),
            ("UVM_PERF_EVENT_MIGRATION", l.migration_id),
            ("UVM_PERF_EVENT_REVOCATION", l.revocation_id),
            ("UVM_PERF_EVENT_COUNT", l.event_count),
        ]);
        w.typedef("uvm_perf_event_t", events);
        let causes = w.enumeration(&[
            ("UVM_MAKE_RESIDENT_CAUSE_REPLAYABLE_FAULT", 0),
            ("UVM_MAKE_RESIDENT_CAUSE_NON_REPLAYABLE_FAULT", 1),
            ("UVM_MAKE_RESIDENT_CAUSE_PREFETCH", 3),
            ("UVM_MAKE_RESIDENT_CAUSE_EVICTION", 4),
            ("UVM_MAKE_RESIDENT_CAUSE_API_MIGRATE", 6),
            ("UVM_MAKE_RESIDENT_CAUSE_API_HINT", 8),
        ]);
        w.typedef("uvm_make_resident_cause_t", causes);
        let entry = w.record(
            STRUCT,
            "uvm_fault_buffer_entry_struct",
            96,
            &[
                ("fault_address", int, l.entry_fault_address),
                ("timestamp", int, l.entry_timestamp),
                ("va_space", int, l.entry_va_space),
                ("num_instances", int, l.entry_num_instances),
            ],
        );
        w.typedef("uvm_fault_buffer_entry_t", entry);
        w.bytes()
    }

    fn read(module: &[u8]) -> Result<EventLayout, BtfError> {
        let kernel = kernel();
        let kernel = Btf::parse(&kernel, None)?;
        event_layout(&Btf::parse(module, Some(&kernel))?)
    }

    #[test]
    fn the_layout_of_every_known_driver_is_found_in_its_type_information() {
        let versions = Epoch::ALL.map(Epoch::last).into_iter().chain([DriverVersion::new(560, 35, 3)]);
        for version in versions {
            let layout = EventLayout::of(version).unwrap();
            assert_eq!(read(&module(&layout)), Ok(layout), "{version}");
        }
    }

    #[test]
    fn what_is_missing_or_means_something_else_is_named() {
        let layout = EventLayout::of_epoch(Epoch::E580);
        let renamed = |from: &str, to: &str| {
            let mut bytes = module(&layout);
            let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            read(&bytes)
        };
        assert_eq!(renamed("num_instances", "xum_instances"), Err(BtfError::Missing("num_instances")));
        assert_eq!(renamed("buffer_entry", "xuffer_entry"), Err(BtfError::Missing("fault.gpu.buffer_entry")));
        // What is not needed may be gone.
        assert_eq!(renamed("preferred_location", "x").map(|l| l.fault_preferred), Ok(ABSENT));
        // Two constants change places.
        let mut bytes = module(&layout);
        let swap = |bytes: &mut Vec<u8>, from: &[u8], to: &[u8]| {
            let at = bytes.windows(from.len()).position(|part| part == from).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to);
        };
        swap(&mut bytes, b"CAUSE_PREFETCH\0", b"CAUSE_PREFETCX\0");
        swap(&mut bytes, b"CAUSE_API_HINT\0", b"CAUSE_PREFETCH\0");
        let changed = Err(BtfError::Changed("UVM_MAKE_RESIDENT_CAUSE_PREFETCH"));
        assert_eq!(read(&bytes), changed);
    }

    #[test]
    fn no_bytes_are_too_much() {
        let good = module(&EventLayout::of_epoch(Epoch::E580));
        for length in 0..good.len() {
            let _cut = read(&good[..length]);
        }
        let seed = crate::clock::now().0;
        eprintln!("seed {seed}");
        let mut state = seed | 1;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                bytes[at] = [0, 1, 4, 8, 0x7f, 0xff, random(256) as u8][random(7)];
            }
            let _broken = read(&bytes);
        }
    }

    #[test]
    fn types_that_run_in_circles_end() {
        let mut writer = Writer::after(0, 0);
        let first = writer.next;
        writer.typedef("uvm_perf_event_data_t", first + 1);
        writer.typedef("b", first);
        // A structure whose nameless member is itself.
        let id = writer.next;
        writer.record(STRUCT, "uvm_fault_buffer_entry_t", 8, &[("", id, 0), ("", id, 0)]);
        let bytes = writer.bytes();
        let btf = Btf::parse(&bytes, None).unwrap();
        assert_eq!(btf.offset("uvm_perf_event_data_t", &["fault"]), None);
        // Two ways at each of 32 levels would never end.
        assert_eq!(btf.offset("uvm_fault_buffer_entry_t", &["num_instances"]), None);
    }

    #[test]
    fn this_machines_kernel_is_understood() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            eprintln!("SKIPPED: this kernel shows no type information");
            return;
        };
        let btf = Btf::parse(&bytes, None).unwrap();
        assert_eq!(btf.offset("list_head", &["prev"]), Some(8));
        assert!(btf.offset("task_struct", &["tgid"]).is_some_and(|offset| offset > 0));
        assert_eq!(btf.constant("pid_type", "PIDTYPE_TGID"), Some(1));
    }
}
