//! The contexts that a program has on one GPU, and waiting until all of them are idle.
//!
//! **Problem.** A drain has to cover every context of the GPU while the program creates and destroys them, and must neither
//! touch one that is gone nor bring one to life. And a drain can take long: a program that destroys another context
//! meanwhile must not wait for it.
//!
//! **Approach.** Contexts that the program created are known by handle. The primary context is counted, but for a drain the
//! driver is asked: it may be alive by the driver's own doing (green contexts retain it), and its wait covers the green
//! contexts as well. A drain says which context it is in; only who takes that very one away waits for it, and not forever. A
//! drain in turn goes on only when nobody is taking a context away.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    abi::{CUdevice, CUresult, Ptr},
    driver,
};

/// How long the destruction of a context waits for a drain of that context. The driver would wait for the context's work
/// too; but a program may also count on a destruction to end work that does not end.
const PATIENCE: Duration = Duration::from_secs(5);

/// How waiting for a GPU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Nothing is running.
    Idle,
    /// A stream capture is open.
    Capturing,
}

/// `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED` to `CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD`.
const CAPTURE_ERRORS: std::ops::RangeInclusive<CUresult> = 900..=908;

impl From<Result<(), CUresult>> for Drained {
    fn from(outcome: Result<(), CUresult>) -> Self {
        match outcome {
            Err(code) if CAPTURE_ERRORS.contains(&code) => Self::Capturing,
            // A context that answers with another error is broken or gone: it runs nothing any more.
            Ok(()) | Err(_) => Self::Idle,
        }
    }
}

/// One context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Primary,
    Created(usize),
}

/// A context that the program created.
#[derive(Clone, Copy, Debug)]
struct Created {
    handle: usize,
    /// A stream of ours in it; 0 until one is needed. It goes with the context.
    stream: usize,
}

#[derive(Debug, Default)]
struct Known {
    /// With `cuCtxAttach`, a context is there more than once.
    created: Vec<Created>,
    /// How often the program retained the primary context, and where it was the last time.
    retained: u32,
    primary: usize,
    /// Our stream in the primary context, as in [`Created`].
    stream: usize,
    /// What the drain is waiting for, or memory is moved in.
    draining: Option<Which>,
    /// Threads that are taking a context away.
    leaving: u32,
}

/// The contexts of one GPU.
#[derive(Debug)]
pub(crate) struct Contexts {
    device: CUdevice,
    known: Mutex<Known>,
    /// `draining` or `leaving` changed.
    changed: Condvar,
}

/// A context is being taken away while this lives; no drain begins with one.
#[derive(Debug)]
#[must_use = "the driver's own function is called while this lives"]
pub(crate) struct Leaving<'a> {
    contexts: &'a Contexts,
    /// Handles that are gone once the driver has done it.
    pub(crate) gone: Option<usize>,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.contexts.lock().leaving -= 1;
        self.contexts.changed.notify_all();
    }
}

/// A context that is lent; dropping it gives it back.
struct Lent<'a>(&'a Contexts);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.lock().draining = None;
        self.0.changed.notify_all();
    }
}

impl Known {
    /// Where our stream in a context is kept; `None` if the context is not one of ours to know.
    fn stream_of(&mut self, context: Ptr) -> Option<&mut usize> {
        if self.retained > 0 && self.primary == context as usize {
            return Some(&mut self.stream);
        }
        self.created
            .iter_mut()
            .find(|created| created.handle == context as usize)
            .map(|created| &mut created.stream)
    }
}

