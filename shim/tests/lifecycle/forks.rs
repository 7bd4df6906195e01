//! Children of `fork`, and programs started by one.

use std::{ffi::c_int, process::Command};

use nvshare_tests::{
    Cuda, ScriptedAgent,
    program::{Host, Running, orders, role, say},
};
use nvshare_wire::DrainOutcome;

use super::{compute, run, threads};

/// Runs `child` in a child; its exit code.
fn forked(child: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: the child runs what a test program may run after a fork, and ends without returning.
    unsafe {
        let id = libc::fork();
        if id == 0 {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            libc::_exit(code.unwrap_or(101));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(id, &raw mut status, 0), id);
        if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -status }
    }
}

#[test]
fn a_child_that_is_forked_after_look_ups_is_a_client_of_its_own_and_so_is_its_parent() {
    let name = "forks::a_child_that_is_forked_after_look_ups_is_a_client_of_its_own_and_so_is_its_parent";
    if role().is_some() {
        let cuda = Cuda::load();
        cuda.look_up("cuLaunchKernel", 4000, 0);
        cuda.look_up("cuMemAlloc", 3020, 0);
        let code = forked(|| {
            let cuda = Cuda::open();
            say("child");
            assert_eq!(orders().next().unwrap(), "compute");
            compute(&cuda);
            say("computed");
            0
        });
        assert_eq!(code, 0);
        let cuda = Cuda::open();
        say("parent");
        assert_eq!(orders().next().unwrap(), "compute");
        compute(&cuda);
        say("computed");
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    for who in ["child", "parent"] {
        let gpu = agent.greet();
        assert_eq!(program.hear(), who);
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        program.tell("compute");
        agent.await_waiting(1);
        agent.give(gpu);
        assert_eq!(program.hear(), "computed");
    }
    program.finish();
}

/// A call of the driver that is looked up now and made later.
macro_rules! prepared {
    ($cuda:expr, $name:literal $version:literal, $($argument:expr => $type:ty),* $(,)?) => {{
        let function = $cuda.look_up($name, $version, 0);
        // SAFETY: the types are those of cuda.h for this name at this version.
        let function = unsafe {
            std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($type),*) -> u32>(function)
        };
        // SAFETY: the arguments are values, or point to what outlives the call.
        Box::new(move || unsafe { function($($argument),*) }) as Box<dyn Fn() -> u32>
    }};
}

/// What a child will ask of the driver that its parent has initialised.
fn questions(cuda: &Cuda) -> Vec<Box<dyn Fn() -> u32>> {
    let place: *mut u64 = Box::leak(Box::new(0));
    let other: *mut u64 = Box::leak(Box::new(0));
    vec![
        prepared!(cuda, "cuInit" 2000, 0 => u32),
        prepared!(cuda, "cuDevicePrimaryCtxRetain" 7000, place => *mut u64, 0 => i32),
        prepared!(cuda, "cuCtxCreate" 3020, place => *mut u64, 0 => u32, 0 => i32),
        prepared!(cuda, "cuMemAlloc" 3020, place => *mut u64, 8 << 20 => usize),
        prepared!(cuda, "cuMemGetInfo" 3020, place => *mut u64, other => *mut u64),
        prepared!(cuda, "cuMemsetD32" 3020, 0x1000 => u64, 0 => u32, 1 => usize),
        prepared!(cuda, "cuStreamBeginCapture" 10010, 0x10 => usize, 0 => i32),
        prepared!(cuda, "cuStreamEndCapture" 10000, 0x10 => usize, place => *mut u64),
        prepared!(cuda, "cuCtxSynchronize" 2000,),
        prepared!(cuda, "cuDevicePrimaryCtxRelease" 11000, 0 => i32),
        prepared!(cuda, "cuCtxDestroy" 4000, 0x10 => usize),
    ]
}

#[test]
fn a_child_of_an_initialised_program_fails_as_without_us_and_its_parent_goes_on() {
    let name = "forks::a_child_of_an_initialised_program_fails_as_without_us_and_its_parent_goes_on";
    if role().is_some() {
        let cuda = Cuda::open();
        compute(&cuda);
        say("ready");
        let questions = questions(&cuda);
        assert_eq!(orders().next().unwrap(), "fork");
        let code = forked(|| {
            let codes: Vec<u32> = questions.iter().map(|ask| ask()).collect();
            say(format!("{codes:?}, {} threads", threads()));
            0
        });
        assert_eq!(code, 0);
        compute(&cuda);
        say("computed");
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    let mut alone = Running::start(&mut host.program(name, "main"), host.home());
    assert_eq!(alone.hear(), "ready");
    let expected = alone.ask("fork");
    assert!(!expected.contains("[0") && expected.ends_with("1 threads"), "{expected}");
    assert_eq!(alone.hear(), "computed");
    alone.finish();

    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    // The parent's gate is closed, and is none of the child's business.
    assert_eq!(program.ask("fork"), expected);
    agent.await_waiting(1);
    agent.give(gpu);
    assert_eq!(program.hear(), "computed");
    program.finish();
}

#[test]
fn a_child_that_outlives_its_parent_does_not_keep_the_session() {
    let name = "forks::a_child_that_outlives_its_parent_does_not_keep_the_session";
    if role().is_some() {
        let cuda = Cuda::open();
        compute(&cuda);
        say("ready");
        assert_eq!(orders().next().unwrap(), "fork");
        // SAFETY: the child only reads until its input ends.
        unsafe {
            if libc::fork() == 0 {
                say("child");
                assert_eq!(orders().next(), None);
                libc::_exit(0);
            }
            let mut rest = 0;
            libc::kill(libc::getpid(), libc::SIGKILL);
            libc::wait(&raw mut rest);
        }
        unreachable!("killed");
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    agent.greet();
    assert_eq!(program.hear(), "ready");
    program.tell("fork");
    assert_eq!(program.hear(), "child");
    assert!(agent.is_hung_up(), "a descriptor of the session is left in the child");
    assert!(!program.end().success());
}

#[test]
fn programs_are_started_while_the_gate_is_closed() {
    let name = "forks::programs_are_started_while_the_gate_is_closed";
    if role().is_some() {
        let cuda = Cuda::open();
        compute(&cuda);
        say("ready");
        for _ in orders() {
            // By `posix_spawn`, and by `fork` and `exec` where there is something to do in between.
            let spawned = Command::new("true").status().unwrap();
            let forked = forked(|| {
                // SAFETY: a program and its arguments, which end with a null.
                unsafe { libc::execlp(c"true".as_ptr(), c"true".as_ptr(), std::ptr::null::<i8>()) }
            });
            say(format!("{:?} {forked}", spawned.code()));
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    assert_eq!(program.ask("start"), "Some(0) 0");
    agent.give(gpu);
    program.finish();
}
