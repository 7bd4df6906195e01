//! The way to the agent: one background thread per process that uses a GPU.
//!
//! **Problem.** The agent may be absent, slow, killed or replaced at any moment, and none of that may be felt by
//! the program, whose threads never touch the socket.
//!
//! **Approach.** The thread begins with the first context or allocation, so look-ups alone start nothing. It sleeps in one
//! `poll` over the socket and one of a pair ([`Session::kick`]), publishes the page while the GPU is used, answers
//! revocations ([`handover`]), and reconnects with a growing pause for as long as the process lives.
//!
//! **Invariants.** Without a standing session every gate is open. Every wait has an end. The thread blocks all signals, makes
//! no SIGPIPE, and its descriptors are closed by `exec` and in forked children; it uses none that the program has taken
//! ([`held`]).

mod descriptors;
mod handover;
mod held;
mod link;
mod mover;
mod page;
mod worker;

use std::{
    io,
    os::fd::RawFd,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nvshare_wire::{AgentMessage, ClientMessage, page::SLOTS};

use crate::{
    config, gate,
    gate::silence,
    log::{debug, error, info, warning},
    state::{self, State},
    sys,
};
use handover::Handovers;
use held::{Held, Shown};
use link::Link;
pub(crate) use mover::Best;
use page::Publication;
use worker::Workers;

/// Whether and how this process talks to the agent. The descriptors are the thread's.
#[derive(Debug, Default)]
pub(crate) struct Session {
    started: AtomicBool,
    /// The sockets that wake the thread: its own end, and everybody's.
    woken: Shown,
    wake: Shown,
    page: Shown,
    socket: Shown,
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
        let thread = std::thread::Builder::new().name("nvshare".into()).stack_size(STACK);
        let spawned = sys::without_signals(|| thread.spawn(|| guarded(state::get())));
        if let Err(error) = spawned {
            error!("cannot start a thread ({error}): this process runs without sharing");
        }
    }

    /// Makes the thread look around now.
    pub(crate) fn kick(&self) {
        if let Some(end) = self.wake.number() {
            sys::signal(end);
        }
    }

    /// Closes the parent's descriptors in a forked child, so that the agent sees the parent's end when it comes.
    pub(crate) fn close_in_child(&self) {
        for number in
            [&self.woken, &self.wake, &self.page, &self.socket].into_iter().filter_map(Shown::number)
        {
            // SAFETY: the owner is a thread that this child does not have.
            unsafe { libc::close(number) };
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

fn guarded(state: &'static State) {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(state)));
    for shown in [&state.session.woken, &state.session.wake, &state.session.page, &state.session.socket] {
        shown.show(None);
    }
    state.memory.forget_room();
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

/// The sockets by which other threads wake this one.
struct Wake {
    woken: Held,
    /// Kept open for those to whom it is shown.
    wake: Held,
}

impl Wake {
    fn new(session: &Session) -> io::Result<Self> {
        let (woken, wake) = sys::socket_pair()?;
        let (woken, wake) = (Held::new(woken)?, Held::new(wake)?);
        session.woken.show(Some(&woken));
        session.wake.show(Some(&wake));
        Ok(Self { woken, wake })
    }

    /// The end to look at, if both still are ours.
    fn number(&self) -> Option<RawFd> {
        self.wake.number()?;
        self.woken.number()
    }
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

/// When to try again, and whether the log knows that there is no session.
struct Attempts {
    pause: Duration,
    next_ns: u64,
    told: bool,
}

impl Attempts {
    fn failed(&mut self, why: impl FnOnce()) {
        if !std::mem::replace(&mut self.told, true) {
            why();
        }
        self.next_ns = sys::now_ns() + self.pause.as_nanos() as u64;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// A session that had begun has ended. An agent that greets is there, so the next attempt comes soon; but only one that
    /// stays is worth another line when it goes.
    fn ended(&mut self, was_welcomed: bool, stood: Duration, why: impl FnOnce()) {
        if was_welcomed {
            self.pause = FIRST_PAUSE;
        }
        if stood > LONGEST_PAUSE {
            self.told = false;
        }
        self.failed(why);
    }
}

fn run(state: &'static State) -> io::Result<()> {
    // Here, since the kernel takes its time with a process of many threads: a program's start would wait for it.
    gate::use_membarrier();
    let mut wake = Wake::new(&state.session)?;
    let mut publication = Publication::new()?;
    publication.show(&state.session.page);
    let mut workers = Workers::default();
    let mut standing: Option<Standing> = None;
    let mut attempts = Attempts { pause: FIRST_PAUSE, next_ns: 0, told: false };
    loop {
        if standing.is_none() && sys::now_ns() >= attempts.next_ns {
            match connect(state, &mut publication) {
                Ok(begun) => standing = Some(begun),
                Err(error) => {
                    state.session.socket.show(None);
                    attempts.failed(|| {
                        warning!(
                            "no agent at {} ({error}): running without sharing; will keep trying",
                            config::get().run_dir.join(link::SOCKET).display()
                        );
                    });
                }
            }
        }
        if wake.number().is_none()
            && let Ok(new) = Wake::new(&state.session)
        {
            wake = new;
        }
        let limit = match &standing {
            Some(standing) => standing.handovers.next_look().min(publication.interval()),
            None => Duration::from_nanos(attempts.next_ns.saturating_sub(sys::now_ns())),
        };
        let socket = standing.as_ref().and_then(|standing| standing.link.number().ok());
        let [kicked, readable] = sys::poll([wake.number(), socket], limit);
        if kicked && let Some(end) = wake.number() {
            sys::clear(end);
        }
        let Some(current) = &mut standing else {
            continue;
        };
        if let Err(ended) = current.turn(state, &mut publication, &mut workers, readable) {
            state.session.socket.show(None);
            state.memory.forget_room();
            workers.stop_all();
            (0..SLOTS).for_each(|slot| state.memory.residency.displaced(slot, true, true));
            let was_closed = gate::open_all();
            let stood = Duration::from_nanos(sys::now_ns() - current.begun_ns);
            let was_welcomed = current.link.welcomed;
            standing = None;
            attempts.ended(was_welcomed, stood, || {
                warning!(
                    "session with the agent ended ({ended}){}: running without sharing; will keep trying",
                    if was_closed { ", gates opened" } else { "" }
                );
            });
        }
    }
}

fn connect(state: &State, publication: &mut Publication) -> Result<Standing, link::Ended> {
    let config = config::get();
    if publication.number().is_none() {
        // The program has closed it.
        *publication = Publication::new()?;
        publication.show(&state.session.page);
    }
    let mut link = Link::connect(&config.run_dir, &state.session.socket)?;
    let hello = ClientMessage::Hello {
        weight_milli: config.weight_milli,
        priority: config.priority,
        memory_limit: config.memory_limit.unwrap_or(0),
        name: nvshare_wire::Label::new(&program()),
    };
    let page = publication.number().ok_or(link::Ended::Taken)?;
    link.send(&hello, Some(page))?;
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
        workers: &mut Workers,
        readable: bool,
    ) -> Result<(), link::Ended> {
        self.link.number()?;
        if readable {
            self.link.receive()?;
            while let Some(message) = self.link.next_message()? {
                silence::heard();
                self.handle(state, workers, &message)?;
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
        self.handovers.advance(state, workers, &mut self.link)?;
        self.handovers.tell_waiting(state, &mut self.link)?;
        if publication.is_due() {
            publication.publish(state);
            self.descriptors.send_new(&mut self.link)?;
        }
        // An agent that comes back to itself must not believe that work is still held back, so the session ends and
        // begins anew.
        if self.handovers.was_opened() || (self.handovers.holds_back() && silence::is_too_long()) {
            return Err(link::Ended::Silent);
        }
        Ok(())
    }

    fn handle(
        &mut self,
        state: &State,
        workers: &Workers,
        message: &AgentMessage,
    ) -> Result<(), link::Ended> {
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
            AgentMessage::Limit { bytes } => {
                state.memory.told_limit(bytes);
                Ok(())
            }
            AgentMessage::Grant { gpu, epoch, prefetch } => {
                if let Some(slot) = state.devices.slot_of_uuid(&gpu) {
                    self.handovers.granted(slot, (gpu, epoch), prefetch, workers);
                }
                Ok(())
            }
            AgentMessage::Revoke { gpu, epoch, drain_ms, shortfall } => {
                if let Some(slot) = state.devices.slot_of_uuid(&gpu) {
                    let drain = Duration::from_millis(drain_ms.into());
                    self.handovers.revoked(slot, (gpu, epoch), drain, shortfall, workers);
                }
                Ok(())
            }
            AgentMessage::Displaced { gpu, brought, pushed } => {
                if let Some(slot) = state.devices.slot_of_uuid(&gpu) {
                    state.memory.residency.displaced(slot, brought != 0, pushed != 0);
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
