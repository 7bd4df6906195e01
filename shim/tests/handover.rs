//! Moving memory at hand-overs, under programs on the simulated GPU and an agent that does what the test says.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking; helpers outside test functions do too")]

#[path = "handover/soak.rs"]
mod soak;

use nvshare_tests::{
    Cuda, ScriptedAgent, call,
    program::{Host, Running, moved, orders, resident, role, say},
};
use nvshare_wire::{AgentMessage, ClientMessage, Direction, DrainOutcome, GpuUuid, Mover};

const MIB: u64 = 1 << 20;
/// As much as there is.
const ALL: u64 = u64::MAX;

fn program(host: &Host, test: &str, agent: &ScriptedAgent, variables: &[(&str, &str)]) -> Running {
    let mut command = host.shimmed(test, "main", agent.dir());
    Running::start(command.envs(variables.iter().copied()), host.home())
}

/// A block that was written as a whole, with words that tell it from others.
fn written(cuda: &Cuda, bytes: u64, word: u32) -> u64 {
    let block = cuda.allocate(bytes as usize);
    let code = call!(cuda, "cuMemsetD32" 3020, block => u64, word => u32, bytes as usize / 4 => usize);
    assert_eq!(code, 0);
    block
}

/// Whether a block still holds its words; read by a kernel, so on the GPU.
fn holds(cuda: &Cuda, block: u64, bytes: u64, word: u32, sum: u64) -> bool {
    assert_eq!(cuda.launch("checksum", 0, &[block, bytes, sum]), 0);
    let found = cuda.read(sum, 2);
    u64::from(found[0]) | u64::from(found[1]) << 32 == u64::from(word) * (bytes / 4)
}

/// What the client says of the end of a move.
fn end_of_move(agent: &mut ScriptedAgent, of: u64) -> (Direction, u64) {
    agent.await_message(|message| match message {
        ClientMessage::Moved { epoch, direction, moved, .. } if *epoch == of => Some((*direction, *moved)),
        _ => None,
    })
}

/// Takes the GPU away, with its memory: bytes announced.
fn take(agent: &mut ScriptedAgent, gpu: GpuUuid, shortfall: u64) -> (u64, u64) {
    let of = agent.revoke_memory(gpu, shortfall);
    let announced = agent.await_message(|message| match message {
        ClientMessage::Revoked { epoch, outcome, moved, .. } if *epoch == of => {
            assert_eq!(*outcome, DrainOutcome::Drained);
            Some(*moved)
        }
        _ => None,
    });
    (of, announced)
}

/// Gives it back: bytes announced.
fn give(agent: &mut ScriptedAgent, gpu: GpuUuid, prefetch: u64) -> (u64, u64) {
    let of = agent.grant_memory(gpu, prefetch);
    let announced = agent.await_message(|message| match message {
        ClientMessage::Resumed { epoch, moved, .. } if *epoch == of => Some(*moved),
        _ => None,
    });
    (of, announced)
}

/// A program with two blocks written as a whole and one that is large and never touched. It says what of it is resident, and what
/// was moved in and out, and checks its words.
fn three_blocks() {
    let cuda = Cuda::open();
    let sum = cuda.allocate(8);
    let untouched = cuda.allocate(64 << 20);
    let (one, two) = (written(&cuda, 24 * MIB, 7), written(&cuda, 16 * MIB, 9));
    say("ready");
    for order in orders() {
        match order.as_str() {
            "resident" => say(resident() / MIB),
            "moved" => say(format!("{:?}", moved())),
            "check" => {
                say(holds(&cuda, one, 24 * MIB, 7, sum) && holds(&cuda, two, 16 * MIB, 9, sum));
            }
            "free" => say(call!(&cuda, "cuMemFree" 3020, one => u64)),
            "again" => {
                let again = written(&cuda, 24 * MIB, 11);
                say(holds(&cuda, again, 24 * MIB, 11, sum));
            }
            "touch untouched" => {
                assert_eq!(cuda.launch("fill", 0, &[untouched, 16 * MIB, 5]), 0);
                say(cuda.synchronize(0));
            }
            other => panic!("{other}?"),
        }
    }
}

fn start(host: &Host, test: &str, variables: &[(&str, &str)]) -> (ScriptedAgent, Running, GpuUuid) {
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(host, test, &agent, variables);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    (agent, program, gpu)
}

