//! Stream captures that are open. While there is one, the GPU cannot be drained: waiting for a context would
//! break the capture.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, ThreadId},
};

use crate::abi::{Flavour, Ptr, STREAM_PER_THREAD};

/// One capture: where it began. A per-thread stream is another one in each thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capture {
    stream: usize,
    owner: Option<ThreadId>,
    begun_by: ThreadId,
    /// The stream's context, 0 if the driver does not say.
    context: usize,
}

impl Capture {
    fn of(stream: Ptr, flavour: Flavour, context: usize) -> Self {
        let stream = stream as usize;
        let mine = thread::current().id();
        let per_thread = stream == STREAM_PER_THREAD || (stream == 0 && flavour == Flavour::PerThread);
        // Both handles of the per-thread stream name the same stream.
        let stream = if per_thread { STREAM_PER_THREAD } else { stream };
        Self { stream, owner: per_thread.then_some(mine), begun_by: mine, context }
    }

    fn is_same_stream(&self, other: &Self) -> bool {
        self.stream == other.stream && self.owner == other.owner
    }
}

/// The open captures of the process.
#[derive(Debug, Default)]
pub(crate) struct Captures {
    open: Mutex<Vec<Capture>>,
    count: AtomicUsize,
}

impl Captures {
    /// A capture of this stream began, in this context if that is known.
    pub(crate) fn began(&self, stream: Ptr, flavour: Flavour, context: Option<Ptr>) {
        let capture = Capture::of(stream, flavour, context.map_or(0, |context| context as usize));
        self.change(|open| {
            open.retain(|other| !other.is_same_stream(&capture));
            open.push(capture);
        });
    }

    /// No capture of this stream is open any more.
    pub(crate) fn ended(&self, stream: Ptr, flavour: Flavour) {
        if self.any() {
            let capture = Capture::of(stream, flavour, 0);
            self.change(|open| open.retain(|other| !other.is_same_stream(&capture)));
        }
    }

    /// A context is gone, and its streams and their captures with it.
    pub(crate) fn context_gone(&self, context: usize) {
        if self.any() {
            self.change(|open| open.retain(|other| other.context == 0 || other.context != context));
        }
    }

    /// Whether any capture is open.
    pub(crate) fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    /// Whether the calling thread has begun a capture that is open.
    pub(crate) fn mine(&self) -> bool {
        let mine = thread::current().id();
        self.any()
            && self
                .open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .any(|open| open.begun_by == mine)
    }

    fn change(&self, f: impl FnOnce(&mut Vec<Capture>)) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        f(&mut open);
        self.count.store(open.len(), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_is_open_until_its_own_stream_ends_it() {
        let captures = Captures::default();
        captures.began(0x10 as Ptr, Flavour::Legacy, None);
        captures.began(0x20 as Ptr, Flavour::Legacy, None);
        captures.ended(0x10 as Ptr, Flavour::Legacy);
        captures.ended(0x30 as Ptr, Flavour::Legacy);
        assert!(captures.any());
        captures.ended(0x20 as Ptr, Flavour::Legacy);
        assert!(!captures.any());
    }

    #[test]
    fn a_per_thread_stream_is_another_one_in_each_thread() {
        let captures = Captures::default();
        captures.began(std::ptr::null_mut(), Flavour::PerThread, None);
        thread::scope(|scope| {
            scope.spawn(|| captures.ended(std::ptr::null_mut(), Flavour::PerThread));
        });
        assert!(captures.any(), "another thread's stream 0 ended this thread's capture");
        captures.ended(std::ptr::null_mut(), Flavour::Legacy);
        assert!(captures.any(), "the legacy stream ended a capture of the per-thread stream");
        captures.ended(STREAM_PER_THREAD as Ptr, Flavour::Legacy);
        assert!(!captures.any(), "both handles of the per-thread stream name the same stream");
    }

    #[test]
    fn captures_go_with_the_context_of_their_stream() {
        let captures = Captures::default();
        captures.began(0x10 as Ptr, Flavour::Legacy, Some(0xc0 as Ptr));
        captures.began(0x20 as Ptr, Flavour::Legacy, None);
        captures.context_gone(0xc1);
        captures.ended(0x20 as Ptr, Flavour::Legacy);
        assert!(captures.any());
        captures.context_gone(0xc0);
        assert!(!captures.any());
    }

    #[test]
    fn only_the_thread_that_began_a_capture_calls_it_its_own() {
        let captures = Captures::default();
        captures.began(0x10 as Ptr, Flavour::Legacy, None);
        assert!(captures.mine());
        thread::scope(|scope| {
            scope.spawn(|| assert!(!captures.mine()));
        });
    }
}
