//! Streams: one worker thread and one queue each.
//!
//! # Approach
//! An operation is queued with the list of (stream, position) pairs it must wait for. The legacy default stream waits
//! for every blocking stream of its context and every blocking stream waits for it; events add pairs of their own.
//! Positions are taken under the context's submission lock, so waits point backwards in one total order and cannot form
//! a cycle.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    abi::{
        CONTEXT_IS_DESTROYED, CUresult, Handle, INVALID_HANDLE, OUT_OF_MEMORY, Outcome,
        STREAM_CAPTURE_IMPLICIT,
    },
    context::{self, Context},
    graph::Capture,
    launch::Operation,
    registry::{Registry, handle_of, lock},
};

/// Which default stream a call means by stream 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flavour {
    Legacy,
    Thread,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Legacy,
    PerThread,
    Created,
}

/// `CU_STREAM_NON_BLOCKING`.
pub(crate) const NON_BLOCKING: u32 = 1;
/// `CU_STREAM_LEGACY`, `CU_STREAM_PER_THREAD`.
const HANDLE_LEGACY: Handle = 1;
const HANDLE_PER_THREAD: Handle = 2;

/// A place in a stream: done once `stream` has completed `position` operations.
#[derive(Clone)]
pub(crate) struct Point {
    pub(crate) stream: Arc<Stream>,
    pub(crate) position: u64,
}

struct Job {
    after: Vec<Point>,
    operation: Operation,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    submitted: u64,
    completed: u64,
    running: bool,
    closing: bool,
}

pub(crate) struct Stream {
    context: Weak<Context>,
    pub(crate) gpu: usize,
    fault: Arc<AtomicU32>,
    pub(crate) kind: Kind,
    pub(crate) flags: u32,
    pub(crate) priority: i32,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// The capture this stream takes part in.
    pub(crate) capture: Mutex<Option<Arc<Capture>>>,
}

pub(crate) static STREAMS: Registry<Stream> = Registry::new();

thread_local! {
    static PER_THREAD: RefCell<HashMap<Handle, Arc<Stream>>> = RefCell::new(HashMap::new());
}

/// The stream a call names, in the calling thread's context.
pub(crate) fn resolve(handle: Handle, flavour: Flavour) -> Outcome<Arc<Stream>> {
    let legacy = match (handle, flavour) {
        (HANDLE_LEGACY, _) | (0, Flavour::Legacy) => true,
        (HANDLE_PER_THREAD, _) | (0, Flavour::Thread) => false,
        (handle, _) => {
            let stream = STREAMS.get(handle)?;
            stream.context()?.check()?;
            return Ok(stream);
        }
    };
    let context = context::current()?;
    if legacy {
        return Ok(Arc::clone(&context.legacy));
    }
    Ok(PER_THREAD.with_borrow_mut(|streams| {
        Arc::clone(
            streams.entry(handle_of(&context)).or_insert_with(|| context.add_stream(Kind::PerThread, 0, 0)),
        )
    }))
}

impl Point {
    pub(crate) fn is_done(&self) -> bool {
        lock(&self.stream.queue).completed >= self.position
    }

    pub(crate) fn wait(&self) {
        self.stream.wait_until(self.position);
    }
}

impl Stream {
    pub(crate) fn create(
        context: Weak<Context>,
        gpu: usize,
        fault: Arc<AtomicU32>,
        kind: Kind,
        flags: u32,
        priority: i32,
    ) -> Arc<Self> {
        Arc::new(Self {
            context,
            gpu,
            fault,
            kind,
            flags,
            priority,
            queue: Mutex::default(),
            changed: Condvar::new(),
            capture: Mutex::new(None),
        })
    }

    pub(crate) fn context(&self) -> Outcome<Arc<Context>> {
        self.context.upgrade().ok_or(CONTEXT_IS_DESTROYED)
    }

    fn is_blocking(&self) -> bool {
        self.flags & NON_BLOCKING == 0
    }

