//! Every hooked function before a driver that has them all: arguments arrive, and work waits at a closed gate.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]
#![expect(clippy::print_stdout, reason = "figures for whoever reads the tests; a body answers its test")]

mod table_driver;

use std::{
    io::{BufRead as _, BufReader, Lines, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{atomic::Ordering, mpsc},
    thread,
    time::Duration,
};

use nvshare_tests::{
    ScriptedAgent,
    api::{Function, entry_points, functions},
    cuda::{Cuda, owner},
    program::{passed, role},
    wait_until,
};
use nvshare_wire::{AgentMessage, ClientMessage, DrainOutcome};
use table_driver::{Arguments, Cell, calls, folder, result, shimmed};

/// The stream that the driver says is being captured.
const CAPTURING: u64 = 0xca;
/// A stream that is not.
const STREAM: u64 = 0x5000;
const GPU: [u8; 16] = [0xab; 16];
const PATIENCE: Duration = Duration::from_secs(30);

fn work() -> Vec<Function> {
    functions().into_iter().filter(Function::is_work).collect()
}

fn nobody() -> &'static Path {
    Path::new("/nonexistent")
}

fn unchanged(_: char, _: &mut u64, _: &mut Cell) {}

fn retain(cuda: &Cuda) {
    let mut context = 0_usize;
    // SAFETY: the type is that of the function.
    let code = unsafe {
        let retain: extern "C" fn(*mut usize, i32) -> i32 =
            std::mem::transmute(cuda.symbol("cuDevicePrimaryCtxRetain"));
        retain(&raw mut context, 0)
    };
    assert_eq!(code, 0);
}

/// C4, and more: not only the names with several ABIs.
#[test]
fn every_wrapper_hands_its_own_function_all_arguments_as_they_came() {
    const TEST: &str = "every_wrapper_hands_its_own_function_all_arguments_as_they_came";
    if role().is_none() {
        passed(&shimmed(TEST, "main", nobody()).output().unwrap());
        return;
    }
    let cuda = Cuda::load();
    // What allocates, frees or tells memory is not handed on one to one; shim/tests/memory*.rs are about that.
    let handed_on = |function: &Function| {
        matches!(function.group, "work" | "wait" | "capture" | "context")
            || function.symbol.starts_with("cuGraphAddNode")
    };
    let mut checked = 0;
    for function in functions().iter().filter(|function| function.hooked && handed_on(function)) {
        let point = entry_points().into_iter().find(|point| point.symbol == function.symbol).unwrap();
        let given = cuda.look_up(point.name, point.version, if point.per_thread { 2 } else { 0 });
        assert_eq!(owner(given), format!("libnvshare.so {}", function.symbol));
        assert_eq!(given, cuda.symbol(function.symbol), "{point:?}");
        let arguments = Arguments::new(function, STREAM, unchanged);
        let before = calls(&cuda, function.symbol).0;
        let code = arguments.call(given);
        let (after, words) = calls(&cuda, function.symbol);
        assert_eq!(after, before + 1, "calls of {}", function.symbol);
        assert!(
            arguments.arrived(&words),
            "{}: sent {:x?}, came {words:x?}",
            function.symbol,
            arguments.words
        );
        let expected =
            if function.symbol == "cuDevicePrimaryCtxRetain" || function.symbol == "cuCtxSynchronize" {
                0
            } else {
                result(&cuda, function.symbol)
            };
        assert_eq!(code, expected, "the result of {}", function.symbol);
        checked += 1;
    }
    assert!(checked > 200, "only {checked} functions");
}

/// C5 and C6.
#[test]
fn what_is_newer_or_asked_for_by_its_full_name_is_recognised_by_what_the_driver_answers() {
    const TEST: &str = "what_is_newer_or_asked_for_by_its_full_name_is_recognised_by_what_the_driver_answers";
    if role().is_none() {
        passed(&shimmed(TEST, "main", nobody()).env("FAKE_SUFFIXES", "1").output().unwrap());
        return;
    }
    let cuda = Cuda::load();
    for function in functions() {
        let point = entry_points().into_iter().find(|point| point.symbol == function.symbol).unwrap();
        for name in [point.name, function.symbol] {
            assert_eq!(owner(cuda.look_up(name, 21000, 0)), "libcuda.so.1 fake_newer", "{name} at 21000");
        }
        let file = if function.hooked { "libnvshare.so" } else { "libcuda.so.1" };
        let full = owner(cuda.look_up(function.symbol, 13050, 0));
        // A full name that is also the short one of other functions means whatever the version makes of it.
        if entry_points().iter().all(|point| point.name != function.symbol) {
            assert_eq!(full, format!("{file} {}", function.symbol));
        }
    }
    assert_eq!(cuda.query("", 0, 0).1, std::ptr::null_mut());
}

