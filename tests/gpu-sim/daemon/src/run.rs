//! `nvshare-gpu-sim run`: builds the host, waits, tears it down.

use std::{
    ffi::OsString,
    fmt::Write as _,
    io,
    os::unix::{
        fs::PermissionsExt as _, net::UnixListener, process::CommandExt as _, process::ExitStatusExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode},
    sync::{Arc, Mutex, atomic::Ordering, mpsc},
};

use anyhow::{Context as _, Result, anyhow};
use nvshare_abi::{
    tools::TrackerLayout,
    uvm::{EventLayout, FAULT_THREAD_PREFIX, FAULT_THREAD_SUFFIX},
};
use nvshare_gpu_sim_model::{
    ids::CardId,
    memory::Memory,
    shared::{MAGIC, MAX_BLOCKS, Mapped},
};

use crate::{
    files::{Directory, processor, uuid_text},
    fuse, options,
    server::accept,
    service::Service,
    world::World,
};

/// Runs the host until a signal or until the program ends; the exit code is the program's.
pub(crate) fn run(options: &options::Run) -> Result<ExitCode> {
    let costs = options.costs().map_err(|error| anyhow!(error))?;
    let signals = Signals::block()?;
    let directory = Directory::create(&directory(options))?;
    let dir = directory.path();
    let version = options.driver_version;
    let uuids: Vec<[u8; 16]> = (0..options.gpus).map(uuid).collect();
    directory.write_driver(version, &uuids)?;
    stage(&directory, options)?;
    directory.write_agent_configuration()?;

    let state = Mapped::create(&dir.join("state")).context("mapping the shared state")?;
    describe(state, options, &costs, &uuids);
    let memory = Memory::new(&vec![options.memory; uuids.len()], MAX_BLOCKS as u32);
    let processors = (0..options.gpus).map(|index| processor(version, index)).collect();
    let world = Arc::new(Mutex::new(World {
        state,
        memory,
        costs,
        layout: EventLayout::of(version).context("the driver's event layout is unknown")?,
        processors,
        service_ns: vec![0; uuids.len()],
        uuids: uuids.clone(),
        spaces: std::collections::BTreeMap::new(),
        ended: Vec::new(),
        trackers: std::collections::BTreeMap::new(),
        queues: std::collections::BTreeMap::new(),
    }));
    directory.write("fault-threads", &start_services(&world, &uuids, version.branch)?)?;
    let _mount = mount(dir, &world, version);
    listen(dir, &world)?;
    state.magic.store(MAGIC, Ordering::Release);
    directory.write("ready", "")?;
    eprintln!(
        "nvshare-gpu-sim: {} card(s) of {} MiB, driver {version}, in {}",
        uuids.len(),
        options.memory >> 20,
        dir.display()
    );
    if options.program.is_empty() {
        eprintln!(
            "nvshare-gpu-sim: run programs with NVSHARE_SIM_DIR={0} LD_LIBRARY_PATH={0}/lib; \
             stop with Ctrl-C",
            dir.display()
        );
    }
    let child = start_program(options, dir)?;
    signals.wait(child)
}

fn directory(options: &options::Run) -> PathBuf {
    options.dir.clone().unwrap_or_else(|| {
        let runtime =
            std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        runtime.join("nvshare-sim")
    })
}

/// The same in every run, different for each card.
fn uuid(index: u32) -> [u8; 16] {
    let mut uuid = *b"nvshare-sim-gpu\0";
    uuid[15] = index as u8;
    uuid
}

fn stage(directory: &Directory, options: &options::Run) -> Result<()> {
    let beside = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let Some(from) = options.lib_dir.clone().or(beside) else { return Ok(()) };
    let missing = directory.stage(&from)?;
    if !missing.is_empty() {
        eprintln!(
            "nvshare-gpu-sim: {} not found in {}: programs that need it will not start (build it, or name its \
             folder with --lib-dir)",
            missing.join(" and "),
            from.display()
        );
    }
    Ok(())
}

fn describe(
    state: Mapped,
    options: &options::Run,
    costs: &nvshare_gpu_sim_model::cost::Costs,
    uuids: &[[u8; 16]],
) {
    let version = options.driver_version;
    for (slot, part) in state.driver.iter().zip([version.branch, version.minor, version.patch]) {
        slot.store(u32::from(part), Ordering::Relaxed);
    }
    state.cards_used.store(options.gpus, Ordering::Relaxed);
    let (name, sms, (major, minor)) = options.preset.product();
    for (index, (card, uuid)) in state.cards.iter().zip(uuids).enumerate() {
        for (word, half) in card.uuid.iter().zip(uuid.chunks_exact(8)) {
            word.store(bytemuck::pod_read_unaligned(half), Ordering::Relaxed);
        }
        for (slot, byte) in card.name.iter().zip(name.bytes()) {
            slot.store(byte, Ordering::Relaxed);
        }
        card.total.store(options.memory, Ordering::Relaxed);
        card.sms.store(sms, Ordering::Relaxed);
        card.capability.store(major << 4 | minor, Ordering::Relaxed);
        card.pci_bus.store(index as u32 + 1, Ordering::Relaxed);
        card.processor.store(processor(version, index as u32).0, Ordering::Relaxed);
        card.fault_window.store(costs.fault_window, Ordering::Relaxed);
        card.slice_ns.store(costs.slice_ns, Ordering::Relaxed);
        card.link_rate.store(costs.link as u64, Ordering::Relaxed);
    }
}

