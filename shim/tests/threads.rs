//! The gate before the fake driver: many threads at once, and threads that leave a call otherwise than by its return.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]

#[path = "preload/bench.rs"]
mod bench;

use std::{
    fs::OpenOptions,
    io::{BufRead as _, BufReader, Lines, Read as _, Write as _},
    os::fd::AsRawFd as _,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use bench::{Bench, shim};
use nvshare_tests::ScriptedAgent;
use nvshare_wire::{ClientMessage, DrainOutcome};

/// The programs of these tests.
fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| {
        let bench = Bench::new("threads");
        bench.rustc("stress", "stress", &[]);
        bench.cc("leaving", "leaving", &["-pthread", "-Wall", "-Werror"]);
        bench
    })
}

/// The driver's two words: whether the GPU is given away, and how often work came nevertheless.
fn tripwire(name: &str) -> (std::path::PathBuf, &'static [AtomicU64; 2]) {
    let path = bench().dir.join(name);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(4096).unwrap();
    // SAFETY: a shared mapping of a file of this size, for good.
    let words = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(std::ptr::null_mut(), 4096, access, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast()
    };
    (path, words)
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn no_work_reaches_the_driver_between_a_drain_and_the_next_grant() {
    const HAND_OVERS: u64 = 300;
    let seed = u64::from(std::process::id()) ^ std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut agent = ScriptedAgent::new(&bench().dir, "crowd");
    let (path, [away, violations]) = tripwire("stress.words");
    let mut command = bench().program("stress", &shim("dev"), &seed.to_string());
    command
        .arg("6")
        .env("NVSHARE_RUN_DIR", agent.dir())
        .env("FAKE_TRIPWIRE", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut gpu = agent.greet();
    for hand_over in 0..HAND_OVERS {
        // Now and then so short that it may fail.
        let hasty = random.below(8) == 0;
        agent.revoke(gpu, if hasty { 0 } else { 20_000 });
        match agent.outcome() {
            DrainOutcome::Drained => {
                away.store(1, SeqCst);
                for _ in 0..random.below(20_000) {
                    std::hint::spin_loop();
                }
                away.store(0, SeqCst);
            }
            outcome => assert!(hasty, "{outcome:?}"),
        }
        assert_eq!(
            violations.load(SeqCst),
            0,
            "work while the GPU was away, hand-over {hand_over}, seed {seed}"
        );
        match random.below(32) {
            0 => {
                agent.hang_up();
                gpu = agent.greet();
            }
            // Another revocation without a grant.
            1..4 => {}
            _ => agent.give(gpu),
        }
    }
    agent.hang_up();
    drop(child.stdin.take());
    let mut done = String::new();
    child.stdout.take().unwrap().read_to_string(&mut done).unwrap();
    assert!(child.wait().unwrap().success(), "seed {seed}");
    assert_eq!(violations.load(SeqCst), 0, "seed {seed}");
    let done: u64 = done.trim().parse().unwrap();
    assert!(done > HAND_OVERS, "only {done} calls: nothing was tried, seed {seed}");
}

/// A program whose threads do not return.
struct Leaving {
    child: Child,
    orders: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    agent: ScriptedAgent,
    gpu: [u8; 16],
}

impl Leaving {
    fn start(name: &str) -> Self {
        let mut agent = ScriptedAgent::new(&bench().dir, name);
        let mut command = bench().program("leaving", &shim("dev"), "");
        command.env("NVSHARE_RUN_DIR", agent.dir()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let orders = child.stdin.take().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let gpu = agent.greet();
        Self { child, orders, said, agent, gpu }
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.hear()
    }

    fn hear(&mut self) -> String {
        self.said.next().unwrap().unwrap()
    }

    /// The GPU can be taken away, which a thread that counts as inside would prevent.
    fn take(&mut self) {
        self.agent.revoke(self.gpu, 3_000);
        assert_eq!(self.agent.outcome(), DrainOutcome::Drained);
    }

    /// An order that comes to the gate, waits there, and is carried out when it opens.
    fn is_held_back(&mut self, order: &str) {
        self.tell(order);
        self.agent.await_waiting(1);
        self.agent.give(self.gpu);
        assert_eq!(self.hear(), "returned");
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn a_thread_that_is_cancelled_or_ends_in_the_driver_is_not_inside_any_more() {
    let mut program = Leaving::start("ends");
    for (order, said) in [("cancel", "cancelled"), ("exit", "exited"), ("cancel", "cancelled")] {
        assert_eq!(program.ask(order), said);
        program.take();
        // Nor is the thread that gets its place.
        program.is_held_back("new");
    }
}

#[test]
fn a_thread_that_jumps_out_of_the_driver_is_not_inside_when_it_comes_again() {
    let mut program = Leaving::start("jumps");
    assert_eq!(program.ask("stay"), "inside");
    assert_eq!(program.ask("jump"), "jumped");
    // Where it went, nobody can know before it calls again.
    assert_eq!(program.ask("launch"), "returned");
    program.take();
    program.is_held_back("launch");
}

#[test]
fn a_thread_that_jumps_out_of_its_wait_at_the_gate_does_not_count_as_waiting_when_the_gate_closes_again() {
    let mut program = Leaving::start("gives-up");
    program.take();
    program.tell("launch");
    program.agent.await_waiting(1);
    assert_eq!(program.ask("jump"), "jumped");
    program.agent.give(program.gpu);
    program.take();
    // The next thread that waits is the only one.
    program.tell("new");
    let threads = program.agent.await_message(|message| match message {
        ClientMessage::Waiting { threads, .. } if *threads > 0 => Some(*threads),
        _ => None,
    });
    assert_eq!(threads, 1);
    program.agent.give(program.gpu);
    assert_eq!(program.hear(), "returned");
}