    pub(crate) fn capture(&self) -> Option<Arc<Capture>> {
        lock(&self.capture).clone()
    }

    /// Everything submitted so far, as a place to wait for.
    pub(crate) fn tail(self: &Arc<Self>) -> Point {
        Point { stream: Arc::clone(self), position: lock(&self.queue).submitted }
    }

    pub(crate) fn is_idle(&self) -> bool {
        let queue = lock(&self.queue);
        queue.completed == queue.submitted
    }

    pub(crate) fn wait_idle(&self) {
        let position = lock(&self.queue).submitted;
        self.wait_until(position);
    }

    fn wait_until(&self, position: u64) {
        let mut queue = lock(&self.queue);
        while queue.completed < position {
            queue = self.wait(queue);
        }
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an operation: to the capture if the stream is capturing, else to the queue. `None` in the former case.
    pub(crate) fn add(self: &Arc<Self>, operation: Operation) -> Outcome<Option<Point>> {
        if let Some(capture) = self.capture() {
            capture.record(self, operation)?;
            return Ok(None);
        }
        self.submit(operation, Vec::new()).map(Some)
    }

    /// Queues an operation behind `after` and whatever the default stream rules put before it.
    pub(crate) fn submit(self: &Arc<Self>, operation: Operation, mut after: Vec<Point>) -> Outcome<Point> {
        let context = self.context()?;
        context.check()?;
        let _order = lock(&context.submitting);
        match self.kind {
            Kind::Legacy => {
                for stream in context.streams() {
                    if stream.kind == Kind::Legacy || !stream.is_blocking() {
                        continue;
                    }
                    if let Some(capture) = stream.capture() {
                        capture.invalidate();
                        return Err(STREAM_CAPTURE_IMPLICIT);
                    }
                    after.push(stream.tail());
                }
            }
            Kind::PerThread | Kind::Created if self.is_blocking() => after.push(context.legacy.tail()),
            Kind::PerThread | Kind::Created => {}
        }
        after.retain(|point| !Arc::ptr_eq(&point.stream, self) && !point.is_done());
        let mut queue = lock(&self.queue);
        if queue.closing {
            return Err(INVALID_HANDLE);
        }
        if !queue.running {
            queue.running = true;
            let stream = Arc::clone(self);
            if let Err(error) =
                std::thread::Builder::new().name("nvshare-sim-str".to_owned()).spawn(move || stream.work())
            {
                queue.running = false;
                crate::process::log(&format!("cannot start a thread for a stream: {error}"));
                return Err(OUT_OF_MEMORY);
            }
        }
        queue.jobs.push_back(Job { after, operation });
        queue.submitted += 1;
        let position = queue.submitted;
        drop(queue);
        self.changed.notify_all();
        Ok(Point { stream: Arc::clone(self), position })
    }

    /// Lets the worker end once the queue is empty.
    pub(crate) fn close(&self) {
        lock(&self.queue).closing = true;
        self.changed.notify_all();
    }

    fn work(self: Arc<Self>) {
        block_signals();
        loop {
            let job = {
                let mut queue = lock(&self.queue);
                loop {
                    if let Some(job) = queue.jobs.pop_front() {
                        break job;
                    }
                    if queue.closing {
                        queue.running = false;
                        return;
                    }
                    queue = self.wait(queue);
                }
            };
            for point in &job.after {
                point.wait();
            }
            // After an error the context is unusable: what is queued completes without effect, as on the hardware.
            if self.fault.load(Ordering::Acquire) == 0
                && let Err(CUresult(code)) = job.operation.execute(self.gpu)
            {
                self.fault.store(code, Ordering::Release);
            }
            lock(&self.queue).completed += 1;
            self.changed.notify_all();
        }
    }
}

/// The program's signal handlers must not run on the driver's threads.
fn block_signals() {
    // SAFETY: a full set is built in place before it is used.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
}
