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