#[test]
fn a_look_up_that_the_driver_refuses_leaves_what_the_program_had_there() {
    const TEST: &str = "a_look_up_that_the_driver_refuses_leaves_what_the_program_had_there";
    if role().is_none() {
        passed(&shimmed(TEST, "main", nobody()).output().unwrap());
        return;
    }
    let cuda = Cuda::load();
    // SAFETY: the types are those of the driver's functions.
    unsafe {
        let address: extern "C" fn(*const i8) -> usize = std::mem::transmute(cuda.symbol("fake_address"));
        let real = address(c"cuLaunchKernel".as_ptr().cast());
        let get: extern "C" fn(*const i8, *mut usize, i32, u64, *mut u32) -> i32 =
            std::mem::transmute(cuda.symbol("cuGetProcAddress_v2"));
        // A version above the driver's.
        let (mut place, mut status) = (real, 77);
        assert_eq!(get(c"cuLaunchKernel".as_ptr().cast(), &raw mut place, 99000, 0, &raw mut status), 1);
        assert_eq!((place, status), (real, 77));
    }
}

/// C12, and a driver function that submits through another one.
#[test]
fn a_driver_that_looks_up_and_calls_its_own_functions_through_the_loader_does_not_hang() {
    const TEST: &str = "a_driver_that_looks_up_and_calls_its_own_functions_through_the_loader_does_not_hang";
    if role().is_none() {
        let mut command = shimmed(TEST, "main", nobody());
        passed(&command.env("FAKE_REENTRANT", "1").output().unwrap());
        return;
    }
    let (done, ended) = mpsc::channel();
    thread::spawn(move || {
        let cuda = Cuda::load();
        // SAFETY: the types are those of the functions.
        unsafe {
            let init: extern "C" fn(u32) -> i32 = std::mem::transmute(cuda.look_up("cuInit", 2000, 0));
            assert_eq!(init(0), 0);
            let launch: extern "C" fn(usize, usize) -> i32 =
                std::mem::transmute(cuda.look_up("cuGraphLaunch", 10000, 0));
            launch(0, 0);
        }
        let counts = ["cuInit", "cuDevicePrimaryCtxRetain", "cuGraphLaunch", "cuLaunchKernel"];
        done.send(counts.map(|symbol| calls(&cuda, symbol).0)).unwrap();
    });
    assert_eq!(ended.recv_timeout(PATIENCE), Ok([2, 1, 1, 1]), "the driver's own call did not return");
}

/// C10.
#[test]
fn the_drivers_versioned_file_alone_is_enough() {
    const TEST: &str = "the_drivers_versioned_file_alone_is_enough";
    if role().is_none() {
        assert!(folder().join("libcuda.so.1").exists() && !folder().join("libcuda.so").exists());
        passed(&shimmed(TEST, "main", nobody()).output().unwrap());
        return;
    }
    let cuda = Cuda::load();
    let function = *work().iter().find(|function| function.symbol == "cuLaunchKernel").unwrap();
    let arguments = Arguments::new(&function, STREAM, unchanged);
    assert_eq!(arguments.call(cuda.symbol("cuLaunchKernel")), result(&cuda, "cuLaunchKernel"));
    assert_eq!(calls(&cuda, "cuLaunchKernel").0, 1);
}

/// A program under the shim with an agent that the test plays.
struct Session {
    agent: ScriptedAgent,
    child: Child,
    orders: ChildStdin,
    lines: mpsc::Receiver<String>,
    _home: tempfile::TempDir,
}

fn lines(from: ChildStdout) -> mpsc::Receiver<String> {
    let (send, receive) = mpsc::channel();
    let lines: Lines<_> = BufReader::new(from).lines();
    thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(send.send(line))));
    receive
}

impl Session {
    /// Starts a body that retains a context, says `ready`, and takes orders from its standard input.
    fn start(test: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut agent = ScriptedAgent::new(home.path(), "run");
        let mut command: Command = shimmed(test, "main", agent.dir());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        let orders = child.stdin.take().unwrap();
        let (hello, has_page) = agent.accept();
        assert!(matches!(hello, ClientMessage::Hello { .. }) && has_page, "{hello:?}");
        agent.send(&AgentMessage::Welcome { client: 1, silence_ms: 600_000 });
        assert_eq!(agent.receive(), ClientMessage::UseGpu { slot: 0, gpu: GPU });
        let mut session = Self { agent, child, orders, lines, _home: home };
        session.hear("ready");
        session
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    /// Waits for a line that begins like this; what follows.
    fn hear(&mut self, beginning: &str) -> String {
        loop {
            let line =
                self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("never heard {beginning:?}"));
            // The test harness of the body writes to the same output.
            if let Some((_, rest)) = line.split_once(beginning) {
                return rest.trim().to_owned();
            }
            assert!(!line.contains("panicked"), "{line}");
        }
    }

