//! Stream captures under the shim: they come out as they would without it, whatever the agent asks for meanwhile.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking; helpers outside test functions do too")]

use std::thread;

use nvshare_tests::{
    Cuda, ScriptedAgent, call,
    program::{Host, Running, orders, passed, role, say},
};
use nvshare_wire::DrainOutcome;

/// `CU_STREAM_CAPTURE_MODE_*`.
const GLOBAL: i32 = 0;
const THREAD_LOCAL: i32 = 1;
const RELAXED: i32 = 2;
const MODES: [i32; 3] = [GLOBAL, THREAD_LOCAL, RELAXED];
/// `CU_STREAM_CAPTURE_STATUS_ACTIVE`.
const ACTIVE: i32 = 1;

const NON_BLOCKING: u32 = 1;
const PAGE: u64 = 4096;

fn begin(cuda: &Cuda, stream: usize, mode: i32) -> u32 {
    call!(cuda, "cuStreamBeginCapture" 10010, stream => usize, mode => i32)
}

fn status(cuda: &Cuda, stream: usize) -> i32 {
    let mut status = -1;
    assert_eq!(call!(cuda, "cuStreamIsCapturing" 10000, stream => usize, &raw mut status => *mut i32), 0);
    status
}

/// Ends the capture; its graph.
fn end(cuda: &Cuda, stream: usize) -> Result<usize, u32> {
    let mut graph = 0;
    match call!(cuda, "cuStreamEndCapture" 10000, stream => usize, &raw mut graph => *mut usize) {
        0 => Ok(graph),
        code => Err(code),
    }
}

fn run_graph(cuda: &Cuda, graph: usize, stream: usize) {
    let mut executable = 0_usize;
    let code =
        call!(cuda, "cuGraphInstantiate" 12000, &raw mut executable => *mut usize, graph => usize, 0 => u64);
    assert_eq!(code, 0);
    assert_eq!(call!(cuda, "cuGraphLaunch" 10000, executable => usize, stream => usize), 0);
    assert_eq!(cuda.synchronize(stream), 0);
}

/// Adds 1 to the first word of a block.
fn add_one(cuda: &Cuda, stream: usize, block: u64) -> u32 {
    cuda.launch("sweep", stream, &[block, PAGE, 0, 1])
}

/// The driver's calls between one and another, from its log.
fn calls_between<'a>(log: &'a str, from: &str, to: &str) -> Vec<&'a str> {
    let calls = log.lines().filter_map(|line| line.split_once("]: ")?.1.split_once(" = "));
    let names = calls.map(|(name, _)| name);
    names.skip_while(|name| !name.starts_with(from)).take_while(|name| !name.starts_with(to)).collect()
}

const LAUNCHES: usize = 5_000;

#[test]
fn five_thousand_launches_become_a_graph_in_every_mode_and_nothing_is_waited_for() {
    let name = "five_thousand_launches_become_a_graph_in_every_mode_and_nothing_is_waited_for";
    if let Some(mode) = role() {
        let cuda = Cuda::open();
        let (block, stream) = (cuda.allocate(PAGE as usize), cuda.stream(NON_BLOCKING));
        cuda.write(block, &[7]);
        assert_eq!(begin(&cuda, stream, mode.parse().unwrap()), 0);
        for _ in 0..LAUNCHES {
            assert_eq!(add_one(&cuda, stream, block), 0);
        }
        let graph = end(&cuda, stream).unwrap();
        assert_eq!(cuda.read(block, 1), [7], "captured work ran");
        run_graph(&cuda, graph, stream);
        assert_eq!(cuda.read(block, 1), [7 + LAUNCHES as u32]);
        return;
    }
    let host = Host::new("256MiB");
    for mode in MODES {
        let mut command = host.shimmed(name, &mode.to_string(), &host.home().join("nobody"));
        let log = passed(&command.env("NVSHARE_SIM_LOG", "2").output().unwrap());
        let calls = calls_between(&log, "cuStreamBeginCapture", "cuStreamEndCapture");
        let launches = calls.iter().filter(|&&name| name == "cuLaunchKernel").count();
        assert_eq!(launches, LAUNCHES, "mode {mode}");
        let mut others: Vec<_> = calls.into_iter().filter(|&name| name != "cuLaunchKernel").collect();
        others.dedup();
        // The look-ups are this program's own.
        others.retain(|name| !name.starts_with("cuGetProcAddress") && *name != "cuModuleGetFunction");
        // What it takes to know whose capture it is.
        assert_eq!(others, ["cuStreamBeginCapture_v2", "cuStreamGetCtx"], "mode {mode}");
    }
}