#[test]
fn what_leaves_is_as_much_as_is_asked_for_and_comes_back_before_the_program_runs() {
    let name = "what_leaves_is_as_much_as_is_asked_for_and_comes_back_before_the_program_runs";
    if role().is_some() {
        return three_blocks();
    }
    for by in ["protected", "plain"] {
        let host = Host::new("256MiB");
        let (mut agent, mut program, gpu) = start(&host, name, &[("NVSHARE_HANDOVER", by)]);
        assert_eq!(program.ask("resident"), "40");
        for round in 1..=3 {
            let (epoch, announced) = take(&mut agent, gpu, 30 * MIB);
            assert_eq!(announced, 30 * MIB, "{by}, round {round}");
            assert_eq!(end_of_move(&mut agent, epoch), (Direction::Out, 30 * MIB));
            assert_eq!(program.ask("resident"), "10");
            let (epoch, announced) = give(&mut agent, gpu, ALL);
            assert_eq!(announced, 30 * MIB);
            assert_eq!(end_of_move(&mut agent, epoch), (Direction::In, 30 * MIB));
            assert_eq!(program.ask("resident"), "40");
            assert_eq!(program.ask("check"), "true", "{by}, round {round}");
            let total = 30 * MIB * round;
            assert_eq!(program.ask("moved"), format!("({total}, {total})"), "nothing else moved");
        }
        program.finish();
    }
}

#[test]
fn who_does_not_move_says_so_and_leaves_it_to_the_driver() {
    let name = "who_does_not_move_says_so_and_leaves_it_to_the_driver";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent, &[("NVSHARE_HANDOVER", "demand")]);
    let gpu = agent.greet();
    let by = agent.await_message(|message| match message {
        ClientMessage::Moves { by } => Some(*by),
        _ => None,
    });
    assert_eq!(by, Mover::Demand);
    assert_eq!(program.hear(), "ready");
    assert_eq!(take(&mut agent, gpu, ALL).1, 0);
    assert_eq!(program.ask("resident"), "40");
    assert_eq!(give(&mut agent, gpu, ALL).1, 0);
    assert_eq!(program.ask("check"), "true");
    program.finish();
}

#[test]
fn what_the_driver_does_best_is_proven_at_the_first_hand_over_and_told() {
    let name = "what_the_driver_does_best_is_proven_at_the_first_hand_over_and_told";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent, &[("NVSHARE_LOG", "info")]);
    let gpu = agent.greet();
    let told = |agent: &mut ScriptedAgent| {
        agent.await_message(|message| match message {
            ClientMessage::Moves { by } => Some(*by),
            _ => None,
        })
    };
    assert_eq!(told(&mut agent), Mover::Unproven);
    assert_eq!(program.hear(), "ready");
    agent.revoke_memory(gpu, ALL);
    let by = told(&mut agent);
    // Which of the two is faster by how much depends on what else the machine does.
    assert!(matches!(by, Mover::Protected | Mover::Plain), "{by:?}");
    give(&mut agent, gpu, ALL);
    assert_eq!(program.ask("check"), "true");
    let log = program.finish();
    assert!(log.contains("(right), protected in") && log.contains("(right, writable afterwards)"), "{log}");
}

#[test]
fn an_unknown_way_to_move_memory_is_named_and_the_default_holds() {
    let name = "an_unknown_way_to_move_memory_is_named_and_the_default_holds";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let (mut agent, program, gpu) = start(&host, name, &[("NVSHARE_HANDOVER", "magic")]);
    assert_ne!(take(&mut agent, gpu, ALL).1, 0);
    let log = program.finish();
    assert!(log.contains("NVSHARE_HANDOVER=magic is ignored: expected protected, plain or demand"), "{log}");
}

#[test]
fn memory_that_was_never_touched_is_moved_and_made_by_no_hand_over() {
    let name = "memory_that_was_never_touched_is_moved_and_made_by_no_hand_over";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let variables = [("NVSHARE_TEST_EVACUATE", "1"), ("NVSHARE_HANDOVER", "protected")];
    let (mut agent, mut program, gpu) = start(&host, name, &variables);
    let (epoch, announced) = take(&mut agent, gpu, 0);
    assert_eq!(announced, 40 * MIB, "all that is known to be resident");
    end_of_move(&mut agent, epoch);
    assert_eq!(program.ask("resident"), "0");
    let (epoch, _) = give(&mut agent, gpu, 0);
    end_of_move(&mut agent, epoch);
    assert_eq!(program.ask("resident"), "40");
    // The program's kernels touch it, which nobody sees: it stays.
    assert_eq!(program.ask("touch untouched"), "0");
    assert_eq!(program.ask("resident"), "104");
    let (epoch, _) = take(&mut agent, gpu, 0);
    assert_eq!(end_of_move(&mut agent, epoch), (Direction::Out, 40 * MIB));
    assert_eq!(program.ask("resident"), "64");
    program.finish();
}

#[test]
fn what_others_moved_does_not_leave_again_before_it_was_brought_back() {
    let name = "what_others_moved_does_not_leave_again_before_it_was_brought_back";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let (mut agent, mut program, gpu) = start(&host, name, &[("NVSHARE_HANDOVER", "protected")]);
    agent.send(&AgentMessage::Displaced { gpu, brought: 0, pushed: 1 });
    assert_eq!(take(&mut agent, gpu, ALL).1, 0, "nobody knows what of it is there");
    assert_eq!(program.ask("resident"), "40");
    let (epoch, announced) = give(&mut agent, gpu, ALL);
    assert_eq!(announced, 0, "nor what comes back");
    end_of_move(&mut agent, epoch);
    assert_eq!(program.ask("resident"), "40", "and what was never touched is not made by it");
    assert_eq!(take(&mut agent, gpu, ALL).1, 40 * MIB);
    give(&mut agent, gpu, ALL);
    assert_eq!(program.ask("check"), "true");
    program.finish();
}