    fn close(&mut self) {
        self.agent.send(&AgentMessage::Revoke { gpu: GPU, epoch: 1, drain_ms: 20_000, shortfall: 0 });
        let answer = self.agent.receive();
        assert!(
            matches!(answer, ClientMessage::Revoked { epoch: 1, outcome: DrainOutcome::Drained, .. }),
            "{answer:?}"
        );
    }

    fn open(&mut self) {
        self.agent.send(&AgentMessage::Grant { gpu: GPU, epoch: 2, prefetch: 0 });
    }

    /// Waits until so many threads wait at the gate.
    fn waiting(&mut self, threads: u32) {
        let mut last = 0;
        while last != threads {
            match self.agent.try_receive() {
                Ok(ClientMessage::Waiting { gpu: GPU, threads }) => last = threads,
                Ok(other) => panic!("{other:?}"),
                Err(error) => panic!(
                    "{last} threads wait, not {threads} ({error}); the body said: {:?}",
                    self.lines.try_iter().collect::<Vec<_>>()
                ),
            }
        }
    }

    fn ends_well(mut self) {
        drop(self.orders);
        assert!(self.child.wait().unwrap().success(), "{:?}", self.lines.try_iter().collect::<Vec<_>>());
    }
}

/// The body's side: a context, and orders.
fn obey(mut order: impl FnMut(&Cuda, &str)) {
    let cuda = Cuda::load();
    retain(&cuda);
    println!("\nready");
    for line in std::io::stdin().lock().lines() {
        order(&cuda, &line.unwrap());
    }
}

/// C28.
#[test]
fn every_call_that_submits_work_waits_at_a_closed_gate_and_then_reaches_the_driver_once() {
    const TEST: &str = "every_call_that_submits_work_waits_at_a_closed_gate_and_then_reaches_the_driver_once";
    let work = work();
    if role().is_none() {
        assert!(work.len() > 150, "{}", work.len());
        let mut session = Session::start(TEST);
        session.close();
        session.tell("submit");
        session.waiting(work.len() as u32);
        session.tell("count");
        assert_eq!(session.hear("submitted "), "[]", "reached the driver through a closed gate");
        session.open();
        session.tell("join");
        assert_eq!(session.hear("all "), format!("{} arrived", work.len()));
        println!("{} functions wait at a closed gate", work.len());
        return session.ends_well();
    }
    let mut threads = Vec::new();
    obey(|cuda, order| match order {
        "submit" => {
            for function in work.clone() {
                let (wrapper, arguments) =
                    (cuda.symbol(function.symbol) as usize, Arguments::new(&function, STREAM, unchanged));
                threads.push(thread::spawn(move || {
                    let code = arguments.call(wrapper as *mut _);
                    println!("{} has returned", function.symbol);
                    (function, arguments, code)
                }));
            }
        }
        "count" => {
            let submitted: Vec<_> =
                work.iter().filter(|function| calls(cuda, function.symbol).0 > 0).collect();
            println!("submitted {submitted:?}");
        }
        _ => {
            let joined = threads.drain(..).map(|thread| thread.join().unwrap());
            let arrived = joined.filter(|(function, arguments, code)| {
                let (count, words) = calls(cuda, function.symbol);
                assert_eq!((count, *code), (1, result(cuda, function.symbol)), "{}", function.symbol);
                assert!(
                    arguments.arrived(&words),
                    "{}: {:x?} came as {words:x?}",
                    function.symbol,
                    arguments.words
                );
                true
            });
            println!("all {} arrived", arrived.count());
        }
    });
}

