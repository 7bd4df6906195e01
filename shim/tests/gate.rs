//! The gate and the drain under programs that run on the simulated GPU, with an agent that does what the test says.

use std::{ffi::CStr, sync::mpsc, thread};

use nvshare_tests::{
    Cuda, ScriptedAgent, SimulatorOptions, call,
    program::{Host, Running, orders, role, say},
};
use nvshare_wire::{AgentMessage, ClientMessage, DrainOutcome};

const NON_BLOCKING: u32 = 1;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;
/// Long enough that it still runs when somebody looks, short enough to be waited for.
const LONG_NS: u64 = 400_000_000;

fn program(host: &Host, test: &str, agent: &ScriptedAgent) -> Running {
    Running::start(host.shimmed(test, "main", agent.dir()).env("NVSHARE_SIM_LOG", "2"), host.home())
}

fn query(cuda: &Cuda, stream: usize) -> u32 {
    call!(cuda, "cuStreamQuery" 2000, stream => usize)
}

/// Makes a stream wait for a word of memory to become 1.
fn hold(cuda: &Cuda, stream: usize, word: u64) {
    assert_eq!(call!(cuda, "cuStreamWaitValue32" 8000, stream => usize, word => u64, 1 => u32, 1 => u32), 0);
}

/// Sets the word, through a stream that waits for nothing.
fn let_go(cuda: &Cuda, stream: usize, word: u64) {
    assert_eq!(call!(cuda, "cuStreamWriteValue32" 8000, stream => usize, word => u64, 1 => u32, 0 => u32), 0);
}

fn new_context(cuda: &Cuda, device: i32) -> usize {
    let mut context = 0;
    assert_eq!(call!(cuda, "cuCtxCreate" 3020, &raw mut context => *mut usize, 0 => u32, device => i32), 0);
    context
}

/// A built-in kernel in the current context, which need not be the one that the driver was opened with.
fn load(cuda: &Cuda, name: &CStr) -> usize {
    let (mut module, mut kernel) = (0, 0);
    let image = nvshare_tests::cuda::MODULE.as_ptr();
    assert_eq!(call!(cuda, "cuModuleLoadData" 2000, &raw mut module => *mut usize, image => *const i8), 0);
    let code = call!(cuda, "cuModuleGetFunction" 2000,
        &raw mut kernel => *mut usize, module => usize, name.as_ptr() => *const i8);
    assert_eq!(code, 0);
    kernel
}

/// Launches a kernel of [`load`].
fn launch(cuda: &Cuda, kernel: usize, stream: usize, arguments: &[u64]) -> u32 {
    let mut pointers: Vec<*const u64> = arguments.iter().map(std::ptr::from_ref).collect();
    call!(cuda, "cuLaunchKernel" 4000,
        kernel => usize, 1 => u32, 1 => u32, 1 => u32, 32 => u32, 1 => u32, 1 => u32, 0 => u32,
        stream => usize, pointers.as_mut_ptr() => *mut *const u64, std::ptr::null_mut() => *mut usize)
}

/// One context of a program, with what it takes to keep it busy.
#[derive(Clone, Copy)]
struct Place {
    context: usize,
    spin: usize,
    stream: usize,
}

impl Place {
    /// A context that the program creates.
    fn create(cuda: &Cuda, device: i32) -> Self {
        let context = new_context(cuda, device);
        Self { context, spin: load(cuda, c"spin"), stream: cuda.stream(NON_BLOCKING) }
    }

    fn work(self, cuda: &Cuda, ns: u64) -> u32 {
        cuda.set_context(self.context);
        launch(cuda, self.spin, self.stream, &[ns])
    }

    fn left(self, cuda: &Cuda) -> u32 {
        cuda.set_context(self.context);
        query(cuda, self.stream)
    }
}

