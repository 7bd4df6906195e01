//! The way to the agent: one background thread per process that uses a GPU.
//!
//! **Problem.** The agent may be absent, slow, killed or replaced at any moment, and none of that may be felt by
//! the program, whose threads never touch the socket.
//!
//! **Approach.** The thread begins with the first context or allocation, so look-ups alone start nothing. It sleeps in one
//! `poll` over the socket and an eventfd ([`Session::kick`]), publishes the page while the GPU is used, answers
//! revocations ([`handover`]), and reconnects with a growing pause for as long as the process lives.
//!
//! **Invariants.** Without a standing session every gate is open. Every wait has an end. The thread blocks all signals, makes
//! no SIGPIPE, and its descriptors are closed by `exec` and in forked children.

mod descriptors;
mod drainer;
mod handover;
mod link;
mod page;

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
    time::Duration,
};

use nvshare_wire::{AgentMessage, ClientMessage};

use crate::{
    config, gate,
    gate::silence,
    log::{debug, error, info, warning},
    state::{self, State},
    sys,
};
use handover::Handovers;
use link::Link;
use page::Publication;

/// Whether and how this process talks to the agent. The numbers are of descriptors that the thread owns.
#[derive(Debug)]
pub(crate) struct Session {
    started: AtomicBool,
    wake: AtomicI32,
    page: AtomicI32,
    socket: AtomicI32,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            started: AtomicBool::new(false),
            wake: AtomicI32::new(-1),
            page: AtomicI32::new(-1),
            socket: AtomicI32::new(-1),
        }
    }
}

/// Enough for the thread, whose deepest call is the driver's `cuCtxGetDevice`-like queries.
const STACK: usize = 512 << 10;

impl Session {
    /// Starts the thread, once per process.
    pub(crate) fn start(&self) {
        if self.started.load(Ordering::Relaxed) || self.started.swap(true, Ordering::AcqRel) {
            return;
        }
        if config::get().disabled {
            return;
        }
        watch_forks();
        gate::use_membarrier();
        match sys::eventfd() {
            Ok(wake) => {
                self.wake.store(wake.as_raw_fd(), Ordering::Release);
                let thread = std::thread::Builder::new().name("nvshare".into()).stack_size(STACK);
                let spawned = sys::without_signals(|| thread.spawn(move || guarded(state::get(), &wake)));
                if let Err(error) = spawned {
                    error!("cannot start a thread ({error}): this process runs without sharing");
                }
            }
            Err(error) => error!("cannot make an eventfd ({error}): this process runs without sharing"),
        }
    }

    /// Makes the thread look around now.
    pub(crate) fn kick(&self) {
        let wake = self.wake.load(Ordering::Acquire);
        if wake >= 0 {
            sys::signal(wake);
        }
    }

    /// Closes the parent's descriptors in a forked child, so that the agent sees the parent's end when it comes.
    pub(crate) fn close_in_child(&self) {
        for number in [&self.wake, &self.page, &self.socket] {
            let fd = number.swap(-1, Ordering::AcqRel);
            if fd >= 0 {
                // SAFETY: the owner is a thread that this child does not have.
                unsafe { libc::close(fd) };
            }
        }
    }
}

fn watch_forks() {
    static WATCHING: AtomicBool = AtomicBool::new(false);
    if !WATCHING.swap(true, Ordering::AcqRel) {
        // SAFETY: the handler lives as long as the library, which is never unloaded.
        let code = unsafe { libc::pthread_atfork(None, None, Some(state::after_fork_in_child)) };
        if code != 0 {
            warning!("cannot watch for forks (error {code}): a forked child will not be shared correctly");
        }
    }
}

fn guarded(state: &'static State, wake: &OwnedFd) {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(state, wake)));
    gate::open_all();
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            error!("cannot share memory with the agent ({error}): this process runs without sharing");
        }
        Err(_) => {
            error!("internal error in the session: this process runs on without sharing. Please report it");
        }
    }
    // Whoever waited in vain for the session is let in by the silence rule; nobody closes a gate again.
}

/// Pauses between attempts to reach the agent.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long the agent may take to greet.
const GREETING_NS: u64 = 5_000_000_000;

/// A session that stands, or is about to.
struct Standing {
    link: Link,
    handovers: Handovers,
    begun_ns: u64,
    /// GPUs that the agent knows of.
    announced: usize,
    descriptors: descriptors::Sent,
}