/// Copies between addresses that may both be host memory, and descriptions of copies with the places of their two kinds.
fn between_hosts(function: &Function) -> Option<Arguments> {
    let described = |from: usize, to: usize| {
        // Kind 1: host memory.
        Arguments::new(function, STREAM, move |letter, _, cell| {
            if letter == 'p' {
                cell.0[from / 8] = 1;
                cell.0[to / 8] = 1;
            }
        })
    };
    match function.symbol.split('_').next().unwrap() {
        "cuMemcpy" | "cuMemcpyAsync" | "cuMemcpyWithAttributesAsync" => {
            Some(Arguments::new(function, STREAM, |letter, word, _| {
                if letter == 'd' {
                    *word = 0x4000_0000_0000 | (*word & 0xffff);
                }
            }))
        }
        // The first ABI describes a copy with 32-bit fields.
        _ if matches!(
            function.symbol,
            "cuMemcpy2D" | "cuMemcpy2DAsync" | "cuMemcpy2DUnaligned" | "cuMemcpy3D" | "cuMemcpy3DAsync"
        ) =>
        {
            None
        }
        "cuMemcpy2D" | "cuMemcpy2DAsync" | "cuMemcpy2DUnaligned" => Some(described(16, 72)),
        "cuMemcpy3D" | "cuMemcpy3DAsync" | "cuMemcpy3DPeer" | "cuMemcpy3DPeerAsync" => {
            Some(described(32, 120))
        }
        _ => None,
    }
}

/// C34.
#[test]
fn captured_work_and_copies_between_hosts_pass_a_closed_gate() {
    const TEST: &str = "captured_work_and_copies_between_hosts_pass_a_closed_gate";
    let captured = |function: &Function| function.arguments.contains(['s', 'c']);
    if role().is_none() {
        let mut session = Session::start(TEST);
        session.close();
        for (order, at_least) in [("captured", 100), ("between hosts", 20)] {
            session.tell(order);
            let passed: usize = session.hear("passed ").parse().unwrap();
            assert!(passed >= at_least, "only {passed} {order}");
        }
        // The gate was closed all the time: other work waits.
        session.tell("other");
        session.waiting(1);
        session.open();
        session.hear("other has returned");
        return session.ends_well();
    }
    obey(|cuda, order| {
        let pass = |function: &Function, arguments: &Arguments| {
            let before = calls(cuda, function.symbol).0;
            assert_eq!(arguments.call(cuda.symbol(function.symbol)), result(cuda, function.symbol));
            let (after, words) = calls(cuda, function.symbol);
            assert!(after == before + 1 && arguments.arrived(&words), "{}", function.symbol);
        };
        let work = work();
        match order {
            "captured" => {
                let captured = work.iter().filter(|function| captured(function));
                let passed = captured
                    .inspect(|function| pass(function, &Arguments::new(function, CAPTURING, unchanged)));
                println!("passed {}", passed.count());
            }
            "between hosts" => {
                let copies = work.iter().filter_map(|function| Some((function, between_hosts(function)?)));
                println!(
                    "passed {}",
                    copies.inspect(|(function, arguments)| pass(function, arguments)).count()
                );
            }
            _ => {
                let function = work.iter().find(|function| function.symbol == "cuMemcpy").unwrap();
                pass(function, &Arguments::new(function, STREAM, unchanged));
                println!("other has returned");
            }
        }
    });
}

/// C29.
#[test]
fn a_program_that_only_launches_graphs_or_by_configuration_asks_for_its_turn_and_is_seen_working() {
    const TEST: &str =
        "a_program_that_only_launches_graphs_or_by_configuration_asks_for_its_turn_and_is_seen_working";
    const ONLY: [&str; 4] =
        ["cuGraphLaunch", "cuGraphLaunch_ptsz", "cuLaunchKernelEx", "cuLaunchKernelEx_ptsz"];
    if role().is_some() {
        return obey(|cuda, order| {
            let (symbol, count) = order.split_once(' ').unwrap();
            let function = *work().iter().find(|function| function.symbol == symbol).unwrap();
            let arguments = Arguments::new(&function, STREAM, unchanged);
            let wrapper = cuda.symbol(symbol);
            for _ in 0..count.parse().unwrap() {
                assert_eq!(arguments.call(wrapper), result(cuda, symbol));
            }
            println!("{symbol} has returned");
        });
    }
    for symbol in ONLY {
        let mut session = Session::start(TEST);
        let page = &session.agent.page().gpu[0];
        let (calls, active) =
            (|| page.calls.load(Ordering::SeqCst), || page.active_ns.load(Ordering::SeqCst));
        session.close();
        assert_eq!(calls(), 0);
        session.tell(&format!("{symbol} 1"));
        session.waiting(1);
        session.open();
        session.hear(&format!("{symbol} has returned"));
        // Each further round is seen as activity of its own, and every call is counted.
        let mut expected = 1;
        for _ in 0..3 {
            let before = active();
            session.tell(&format!("{symbol} 1000"));
            session.hear(&format!("{symbol} has returned"));
            expected += 1000;
            let seen = wait_until("the calls on the page", PATIENCE, || {
                Ok((calls() == expected && active() > before).then_some(()))
            });
            seen.unwrap_or_else(|_| panic!("{symbol}: {} calls, active at {}", calls(), active()));
        }
        session.ends_well();
    }
}
