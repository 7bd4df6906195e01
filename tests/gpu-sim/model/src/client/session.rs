//! A process's part in the simulated GPU.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    ops::Range,
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use nvshare_abi::uvm::{EventLayout, PAGE_BYTES};

use super::{
    ConnectError, Direction, EntryPoints, Host, Location, SimError, Work,
    announce::announce,
    host::{directory, unreachable},
    kernel::EngineTime,
    ranges::Ranges,
};
use crate::{
    shared::{CardSlot, ClientSlot, MAX_CARDS, State},
    sync::{now_ns, sleep_until},
    wire::{Op, Record, Reply, Request, Status, TO_HOST, VERSION, words_to_bytes},
};

/// UVM_INITIALIZE of the driver: makes an open `/dev/nvidia-uvm` a VA space.
const UVM_INITIALIZE: libc::c_ulong = 0x3000_0001;
/// UVM_MM_INITIALIZE of the driver: the second descriptor that CUDA opens, which is no VA space.
const UVM_MM_INITIALIZE: libc::c_ulong = 75;
/// Bytes of an explicit copy that take the link at a time, so that copies of several programs interleave.
const COPY_PIECE: u64 = 4 << 20;

/// A process's connection; dropping it gives back all that the process holds.
#[derive(Debug)]
pub struct Session {
    host: Host,
    entry: EntryPoints,
    layout: EventLayout,
    pub(super) slot: usize,
    stream: Mutex<UnixStream>,
    /// The same stream, to ask whether the other end lives while a request is under way.
    watch: UnixStream,
    ranges: RwLock<Ranges>,
    pub(super) engines: [Mutex<EngineTime>; MAX_CARDS],
    /// Memory was pushed out under protection, and the protection has not been seen lifted since.
    is_protected: AtomicBool,
    /// The driver's device files, as a CUDA program has them open; absent where the simulator could not mount them.
    _device_files: Option<[File; 2]>,
}

impl Session {
    /// Joins the host that NVSHARE_SIM_DIR names.
    pub fn connect(entry: EntryPoints) -> Result<Self, ConnectError> {
        Self::connect_in(&directory()?, entry)
    }

    /// Joins the host whose files are in `dir`.
    pub fn connect_in(dir: &Path, entry: EntryPoints) -> Result<Self, ConnectError> {
        let host = Host::open_in(dir)?;
        let layout = EventLayout::of(host.driver())
            .ok_or_else(|| ConnectError::Refused(format!("driver {} is unknown", host.driver())))?;
        let mut stream = UnixStream::connect(dir.join("sim.sock")).map_err(unreachable(dir, "its socket"))?;
        let hello =
            call(&mut stream, Op::Hello, [VERSION, 0, 0, 0]).map_err(unreachable(dir, "greeting it"))?;
        if hello.status != Status::Ok {
            return Err(ConnectError::Refused(hello.text));
        }
        let (slot, space) = (hello.values[0] as usize, hello.values[1] as usize);
        let state = host.state();
        if slot >= state.clients.len() || space >= state.spaces.len() {
            return Err(ConnectError::Refused("its answer makes no sense".to_owned()));
        }
        let device_files = open_device_files(dir).map_err(unreachable(dir, "opening dev/nvidia-uvm"))?;
        let watch = stream.try_clone().map_err(unreachable(dir, "its socket"))?;
        let space = &state.spaces[space];
        // SAFETY: the program's own function, which reads nothing; both addresses stay mapped.
        unsafe { (entry.init_va_space_events)(space.va_space(), space.events()) };
        Ok(Self {
            host,
            entry,
            layout,
            slot,
            stream: Mutex::new(stream),
            watch,
            ranges: RwLock::default(),
            engines: Default::default(),
            is_protected: AtomicBool::new(false),
            _device_files: device_files,
        })
    }

    /// The read-only view: cards and memory.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Declares `[base, base + len)` managed. Nothing is resident yet. `base` is page-aligned; `len` is rounded up to whole
    /// pages, as the driver maps them.
    pub fn register_managed(&self, base: u64, len: u64) -> Result<(), SimError> {
        let len = whole_pages(len);
        let reply = self.request(Op::Register, [base, len, 0, 0])?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.insert(base, len, reply.values[0] as u32);
        Ok(())
    }

    /// Gives a managed range back, with the memory it occupies. `base` and `len` are those that were registered.
    pub fn unregister_managed(&self, base: u64, len: u64) {
        let len = whole_pages(len);
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(base);
        // A simulator that is gone holds nothing of ours.
        drop(self.request(Op::Unregister, [base, len, 0, 0]));
    }

