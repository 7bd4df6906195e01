//! The driver's own nvidia-uvm: loaded without a GPU, used as a CUDA program uses it, and made to notify of what
//! only a GPU at work would cause.

use std::{
    fs::{self, File},
    os::fd::AsRawFd as _,
    path::Path,
};

use nvshare_abi::{
    tools::{
        Counter,
        queue::{Migration, QueueVersion},
    },
    uvm::{DriverVersion, MakeResidentCause, PAGE_BYTES, Processor},
};
use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};

use crate::{
    kernel_module,
    stand_in::{GPU, GPU_1},
};

const UVM: &str = "/dev/nvidia-uvm";
const TOOLS: &str = "/dev/nvidia-uvm-tools";
const COMMANDS: &str = "/proc/driver/nvshare-inject";

/// Built-in tests on, for events and counters on demand. Prefetching off, so that each page touched is one fault.
/// Its detector of thrashing off: it looks into the memory block of every migration, and an injected one has none.
const PARAMETERS: &str = "uvm_enable_builtin_tests=1 uvm_perf_prefetch_enable=0 uvm_perf_thrashing_enable=0";

/// Numbers of the driver's ioctls, which are the same in all versions.
mod number {
    pub(super) const INITIALIZE: u32 = 0x3000_0001;
    pub(super) const MIGRATE: u32 = 51;
    pub(super) const MM_INITIALIZE: u32 = 75;
    pub(super) const TEST_EVENTS: u32 = 223;
    pub(super) const TEST_EVENT: u32 = 228;
    pub(super) const TEST_COUNTER: u32 = 229;
}

/// What the driver calls the GPU.
pub(crate) const UUID_OF_GPU: [u8; 16] = GPU.0;
/// What the driver calls the CPU.
pub(crate) const UUID_OF_CPU: [u8; 16] =
    [0xa6, 0x5e, 0x0f, 0x4e, 0xd7, 0xd4, 0x7b, 0xa2, 0x50, 0x47, 0x41, 0x2c, 0x14, 0x2a, 0x77, 0x73];

/// The loaded driver, with one GPU in name.
pub(crate) struct Driver {
    /// What it says it is.
    pub(crate) version: DriverVersion,
    commands: File,
}

/// Mirrors the module's `enum operation`.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Operation {
    Find = 1,
    Service = 2,
    Fault = 3,
    Migrate = 4,
    MigrateHere = 5,
    Counters = 6,
}

/// Mirrors the module's `struct command`.
#[repr(C)]
#[derive(Default)]
struct Command {
    operation: u32,
    descriptor: i32,
    events: u64,
    processor: u32,
    source: u32,
    cause: u32,
    instances: u32,
    bytes: u64,
}

impl Driver {
    pub(crate) fn load() -> Self {
        kernel_module::load("driver/nvshare_rm", "");
        kernel_module::load("driver/nvidia-uvm", PARAMETERS);
        let version = fs::read_to_string("/sys/module/nvidia_uvm/version").unwrap();
        let version: DriverVersion = version.trim().parse().expect("a version");
        make_device_files();
        let prefix = if version.branch <= 560 { "UVM-" } else { "" };
        kernel_module::load("driver/nvshare_inject", &format!("link={prefix}{GPU}/0"));
        Self { version, commands: File::open(COMMANDS).unwrap() }
    }

    /// Unloads all of it, which must not need anybody to let go of it first.
    pub(crate) fn unload(self) {
        drop(self.commands);
        for name in ["nvshare_inject", "nvidia_uvm", "nvshare_rm"] {
            kernel_module::unload(name);
        }
    }

    /// The fault-service thread begins a round.
    pub(crate) fn service(&self) {
        self.obey(Operation::Service, Command::default());
    }

    /// The fault-service thread turns to the access counters.
    pub(crate) fn access_counters(&self) {
        self.obey(Operation::Counters, Command::default());
    }

    /// The fault-service thread notifies of a GPU fault.
    pub(crate) fn gpu_fault(&self, events: u64, instances: u32) {
        self.obey(Operation::Fault, Command { events, processor: GPU_1.0, instances, ..Command::default() });
    }

