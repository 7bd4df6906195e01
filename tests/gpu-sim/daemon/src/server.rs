//! The programs' side: one thread for each connection on `SIM/sim.sock`.
//!
//! The thread watches the stream and the process at once: a stream that a forked child still holds does not end when the
//! program does. Requests are answered at once with how long they take; the program spends that time itself.

use std::{
    io::Write as _,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use nvshare_abi::{tools::Counter, uvm::MakeResidentCause};
use nvshare_gpu_sim_model::{
    client::BLOCK_BYTES,
    ids::{BlockId, CardId, SpaceId},
    memory::{Effect, MemoryError, Place},
    wire::{Op, Record, Reply, Request, Status, TO_HOST, VERSION, read_words},
};

use crate::{service::lock, stats, world::World};

/// Blocks that one request for a range moves at most.
const WINDOW: usize = 16;
/// CPU faults that the driver takes to bring a whole block back: its CPU side grows 64, 64, 128, 256, 512, 1024 KiB.
const CPU_FAULTS_PER_BLOCK: u64 = 6;
/// A CPU fault on memory that is nowhere yet costs about what any page fault costs.
const FIRST_CPU_FAULT: Duration = Duration::from_micros(5);

/// Accepts programs until the process ends.
pub(crate) fn accept(listener: &UnixListener, world: &Arc<Mutex<World>>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let world = Arc::clone(world);
        let spawned =
            std::thread::Builder::new().name("program".to_owned()).spawn(move || serve(stream, &world));
        if let Err(error) = spawned {
            eprintln!("nvshare-gpu-sim: a program was turned away: {error}");
        }
    }
}

fn serve(mut stream: UnixStream, world: &Mutex<World>) {
    let mut connected = None;
    let Some((pid, process)) = peer(&stream) else { return };
    while wait(&stream, &process) {
        let Ok(request) = read_words(&mut stream) else { break };
        let reply = answer(world, &mut connected, pid, &request);
        let mut bytes = Vec::new();
        if reply.write(&mut bytes).and_then(|()| stream.write_all(&bytes)).is_err() {
            break;
        }
    }
    if let Some((client, _)) = connected {
        lock(world).disconnect(client);
    }
}

/// The process at the other end.
fn peer(stream: &UnixStream) -> Option<(u32, OwnedFd)> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: writes at most `length` bytes into `credentials`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    let pid = u32::try_from(credentials.pid).ok().filter(|&pid| result == 0 && pid != 0)?;
    Some((pid, pidfd_open(pid)?))
}

/// A descriptor of a process.
pub(crate) fn pidfd_open(pid: u32) -> Option<OwnedFd> {
    // SAFETY: takes numbers only.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: a descriptor that the kernel has just made for us.
    (descriptor >= 0).then(|| unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

/// Waits for a request; false once the process has ended. The other end of the stream having closed shows when reading.
fn wait(stream: &UnixStream, process: &OwnedFd) -> bool {
    let poll = |fd: i32| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(stream.as_raw_fd()), poll(process.as_raw_fd())];
    loop {
        // SAFETY: both entries live until the call returns.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if ready < 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            continue;
        }
        return ready > 0 && fds[1].revents == 0;
    }
}

type Connected = Option<(usize, SpaceId)>;

fn answer(world: &Mutex<World>, connected: &mut Connected, pid: u32, request: &Request) -> Reply {
    let &[op, a, b, c, d] = request;
    let mut world = lock(world);
    let Some(op) = Op::from_value(op) else { return Reply::refused(&"unknown request") };
    match op {
        Op::Stats => return Reply { text: stats::json(&world), ..Reply::ok([0; 2]) },
        Op::Hello => return hello(&mut world, connected, pid, a),
        Op::Register | Op::Unregister | Op::AllocatePlain | Op::FreePlain | Op::Prefetch | Op::TouchCpu => {}
    }
    let &mut Some((client, space)) = connected else { return Reply::refused(&"greet first") };
    let card = |index: u64| {
        let index = index as usize;
        (index < world.processors.len()).then_some(CardId(index)).ok_or(format!("there is no GPU {index}"))
    };
    match op {
        Op::Hello | Op::Stats => Reply::refused(&"greeted already"),
        Op::Register => match world.memory.register(space, a, b) {
            Ok(span) => {
                world.publish_span(span);
                Reply::ok([u64::from(span.first.0), u64::from(span.count)])
            }
            Err(error) => Reply::refused(&error),
        },
        Op::Unregister => match world.memory.unregister(space, a, b) {
            Ok(span) => {
                world.publish_span(span);
                world.publish_usage();
                Reply::ok([0; 2])
            }
            Err(error) => Reply::refused(&error),
        },
        Op::AllocatePlain => match card(a) {
            Ok(card) => allocate(&mut world, client, space, card, b),
            Err(error) => Reply::refused(&error),
        },
        Op::FreePlain => match card(a) {
            Ok(card) => {
                world.memory.free_plain(space, card, b);
                publish_plain(&world, client, space, card);
                Reply::ok([0; 2])
            }
            Err(error) => Reply::refused(&error),
        },
        Op::Prefetch => match if c == TO_HOST { Ok(None) } else { card(c).map(Some) } {
            Ok(to) => prefetch(&mut world, space, (a, b), to, d != 0),
            Err(error) => Reply::refused(&error),
        },
        Op::TouchCpu => touch_cpu(&mut world, space, (a, b)),
    }
}

