//! What a program is told of the GPU's free memory beside others, with the real agent between them.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::Stdio,
    time::Duration,
};

use nvshare_tests::{
    Agent, Binaries, Cuda, call,
    program::{Host, passed, role},
    wait_until,
};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn free_bytes(cuda: &Cuda) -> usize {
    let (mut free, mut total) = (0, 0);
    let code = call!(cuda, "cuMemGetInfo" 3020, &raw mut free => *mut usize, &raw mut total => *mut usize);
    assert_eq!(code, 0);
    free
}

/// C19: memory that others hold for good is not free; memory that they hold and that can be pushed out is.
#[test]
fn a_program_is_not_told_memory_as_free_that_others_hold_for_good() {
    const TEST: &str = "a_program_is_not_told_memory_as_free_that_others_hold_for_good";
    match role().as_deref() {
        // Holds 100 MiB until its input ends.
        Some("holder") => {
            let cuda = Cuda::open();
            let _block = cuda.allocate(100 * MIB);
            println!("held");
            std::io::stdin().lines().for_each(drop);
        }
        Some("asker") => {
            let cuda = Cuda::open();
            let free = |wanted: &dyn Fn(usize) -> bool| {
                let probe = || Ok(wanted(free_bytes(&cuda)).then_some(()));
                wait_until("another figure", PATIENCE, probe).unwrap();
            };
            free(&|free| free < 160 * MIB);
            println!("told");
            // Once the holder has ended.
            free(&|free| free > 230 * MIB);
        }
        _ => {
            let host = Host::new("256MiB");
            let binaries = Binaries::of_this_test().unwrap();
            let run_dir = host.home().join("run");
            let _agent = Agent::start(&binaries, &host.simulator().agent_config(), &run_dir).unwrap();
            let start = |role: &str, managed_min: &str| {
                let mut command = host.shimmed(TEST, role, &run_dir);
                command.env("NVSHARE_MANAGED_MIN_BYTES", managed_min);
                let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
                piped.spawn().unwrap()
            };
            let hear = |child: &mut std::process::Child, word: &str| {
                let stdout = child.stdout.take().unwrap();
                let mut lines = BufReader::new(stdout);
                let mut line = String::new();
                while !line.contains(word) {
                    line.clear();
                    assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it ended before it said {word}");
                }
                lines
            };
            // Pageable memory of others leaves everything free.
            let mut evictable = start("holder", "1");
            let _lines = hear(&mut evictable, "held");
            let mut holder = start("holder", "never");
            let _lines = hear(&mut holder, "held");
            let mut asker = start("asker", "1");
            let mut lines = hear(&mut asker, "told");
            holder.stdin.take().unwrap().flush().unwrap();
            assert!(holder.wait().unwrap().success());
            let mut rest = String::new();
            std::io::Read::read_to_string(&mut lines, &mut rest).unwrap();
            let mut output = asker.wait_with_output().unwrap();
            output.stdout = rest.into_bytes();
            passed(&output);
            drop(evictable.stdin.take());
            assert!(evictable.wait().unwrap().success());
        }
    }
}

/// The limit that an operator sets holds for a program that runs already: it is told so, and what goes beyond fails.
#[test]
fn an_operators_limit_holds_for_a_running_program_until_it_is_taken_back() {
    const TEST: &str = "an_operators_limit_holds_for_a_running_program_until_it_is_taken_back";
    if role().is_some() {
        let cuda = Cuda::open();
        let total = || {
            let (mut free, mut total) = (0, 0);
            let code =
                call!(cuda, "cuMemGetInfo" 3020, &raw mut free => *mut usize, &raw mut total => *mut usize);
            assert_eq!(code, 0);
            total
        };
        let allocated = |bytes: usize| {
            let mut address = 0;
            call!(cuda, "cuMemAlloc" 3020, &raw mut address => *mut u64, bytes => usize)
        };
        let becomes = |wanted: usize| {
            wait_until("another size", PATIENCE, || Ok((total() == wanted).then_some(()))).unwrap();
        };
        // A session begins with the first allocation.
        assert_eq!(allocated(60 * MIB), 0);
        println!("began");
        becomes(100 * MIB);
        assert_eq!(allocated(50 * MIB), 2, "out of memory: 110 of 100 MiB");
        assert_eq!(allocated(30 * MIB), 0, "what is within the limit is given");
        println!("limited");
        becomes(256 * MIB);
        assert_eq!(allocated(50 * MIB), 0);
        return;
    }
    let host = Host::new("256MiB");
    let binaries = Binaries::of_this_test().unwrap();
    let run_dir = host.home().join("run");
    let agent = Agent::start(&binaries, &host.simulator().agent_config(), &run_dir).unwrap();
    let mut command = host.shimmed(TEST, "program", &run_dir);
    let mut program = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(program.stdout.take().unwrap());
    let mut hear = |word: &str| {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it ended before it said {word}");
        }
    };
    // The session may begin a moment after the program said so.
    let set = |limit: &str| {
        let pid = program.id().to_string();
        wait_until("the agent to take the limit", PATIENCE, || {
            let output = agent.ctl(&["set", "limit", limit, "--client", &pid])?;
            Ok(output.status.success().then_some(()))
        })
        .unwrap();
    };
    hear("began");
    set("100MiB");
    hear("limited");
    set("none");
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut lines, &mut rest).unwrap();
    let mut output = program.wait_with_output().unwrap();
    output.stdout = rest.into_bytes();
    passed(&output);
}