    /// The fault-service thread notifies of a migration.
    pub(crate) fn migrate(
        &self,
        events: u64,
        dst: Processor,
        src: Processor,
        bytes: u64,
        cause: MakeResidentCause,
    ) {
        self.obey(Operation::Migrate, migration(events, dst, src, bytes, cause));
    }

    /// This process notifies of a migration.
    pub(crate) fn migrate_here(
        &self,
        events: u64,
        dst: Processor,
        src: Processor,
        bytes: u64,
        cause: MakeResidentCause,
    ) {
        self.obey(Operation::MigrateHere, migration(events, dst, src, bytes, cause));
    }

    fn obey(&self, operation: Operation, command: Command) {
        obey(&self.commands, operation, command);
    }
}

fn migration(events: u64, dst: Processor, src: Processor, bytes: u64, cause: MakeResidentCause) -> Command {
    let (processor, source, cause) = (dst.0, src.0, cause.value());
    Command { events, processor, source, cause, bytes, ..Command::default() }
}

fn obey(commands: &File, operation: Operation, mut command: Command) -> Command {
    command.operation = operation as u32;
    // SAFETY: the module reads and writes one `Command` at this address.
    unsafe { ioctl(commands, 0, &mut command) };
    command
}

/// A VA space of this process, as a CUDA program has one.
pub(crate) struct Space {
    file: File,
    /// Ties the space to the process's memory.
    _mm: File,
    events: u64,
}

impl Space {
    pub(crate) fn begin() -> Self {
        let open = || File::options().read(true).write(true).open(UVM).unwrap();
        let (file, mm) = (open(), open());
        // Flags and a status.
        let mut initialize = [0, 0, u32::MAX, 0];
        // SAFETY: the driver reads and writes these 16 bytes.
        unsafe { ioctl(&file, number::INITIALIZE, &mut initialize) };
        assert_eq!(initialize[2], 0, "the status of a space's beginning");
        let mut of_memory = [file.as_raw_fd() as u32, 0];
        // SAFETY: the driver reads and writes these 8 bytes.
        unsafe { ioctl(&mm, number::MM_INITIALIZE, &mut of_memory) };
        let commands = File::open(COMMANDS).unwrap();
        let command = Command { descriptor: file.as_raw_fd(), ..Command::default() };
        let events = obey(&commands, Operation::Find, command).events;
        Self { file, _mm: mm, events }
    }

    /// The address that its events carry.
    pub(crate) fn events(&self) -> u64 {
        self.events
    }

    pub(crate) fn descriptor(&self) -> std::os::fd::OwnedFd {
        self.file.try_clone().unwrap().into()
    }