#[test]
fn a_thread_that_the_driver_keeps_holds_up_no_other_and_a_drain_only_until_its_deadline() {
    let name = "a_thread_that_the_driver_keeps_holds_up_no_other_and_a_drain_only_until_its_deadline";
    if role().is_some() {
        let cuda = &Cuda::open();
        let (held, word, other) = (cuda.stream(0), cuda.allocate(4), cuda.stream(NON_BLOCKING));
        cuda.write(word, &[0]);
        hold(cuda, held, word);
        let context = cuda.context();
        thread::scope(|scope| {
            // A blocking copy in the legacy stream, behind the one that is held: inside the gate until the word is set.
            let copy = move || {
                cuda.set_context(context);
                cuda.read(word, 1)
            };
            let copier = scope.spawn(copy);
            for order in orders() {
                if order == "let go" {
                    let_go(cuda, other, word);
                    break;
                }
                say((0..1000).map(|_| cuda.launch("spin", other, &[100])).sum::<u32>());
            }
            assert_eq!(copier.join().unwrap(), [1]);
        });
        say("done");
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.ask("launch"), "0");
    agent.revoke(gpu, 200);
    assert_eq!(agent.outcome(), DrainOutcome::TimedOut);
    assert_eq!(program.ask("launch"), "0");
    assert_eq!(program.ask("let go"), "done");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    program.finish();
}

