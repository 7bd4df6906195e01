//! A stand-in for the driver: its files in a temporary directory, its functions in this program.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use nvshare_abi::uvm::{DriverVersion, Event, EventData, EventLayout, FaultEntry, Processor};
use nvshare_core::GpuId;
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use crate::{config::DriverConfig, observe::btf, observe::source::BpfOptions};

/// The driver's unit of eviction.
pub(super) const BLOCK: u64 = nvshare_abi::uvm::BLOCK_BYTES;

/// The driver's functions, with its names and arguments. Each body differs, so that no two become one.
mod functions {
    use std::{ffi::c_void, hint::black_box};

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(super) extern "C" fn uvm_perf_event_notify(events: u64, id: u32, data: *const c_void) {
        black_box((events, id, data));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(super) extern "C" fn uvm_perf_init_va_space_events(va_space: u64, events: u64) {
        black_box((va_space, events, 1));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(super) extern "C" fn uvm_perf_destroy_va_space_events(events: u64) {
        black_box((events, 2));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(super) extern "C" fn uvm_parent_gpu_service_replayable_faults(parent: u64) {
        black_box((parent, 3));
    }

    pub(super) use uvm_parent_gpu_service_replayable_faults as service;
    pub(super) use uvm_perf_destroy_va_space_events as destroy;
    pub(super) use uvm_perf_event_notify as notify;
    pub(super) use uvm_perf_init_va_space_events as init;
}

/// Some of libcuda's functions.
pub(super) mod cuda {
    use std::{ffi::c_void, hint::black_box};

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(in super::super) extern "C" fn cuInit(flags: u32) {
        black_box((flags, 4));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(in super::super) extern "C" fn cuDevicePrimaryCtxRetain(context: *mut c_void, device: i32) {
        black_box((context, device, 5));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(in super::super) extern "C" fn cuMemAllocManaged(pointer: *mut u64, bytes: usize, flags: u32) {
        black_box((pointer, bytes, flags, 6));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(in super::super) extern "C" fn cuMemAlloc_v2(pointer: *mut u64, bytes: usize) {
        black_box((pointer, bytes, 7));
    }

    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(in super::super) extern "C" fn cuMemFree_v2(pointer: u64) {
        black_box((pointer, 8));
    }
}

pub(super) struct FakeDriver {
    directory: TempDir,
    layout: EventLayout,
}

impl FakeDriver {
    pub(super) fn new(version: DriverVersion) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("proc/nvidia-uvm/gpus")).unwrap();
        fs::write(directory.path().join("fault-threads"), "").unwrap();
        let driver = Self { directory, layout: EventLayout::of(version).unwrap_or_else(modern) };
        driver.replace(version);
        driver
    }

    /// Unloads this driver and loads another; the layout of events stays.
    pub(super) fn replace(&self, version: DriverVersion) {
        let module = self.directory.path().join("module");
        let old = self.directory.path().join("old-module");
        if module.exists() {
            fs::rename(&module, old).unwrap();
        }
        fs::create_dir(&module).unwrap();
        fs::write(module.join("version"), format!("{version}\n")).unwrap();
    }

    pub(super) fn options(&self) -> BpfOptions {
        let own = std::env::current_exe().unwrap();
        BpfOptions {
            driver: DriverConfig {
                proc_dir: self.directory.path().join("proc"),
                module_dir: self.directory.path().join("module"),
                btf_dir: self.directory.path().join("btf"),
                libcuda: Some(own.clone()),
                fault_threads: Some(self.directory.path().join("fault-threads")),
                uvm_objects: vec![own],
                ..DriverConfig::default()
            },
            uvm_kprobe: true,
            fault_thread: true,
            xid: true,
            cuda_uprobe: true,
        }
    }

    /// Has the kernel show the types of this driver; gives the directory.
    pub(super) fn write_types(&self) -> std::path::PathBuf {
        let directory = self.directory.path().join("types");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("vmlinux"), btf::tests::kernel()).unwrap();
        fs::write(directory.join("nvidia_uvm"), btf::tests::module(&self.layout)).unwrap();
        directory
    }

    pub(super) fn layout(&self) -> &EventLayout {
        &self.layout
    }

    pub(super) fn add_gpu(&self, name: u32, gpu: GpuId) {
        let link = self.directory.path().join("proc/nvidia-uvm/gpus").join(name.to_string());
        symlink(format!("{gpu}/0"), link).unwrap();
    }

    pub(super) fn list_fault_thread(&self, tid: u32, gpu: GpuId) {
        fs::write(self.directory.path().join("fault-threads"), format!("{tid} {gpu}\n")).unwrap();
    }

    pub(super) fn begin_space(&self, va_space: u64, events: u64) -> u64 {
        assert!(self.directory.path().exists());
        functions::init(va_space, events);
        events
    }

    pub(super) fn end_space(&self, events: u64) {
        assert!(self.directory.path().exists());
        functions::destroy(events);
    }

    pub(super) fn service(&self) {
        assert!(self.directory.path().exists());
        functions::service(1);
    }

    pub(super) fn notify(&self, events: u64, event: Event) {
        let data = event.data(&self.layout);
        functions::notify(events, event.id(&self.layout), (&raw const data).cast());
    }

    pub(super) fn raw_event(&self, events: u64, id: u32) {
        assert!(self.directory.path().exists());
        let data = EventData([0xff; nvshare_abi::uvm::EVENT_DATA_BYTES]);
        functions::notify(events, id, (&raw const data).cast());
    }

    pub(super) fn gpu_fault(&self, events: u64, processor: Processor, instances: u16) {
        let entry = FaultEntry { address: 0x7f00_0000_0000, timestamp: 1, va_space: 2, instances };
        let entry = entry.data(&self.layout);
        let entry = (&raw const entry).expose_provenance() as u64;
        self.notify(events, Event::GpuFault { processor, entry, batch: 1, duplicate: false });
    }
}

fn modern() -> EventLayout {
    EventLayout::of_epoch(nvshare_abi::uvm::Epoch::E530)
}

/// Another process that owns a space.
pub(super) struct Tenant {
    pub(super) pid: u32,
    pub(super) space: u64,
    /// Closing it ends the process.
    commands: std::io::PipeWriter,
    answers: std::io::PipeReader,
}

impl Tenant {
    pub(super) fn begin(driver: &FakeDriver, events: u64) -> Self {
        use std::io::Read as _;
        assert!(driver.directory.path().exists());
        let (commands_rx, commands) = std::io::pipe().unwrap();
        let (mut answers, answers_tx) = std::io::pipe().unwrap();
        // SAFETY: the child calls nothing but functions that touch no lock: plain ones, read, write and _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork failed");
        if pid == 0 {
            use std::os::fd::AsRawFd as _;
            functions::init(events + 0x10_0000, events);
            let mut byte = 0u8;
            // SAFETY: the buffers are one valid byte.
            unsafe {
                libc::close(commands.as_raw_fd());
                libc::write(answers_tx.as_raw_fd(), (&raw const byte).cast(), 1);
                while libc::read(commands_rx.as_raw_fd(), (&raw mut byte).cast(), 1) == 1 {
                    functions::destroy(events);
                    libc::write(answers_tx.as_raw_fd(), (&raw const byte).cast(), 1);
                }
                libc::_exit(0);
            }
        }
        drop(answers_tx);
        answers.read_exact(&mut [0]).unwrap();
        Self { pid: pid as u32, space: events, commands, answers }
    }

    /// Ends the space; the process lives on until the value is dropped.
    pub(super) fn end(&mut self) {
        use std::io::{Read as _, Write as _};
        self.commands.write_all(&[1]).unwrap();
        self.answers.read_exact(&mut [0]).unwrap();
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        // SAFETY: the child was forked by `begin` and is waited for only here.
        unsafe {
            libc::kill(self.pid as i32, libc::SIGKILL);
            libc::waitpid(self.pid as i32, std::ptr::null_mut(), 0);
        }
    }
}

/// CPU time of the calling thread.
pub(super) fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Returns when a thread sleeps.
pub(super) fn until_asleep(tid: u32) {
    let deadline = deadline();
    loop {
        let stat = fs::read_to_string(format!("/proc/{tid}/stat")).unwrap();
        if stat.rsplit_once(") ").unwrap().1.starts_with('S') {
            return;
        }
        assert!(!deadline(), "thread {tid} did not fall asleep: {stat}");
        std::thread::yield_now();
    }
}

#[expect(clippy::disallowed_methods, reason = "a test waits for an event of the system, not for the agent")]
fn deadline() -> impl Fn() -> bool {
    let begin = Instant::now();
    move || begin.elapsed() > Duration::from_secs(30)
}

/// Every message that is logged in this program from now on.
pub(super) fn record_log() -> Arc<Mutex<Vec<String>>> {
    struct Recorder(Arc<Mutex<Vec<String>>>);
    impl log::Log for Recorder {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }
    static RECORDED: OnceLock<Arc<Mutex<Vec<String>>>> = OnceLock::new();
    let recorded = RECORDED.get_or_init(|| {
        let recorded = Arc::new(Mutex::new(Vec::new()));
        log::set_boxed_logger(Box::new(Recorder(Arc::clone(&recorded)))).unwrap();
        log::set_max_level(log::LevelFilter::Info);
        recorded
    });
    Arc::clone(recorded)
}
