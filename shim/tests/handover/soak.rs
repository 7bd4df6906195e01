//! Many hand-overs under a program that allocates, writes, frees and forks at random, with failures at random: never a wrong
//! word, never a signal.
#![expect(clippy::print_stdout, reason = "figures for whoever reads the tests")]

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use nvshare_tests::{
    Cuda, ScriptedAgent, call,
    program::{Host, orders, role, say},
};
use nvshare_wire::{AgentMessage, ClientMessage, DrainOutcome};

use super::{MIB, program};

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// What the program's side did.
#[derive(Debug, Default)]
struct Done {
    checks: AtomicU64,
    frees: AtomicU64,
    forks: AtomicU64,
}

/// A block and what must be in it: ranges of words of one value, by their ends.
struct Block {
    address: u64,
    words: u64,
    values: Vec<(u64, u32)>,
}

impl Block {
    fn fresh(cuda: &Cuda, random: &mut Random) -> Self {
        // Mostly odd sizes: blocks need not end where pieces do.
        let words = MIB / 2 + random.below(3 * MIB) + 1;
        let address = cuda.allocate(words as usize * 4);
        let mut block = Self { address, words, values: vec![(words, 0)] };
        block.write(cuda, random, true);
        block
    }

    /// Writes all of it or a part, through the driver's interface or by a kernel.
    fn write(&mut self, cuda: &Cuda, random: &mut Random, whole: bool) {
        let value = random.next() as u32;
        let (from, to) = if whole {
            (0, self.words)
        } else {
            let from = random.below(self.words);
            (from, from + 1 + random.below(self.words - from))
        };
        let (at, count) = (self.address + from * 4, to - from);
        if random.chance(2) {
            assert_eq!(cuda.launch("fill", 0, &[at, count, u64::from(value)]), 0);
        } else {
            let code = call!(cuda, "cuMemsetD32" 3020, at => u64, value => u32, count as usize => usize);
            assert_eq!(code, 0);
        }
        let mut values = Vec::new();
        let mut begin = 0;
        for &(end, old) in &self.values {
            for (cut, value) in [(from, old), (to, value), (self.words, old)] {
                if cut.min(end) > begin {
                    values.push((cut.min(end), value));
                    begin = cut.min(end);
                }
            }
        }
        self.values = values;
    }

    /// Every word, summed by a kernel, and some of them one by one.
    fn check(&self, cuda: &Cuda, random: &mut Random, sum: u64) {
        let (mut begin, mut expected) = (0, 0_u64);
        for &(end, value) in &self.values {
            expected = expected.wrapping_add(u64::from(value).wrapping_mul(end - begin));
            begin = end;
        }
        assert_eq!(cuda.launch("checksum", 0, &[self.address, self.words * 4, sum]), 0);
        let found = cuda.read(sum, 2);
        assert_eq!(u64::from(found[0]) | u64::from(found[1]) << 32, expected, "a word is wrong");
        let at = random.below(self.words);
        let value = self.values.iter().find(|&&(end, _)| at < end).map(|&(_, value)| value);
        assert_eq!(Some(cuda.read(self.address + at * 4, 1)[0]), value);
    }
}

/// Writes to every page of a block by the processor. Programs do not do that to what they take for device memory; here it
/// shows that nothing stays protected.
fn poke(block: &Block) {
    for at in (0..block.words * 4 / 4096 * 4096).step_by(4096) {
        // SAFETY: the program's own memory, as the simulated driver maps it; nobody else uses this block.
        unsafe {
            let word = (block.address + at) as *mut u32;
            word.write_volatile(word.read_volatile());
        }
    }
}