/// A program that captures in the mode that is its role while it does as it is told.
fn capturing_body(mode: i32) {
    let cuda = Cuda::open();
    let (block, stream) = (cuda.allocate(PAGE as usize), cuda.stream(NON_BLOCKING));
    let other = cuda.stream(NON_BLOCKING);
    cuda.write(block, &[0]);
    for order in orders() {
        match order.as_str() {
            "begin" => say(begin(&cuda, stream, mode)),
            "launch" => say(add_one(&cuda, stream, block)),
            // Work beside the capture, from a thread of its own.
            "work" => {
                let (cuda, context) = (&cuda, cuda.context());
                let work = move || {
                    cuda.set_context(context);
                    cuda.launch("spin", other, &[1000])
                };
                say(thread::scope(|scope| scope.spawn(work).join().unwrap()));
            }
            "end" => {
                assert_eq!(status(&cuda, stream), ACTIVE);
                run_graph(&cuda, end(&cuda, stream).unwrap(), stream);
                say(cuda.read(block, 1)[0]);
            }
            other => panic!("{other}?"),
        }
    }
}

#[test]
fn a_revocation_during_a_capture_is_put_off_and_the_capture_comes_out_whole() {
    let name = "a_revocation_during_a_capture_is_put_off_and_the_capture_comes_out_whole";
    if let Some(mode) = role() {
        return capturing_body(mode.parse().unwrap());
    }
    let host = Host::new("256MiB");
    for mode in MODES {
        let mut agent = ScriptedAgent::new(host.home(), &format!("mode-{mode}"));
        let mut program =
            Running::start(&mut host.shimmed(name, &mode.to_string(), agent.dir()), host.home());
        let gpu = agent.greet();
        assert_eq!(program.ask("begin"), "0");
        assert_eq!(program.ask("launch"), "0");
        for _ in 0..3 {
            assert_eq!(agent.take(gpu), DrainOutcome::Capturing, "mode {mode}");
            // The gate is open again, for the capture and for others.
            assert_eq!(program.ask("launch"), "0");
            assert_eq!(program.ask("work"), "0");
        }
        assert_eq!(program.ask("end"), "4");
        assert_eq!(agent.take(gpu), DrainOutcome::Drained, "mode {mode}");
        // No capture begins while the GPU is away: it would be in the way of whoever waits for the drain.
        program.tell("begin");
        agent.await_waiting(1);
        agent.give(gpu);
        assert_eq!(program.hear(), "0");
        assert_eq!(program.ask("launch"), "0");
        assert_eq!(program.ask("end"), "5");
        program.finish();
    }
}

#[test]
fn captures_that_go_with_their_stream_or_context_hold_up_no_later_revocation() {
    let name = "captures_that_go_with_their_stream_or_context_hold_up_no_later_revocation";
    if role().is_some() {
        let cuda = Cuda::open();
        for order in orders() {
            if order == "stream" {
                let stream = cuda.stream(NON_BLOCKING);
                assert_eq!(begin(&cuda, stream, RELAXED), 0);
                say("captures");
                assert_eq!(orders().next().unwrap(), "go");
                say(call!(cuda, "cuStreamDestroy" 4000, stream => usize));
            } else {
                let mut context = 0_usize;
                assert_eq!(
                    call!(cuda, "cuCtxCreate" 3020, &raw mut context => *mut usize, 0 => u32, 0 => i32),
                    0
                );
                assert_eq!(begin(&cuda, cuda.stream(NON_BLOCKING), RELAXED), 0);
                say("captures");
                assert_eq!(orders().next().unwrap(), "go");
                say(call!(cuda, "cuCtxDestroy" 4000, context => usize));
            }
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = Running::start(&mut host.shimmed(name, "main", agent.dir()), host.home());
    let gpu = agent.greet();
    for what in ["stream", "context"] {
        assert_eq!(program.ask(what), "captures");
        assert_eq!(agent.take(gpu), DrainOutcome::Capturing, "{what}");
        assert_eq!(program.ask("go"), "0");
        assert_eq!(agent.take(gpu), DrainOutcome::Drained, "{what}");
        agent.give(gpu);
    }
    program.finish();
}