impl Contexts {
    pub(super) fn new(device: CUdevice) -> Self {
        Self { device, known: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The program created a context, or attached to one.
    pub(crate) fn created(&self, context: Ptr) {
        self.lock().created.push(Created { handle: context as usize, stream: 0 });
    }

    /// The program retained the primary context.
    pub(crate) fn retained(&self, context: Ptr) {
        let mut known = self.lock();
        known.retained = known.retained.saturating_add(1);
        if known.primary != context as usize {
            known.primary = context as usize;
            known.stream = 0;
        }
    }

    /// The program is about to release the primary context once; it goes when it was released as often as it
    /// was retained.
    pub(crate) fn releasing(&self) -> Leaving<'_> {
        let mut known = self.lock();
        known.retained = known.retained.saturating_sub(1);
        let last = known.retained == 0;
        if last {
            known.stream = 0;
        }
        let gone = last.then_some(known.primary);
        self.leave(known, last.then_some(Which::Primary), gone)
    }

    /// The program is about to reset the primary context. It must still release it as often as it retained it.
    pub(crate) fn resetting(&self) -> Leaving<'_> {
        let mut known = self.lock();
        known.stream = 0;
        let gone = Some(known.primary);
        self.leave(known, Some(Which::Primary), gone)
    }

    /// The program is about to destroy this context.
    pub(crate) fn destroying(&self, context: Ptr) -> Leaving<'_> {
        let mut known = self.lock();
        let handle = context as usize;
        known.created.retain(|created| created.handle != handle);
        self.leave(known, Some(Which::Created(handle)), Some(handle))
    }

    /// The program is about to detach from this context; it goes with the last one attached.
    pub(crate) fn detaching(&self, context: Ptr) -> Leaving<'_> {
        let mut known = self.lock();
        let handle = context as usize;
        if let Some(at) = known.created.iter().position(|created| created.handle == handle) {
            known.created.remove(at);
        }
        let last = !known.created.iter().any(|created| created.handle == handle);
        self.leave(known, last.then_some(Which::Created(handle)), last.then_some(handle))
    }

    fn leave<'a>(
        &'a self,
        mut known: MutexGuard<'a, Known>,
        which: Option<Which>,
        gone: Option<usize>,
    ) -> Leaving<'a> {
        known.leaving += 1;
        let is_in_it = |known: &mut Known| which.is_some() && known.draining == which;
        let waited = self.changed.wait_timeout_while(known, PATIENCE, is_in_it);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Leaving { contexts: self, gone }
    }

    /// Our own stream in a context of this GPU that is the calling thread's current one.
    pub(crate) fn own_stream(&self, context: Ptr) -> Option<Ptr> {
        let known = *self.lock().stream_of(context)?;
        if known != 0 {
            return Some(known as Ptr);
        }
        // No lock is held while the driver works. Of two threads that make one, the second's goes again.
        let made = driver::make_stream().ok()?;
        let kept = match self.lock().stream_of(context) {
            Some(place) => {
                if *place == 0 {
                    *place = made as usize;
                }
                *place as Ptr
            }
            // The context went meanwhile, and the stream with it.
            None => return None,
        };
        if kept != made {
            driver::destroy_stream(made);
        }
        Some(kept)
    }

    /// Whether the program created this context here.
    pub(crate) fn has(&self, context: Ptr) -> bool {
        self.lock().created.iter().any(|created| created.handle == context as usize)
    }

    /// How many contexts there are.
    pub(crate) fn count(&self) -> usize {
        let known = self.lock();
        known.created.len() + usize::from(known.retained > 0)
    }

    /// Waits until everything submitted to this GPU has finished. For a thread that may block.
    pub(crate) fn drain(&self) -> Drained {
        let mut outcome = self.drain_one(Which::Primary);
        let created: Vec<_> = self.lock().created.iter().map(|created| created.handle).collect();
        for handle in created {
            // Whatever became of one context, the others may be at work.
            let this = self.drain_one(Which::Created(handle));
            if outcome == Drained::Idle {
                outcome = this;
            }
        }
        // What is just being taken away ends with the driver's own wait.
        drop(self.nobody_leaving());
        outcome
    }

    fn drain_one(&self, which: Which) -> Drained {
        let mut known = self.nobody_leaving();
        if let Which::Created(handle) = which
            && !known.created.iter().any(|created| created.handle == handle)
        {
            return Drained::Idle;
        }
        known.draining = Some(which);
        drop(known);
        let outcome = match which {
            Which::Primary => self.drain_primary(),
            Which::Created(handle) => driver::synchronise(handle as Ptr),
        };
        self.lock().draining = None;
        self.changed.notify_all();
        outcome.into()
    }

    /// Retaining keeps it from going while it is waited for; where it is not alive, it would bring it to life.
    fn drain_primary(&self) -> Result<(), CUresult> {
        if !driver::primary_is_active(self.device) {
            return Ok(());
        }
        let context = driver::retain_primary(self.device)?;
        let outcome = driver::synchronise(context);
        driver::release_primary(self.device)?;
        outcome
    }

    /// Does something with a stream of ours in some context of this GPU, which does not go meanwhile; `None` if there is
    /// no context, or none that works.
    pub(crate) fn lend<T>(&self, work: impl FnOnce(Ptr) -> T) -> Option<T> {
        let mut known = self.nobody_leaving();
        let which =
            if known.retained > 0 { Which::Primary } else { Which::Created(known.created.first()?.handle) };
        known.draining = Some(which);
        drop(known);
        let _lent = Lent(self);
        let in_it =
            |context| driver::within(context, || Some(work(self.own_stream(context)?))).ok().flatten();
        match which {
            Which::Created(handle) => in_it(handle as Ptr),
            Which::Primary => {
                let context = driver::retain_primary(self.device).ok()?;
                let result = in_it(context);
                driver::release_primary(self.device).ok()?;
                result
            }
        }
    }

    fn nobody_leaving(&self) -> MutexGuard<'_, Known> {
        let known = self.lock();
        self.changed.wait_while(known, |known| known.leaving > 0).unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn the_primary_context_goes_with_its_last_release() {
        let contexts = Contexts::new(0);
        contexts.retained(0x10 as Ptr);
        contexts.retained(0x10 as Ptr);
        assert_eq!(contexts.releasing().gone, None);
        assert_eq!(contexts.count(), 1);
        assert_eq!(contexts.releasing().gone, Some(0x10));
        assert_eq!(contexts.count(), 0);
    }

    #[test]
    fn a_reset_leaves_the_primary_context_to_be_released() {
        let contexts = Contexts::new(0);
        contexts.retained(0x10 as Ptr);
        assert_eq!(contexts.resetting().gone, Some(0x10));
        assert_eq!(contexts.count(), 1);
        drop(contexts.releasing());
        assert_eq!(contexts.count(), 0);
    }

    #[test]
    fn a_created_context_goes_when_it_is_destroyed_or_last_detached_from_and_not_before() {
        let contexts = Contexts::new(0);
        for handle in [0x20, 0x30, 0x30] {
            contexts.created(handle as Ptr);
        }
        assert_eq!(contexts.destroying(0x20 as Ptr).gone, Some(0x20));
        assert!(!contexts.has(0x20 as Ptr) && contexts.has(0x30 as Ptr));
        assert_eq!(contexts.detaching(0x30 as Ptr).gone, None);
        assert!(contexts.has(0x30 as Ptr));
        assert_eq!(contexts.detaching(0x30 as Ptr).gone, Some(0x30));
        assert_eq!(contexts.count(), 0);
    }

    #[test]
    fn only_who_takes_the_drained_context_away_waits_for_the_drain() {
        let contexts = Contexts::new(0);
        contexts.created(0x20 as Ptr);
        contexts.created(0x30 as Ptr);
        contexts.lock().draining = Some(Which::Created(0x20));
        // This one would hang, or take the patience of the other.
        drop(contexts.destroying(0x30 as Ptr));
        thread::scope(|scope| {
            let (gone_tx, gone_rx) = mpsc::channel();
            let (contexts, all) = (&contexts, gone_rx);
            scope.spawn(move || {
                drop(contexts.destroying(0x20 as Ptr));
                gone_tx.send(()).unwrap();
            });
            while contexts.lock().leaving == 0 {
                thread::yield_now();
            }
            assert!(all.try_recv().is_err(), "a context was taken away from under the drain");
            contexts.lock().draining = None;
            contexts.changed.notify_all();
            all.recv().unwrap();
        });
        drop(contexts.nobody_leaving());
    }
}