    /// Managed memory.
    pub(crate) fn allocate(&self, bytes: usize) -> Managed<'_> {
        let block = nvshare_abi::uvm::BLOCK_BYTES as usize;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping, to find a free place; then in a part of it a mapping that replaces it.
        let base = unsafe {
            let free = std::ptr::null_mut();
            let place = mmap_anonymous(free, bytes + block, ProtFlags::empty(), MapFlags::PRIVATE).unwrap();
            let base = place.cast::<u8>().wrapping_add(place.cast::<u8>().align_offset(block));
            // The driver takes the offset for the address.
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            mmap(base.cast(), bytes, protection, flags, &self.file, base.addr() as u64).unwrap()
        };
        Managed { base: base.cast(), bytes, space: self }
    }

    /// The driver's test of its own notifications: one event of a CPU fault, from this thread.
    pub(crate) fn test_events(&self) {
        let mut status = [u32::MAX];
        // SAFETY: the driver writes this word.
        unsafe { ioctl(&self.file, number::TEST_EVENTS, &mut status) };
        assert_eq!(status, [0], "the status of the driver's test");
    }

    /// The driver queues a migration for everybody who observes this space, so many times.
    pub(crate) fn queue(&self, version: QueueVersion, migration: &Migration, count: u32) {
        let mut test = [0_u8; 88];
        test[..72].copy_from_slice(&migration.entry(version));
        // From branch 550 on there is room for either layout, and a word for which.
        let (at, status) = match version {
            QueueVersion::V1 => (64, 68),
            QueueVersion::V2 => {
                test[72..76].copy_from_slice(&2_u32.to_ne_bytes());
                (76, 80)
            }
        };
        test[at..at + 4].copy_from_slice(&count.to_ne_bytes());
        test[status..status + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        // SAFETY: the driver reads and writes 72 or 88 bytes.
        unsafe { ioctl(&self.file, number::TEST_EVENT, &mut test) };
        assert_eq!(test[status..status + 4], [0; 4], "the status of the driver's test");
    }

    /// The driver adds to one of its counters for a processor.
    pub(crate) fn count(&self, counter: Counter, amount: u64, processor: [u8; 16]) {
        let mut test = [0_u8; 40];
        test[..8].copy_from_slice(&amount.to_ne_bytes());
        test[8..12].copy_from_slice(&(counter as u32).to_ne_bytes());
        test[12..28].copy_from_slice(&processor);
        test[28..32].copy_from_slice(&1_u32.to_ne_bytes());
        test[32..36].copy_from_slice(&u32::MAX.to_ne_bytes());
        // SAFETY: the driver reads and writes these 40 bytes.
        unsafe { ioctl(&self.file, number::TEST_COUNTER, &mut test) };
        assert_eq!(test[32..36], [0; 4], "the status of the driver's test");
    }
}

/// Managed memory of a space.
pub(crate) struct Managed<'a> {
    base: *mut u8,
    bytes: usize,
    space: &'a Space,
}

impl Managed<'_> {
    /// Writes to the first pages. Says how many.
    pub(crate) fn touch(&self, pages: u64) -> u64 {
        for page in 0..pages as usize {
            let at = page * PAGE_BYTES as usize;
            assert!(at < self.bytes);
            // SAFETY: inside the mapping, which nobody else uses.
            unsafe { self.base.add(at).write_volatile(1) };
        }
        pages
    }

    /// Asks the driver to move all of it to a node of the CPU's memory.
    pub(crate) fn migrate(&self, node: u32) {
        let mut migrate = [0_u8; 80];
        migrate[..8].copy_from_slice(&(self.base.addr() as u64).to_ne_bytes());
        migrate[8..16].copy_from_slice(&(self.bytes as u64).to_ne_bytes());
        migrate[16..32].copy_from_slice(&UUID_OF_CPU);
        migrate[52..56].copy_from_slice(&node.to_ne_bytes());
        migrate[72..76].copy_from_slice(&u32::MAX.to_ne_bytes());
        // SAFETY: the driver reads and writes these 80 bytes.
        unsafe { ioctl(&self.space.file, number::MIGRATE, &mut migrate) };
        assert_eq!(migrate[72..76], [0; 4], "the status of the migration");
    }
}

impl Drop for Managed<'_> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `allocate`, and no pointer into it is left.
        unsafe { munmap(self.base.cast(), self.bytes) }.unwrap();
    }
}

/// An ioctl with a number that says nothing of its parameters; a panic where it is refused.
///
/// # Safety
/// The other side reads and writes no more than `parameters`.
unsafe fn ioctl<T>(file: &File, number: u32, parameters: &mut T) {
    // SAFETY: by the caller's promise.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number.into(), std::ptr::from_mut(parameters)) };
    assert_eq!(result, 0, "ioctl {number:#x}: {}", std::io::Error::last_os_error());
}

/// The device files, which on a host the driver's own tools make.
fn make_device_files() {
    let devices = fs::read_to_string("/proc/devices").unwrap();
    let major = devices.lines().find_map(|line| line.trim().strip_suffix(" nvidia-uvm")).expect("its number");
    let major = major.parse().unwrap();
    for (minor, path) in [(0, UVM), (1, TOOLS)] {
        if Path::new(path).exists() {
            fs::remove_file(path).unwrap();
        }
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(major, minor)).unwrap();
    }
}
