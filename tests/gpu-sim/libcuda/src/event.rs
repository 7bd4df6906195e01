//! Events: a mark in a stream, with the time at which the stream passed it.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use crate::{
    abi::{CAPTURED_EVENT, Handle, INVALID_HANDLE, INVALID_VALUE, NOT_READY, Out, Outcome},
    context,
    entry::{driver_api, stream_api},
    graph,
    graph::{Capture, NodeId},
    launch::Operation,
    registry::{Registry, lock},
    stream::{Flavour, Point, resolve},
};

/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;

#[derive(Default)]
enum Recorded {
    #[default]
    Never,
    InStream(Point),
    /// Recorded while a stream was capturing: the nodes it stands for.
    InCapture(Arc<Capture>, Vec<NodeId>),
}

pub(crate) struct Event {
    flags: u32,
    recorded: Mutex<Recorded>,
    passed: Mutex<Option<Instant>>,
}

pub(crate) static EVENTS: Registry<Event> = Registry::new();

impl Event {
    /// The stream has come to this event.
    pub(crate) fn pass(&self) {
        *lock(&self.passed) = Some(Instant::now());
    }

    fn point(&self) -> Outcome<Option<Point>> {
        match &*lock(&self.recorded) {
            Recorded::Never => Ok(None),
            Recorded::InStream(point) => Ok(Some(point.clone())),
            Recorded::InCapture(..) => Err(CAPTURED_EVENT),
        }
    }
}

fn record(event: Handle, stream: Handle, flavour: Flavour) -> Outcome {
    let event = EVENTS.get(event)?;
    let stream = resolve(stream, flavour)?;
    if let Some(capture) = stream.capture() {
        let tails = capture.tails(&stream)?;
        *lock(&event.recorded) = Recorded::InCapture(capture, tails);
        return Ok(());
    }
    // The mark is stored before the worker can pass it only if it is stored under the event's own lock.
    let mut recorded = lock(&event.recorded);
    let point = stream.submit(Operation::Record(Arc::clone(&event)), Vec::new())?;
    *recorded = Recorded::InStream(point);
    Ok(())
}

fn elapsed(milliseconds: Out<f32>, start: Handle, end: Handle) -> Outcome {
    context::current()?;
    let mut times = Vec::new();
    for handle in [start, end] {
        let event = EVENTS.get(handle)?;
        if event.flags & DISABLE_TIMING != 0 {
            return Err(INVALID_HANDLE);
        }
        match event.point()? {
            None => return Err(INVALID_HANDLE),
            Some(point) if !point.is_done() => return Err(NOT_READY),
            Some(_) => {}
        }
        times.push(lock(&event.passed).ok_or(NOT_READY)?);
    }
    let millis = if times[1] >= times[0] {
        (times[1] - times[0]).as_secs_f64() * 1e3
    } else {
        -(times[0] - times[1]).as_secs_f64() * 1e3
    };
    milliseconds.set(millis as f32)
}

driver_api! {
    fn cuEventCreate(out: Out<Handle>, flags: u32) {
        context::current()?;
        if out.is_null() {
            return Err(INVALID_VALUE);
        }
        let event = Event { flags, recorded: Mutex::default(), passed: Mutex::new(None) };
        out.set(EVENTS.insert(Arc::new(event)))
    }

    fn cuEventQuery(event: Handle) {
        match EVENTS.get(event)?.point()? {
            Some(point) if !point.is_done() => Err(NOT_READY),
            Some(point) => point.stream.context()?.check(),
            None => Ok(()),
        }
    }

    fn cuEventSynchronize(event: Handle) {
        match EVENTS.get(event)?.point()? {
            Some(point) => {
                point.wait();
                point.stream.context()?.check()
            }
            None => Ok(()),
        }
    }

    fn cuEventDestroy(event: Handle) {
        EVENTS.remove(event).map(drop)
    }

    fn cuEventDestroy_v2(event: Handle) {
        EVENTS.remove(event).map(drop)
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) {
        elapsed(milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) {
        elapsed(milliseconds, start, end)
    }
}

stream_api! {
    fn cuEventRecord | cuEventRecord_ptsz(flavour; event: Handle, stream: Handle) {
        record(event, stream, flavour)
    }

    fn cuEventRecordWithFlags | cuEventRecordWithFlags_ptsz(flavour; event: Handle, stream: Handle, _flags: u32) {
        record(event, stream, flavour)
    }

    fn cuStreamWaitEvent | cuStreamWaitEvent_ptsz(flavour; stream: Handle, event: Handle, _flags: u32) {
        let stream = resolve(stream, flavour)?;
        let event = EVENTS.get(event)?;
        let recorded = lock(&event.recorded);
        match (&*recorded, stream.capture()) {
            (Recorded::InCapture(capture, nodes), _) => capture.join(&stream, nodes),
            (Recorded::Never, _) => Ok(()),
            (Recorded::InStream(_), Some(capture)) => {
                capture.invalidate();
                Err(graph::ISOLATION)
            }
            (Recorded::InStream(point), None) => {
                stream.submit(Operation::Nothing, vec![point.clone()]).map(drop)
            }
        }
    }
}
