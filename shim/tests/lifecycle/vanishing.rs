//! The agent goes at every step of the exchange, and comes back.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    thread,
};

use nvshare_tests::{
    Cuda, ScriptedAgent,
    program::{Host, Running, orders, role, say},
};
use nvshare_wire::{AgentMessage, DrainOutcome};

use super::{compute, run};

const WELCOME: AgentMessage = AgentMessage::Welcome { client: 1, silence_ms: 600_000 };
/// Long enough that an agent can go while it is waited for.
const LONG_NS: u64 = 300_000_000;

/// What the agent does with a client before it goes, by name.
type Step = (&'static str, fn(&mut ScriptedAgent, &mut Running));

const STEPS: &[Step] = &[
    ("connected", |agent, _| agent.connect()),
    ("heard the greeting", |agent, _| {
        agent.accept();
    }),
    ("welcomed", |agent, _| {
        agent.accept();
        agent.send(&WELCOME);
    }),
    ("heard of the GPU", |agent, _| {
        agent.greet();
    }),
    ("revoked", |agent, _| {
        let gpu = agent.greet();
        agent.revoke(gpu, 20_000);
    }),
    ("been waiting for a drain", |agent, program| {
        let gpu = agent.greet();
        assert_eq!(program.ask("long"), "launched");
        assert_eq!(program.ask("press"), "presses");
        agent.revoke(gpu, 20_000);
        // Somebody waits at the gate, so it is closed, and the long kernel is being waited for.
        agent.await_waiting(1);
    }),
    ("heard of the drain", |agent, _| {
        let gpu = agent.greet();
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    }),
    ("heard of a thread at the gate", |agent, program| {
        let gpu = agent.greet();
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        assert_eq!(program.ask("press"), "presses");
        agent.await_waiting(1);
    }),
    ("granted", |agent, program| {
        let gpu = agent.greet();
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        assert_eq!(program.ask("press"), "presses");
        agent.await_waiting(1);
        agent.grant(gpu);
    }),
    ("heard that work goes on", |agent, _| {
        let gpu = agent.greet();
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        agent.give(gpu);
    }),
];

/// A program that adds to a word on the GPU, and looks whether it got the sum.
fn adding(cuda: &Cuda) {
    let (stream, word, context) = (cuda.stream(1), cuda.allocate(4096), cuda.context());
    cuda.write(word, &[0]);
    let add = |ns| assert_eq!(cuda.launch("sweep", stream, &[word, 4096, ns, 1]), 0);
    let pressing = AtomicBool::new(false);
    let added = AtomicU32::new(0);
    thread::scope(|scope| {
        for order in orders() {
            match order.as_str() {
                "long" => {
                    add(LONG_NS);
                    added.fetch_add(1, SeqCst);
                    say("launched");
                }
                "press" => {
                    pressing.store(true, SeqCst);
                    scope.spawn(|| {
                        cuda.set_context(context);
                        while pressing.load(SeqCst) {
                            add(1000);
                            added.fetch_add(1, SeqCst);
                            assert_eq!(cuda.synchronize(stream), 0);
                        }
                        say("pressed");
                    });
                    say("presses");
                }
                "stop" => pressing.store(false, SeqCst),
                "check" => {
                    compute(cuda);
                    assert_eq!(cuda.synchronize(stream), 0);
                    assert_eq!(cuda.read(word, 1), [added.load(SeqCst)]);
                    say("right");
                }
                other => panic!("{other}?"),
            }
        }
    });
}

#[test]
fn the_agent_may_go_at_every_step_and_be_there_again() {
    let name = "vanishing::the_agent_may_go_at_every_step_and_be_there_again";
    if role().is_some() {
        return adding(&Cuda::open());
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    for (step, go_so_far) in STEPS {
        go_so_far(&mut agent, &mut program);
        agent.hang_up();
        program.tell("stop");
        program.tell("check");
        let mut heard = program.hear();
        if heard == "pressed" {
            heard = program.hear();
        }
        assert_eq!(heard, "right", "after it had {step}");
    }
    // And with all that behind it, everything is as at first.
    let gpu = agent.greet();
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    program.tell("check");
    agent.await_waiting(1);
    agent.give(gpu);
    assert_eq!(program.hear(), "right");
    program.finish();
}

#[test]
fn an_agent_that_was_silent_for_too_long_is_told_that_work_runs_again() {
    let name = "vanishing::an_agent_that_was_silent_for_too_long_is_told_that_work_runs_again";
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
    let gpu = agent.greet_for(300);
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    assert_eq!(program.ask("compute"), "computed");
    // It comes as a new client, which an agent takes for one that runs.
    assert_eq!(agent.greet(), gpu);
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    agent.give(gpu);
    program.finish();
}
