//! A program's whole life under the shim: how it starts, forks and ends, and what fails around it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking; helpers outside test functions do too")]

#[path = "lifecycle/descriptors.rs"]
mod descriptors;
#[path = "lifecycle/failures.rs"]
mod failures;
#[path = "lifecycle/forks.rs"]
mod forks;
#[path = "lifecycle/vanishing.rs"]
mod vanishing;

use std::{ffi::c_int, os::unix::process::ExitStatusExt as _, sync::OnceLock, thread};

use nvshare_tests::{
    Cuda, ScriptedAgent, call,
    program::{Host, Running, orders, role, say},
};
use nvshare_wire::DrainOutcome;

const MIB: usize = 1 << 20;

/// Computes something on the GPU whose result is known.
fn compute(cuda: &Cuda) {
    let words = MIB as u64;
    let (block, sum) = (cuda.allocate(words as usize * 4), cuda.allocate(8));
    assert_eq!(cuda.launch("fill", 0, &[block, words, 3]), 0);
    assert_eq!(cuda.launch("checksum", 0, &[block, words * 4, sum]), 0);
    assert_eq!(cuda.read(sum, 2), [3 << 20, 0]);
    for address in [block, sum] {
        assert_eq!(call!(cuda, "cuMemFree" 3020, address => u64), 0);
    }
}

fn run(host: &Host, test: &str, agent: &ScriptedAgent) -> Running {
    Running::start(&mut host.shimmed(test, "main", agent.dir()), host.home())
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn nothing_of_ours_begins_before_the_program_has_a_context() {
    let name = "nothing_of_ours_begins_before_the_program_has_a_context";
    if role().is_some() {
        let cuda = Cuda::load();
        // What no call of the program's has done yet, no look-up of ours may have.
        let mut device = 0;
        let code = call!(cuda, "cuDeviceGet" 2000, &raw mut device => *mut i32, 0 => i32);
        let before = threads();
        assert_eq!(call!(cuda, "cuInit" 2000, 0 => u32), 0);
        say(format!("{code}, {before} threads, {} then", threads()));
        compute(&Cuda::open());
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    let mut alone = Running::start(&mut host.program(name, "main"), host.home());
    let expected = alone.hear();
    alone.finish();
    assert!(expected.starts_with("3, "), "initialised before cuInit: {expected}");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    assert_eq!(program.hear(), expected);
    agent.greet();
    program.finish();
}

#[test]
fn an_exit_handler_that_launches_ends_although_the_gate_is_closed_and_the_agent_mute() {
    static AT_EXIT: OnceLock<(Cuda, usize)> = OnceLock::new();
    extern "C" fn launch() {
        // The simulated driver's part of this thread is gone already.
        let launched = thread::spawn(|| {
            let (cuda, context) = AT_EXIT.get().unwrap();
            cuda.set_context(*context);
            (cuda.launch("spin", 0, &[1000]), cuda.synchronize(0))
        });
        say(format!("launched {:?}", launched.join().unwrap()));
    }
    let name = "an_exit_handler_that_launches_ends_although_the_gate_is_closed_and_the_agent_mute";
    if role().is_some() {
        let (cuda, _) = AT_EXIT.get_or_init(|| {
            let cuda = Cuda::open();
            let context = cuda.context();
            (cuda, context)
        });
        compute(cuda);
        // SAFETY: the handler is of this program.
        assert_eq!(unsafe { libc::atexit(launch) }, 0);
        say("ready");
        assert_eq!(orders().next().unwrap(), "exit");
        std::process::exit(5);
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    let gpu = agent.greet_for(300);
    assert_eq!(program.hear(), "ready");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    // From here on the agent says nothing.
    assert_eq!(program.ask("exit"), "launched (0, 0)");
    assert_eq!(program.end().code(), Some(5));
}

#[test]
fn a_program_ends_as_it_wants_to_while_its_threads_wait_at_the_gate() {
    let name = "a_program_ends_as_it_wants_to_while_its_threads_wait_at_the_gate";
    if role().is_some() {
        let cuda: &Cuda = Box::leak(Box::new(Cuda::open()));
        compute(cuda);
        let context = cuda.context();
        say("ready");
        for order in orders() {
            let end: c_int = match order.as_str() {
                "wait" => {
                    thread::spawn(move || {
                        cuda.set_context(context);
                        cuda.launch("spin", 0, &[1000])
                    });
                    continue;
                }
                "abort" => std::process::abort(),
                code => code.parse().unwrap(),
            };
            // SAFETY: ends the process.
            unsafe { libc::_exit(end) };
        }
        return;
    }
    let host = Host::new("256MiB");
    for (nth, end) in ["7", "abort"].into_iter().enumerate() {
        let mut agent = ScriptedAgent::new(host.home(), &format!("run-{nth}"));
        let mut program = run(&host, name, &agent);
        let gpu = agent.greet();
        assert_eq!(program.hear(), "ready");
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        for threads in 1..=3 {
            program.tell("wait");
            agent.await_waiting(threads);
        }
        program.tell(end);
        let status = program.end();
        assert!(status.code() == Some(7) || status.signal() == Some(libc::SIGABRT), "{status}");
    }
}