    /// Takes plain memory, evicting managed memory (of any process) as the driver does.
    pub fn allocate_device(&self, gpu: usize, len: u64) -> Result<(), SimError> {
        self.check_alive(gpu)?;
        let reply = self.request(Op::AllocatePlain, [gpu as u64, len, 0, 0])?;
        let finish = self.account(&reply, now_ns());
        sleep_until(finish);
        Ok(())
    }

    /// Gives plain memory back.
    pub fn free_device(&self, gpu: usize, len: u64) {
        // A simulator that is gone holds nothing of ours.
        drop(self.request(Op::FreePlain, [gpu as u64, len, 0, 0]));
    }

    /// Runs a kernel; blocks the calling thread until it has ended. Kernels of one process take turns on a card.
    pub fn run_kernel(&self, gpu: usize, work: &Work) -> Result<(), SimError> {
        let touches: Vec<_> = {
            let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
            work.ranges.iter().flat_map(|access| ranges.touches(access)).collect()
        };
        self.sweep(gpu, &touches, work.compute_ns)
    }

    /// Waits for the link time of an explicit copy.
    pub fn copy_engine(&self, gpu: usize, bytes: u64, direction: Direction) {
        let Ok(card) = self.card(gpu) else { return };
        let mut finish = now_ns();
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(COPY_PIECE);
            finish = card.reserve_link(direction == Direction::Out, piece, finish);
            left -= piece;
            // Reserve only a little ahead of time: others may want their share of the link.
            sleep_until(finish.saturating_sub(1_000_000));
        }
        sleep_until(finish);
    }

    /// Moves managed memory (the driver's UVM_MIGRATE); runs in the caller.
    pub fn prefetch(&self, base: u64, len: u64, to: Location) -> Result<(), SimError> {
        if let Location::Gpu(gpu) = to {
            self.check_alive(gpu)?;
        }
        let (to, protected) = match to {
            Location::Cpu => (TO_HOST, !Protection::read().allows(base)),
            Location::Gpu(gpu) => (gpu as u64, false),
        };
        if protected {
            self.is_protected.store(true, Ordering::Relaxed);
        }
        self.in_windows(Op::Prefetch, base, len, [to, u64::from(protected)])
    }

    /// How many of these addresses the program has write-protected. What the GPU writes there arrives, but slowly.
    pub(super) fn protected_of(&self, addresses: impl Iterator<Item = u64>) -> u32 {
        if !self.is_protected.load(Ordering::Relaxed) {
            return 0;
        }
        let protection = Protection::read();
        self.is_protected.store(protection.holds_shared_memory(), Ordering::Relaxed);
        addresses.filter(|&address| !protection.allows(address)).count() as u32
    }

    /// The CPU touches managed memory: what is on a card comes back, with CPU faults.
    pub fn touch_cpu(&self, base: u64, len: u64) -> Result<(), SimError> {
        self.in_windows(Op::TouchCpu, base, len, [0, 0])
    }

    /// Asks for a range window by window, each taking its time, as the driver works block by block.
    fn in_windows(&self, op: Op, base: u64, len: u64, extra: [u64; 2]) -> Result<(), SimError> {
        let (mut base, mut left) = (base, len);
        let mut finish = now_ns();
        while left > 0 {
            let reply = self.request(op, [base, left, extra[0], extra[1]])?;
            finish = self.account(&reply, finish);
            sleep_until(finish);
            let covered = reply.values[1].clamp(1, left);
            base += covered;
            left -= covered;
        }
        Ok(())
    }

    /// Announces what the driver did in this process, and says when it is done: both the host's work and the link's, from
    /// `start` on.
    fn account(&self, reply: &Reply, start: u64) -> u64 {
        announce(&self.entry, &self.layout, &reply.records);
        let mut finish = start + reply.values[0];
        let moves = reply.records.iter().filter(|record| !record.cpu_fault);
        for &Record { src, dst, bytes, .. } in moves {
            for (processor, out) in [(src, true), (dst, false)] {
                if let Some(card) = self.card_of_processor(processor) {
                    finish = finish.max(card.reserve_link(out, bytes, start));
                }
            }
        }
        finish
    }

    fn card_of_processor(&self, processor: u32) -> Option<&CardSlot> {
        self.host
            .gpus()
            .iter()
            .filter_map(|gpu| self.card(gpu.index).ok())
            .find(|card| card.processor.load(Ordering::Relaxed) == processor)
    }

    pub(super) fn card(&self, gpu: usize) -> Result<&CardSlot, SimError> {
        let cards = &self.state().cards;
        let used = self.state().cards_used.load(Ordering::Relaxed) as usize;
        cards
            .get(gpu)
            .filter(|_| gpu < used)
            .ok_or_else(|| SimError::Refused(format!("there is no GPU {gpu}")))
    }

    pub(super) fn client(&self) -> &ClientSlot {
        &self.state().clients[self.slot]
    }

    pub(super) fn state(&self) -> &State {
        self.host.state_ref()
    }

    /// Whether the simulator still runs, and the card answers.
    pub(super) fn check_alive(&self, gpu: usize) -> Result<(), SimError> {
        if self.card(gpu)?.is_lost() {
            return Err(SimError::Lost(gpu));
        }
        let mut byte = 0u8;
        let descriptor = self.watch.as_raw_fd();
        // SAFETY: peeks at most one byte into `byte` without waiting.
        let got =
            unsafe { libc::recv(descriptor, (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        if got == 0 { Err(SimError::Gone) } else { Ok(()) }
    }

    fn stream(&self) -> MutexGuard<'_, UnixStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(&self, op: Op, arguments: [u64; 4]) -> Result<Reply, SimError> {
        let reply = call(&mut self.stream(), op, arguments).or(Err(SimError::Gone))?;
        match reply.status {
            Status::Ok => Ok(reply),
            Status::OutOfMemory => Err(SimError::OutOfMemory {
                gpu: arguments[0] as usize,
                wanted: reply.values[0],
                free: reply.values[1],
            }),
            Status::Refused => Err(SimError::Refused(reply.text)),
        }
    }
}

fn whole_pages(len: u64) -> u64 {
    len.div_ceil(PAGE_BYTES).saturating_mul(PAGE_BYTES)
}

/// What the simulator whose files are in `dir` has counted since its start, as JSON.
pub fn stats(dir: &Path) -> Result<String, ConnectError> {
    let mut stream = UnixStream::connect(dir.join("sim.sock")).map_err(unreachable(dir, "its socket"))?;
    let reply =
        call(&mut stream, Op::Stats, [0; 4]).map_err(unreachable(dir, "asking for its statistics"))?;
    Ok(reply.text)
}

fn call(stream: &mut UnixStream, op: Op, arguments: [u64; 4]) -> std::io::Result<Reply> {
    let [a, b, c, d] = arguments;
    let request: Request = [op as u64, a, b, c, d];
    stream.write_all(&words_to_bytes(&request))?;
    Reply::read(stream)
}

/// Opens the device file twice: one VA space, and one that is none.
fn open_device_files(dir: &Path) -> std::io::Result<Option<[File; 2]>> {
    let path = dir.join("dev/nvidia-uvm");
    if !path.exists() {
        return Ok(None);
    }
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    let (space, mm) = (open()?, open()?);
    let mut parameters = [0u64; 2];
    initialize(&space, UVM_INITIALIZE, &mut parameters)?;
    let mut parameters = [u64::from(space.as_raw_fd() as u32), 0];
    initialize(&mm, UVM_MM_INITIALIZE, &mut parameters)?;
    Ok(Some([space, mm]))
}

fn initialize(file: &File, number: libc::c_ulong, parameters: &mut [u64; 2]) -> std::io::Result<()> {
    // SAFETY: both calls read and write at most 16 bytes at the pointer.
    match unsafe { libc::ioctl(file.as_raw_fd(), number, parameters.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// What the program's processor may write to: decides how much work pushing out is for the driver.
struct Protection(String);

impl Protection {
    fn read() -> Self {
        Self(std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
    }

    /// (range, access) of each mapping.
    fn mappings(&self) -> impl Iterator<Item = (Range<u64>, &str)> {
        self.0.lines().filter_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some((number(start)?..number(end)?, rest.get(..4)?))
        })
    }

    /// Whether the processor may write there; what is not mapped is no matter of protection.
    fn allows(&self, address: u64) -> bool {
        self.mappings()
            .find(|(range, _)| range.contains(&address))
            .is_none_or(|(_, access)| &access[1..2] == "w")
    }

    /// Whether there is shared memory, as the driver's is, that may be read and not written.
    fn holds_shared_memory(&self) -> bool {
        self.mappings().any(|(_, access)| access == "r--s")
    }
}