/// Starts the service threads; returns the lines of `fault-threads`.
fn start_services(world: &Arc<Mutex<World>>, uuids: &[[u8; 16]], branch: u16) -> Result<String> {
    let mut lines = String::new();
    for (index, uuid) in uuids.iter().enumerate() {
        let service = Service::new(Arc::clone(world), CardId(index), branch);
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name(format!("{FAULT_THREAD_PREFIX}{}{FAULT_THREAD_SUFFIX}", index + 1))
            .spawn(move || {
                // SAFETY: takes no arguments, cannot fail.
                let thread = unsafe { libc::gettid() };
                // The receiver waits for this one message.
                sender.send(thread).ok();
                service.serve()
            })
            .context("starting a fault service thread")?;
        let thread = receiver.recv().context("a fault service thread ended")?;
        writeln!(lines, "{thread} {}", uuid_text(uuid))?;
    }
    Ok(lines)
}

/// Mounts the device files, or says in one line why there are none.
fn mount(
    dir: &Path,
    world: &Arc<Mutex<World>>,
    version: nvshare_abi::uvm::DriverVersion,
) -> Option<fuse::Mount> {
    let mounted = match TrackerLayout::of(version) {
        Some(_) => fuse::mount(&dir.join("dev"), Arc::clone(world), version),
        None => Err(io::Error::other(format!("the tools ioctls of driver {version} are unknown"))),
    };
    match mounted {
        Ok(mount) => Some(mount),
        Err(error) => {
            eprintln!(
                "nvshare-gpu-sim: no device files, so no UVM counters: mounting FUSE failed ({error}); it takes root \
                 and /dev/fuse"
            );
            None
        }
    }
}

fn listen(dir: &Path, world: &Arc<Mutex<World>>) -> Result<()> {
    let path = dir.join("sim.sock");
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    let world = Arc::clone(world);
    std::thread::Builder::new().name("socket".to_owned()).spawn(move || accept(&listener, &world))?;
    Ok(())
}

fn start_program(options: &options::Run, dir: &Path) -> Result<Option<Child>> {
    let Some((program, arguments)) = options.program.split_first() else { return Ok(None) };
    let mut libraries = OsString::from(dir.join("lib"));
    if let Some(more) = std::env::var_os("LD_LIBRARY_PATH").filter(|more| !more.is_empty()) {
        libraries.push(":");
        libraries.push(more);
    }
    let mut command = Command::new(program);
    command.args(arguments).env("NVSHARE_SIM_DIR", dir).env("LD_LIBRARY_PATH", libraries);
    // SAFETY: only a system call that is safe after a fork.
    unsafe {
        command.pre_exec(|| {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            Ok(())
        });
    }
    command.spawn().with_context(|| format!("starting {program}")).map(Some)
}

/// Signals that end the simulator, and the one that says that the program has ended: blocked, and waited for.
struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them in this thread and in all that it starts.
    fn block() -> Result<Self> {
        // SAFETY: an all-zero set is valid and is initialised before use; the calls touch only this set.
        let (set, result) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD] {
                libc::sigaddset(&raw mut set, signal);
            }
            let result = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            (set, result)
        };
        anyhow::ensure!(result == 0, "blocking signals: {}", io::Error::from_raw_os_error(result));
        Ok(Self(set))
    }

    fn wait(&self, mut child: Option<Child>) -> Result<ExitCode> {
        loop {
            // The program may have ended before this is first reached; its signal is pending then.
            // SAFETY: reads the set; no information about the signal is wanted.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.0, std::ptr::null_mut()) };
            match (signal, &mut child) {
                (libc::SIGCHLD, Some(child)) => {
                    if let Some(status) = child.try_wait()? {
                        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                        return Ok(ExitCode::from(code as u8));
                    }
                }
                (libc::SIGTERM | libc::SIGINT | libc::SIGHUP, Some(child)) => {
                    // SAFETY: takes numbers; the child has not been waited for, so the id is still its own.
                    unsafe { libc::kill(child.id() as i32, signal) };
                }
                (libc::SIGTERM | libc::SIGINT | libc::SIGHUP, None) => return Ok(ExitCode::SUCCESS),
                _ => {}
            }
        }
    }
}
