//! The shim as programs meet it: preloaded, before a driver of a few counting functions, with and without an agent.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]

#[path = "preload/bench.rs"]
mod bench;

use std::{
    io::{BufRead, BufReader, Lines, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::OnceLock,
};

use bench::{Bench, shim};
use nvshare_tests::ScriptedAgent;
use nvshare_wire::{AgentMessage, ClientMessage, DrainOutcome};

/// The programs of these tests.
fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| {
        let bench = Bench::new("preload");
        bench.cc("second_preload", "libsecond.so", &["-shared", "-fPIC"]);
        bench.rustc("probe", "probe", &[]);
        bench
    })
}

fn passes(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

#[test]
fn look_ups_lead_to_the_wrapper_of_that_name_version_and_flavour_and_start_nothing() {
    assert_eq!(passes(bench().program("probe", &shim("dev"), "lookups")), "");
    passes(bench().program("probe", &shim("dev"), "versioned"));
}

#[test]
fn a_program_without_cuda_is_left_alone() {
    assert_eq!(passes(bench().program("probe", &shim("dev"), "no-cuda")), "");
}

#[test]
fn a_second_preloaded_library_finds_the_next_function_in_debug_and_release_builds() {
    for profile in ["dev", "release"] {
        let shim = shim(profile);
        for order in [[&shim, &bench().dir.join("libsecond.so")], [&bench().dir.join("libsecond.so"), &shim]]
        {
            let mut command = bench().program("probe", &shim, "second");
            command.env("LD_PRELOAD", order.map(|path| path.to_str().unwrap()).join(" "));
            passes(command);
        }
    }
}

#[test]
fn memory_is_managed_above_the_threshold_counted_and_bounded_by_the_gpu() {
    let said = passes(bench().program("probe", &shim("dev"), "memory"));
    assert!(said.lines().count() <= 1, "more than one line without an agent:\n{said}");
}

#[test]
fn where_managed_memory_fails_the_call_that_the_program_made_is_made() {
    let mut command = bench().program("probe", &shim("dev"), "no-managed");
    command.env("FAKE_NO_MANAGED", "1").env("FAKE_NO_INFO", "1");
    passes(command);
}

#[test]
fn a_disabled_shim_hooks_nothing() {
    let mut command = bench().program("probe", &shim("dev"), "disabled");
    command.env("NVSHARE_DISABLE", "1");
    assert_eq!(passes(command), "");
}

/// A program under the shim that launches when it is told to.
struct Worker {
    child: Child,
    orders: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    fn start(agent: &ScriptedAgent) -> Self {
        let mut command = bench().program("probe", &shim("dev"), "work");
        command.env("NVSHARE_RUN_DIR", agent.dir()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let orders = child.stdin.take().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut worker = Self { child, orders, said };
        assert_eq!(worker.hear(), "ready");
        worker
    }
    fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }
    fn hear(&mut self) -> String {
        self.said.next().unwrap().unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

const GPU: [u8; 16] = [0xab; 16];

#[test]
fn a_revoked_program_is_drained_and_waits_until_it_is_granted_again() {
    let mut agent = ScriptedAgent::new(&bench().dir, "turns");
    let mut worker = Worker::start(&agent);
    agent.greet();
    worker.tell("0");
    assert_eq!(worker.hear(), "launched 0 3");

    agent.send(&AgentMessage::Revoke { gpu: GPU, epoch: 1, drain_ms: 20_000, shortfall: 0 });
    let answer = agent.receive();
    assert!(
        matches!(answer, ClientMessage::Revoked { gpu: GPU, epoch: 1, outcome: DrainOutcome::Drained, .. }),
        "{answer:?}"
    );
    worker.tell("0");
    assert_eq!(agent.receive(), ClientMessage::Waiting { gpu: GPU, threads: 1 });
    // Work for a capture is no work yet: it passes while the other launch waits.
    worker.tell("202");
    assert_eq!(worker.hear(), "launched 202 3");

    agent.send(&AgentMessage::Grant { gpu: GPU, epoch: 2, prefetch: 0 });
    assert_eq!(worker.hear(), "launched 0 3");
    assert_eq!(agent.receive(), ClientMessage::Resumed { gpu: GPU, epoch: 2, moved: 0, moved_ns: 0 });
}

#[test]
fn a_program_runs_on_when_its_agent_goes_away_and_joins_the_next_one() {
    let mut agent = ScriptedAgent::new(&bench().dir, "restart");
    let mut worker = Worker::start(&agent);
    agent.greet();
    agent.send(&AgentMessage::Revoke { gpu: GPU, epoch: 1, drain_ms: 20_000, shortfall: 0 });
    assert!(matches!(agent.receive(), ClientMessage::Revoked { outcome: DrainOutcome::Drained, .. }));
    worker.tell("0");
    assert!(matches!(agent.receive(), ClientMessage::Waiting { threads: 1, .. }));
    agent.hang_up();
    assert_eq!(worker.hear(), "launched 0 3");
    agent.greet();
}

#[test]
fn an_agent_that_falls_silent_holds_nobody() {
    let mut agent = ScriptedAgent::new(&bench().dir, "silent");
    let mut worker = Worker::start(&agent);
    agent.greet_for(300);
    agent.send(&AgentMessage::Revoke { gpu: GPU, epoch: 1, drain_ms: 20_000, shortfall: 0 });
    assert!(matches!(agent.receive(), ClientMessage::Revoked { .. }));
    worker.tell("0");
    assert_eq!(worker.hear(), "launched 0 3");
}

#[test]
fn a_forked_child_has_open_gates_and_no_part_in_its_parents_session() {
    let mut agent = ScriptedAgent::new(&bench().dir, "fork");
    let mut worker = Worker::start(&agent);
    agent.greet();
    agent.send(&AgentMessage::Revoke { gpu: GPU, epoch: 1, drain_ms: 20_000, shortfall: 0 });
    assert!(matches!(agent.receive(), ClientMessage::Revoked { outcome: DrainOutcome::Drained, .. }));
    worker.tell("fork");
    assert_eq!(worker.hear(), "child 7 with 1 threads");
}
