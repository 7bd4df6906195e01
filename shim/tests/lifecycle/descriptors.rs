//! Programs that close descriptors which are not theirs, and programs that were started without some.

use std::{collections::BTreeSet, os::fd::RawFd};

use nvshare_tests::{
    Cuda, ScriptedAgent, call,
    program::{Host, Running, orders, role, say},
};
use nvshare_wire::DrainOutcome;

use super::{compute, run};

/// The session's descriptors: sockets and memory files that are not the driver's, whose numbers were there before.
fn ours(before: &BTreeSet<RawFd>) -> Vec<RawFd> {
    let of_a_kind = |fd: &RawFd| {
        let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        let target = target.to_string_lossy().into_owned();
        target.starts_with("socket:") || target.contains("memfd:nvshare-page")
    };
    open().difference(before).copied().filter(of_a_kind).collect()
}

fn open() -> BTreeSet<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let numbers: Vec<RawFd> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // But for the one by which they were read.
    // SAFETY: the call takes no pointers.
    numbers.into_iter().filter(|&number| unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0).collect()
}

/// A pipe of the program's own at this number; the end from which it is read.
fn occupy(number: RawFd) -> RawFd {
    let mut ends = [-1; 2];
    // SAFETY: two descriptors into a live local, one of which moves to a number that is free.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK), 0);
        assert_eq!(libc::dup2(ends[1], number), number);
        libc::close(ends[1]);
    }
    ends[0]
}

#[test]
fn a_program_that_closes_all_descriptors_keeps_those_that_it_opens_then() {
    let name = "descriptors::a_program_that_closes_all_descriptors_keeps_those_that_it_opens_then";
    if role().is_some() {
        let cuda = Cuda::load();
        assert_eq!(call!(cuda, "cuInit" 2000, 0 => u32), 0);
        let before = open();
        let cuda = Cuda::open();
        compute(&cuda);
        say("ready");
        assert_eq!(orders().next().unwrap(), "close");
        let ours = ours(&before);
        assert!(ours.len() >= 4, "a pair, a page and a connection: {ours:?}");
        assert!(ours.iter().all(|&number| number >= 100), "in the way of the program: {ours:?}");
        for &number in &ours {
            // SAFETY: what is tested is a program that does this.
            unsafe { libc::close(number) };
        }
        let occupied: Vec<_> = ours.iter().map(|&number| (number, occupy(number))).collect();
        say("closed");
        for order in orders() {
            if order == "count" {
                say(self::ours(&before).len());
                continue;
            }
            compute(&cuda);
            for &(number, end) in &occupied {
                let mut byte = 0u8;
                // SAFETY: one byte into a live local; the other calls take no pointers.
                let (flags, read) = unsafe {
                    (libc::fcntl(number, libc::F_GETFD), libc::read(end, (&raw mut byte).cast(), 1))
                };
                assert_eq!(flags, 0, "{number} was closed or replaced");
                // The end is open and empty: neither data nor the end of the file.
                assert_eq!(read, -1, "{number} was written to or closed");
            }
            say("unharmed");
        }
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program = run(&host, name, &agent);
    let gpu = agent.greet();
    assert_eq!(program.hear(), "ready");
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    assert_eq!(program.ask("close"), "closed");
    // The session is gone and its gates are open; another one begins, with all that belongs to it.
    assert!(agent.is_hung_up());
    assert_eq!(program.ask("look"), "unharmed");
    let gpu = agent.greet();
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    program.tell("look");
    agent.await_waiting(1);
    agent.give(gpu);
    assert_eq!(program.hear(), "unharmed");
    assert_eq!(program.ask("count"), "4");
    agent.hang_up();
    assert_eq!(program.ask("look"), "unharmed");
    program.finish();
}

#[test]
fn a_program_without_standard_streams_finds_none_of_ours_there() {
    let name = "descriptors::a_program_without_standard_streams_finds_none_of_ours_there";
    if role().is_some() {
        say("ready");
        assert_eq!(orders().next().unwrap(), "close");
        // First, so that the driver's own descriptors are not in question.
        let cuda = Cuda::load();
        assert_eq!(call!(cuda, "cuInit" 2000, 0 => u32), 0);
        // SAFETY: kept elsewhere and put back at the end; the limit is below the numbers that ours usually have.
        let kept = unsafe {
            let kept = [0, 1, 2].map(|number| libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 50));
            for number in [0, 1, 2] {
                libc::close(number);
            }
            let limit = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
            kept
        };
        let before = open();
        let cuda = Cuda::open();
        compute(&cuda);
        let mut byte = [0u8];
        // SAFETY: waits for an order on the descriptor that was kept.
        let (read, ours) = unsafe { (libc::read(kept[0], byte.as_mut_ptr().cast(), 1), ours(&before)) };
        for (number, kept) in kept.into_iter().enumerate() {
            // SAFETY: puts the streams back.
            unsafe { libc::dup2(kept, number as i32) };
        }
        assert_eq!(read, 1);
        assert!(ours.len() >= 4 && ours.iter().all(|&number| number > 2), "{ours:?}");
        return;
    }
    let host = Host::new("256MiB");
    let mut agent = ScriptedAgent::new(host.home(), "run");
    let mut program: Running = run(&host, name, &agent);
    assert_eq!(program.hear(), "ready");
    program.tell("close");
    let gpu = agent.greet();
    assert_eq!(agent.take(gpu), DrainOutcome::Drained);
    agent.give(gpu);
    program.tell("go on");
    program.finish();
}