#[test]
fn drained_means_that_every_stream_of_every_context_is_idle() {
    let name = "drained_means_that_every_stream_of_every_context_is_idle";
    if role().is_some() {
        let cuda = Cuda::open();
        let primary = cuda.context();
        let streams = [0, cuda.stream(0), cuda.stream(NON_BLOCKING)];
        // Created, and not current when the drain comes.
        let created = Place::create(&cuda, 0);
        for order in orders() {
            let in_primary = || {
                cuda.set_context(primary);
                for stream in streams {
                    assert_eq!(cuda.launch("spin", stream, &[LONG_NS / 4]), 0);
                }
                assert_eq!(query(&cuda, streams[2]), NOT_READY, "not long enough to tell anything");
            };
            // One of them has more to do, so that it is not enough to wait for the other.
            for _ in 0..4 {
                match order.as_str() {
                    "mostly in the primary" => in_primary(),
                    "mostly in the created" => assert_eq!(created.work(&cuda, LONG_NS / 2), 0),
                    other => panic!("{other}?"),
                }
            }
            if order == "mostly in the primary" {
                assert_eq!(created.work(&cuda, LONG_NS / 4), 0);
            } else {
                in_primary();
            }
            cuda.set_context(primary);
            say("works");
            assert_eq!(orders().next().unwrap(), "look");
            let left = streams.map(|stream| query(&cuda, stream));
            say(format!("{left:?} {}", created.left(&cuda)));
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent);
    let gpu = agent.greet();
    for order in ["mostly in the primary", "mostly in the created"] {
        assert_eq!(program.ask(order), "works");
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        assert_eq!(program.ask("look"), "[0, 0, 0] 0", "{order}");
        agent.give(gpu);
    }
    program.finish();
}

#[test]
fn a_broken_context_hides_no_other_ones_work() {
    let name = "a_broken_context_hides_no_other_ones_work";
    if role().is_some() {
        let cuda = Cuda::open();
        let [broken, sound @ ..] = [0; 3].map(|device| Place::create(&cuda, device));
        cuda.set_context(broken.context);
        // Nobody allocated what lies there.
        assert_eq!(launch(&cuda, load(&cuda, c"fill"), broken.stream, &[64, 1, 1]), 0);
        assert_ne!(cuda.synchronize(broken.stream), 0, "the context is not broken");
        assert_eq!(sound.map(|place| place.work(&cuda, LONG_NS)), [0, 0]);
        say("works");
        assert_eq!(orders().next().unwrap(), "look");
        say(format!("{:?}", sound.map(|place| place.left(&cuda))));
        assert_eq!(orders().next(), None);
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "works");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    assert_eq!(program.ask("look"), "[0, 0]");
    program.finish();
}

#[test]
fn contexts_on_two_gpus_are_drained_each_by_its_own_while_others_are_destroyed() {
    let name = "contexts_on_two_gpus_are_drained_each_by_its_own_while_others_are_destroyed";
    if role().is_some() {
        let cuda = Cuda::open();
        let places = [0, 0, 1, 1].map(|device| Place::create(&cuda, device));
        say("ready");
        while let Some(order) = orders().next() {
            assert_eq!(order, "work");
            // One more on each GPU, which goes while the drain is under way.
            let doomed = [0, 1].map(|device| Place::create(&cuda, device));
            assert_eq!(doomed.map(|place| place.work(&cuda, LONG_NS / 4)), [0; 2]);
            assert_eq!(places.map(|place| place.work(&cuda, LONG_NS)), [0; 4]);
            say("works");
            for place in doomed {
                assert_eq!(call!(cuda, "cuCtxDestroy" 4000, place.context => usize), 0);
            }
            assert_eq!(orders().next().unwrap(), "look");
            say(format!("{:?}", places.map(|place| place.left(&cuda))));
            // The gates of GPUs are their own: the second one is given back before the first.
            assert_eq!(orders().next().unwrap(), "second");
            say(places[2].work(&cuda, 1000));
            assert_eq!(orders().next().unwrap(), "first");
            say(places[0].work(&cuda, 1000));
        }
        return;
    }
    let host =
        Host::with(&SimulatorOptions { gpus: 2, memory: "256MiB".into(), ..SimulatorOptions::default() });
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent);
    let first = agent.greet();
    let second = agent.await_message(|message| match message {
        ClientMessage::UseGpu { slot: 1, gpu } => Some(*gpu),
        _ => None,
    });
    assert_eq!(program.hear(), "ready");
    for round in 1..4_u64 {
        assert_eq!(program.ask("work"), "works");
        let epoch = 10 * round;
        for gpu in [first, second] {
            agent.send(&AgentMessage::Revoke { gpu, epoch, drain_ms: 20_000, shortfall: 0 });
        }
        let mut outcomes = Vec::new();
        while outcomes.len() < 2 {
            outcomes.extend(agent.await_message(|message| match message {
                ClientMessage::Revoked { outcome, .. } => Some(Some(*outcome)),
                _ => None,
            }));
        }
        assert_eq!(outcomes, [DrainOutcome::Drained; 2], "round {round}");
        assert_eq!(program.ask("look"), "[0, 0, 0, 0]", "round {round}");
        agent.send(&AgentMessage::Grant { gpu: second, epoch: epoch + 1, prefetch: 0 });
        assert_eq!(program.ask("second"), "0");
        program.tell("first");
        agent.await_waiting(1);
        agent.send(&AgentMessage::Grant { gpu: first, epoch: epoch + 1, prefetch: 0 });
        assert_eq!(program.hear(), "0");
    }
    program.finish();
}