fn hello(world: &mut World, connected: &mut Connected, pid: u32, version: u64) -> Reply {
    if version != VERSION {
        return Reply::refused(&format!(
            "it speaks version {VERSION}, this program's libcuda {version}: build both from one tree"
        ));
    }
    if connected.is_some() {
        return Reply::refused(&"greeted already");
    }
    let state = world.state;
    let Some(client) = state.clients.iter().position(|slot| slot.pid.load(Ordering::Acquire) == 0) else {
        return Reply::refused(&format!(
            "{} programs are connected, the most it can serve: end some first",
            state.clients.len()
        ));
    };
    let space = match world.create_space(pid) {
        Ok(space) => space,
        Err(error) => return Reply::refused(&error),
    };
    let Some(record) = world.spaces.get_mut(&space) else { return Reply::refused(&"no VA space") };
    record.client = Some(client);
    let slot = record.slot;
    state.clients[client].pid.store(pid, Ordering::Release);
    *connected = Some((client, space));
    Reply::ok([client as u64, slot as u64])
}

fn publish_plain(world: &World, client: usize, space: SpaceId, card: CardId) {
    let bytes = world.memory.plain_of(space, card);
    world.state.clients[client].plain[card.0].store(bytes, Ordering::Relaxed);
    world.publish_usage();
}

fn allocate(world: &mut World, client: usize, space: SpaceId, card: CardId, bytes: u64) -> Reply {
    match world.memory.allocate_plain(space, card, bytes) {
        Ok(effects) => {
            let reply = finish(world, space, &effects, false, 0);
            publish_plain(world, client, space, card);
            reply
        }
        Err(MemoryError::OutOfMemory { wanted, free }) => {
            Reply { status: Status::OutOfMemory, ..Reply::ok([wanted, free]) }
        }
        Err(error) => Reply::refused(&error),
    }
}

/// The first blocks of a range, and how many bytes of it they cover.
fn window(world: &World, space: SpaceId, (base, len): (u64, u64)) -> Result<(Vec<BlockId>, u64), Reply> {
    let mut blocks = world.memory.blocks_in(space, base, len.min(WINDOW as u64 * BLOCK_BYTES));
    blocks.truncate(WINDOW);
    let end = blocks.last().and_then(|&block| world.memory.extent(block)).map(|(start, bytes)| start + bytes);
    match end {
        Some(end) => Ok((blocks, (end - base).min(len))),
        None => Err(Reply::refused(&format!("{base:#x} is not managed memory"))),
    }
}

fn prefetch(
    world: &mut World,
    space: SpaceId,
    range: (u64, u64),
    to: Option<CardId>,
    protected: bool,
) -> Reply {
    let (blocks, covered) = match window(world, space, range) {
        Ok(window) => window,
        Err(reply) => return reply,
    };
    let cause = MakeResidentCause::ApiMigrate;
    let effects: Vec<_> = blocks
        .into_iter()
        .flat_map(|block| match to {
            Some(card) => world.memory.bring_to_card(block, card, cause),
            None => world.memory.bring_to_host(block, cause),
        })
        .collect();
    finish(world, space, &effects, protected, covered)
}

/// Publishes, counts and describes what a request did in the caller's context.
fn finish(world: &mut World, space: SpaceId, effects: &[Effect], protected: bool, covered: u64) -> Reply {
    world.settle(effects, space);
    world.flush_trackers();
    let time = world.costs.request_effects(effects, protected);
    let records = world.records(effects);
    Reply { records, ..Reply::ok([time.as_nanos() as u64, covered]) }
}

fn touch_cpu(world: &mut World, space: SpaceId, range: (u64, u64)) -> Reply {
    let (blocks, covered) = match window(world, space, range) {
        Ok(window) => window,
        Err(reply) => return reply,
    };
    let events = world.events(space).map_or(0, |events| events as u64);
    let mut records = Vec::new();
    let mut time = Duration::ZERO;
    for block in blocks {
        let Some((address, bytes)) = world.memory.extent(block) else { continue };
        let cost = match world.memory.place(block) {
            Place::Host => continue,
            Place::Card(_) => Duration::from_nanos(world.costs.cpu_fault_ns),
            Place::Nowhere => FIRST_CPU_FAULT,
        };
        let faults = (CPU_FAULTS_PER_BLOCK * bytes).div_ceil(BLOCK_BYTES);
        time += cost * faults as u32;
        let step = (bytes / faults) & !0xfff;
        records.extend((0..faults).map(|index| Record {
            events,
            cpu_fault: true,
            src: 0,
            dst: 0,
            address: address + index * step,
            bytes: 0,
            cause: 0,
        }));
        let effects = world.memory.bring_to_host(block, MakeResidentCause::ReplayableFault);
        records.extend(world.records(&effects));
        world.settle(&effects, space);
        world.count(space, None, Counter::CpuFaults, faults);
        if let Some(space) = world.spaces.get_mut(&space) {
            space.cpu_faults += faults;
        }
    }
    world.flush_trackers();
    Reply { records, ..Reply::ok([time.as_nanos() as u64, covered]) }
}