fn run(state: &'static State, wake: &OwnedFd) -> std::io::Result<()> {
    let mut publication = Publication::new()?;
    state.session.page.store(publication.descriptor().as_raw_fd(), Ordering::Release);
    let mut drainers = drainer::Drainers::default();
    let mut standing: Option<Standing> = None;
    let mut pause = FIRST_PAUSE;
    let mut next_try_ns = 0;
    let mut told = false;
    loop {
        if standing.is_none() && sys::now_ns() >= next_try_ns {
            match connect(state, &publication) {
                Ok(begun) => standing = Some(begun),
                Err(error) => {
                    if !told {
                        told = true;
                        warning!(
                            "no agent at {} ({error}): running without sharing; will keep trying",
                            config::get().run_dir.join(link::SOCKET).display()
                        );
                    }
                    next_try_ns = sys::now_ns() + pause.as_nanos() as u64;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        let limit = match &standing {
            Some(standing) => standing.handovers.next_look().min(publication.interval()),
            None => Duration::from_nanos(next_try_ns.saturating_sub(sys::now_ns())),
        };
        let socket: Option<RawFd> = standing.as_ref().map(|standing| standing.link.as_raw_fd());
        let [kicked, readable] = sys::poll([Some(wake.as_raw_fd()), socket], limit);
        if kicked {
            sys::clear(wake.as_raw_fd());
        }
        let Some(current) = &mut standing else {
            continue;
        };
        match current.turn(state, &mut publication, &mut drainers, readable) {
            Ok(()) => {
                if current.link.welcomed {
                    pause = FIRST_PAUSE;
                    told = false;
                }
            }
            Err(ended) => {
                state.session.socket.store(-1, Ordering::Release);
                state.memory.forget_room();
                let was_closed = gate::open_all();
                let welcomed = current.link.welcomed;
                standing = None;
                if !told {
                    told = true;
                    warning!(
                        "session with the agent ended ({ended}){}: running without sharing; will keep trying",
                        if was_closed { ", gates opened" } else { "" }
                    );
                }
                if !welcomed {
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                next_try_ns = sys::now_ns() + pause.as_nanos() as u64;
            }
        }
    }
}

fn connect(state: &State, publication: &Publication) -> Result<Standing, link::Ended> {
    let config = config::get();
    let mut link = Link::connect(&config.run_dir)?;
    state.session.socket.store(link.as_raw_fd(), Ordering::Release);
    let hello = ClientMessage::Hello {
        weight_milli: config.weight_milli,
        priority: config.priority,
        memory_limit: config.memory_limit.unwrap_or(0),
        name: nvshare_wire::Label::new(&program()),
    };
    if let Err(ended) = link.send(&hello, Some(publication.descriptor().as_raw_fd())) {
        state.session.socket.store(-1, Ordering::Release);
        return Err(ended);
    }
    silence::heard();
    Ok(Standing {
        link,
        handovers: Handovers::default(),
        begun_ns: sys::now_ns(),
        announced: 0,
        descriptors: descriptors::Sent::default(),
    })
}

/// The program's name, for people.
fn program() -> String {
    let path = std::env::current_exe().unwrap_or_default();
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Standing {
    /// One look at everything: messages, revocations under way, news for the agent.
    fn turn(
        &mut self,
        state: &State,
        publication: &mut Publication,
        drainers: &mut drainer::Drainers,
        readable: bool,
    ) -> Result<(), link::Ended> {
        if readable {
            self.link.receive()?;
            while let Some(message) = self.link.next_message()? {
                silence::heard();
                self.handle(state, &message)?;
            }
        }
        if !self.link.welcomed {
            return if sys::now_ns() - self.begun_ns > GREETING_NS {
                Err(link::Ended::Greeting)
            } else {
                Ok(())
            };
        }
        self.announce(state)?;
        self.handovers.advance(state, drainers, &mut self.link)?;
        self.handovers.tell_waiting(state, &mut self.link)?;
        if publication.is_due() {
            publication.publish(state);
            self.descriptors.send_new(&mut self.link)?;
        }
        if silence::is_too_long() && gate::open_all() {
            warning!("the agent has been silent for too long: gates opened");
            self.handovers.forget_closed();
        }
        Ok(())
    }

    fn handle(&mut self, state: &State, message: &AgentMessage) -> Result<(), link::Ended> {
        match *message {
            AgentMessage::Welcome { client, silence_ms } => {
                info!("client {client} of the agent");
                self.link.welcomed = true;
                silence::allow(silence_ms);
                Ok(())
            }
            AgentMessage::Alive => Ok(()),
            AgentMessage::Room { gpu, unevictable, host } => {
                state.memory.told_room(state.devices.slot_of_uuid(&gpu), unevictable, host);
                Ok(())
            }
            AgentMessage::Grant { gpu, epoch, prefetch: _ } => match state.devices.slot_of_uuid(&gpu) {
                Some(slot) => self.handovers.granted(slot, gpu, epoch, &mut self.link),
                None => Ok(()),
            },
            AgentMessage::Revoke { gpu, epoch, drain_ms, shortfall: _ } => {
                if let Some(slot) = state.devices.slot_of_uuid(&gpu) {
                    self.handovers.revoked(slot, gpu, epoch, Duration::from_millis(drain_ms.into()));
                }
                Ok(())
            }
            AgentMessage::Refused { code, detail } => Err(link::Ended::Refused(code, Box::new(detail))),
        }
    }

    fn announce(&mut self, state: &State) -> Result<(), link::Ended> {
        for (slot, device) in state.devices.iter().skip(self.announced) {
            debug!("announcing GPU {} as slot {slot}", device.ordinal);
            self.link.send(&ClientMessage::UseGpu { slot: slot as u32, gpu: device.uuid }, None)?;
            self.announced = slot + 1;
            self.descriptors.look_again();
        }
        Ok(())
    }
}