#[test]
fn a_context_can_be_destroyed_while_a_drain_of_another_one_does_not_end() {
    let name = "a_context_can_be_destroyed_while_a_drain_of_another_one_does_not_end";
    if role().is_some() {
        let cuda = Cuda::open();
        let primary = cuda.context();
        let (stream, word) = (cuda.stream(NON_BLOCKING), cuda.allocate(4));
        cuda.write(word, &[0]);
        hold(&cuda, stream, word);
        let created = new_context(&cuda, 0);
        say("held");
        for order in orders() {
            match order.as_str() {
                "destroy" => say(call!(cuda, "cuCtxDestroy" 4000, created => usize)),
                "let go" => {
                    cuda.set_context(primary);
                    let_go(&cuda, cuda.stream(NON_BLOCKING), word);
                    say(cuda.synchronize(stream));
                }
                other => panic!("{other}?"),
            }
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "held");
    agent.revoke(gpu, 100);
    assert_eq!(agent.outcome(), DrainOutcome::TimedOut);
    // The driver still waits for the drain's sake, and the gate is open again.
    assert_eq!(program.ask("destroy"), "0");
    assert_eq!(program.ask("let go"), "0");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    program.finish();
}

#[test]
fn a_hundred_hand_overs_ask_nothing_of_the_driver_but_their_drains() {
    const HAND_OVERS: usize = 100;
    const LAUNCHES: usize = 50;
    let name = "a_hundred_hand_overs_ask_nothing_of_the_driver_but_their_drains";
    if role().is_some() {
        let cuda = Cuda::open();
        let (kernel, stream) = (load(&cuda, c"spin"), cuda.stream(NON_BLOCKING));
        say("ready");
        for _ in orders() {
            say((0..LAUNCHES).map(|_| launch(&cuda, kernel, stream, &[1000])).sum::<u32>());
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = program(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    for _ in 0..HAND_OVERS {
        assert_eq!(program.ask("launch"), "0");
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        agent.give(gpu);
    }
    let log = program.finish();
    let calls = log.lines().filter_map(|line| Some(line.split_once("]: ")?.1.split_once(" = ")?.0));
    let mut calls = calls.skip_while(|&name| name != "cuLaunchKernel");
    for hand_over in 0..HAND_OVERS {
        let turn: Vec<_> = calls
            .by_ref()
            // The look-ups are this program's own, and the drainer's thread says once who it is.
            .filter(|name| {
                !name.starts_with("cuGetProcAddress") && *name != "cuThreadExchangeStreamCaptureMode"
            })
            .take(LAUNCHES + 6)
            .collect();
        let (launches, drain) = turn.split_at(LAUNCHES);
        assert!(launches.iter().all(|&name| name == "cuLaunchKernel"), "hand-over {hand_over}: {turn:?}");
        assert_eq!(
            drain,
            [
                "cuDevicePrimaryCtxGetState",
                "cuDevicePrimaryCtxRetain",
                "cuCtxPushCurrent_v2",
                "cuCtxSynchronize",
                "cuCtxPopCurrent_v2",
                "cuDevicePrimaryCtxRelease_v2"
            ],
            "hand-over {hand_over}"
        );
    }
    assert_eq!(calls.count(), 0);
}

#[test]
fn the_program_sees_the_results_of_its_own_launches_whatever_goes_on_around_them() {
    let name = "the_program_sees_the_results_of_its_own_launches_whatever_goes_on_around_them";
    if role().is_some() {
        let cuda = &Cuda::open();
        let (kernel, stream) = (load(cuda, c"spin"), cuda.stream(NON_BLOCKING));
        let context = cuda.context();
        let (stop_tx, stop_rx) = mpsc::channel::<()>();
        say("ready");
        thread::scope(|scope| {
            let launcher = scope.spawn(move || {
                cuda.set_context(context);
                let (mut good, mut bad) = (0_u64, 0_u64);
                while stop_rx.try_recv() != Err(mpsc::TryRecvError::Disconnected) {
                    good += u64::from(launch(cuda, kernel, stream, &[1000]) == 0);
                    // No such stream: an error of the driver's own.
                    bad += u64::from(launch(cuda, kernel, 0x77, &[1000]) == 400);
                }
                (good, bad)
            });
            assert_eq!(orders().next().unwrap(), "stop");
            drop(stop_tx);
            let (good, bad) = launcher.join().unwrap();
            assert!(good > 0 && good == bad, "{good} good results, {bad} bad ones");
        });
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = Running::start(&mut host.shimmed(name, "main", agent.dir()), host.home());
    assert_eq!(program.hear(), "ready");
    // Revocations that fail in every way there is, and an agent that goes.
    for _ in 0..5 {
        let gpu = agent.greet_for(50);
        agent.revoke(gpu, 0);
        agent.outcome();
        assert_eq!(agent.take(gpu), DrainOutcome::Drained);
        agent.hang_up();
    }
    program.tell("stop");
    program.finish();
}