#[test]
fn a_gate_that_opens_without_its_memory_leaves_it_to_the_driver_and_is_known_no_more() {
    let name = "a_gate_that_opens_without_its_memory_leaves_it_to_the_driver_and_is_known_no_more";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let (mut agent, mut program, gpu) = start(&host, name, &[("NVSHARE_HANDOVER", "protected")]);
    let (epoch, _) = take(&mut agent, gpu, ALL);
    end_of_move(&mut agent, epoch);
    agent.hang_up();
    let gpu = agent.greet();
    assert_eq!(program.ask("check"), "true");
    assert_eq!(program.ask("resident"), "40");
    assert_eq!(take(&mut agent, gpu, ALL).1, 0);
    give(&mut agent, gpu, ALL);
    assert_eq!(program.ask("check"), "true");
    program.finish();
}

#[test]
fn a_block_that_is_freed_while_the_gate_is_closed_is_moved_no_more() {
    let name = "a_block_that_is_freed_while_the_gate_is_closed_is_moved_no_more";
    if role().is_some() {
        return three_blocks();
    }
    let host = Host::new("256MiB");
    let (mut agent, mut program, gpu) = start(&host, name, &[("NVSHARE_HANDOVER", "protected")]);
    let (epoch, _) = take(&mut agent, gpu, ALL);
    // With the move under way or at its end: it must not matter.
    assert_eq!(program.ask("free"), "0");
    end_of_move(&mut agent, epoch);
    let (epoch, _) = give(&mut agent, gpu, ALL);
    assert_eq!(end_of_move(&mut agent, epoch), (Direction::In, 16 * MIB));
    assert_eq!(program.ask("resident"), "16");
    assert_eq!(program.ask("again"), "true");
    program.finish();
}

#[test]
fn whatever_step_of_a_move_fails_costs_the_move_and_nothing_else() {
    let name = "whatever_step_of_a_move_fails_costs_the_move_and_nothing_else";
    if role().is_some() {
        return three_blocks();
    }
    for step in ["protect", "prefetch", "wait", "host", "panic", "vanish"] {
        let host = Host::new("256MiB");
        let fail = format!("{step}:1");
        let variables = [("NVSHARE_HANDOVER", "protected"), ("NVSHARE_TEST_FAIL", &fail)];
        let (mut agent, mut program, gpu) = start(&host, name, &variables);
        for round in 0..3 {
            let (epoch, _) = take(&mut agent, gpu, ALL);
            if round == 0 {
                assert_eq!(end_of_move(&mut agent, epoch), (Direction::Out, 0), "{step}");
            }
            give(&mut agent, gpu, ALL);
            assert_eq!(program.ask("check"), "true", "{step}");
        }
        // Its memory can be written to, as before, and freed.
        assert_eq!(program.ask("free"), "0", "{step}");
        assert_eq!(program.ask("again"), "true", "{step}");
        program.finish();
    }
}

#[test]
fn a_move_that_does_not_come_back_holds_up_neither_the_answer_nor_the_gate() {
    let name = "a_move_that_does_not_come_back_holds_up_neither_the_answer_nor_the_gate";
    if role().is_some() {
        return three_blocks();
    }
    // The first window of the way out does not come back in time, or that of the way in: longer than the deadline of the drain,
    // and than a gate waits for memory.
    for (stall, slow) in [("stall:1", Direction::Out), ("stall:2", Direction::In)] {
        let host = Host::new("256MiB");
        let variables = [("NVSHARE_HANDOVER", "protected"), ("NVSHARE_TEST_FAIL", stall)];
        let (mut agent, mut program, gpu) = start(&host, name, &variables);
        let epoch = 1001;
        agent.send(&AgentMessage::Revoke { gpu, epoch, drain_ms: 300, shortfall: ALL });
        let (outcome, left) = agent.await_message(|message| match message {
            ClientMessage::Revoked { epoch: of, outcome, moved, .. } if *of == epoch => {
                Some((*outcome, *moved))
            }
            _ => None,
        });
        assert_eq!((outcome, left > 0), (DrainOutcome::Drained, slow == Direction::In));
        let epoch = 1002;
        agent.send(&AgentMessage::Grant { gpu, epoch, prefetch: ALL });
        let back = agent.await_message(|message| match message {
            ClientMessage::Resumed { epoch: of, moved, .. } if *of == epoch => Some(*moved),
            _ => None,
        });
        assert_eq!(back, 0, "{slow:?}: the gate waited for the move");
        assert_eq!(program.ask("check"), "true");
        // It comes back at last, and nothing is lost by it.
        end_of_move(&mut agent, if slow == Direction::Out { 1001 } else { 1002 });
        assert_eq!(program.ask("check"), "true");
        program.finish();
    }
}
