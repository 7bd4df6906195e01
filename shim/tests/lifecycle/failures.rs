//! Whatever of ours fails costs the sharing and nothing else.

use std::time::Duration;

use libc::c_long;
use nvshare_tests::{
    Cuda, ScriptedAgent, call,
    denied::{deny_everywhere, denying},
    program::{Host, Running, orders, role, say},
    wait_until,
};
use nvshare_wire::DrainOutcome;

use super::{compute, run};

const PATIENCE: Duration = Duration::from_secs(30);

/// The shim's lines in a program's log.
fn ours(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.starts_with("nvshare: ")).collect()
}

/// What is denied, by the role of the program that it is denied to.
const DENIED: &[(&str, &[c_long])] = &[
    ("memory files", &[libc::SYS_memfd_create]),
    ("socket pairs", &[libc::SYS_socketpair]),
    ("sockets", &[libc::SYS_socket]),
    ("connections", &[libc::SYS_connect]),
    ("duplicates", &[libc::SYS_fcntl]),
    ("threads", &[libc::SYS_clone, libc::SYS_clone3]),
];

#[test]
fn what_is_denied_to_us_costs_the_sharing_and_one_line() {
    let name = "failures::what_is_denied_to_us_costs_the_sharing_and_one_line";
    if let Some(denied) = role() {
        let (_, calls) = DENIED.iter().find(|(role, _)| *role == denied).unwrap();
        let cuda = Cuda::load();
        assert_eq!(call!(cuda, "cuInit" 2000, 0 => u32), 0);
        // The first context, with which the session begins, comes from a thread that may not do it; what the driver
        // itself needs, it may.
        let mut context = 0_usize;
        let place = &raw mut context as usize;
        let code = denying(
            calls,
            libc::EMFILE,
            || call!(cuda, "cuDevicePrimaryCtxRetain" 7000, place => usize, 0 => i32),
        );
        assert_eq!(code, 0);
        compute(&Cuda::open());
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    for (denied, _) in DENIED {
        let mut command = host.shimmed(name, denied, &host.home().join("nobody"));
        let program = Running::start(&mut command, host.home());
        let told = || Ok((!ours(&program.log()).is_empty()).then_some(()));
        wait_until("a line that says so", PATIENCE, told).unwrap();
        let log = program.finish();
        let lines = ours(&log);
        assert!(lines.len() == 1 && lines[0].contains("without sharing"), "{denied}: {lines:?}");
    }
}

#[test]
fn a_run_directory_that_no_socket_can_have_costs_the_sharing_and_one_line() {
    let name = "failures::a_run_directory_that_no_socket_can_have_costs_the_sharing_and_one_line";
    if role().is_some() {
        compute(&Cuda::open());
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    let too_long = host.home().join("x".repeat(150));
    let program = Running::start(&mut host.shimmed(name, "main", &too_long), host.home());
    wait_until("a line that says so", PATIENCE, || Ok(program.log().contains("too long").then_some(())))
        .unwrap();
    let log = program.finish();
    assert_eq!(ours(&log).len(), 1, "{log}");
}

#[test]
fn an_agent_that_drops_every_client_fills_no_log() {
    let name = "failures::an_agent_that_drops_every_client_fills_no_log";
    if role().is_some() {
        let cuda = Cuda::open();
        for _ in orders() {
            compute(&cuda);
            say("computed");
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    for _ in 0..6 {
        agent.greet();
        agent.hang_up();
        assert_eq!(program.ask("compute"), "computed");
    }
    let log = program.finish();
    assert_eq!(ours(&log).len(), 1, "{log}");
}

/// A program that launches when it is told to, and to whose kernel `membarrier` is unknown from the start or from an
/// order on.
fn without_membarrier(from_the_start: bool) {
    let calls = &[libc::SYS_membarrier];
    if from_the_start {
        deny_everywhere(calls, libc::ENOSYS);
    }
    let cuda = Cuda::open();
    compute(&cuda);
    say("ready");
    for order in orders() {
        if order == "deny" {
            deny_everywhere(calls, libc::EPERM);
            say("denied");
        } else {
            say(cuda.launch("spin", 0, &[1000]));
        }
    }
}

#[test]
fn without_membarrier_the_gate_closes_all_the_same() {
    let name = "failures::without_membarrier_the_gate_closes_all_the_same";
    if role().is_some() {
        return without_membarrier(true);
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    program.tell("launch");
    agent.await_waiting(1);
    agent.give(gpu);
    assert_eq!(program.hear(), "0");
    program.finish();
}

#[test]
fn a_membarrier_that_is_denied_later_is_not_taken_for_one() {
    let name = "failures::a_membarrier_that_is_denied_later_is_not_taken_for_one";
    if role().is_some() {
        return without_membarrier(false);
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program: Running = run(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    agent.give(gpu);
    assert_eq!(program.ask("deny"), "denied");
    assert_eq!(agent.take(gpu), DrainOutcome::TimedOut, "closed without a barrier");
    assert_eq!(program.ask("launch"), "0");
    // From now on every entry has its own fence.
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    program.tell("launch");
    agent.await_waiting(1);
    agent.give(gpu);
    assert_eq!(program.hear(), "0");
    program.finish();
}