/// Does things at random until told to stop.
fn work(cuda: &Cuda, seed: u64, left_over: &Mutex<Vec<Block>>, stop: &AtomicBool, done: &Done) {
    let mut random = Random(seed | 1);
    let sum = cuda.allocate(8);
    let mut blocks: Vec<Block> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match random.below(8) {
            0 | 1 if blocks.len() < 6 => blocks.push(Block::fresh(cuda, &mut random)),
            2 if !blocks.is_empty() => {
                let at = random.below(blocks.len() as u64) as usize;
                let block = blocks.swap_remove(at);
                block.check(cuda, &mut random, sum);
                left_over.lock().unwrap().push(block);
            }
            3 if random.chance(8) => {
                // SAFETY: the child does nothing but end.
                unsafe {
                    let child = libc::fork();
                    if child == 0 {
                        libc::_exit(0);
                    }
                    let mut status = 0;
                    assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                    assert_eq!(status, 0);
                }
                done.forks.fetch_add(1, Ordering::Relaxed);
            }
            4 | 5 => {
                let whole = random.chance(3);
                let count = blocks.len().max(1) as u64;
                if let Some(block) = blocks.get_mut(random.below(count) as usize) {
                    block.write(cuda, &mut random, whole);
                }
            }
            _ => {
                let count = blocks.len().max(1) as u64;
                if let Some(block) = blocks.get(random.below(count) as usize) {
                    block.check(cuda, &mut random, sum);
                    done.checks.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
    for block in blocks {
        block.check(cuda, &mut random, sum);
        assert_eq!(call!(cuda, "cuMemFree" 3020, block.address => u64), 0);
    }
}

fn body(seed: u64) {
    let cuda = &Cuda::open();
    let context = cuda.context();
    let (left_over, stop, done) = (&Mutex::default(), &AtomicBool::new(false), &Done::default());
    say("ready");
    thread::scope(|scope| {
        for worker in 0..2 {
            scope.spawn(move || {
                cuda.set_context(context);
                work(
                    cuda,
                    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(worker * 77),
                    left_over,
                    stop,
                    done,
                );
            });
        }
        // Frees pass no gate, so these fall into every step of a hand-over. Memory that is protected, freed and made anew must be
        // as any other: the processor writes to it.
        scope.spawn(move || {
            cuda.set_context(context);
            while !stop.load(Ordering::Relaxed) {
                let block: Option<Block> = left_over.lock().unwrap().pop();
                if let Some(block) = block {
                    assert_eq!(call!(cuda, "cuMemFree" 3020, block.address => u64), 0);
                    done.frees.fetch_add(1, Ordering::Relaxed);
                }
                thread::yield_now();
            }
        });
        let poked = [0; 2].map(|_| Block::fresh(cuda, &mut Random(seed | 1)));
        for order in orders() {
            if order == "stop" {
                break;
            }
            poked.iter().for_each(poke);
            say("poked");
        }
        stop.store(true, Ordering::Relaxed);
    });
    let Done { checks, frees, forks } = done;
    say(format!(
        "{} {} {}",
        checks.load(Ordering::Relaxed),
        frees.load(Ordering::Relaxed),
        forks.load(Ordering::Relaxed)
    ));
    assert_eq!(orders().next(), None);
}

/// One kind of trouble: hand-overs, moved bytes, and what the program did.
fn soak(test: &str, by: &str, fail: Option<&str>, hand_overs: u64, seed: u64) {
    println!("seed {seed}");
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let seed_text = seed.to_string();
    let mut variables = vec![("NVSHARE_HANDOVER", by), ("NVSHARE_TEST_SOAK_SEED", &seed_text)];
    variables.extend(fail.map(|fail| ("NVSHARE_TEST_FAIL", fail)));
    let mut program = program(&host, test, &agent, &variables);
    let mut gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    let mut random = Random(seed | 1);
    let (mut out, mut back, mut drained) = (0_u64, 0_u64, 0_u64);
    for _ in 0..hand_overs {
        let some = |random: &mut Random| if random.chance(2) { u64::MAX } else { random.below(128 * MIB) };
        let of = agent.revoke_memory(gpu, some(&mut random));
        if random.chance(40) {
            // The agent is killed, at whatever step this is.
            agent.hang_up();
            gpu = agent.greet();
            continue;
        }
        let outcome = agent.await_message(|message| match message {
            ClientMessage::Revoked { epoch, outcome, moved, .. } if *epoch == of => Some((*outcome, *moved)),
            _ => None,
        });
        if outcome.0 == DrainOutcome::Drained {
            drained += 1;
            out += outcome.1;
        }
        if random.chance(10) {
            let (brought, pushed) = (random.below(2) as u32, random.below(2) as u32);
            agent.send(&AgentMessage::Displaced { gpu, brought, pushed });
        }
        if random.chance(2) && outcome.1 > 0 {
            agent.await_message(|message| {
                matches!(message, ClientMessage::Moved { epoch, .. } if *epoch == of).then_some(())
            });
        }
        let of = agent.grant_memory(gpu, some(&mut random));
        if !random.chance(4) {
            back += agent.await_message(|message| match message {
                ClientMessage::Resumed { epoch, moved, .. } if *epoch == of => Some(*moved),
                _ => None,
            });
            if random.chance(3) {
                assert_eq!(program.ask("poke"), "poked");
            }
        }
    }
    let of = agent.grant_memory(gpu, u64::MAX);
    agent.await_message(|message| {
        matches!(message, ClientMessage::Resumed { epoch, .. } if *epoch == of).then_some(())
    });
    let did = program.ask("stop");
    println!(
        "{by}, failing {fail:?}: {drained} drained of {hand_overs}, {} MiB out, {} MiB back; checks, frees, forks: {did}",
        out / MIB,
        back / MIB
    );
    assert!(drained > hand_overs / 2, "hand-overs that came to nothing: nothing was shown");
    if fail.is_none() {
        assert!(out > 0 && back > 0, "nothing moved: nothing was shown");
    }
    program.finish();
}

fn seed() -> u64 {
    std::env::var("NVSHARE_TEST_SOAK_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |text| text.parse().unwrap())
}

#[test]
fn no_word_is_wrong_after_hundreds_of_hand_overs() {
    let name = "soak::no_word_is_wrong_after_hundreds_of_hand_overs";
    if role().is_some() {
        return body(seed());
    }
    for by in ["protected", "plain"] {
        soak(name, by, None, 300, seed());
    }
}

#[test]
fn no_word_is_wrong_with_failures_at_every_step() {
    let name = "soak::no_word_is_wrong_with_failures_at_every_step";
    if role().is_some() {
        return body(seed());
    }
    for step in ["protect", "prefetch", "wait", "host", "panic", "vanish"] {
        soak(name, "protected", Some(&format!("{step}:7")), 60, seed());
    }
    soak(name, "protected", Some("stall:9"), 20, seed());
}
