//! The gate's own memory operations under every interleaving and every outcome that the memory model allows.
//!
//! The model checks `gate/protocol.rs` as it is built into the library, with the atomics replaced. What stands for the
//! GPU is a cell: a thread inside the gate reads it, and the revoker writes it when it has found nobody inside. An order in
//! which both may happen at once, or in which what was done inside did not happen before, is a failure.
//!
//! `membarrier` makes each thread pass a full barrier at *some* moment of its running. Here it is a request that a thread
//! answers with a fence, and every place at which it may be is tried, including the one between the two operations that
//! only the compiler keeps apart.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; helpers outside test functions do too")]

#[path = "../src/gate/protocol.rs"]
#[allow(dead_code, reason = "what only the library needs")]
mod protocol;

/// What `protocol` is made of, here.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

    /// Between announcing and looking, the processor may be made to pass a barrier.
    pub(super) fn compiler_fence(_order: Ordering) {
        super::pass_barrier_at(super::Place::BetweenMarkAndLook);
    }
}

use std::{
    cell::RefCell,
    sync::atomic::{AtomicUsize as Count, Ordering as CountOrdering},
};

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering, fence},
    },
    thread,
};
use protocol::{Mark, Word};

/// The bit that sends entries to the fenced path, as in the library.
const FENCED: u32 = 2;
const FRAME: usize = 1;

/// Where in a thread's life the barrier may find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    BeforeLink,
    BeforeMark,
    BetweenMarkAndLook,
    Inside,
    Outside,
}

const PLACES: [Place; 5] =
    [Place::BeforeLink, Place::BeforeMark, Place::BetweenMarkAndLook, Place::Inside, Place::Outside];

/// A thread's part in `membarrier`.
#[derive(Debug)]
struct Barrier {
    place: Place,
    requested: AtomicU32,
    passed: AtomicU32,
}

loom::thread_local! {
    static MINE: RefCell<Option<Arc<Barrier>>> = RefCell::new(None);
}

fn pass_barrier_at(place: Place) {
    let mine = MINE.with(|mine| mine.borrow().clone());
    let Some(barrier) = mine.filter(|barrier| barrier.place == place) else { return };
    // Where it was not demanded yet, it comes at the end: the thread does not run any more.
    if barrier.requested.load(Ordering::Acquire) != 0 {
        fence(Ordering::SeqCst);
        barrier.passed.store(1, Ordering::Release);
    }
}

impl Barrier {
    fn new(place: Place) -> Self {
        Self { place, requested: AtomicU32::new(0), passed: AtomicU32::new(0) }
    }

    /// Returns when the thread has passed its barrier.
    fn demand(&self) {
        fence(Ordering::SeqCst);
        self.requested.store(1, Ordering::Release);
        while self.passed.load(Ordering::Acquire) == 0 {
            thread::yield_now();
        }
        fence(Ordering::SeqCst);
    }
}

/// One thread as the revoker sees it.
#[derive(Debug)]
struct Record {
    /// The revoker knows the mark once this is set.
    linked: AtomicUsize,
    mark: Mark,
    barrier: Option<Arc<Barrier>>,
}

#[derive(Debug)]
struct Scene {
    word: Word,
    records: Vec<Record>,
    gpu: UnsafeCell<u32>,
}

/// A thread that tries to enter so many times.
fn launcher(scene: &Scene, record: &Record, entries: usize) {
    MINE.with(|mine| mine.borrow_mut().clone_from(&record.barrier));
    pass_barrier_at(Place::BeforeLink);
    record.linked.store(1, Ordering::Release);
    for _ in 0..entries {
        pass_barrier_at(Place::BeforeMark);
        let inside = match scene.word.pass(&record.mark, FRAME) {
            Ok(()) => true,
            // The slow path, without its wait.
            Err(before) => scene.word.pass_fenced(&record.mark, FRAME, before),
        };
        if inside {
            // SAFETY: what the model is there to check.
            scene.gpu.with(|gpu| unsafe { std::ptr::read_volatile(gpu) });
            pass_barrier_at(Place::Inside);
            record.mark.set_back(0);
        }
        pass_barrier_at(Place::Outside);
    }
    if let Some(barrier) = &record.barrier {
        fence(Ordering::SeqCst);
        barrier.passed.store(1, Ordering::Release);
    }
}

fn revoker(scene: &Scene, membarrier: bool) {
    let closed = scene.word.close(|| {
        if membarrier {
            scene
                .records
                .iter()
                .filter_map(|record| record.barrier.as_ref())
                .for_each(|barrier| barrier.demand());
        }
        true
    });
    assert!(closed);
    for record in &scene.records {
        while record.linked.load(Ordering::Acquire) != 0 && record.mark.is_set() {
            thread::yield_now();
        }
    }
    // SAFETY: what the model is there to check.
    scene.gpu.with_mut(|gpu| unsafe { *gpu += 1 });
    scene.word.open();
}

/// Explores threads with barriers at these places (none: fenced entries) against one revocation, in all orders with so
/// many switches away from a thread that could go on, or in all; how many orders.
fn explore(
    places: &'static [Option<Place>],
    bits: u32,
    membarrier: bool,
    entries: usize,
    switches: Option<usize>,
) -> usize {
    static ORDERS: Count = Count::new(0);
    let before = ORDERS.load(CountOrdering::SeqCst);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = switches;
    model.check(move || {
        ORDERS.fetch_add(1, CountOrdering::SeqCst);
        let records = places.iter().map(|&place| Record {
            linked: AtomicUsize::new(0),
            mark: Mark::default(),
            barrier: place.map(|place| Arc::new(Barrier::new(place))),
        });
        let scene = Arc::new(Scene {
            word: Word(AtomicU32::new(bits)),
            records: records.collect(),
            gpu: UnsafeCell::new(0),
        });
        let launchers: Vec<_> = (0..places.len())
            .map(|nth| {
                let scene = Arc::clone(&scene);
                thread::spawn(move || launcher(&scene, &scene.records[nth], entries))
            })
            .collect();
        revoker(&scene, membarrier);
        for launcher in launchers {
            launcher.join().unwrap();
        }
    });
    ORDERS.load(CountOrdering::SeqCst) - before
}

fn one(place: Place) -> &'static [Option<Place>] {
    Box::leak(Box::new([Some(place)]))
}

#[test]
fn with_a_barrier_wherever_it_may_be_nobody_is_inside_when_the_gpu_is_given_away() {
    for place in PLACES {
        println!("barrier {place:?}: {} orders", explore(one(place), 0, true, 1, None));
        println!("the same, second entry: {} orders", explore(one(place), 0, true, 2, Some(3)));
    }
    for places in [[Place::BetweenMarkAndLook, Place::Inside], [Place::BetweenMarkAndLook; 2]] {
        let places = Box::leak(Box::new(places.map(Some)));
        println!("barriers {places:?}: {} orders", explore(places, 0, true, 1, Some(2)));
    }
}

#[test]
fn with_fenced_entries_nobody_is_inside_when_the_gpu_is_given_away() {
    println!("one thread: {} orders", explore(&[None], FENCED, false, 1, None));
    println!("the same, second entry: {} orders", explore(&[None], FENCED, false, 2, Some(3)));
    println!("two threads: {} orders", explore(&[None; 2], FENCED, false, 1, Some(2)));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_fence_and_barrier_the_model_finds_the_fault() {
    explore(&[None], 0, false, 1, None);
}
