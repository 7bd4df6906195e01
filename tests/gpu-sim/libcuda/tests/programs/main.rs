//! Programs against the simulated driver, each in a process and on a simulated host of its own.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking; helpers outside test functions do too")]

mod lookups;
mod runtime;

use std::{ffi::c_void, io::Read as _, os::unix::process::ExitStatusExt as _, process::Stdio};

use nvshare_tests::{
    call,
    cuda::Cuda,
    program::{Host, moved, passed, program, role},
};

const MIB: usize = 1 << 20;

#[test]
fn a_stream_runs_its_operations_in_order() {
    program("a_stream_runs_its_operations_in_order", |cuda| {
        let words = MIB;
        let (a, b, sum) = (cuda.allocate(words * 4), cuda.allocate_managed(words * 4), cuda.allocate(8));
        let stream = cuda.stream(1);
        for round in 1..=5_u64 {
            assert_eq!(cuda.launch("fill", stream, &[a, words as u64, round]), 0);
            let code = call!(cuda, "cuMemcpyDtoDAsync" 3020,
                b => u64, a => u64, words * 4 => usize, stream => usize);
            assert_eq!(code, 0);
            assert_eq!(cuda.launch("fill", stream, &[a, words as u64, 0]), 0);
            assert_eq!(cuda.launch("sweep", stream, &[b, words as u64 * 4, 1000, 10]), 0);
            assert_eq!(cuda.launch("checksum", stream, &[b, words as u64 * 4, sum]), 0);
            assert_eq!(cuda.synchronize(stream), 0);
            let expected = round * words as u64 + 10 * (words as u64 * 4 / 4096);
            assert_eq!(cuda.read(sum, 2), [expected as u32, (expected >> 32) as u32]);
        }
    });
}

#[test]
fn the_legacy_stream_waits_for_blocking_streams_and_not_for_others() {
    program("the_legacy_stream_waits_for_blocking_streams_and_not_for_others", |cuda| {
        let word = cuda.allocate(4);
        let (blocking, free) = (cuda.stream(0), cuda.stream(1));
        cuda.write(word, &[1]);
        assert_eq!(cuda.launch("spin", blocking, &[50_000_000]), 0);
        assert_eq!(cuda.launch("fill", blocking, &[word, 1, 2]), 0);
        // A copy in the legacy stream: it must see what the blocking stream was given before it.
        assert_eq!(cuda.read(word, 1), [2]);
        // The non-blocking stream waits for a value that only the legacy stream will write.
        let code = call!(cuda, "cuStreamWaitValue32" 8000,
            free => usize, word => u64, 7 => u32, 1 => u32);
        assert_eq!(code, 0);
        cuda.write(word, &[7]);
        assert_eq!(cuda.synchronize(free), 0);
    });
}

#[test]
fn events_time_what_lies_between_them_and_order_streams() {
    program("events_time_what_lies_between_them_and_order_streams", |cuda| {
        let (first, second) = (cuda.stream(1), cuda.stream(1));
        let word = cuda.allocate(4);
        let mut events = [0_usize; 2];
        for event in &mut events {
            assert_eq!(call!(cuda, "cuEventCreate" 2000, &raw mut *event => *mut usize, 0 => u32), 0);
        }
        assert_eq!(call!(cuda, "cuEventRecord" 2000, events[0] => usize, first => usize), 0);
        assert_eq!(cuda.launch("spin", first, &[30_000_000]), 0);
        assert_eq!(cuda.launch("fill", first, &[word, 1, 5]), 0);
        assert_eq!(call!(cuda, "cuEventRecord" 2000, events[1] => usize, first => usize), 0);
        let code = call!(cuda, "cuStreamWaitEvent" 3020, second => usize, events[1] => usize, 0 => u32);
        assert_eq!(code, 0);
        let sum = cuda.allocate(8);
        assert_eq!(cuda.launch("checksum", second, &[word, 4, sum]), 0);
        assert_eq!(cuda.synchronize(second), 0);
        assert_eq!(cuda.read(sum, 1), [5]);
        let mut millis = 0_f32;
        let code = call!(cuda, "cuEventElapsedTime" 2000,
            &raw mut millis => *mut f32, events[0] => usize, events[1] => usize);
        assert_eq!(code, 0);
        assert!(millis >= 30.0, "30 ms of GPU time took {millis} ms");
    });
}

#[test]
fn captured_work_runs_when_its_graph_is_launched_and_as_often() {
    program("captured_work_runs_when_its_graph_is_launched_and_as_often", |cuda| {
        let (a, stream) = (cuda.allocate(MIB), cuda.stream(1));
        cuda.write(a, &[0; 1024]);
        assert_eq!(call!(cuda, "cuStreamBeginCapture" 10010, stream => usize, 0 => u32), 0);
        for _ in 0..100 {
            assert_eq!(cuda.launch("sweep", stream, &[a, 4096, 0, 1]), 0);
        }
        let (mut graph, mut executable, mut nodes) = (0_usize, 0_usize, 0_usize);
        assert_eq!(call!(cuda, "cuStreamEndCapture" 10000, stream => usize, &raw mut graph => *mut usize), 0);
        let none = std::ptr::null_mut();
        let code = call!(cuda, "cuGraphGetNodes" 10000,
            graph => usize, none => *mut usize, &raw mut nodes => *mut usize);
        assert_eq!((code, nodes), (0, 100));
        assert_eq!(cuda.read(a, 1), [0], "a captured launch has run");
        let code = call!(cuda, "cuGraphInstantiateWithFlags" 11040,
            &raw mut executable => *mut usize, graph => usize, 0 => u64);
        assert_eq!(code, 0);
        for _ in 0..3 {
            assert_eq!(call!(cuda, "cuGraphLaunch" 10000, executable => usize, stream => usize), 0);
        }
        assert_eq!(cuda.synchronize(stream), 0);
        assert_eq!(cuda.read(a, 1), [300]);
    });
}

#[test]
fn synchronising_inside_a_capture_breaks_it() {
    program("synchronising_inside_a_capture_breaks_it", |cuda| {
        let (a, stream) = (cuda.allocate(4096), cuda.stream(1));
        assert_eq!(call!(cuda, "cuStreamBeginCapture" 10010, stream => usize, 0 => u32), 0);
        assert_eq!(cuda.launch("sweep", stream, &[a, 4096, 0, 1]), 0);
        assert_eq!(call!(cuda, "cuCtxSynchronize" 2000,), 900);
        let mut graph = 1_usize;
        assert_eq!(
            call!(cuda, "cuStreamEndCapture" 10000, stream => usize, &raw mut graph => *mut usize),
            901
        );
        assert_eq!(graph, 0);
        // The stream works again.
        assert_eq!(cuda.launch("fill", stream, &[a, 1, 3]), 0);
        assert_eq!(cuda.synchronize(stream), 0);
        assert_eq!(cuda.read(a, 1), [3]);
    });
}

#[test]
fn an_access_outside_an_allocation_makes_the_context_unusable() {
    program("an_access_outside_an_allocation_makes_the_context_unusable", |cuda| {
        let a = cuda.allocate(4 * MIB);
        assert_eq!(cuda.launch("fill", 0, &[a, 2 * MIB as u64, 1]), 0);
        assert_eq!(cuda.synchronize(0), 700);
        assert_eq!(cuda.launch("spin", 0, &[1]), 700);
    });
}

#[test]
fn the_gpu_writes_memory_that_the_program_has_write_protected() {
    program("the_gpu_writes_memory_that_the_program_has_write_protected", |cuda| {
        let a = cuda.allocate_managed(2 * MIB);
        let page = a as *mut c_void;
        // SAFETY: changes the protection of memory that this program was given.
        assert_eq!(unsafe { libc::mprotect(page, 2 * MIB, libc::PROT_READ) }, 0);
        assert_eq!(cuda.launch("fill", 0, &[a, 1024, 9]), 0);
        assert_eq!(cuda.synchronize(0), 0);
        // SAFETY: managed memory, readable by the program, idle.
        assert_eq!(unsafe { page.cast::<u32>().add(1023).read_volatile() }, 9);
    });
}

/// Pushes managed memory out while it is write-protected, as a hand-over does, and leaves it so.
fn pushed_out_under_protection(cuda: &Cuda, bytes: usize, word: u32) -> u64 {
    let block = cuda.allocate_managed(bytes);
    assert_eq!(cuda.launch("fill", 0, &[block, bytes as u64 / 4, u64::from(word)]), 0);
    assert_eq!(cuda.synchronize(0), 0);
    // SAFETY: changes the protection of memory that this program was given.
    assert_eq!(unsafe { libc::mprotect(block as *mut c_void, bytes, libc::PROT_READ) }, 0);
    let code = call!(cuda, "cuMemPrefetchAsync" 8000, block => u64, bytes => usize, -1 => i32, 0 => usize);
    assert_eq!(code, 0);
    assert_eq!(cuda.synchronize(0), 0);
    assert_eq!(moved().1, bytes as u64);
    block
}

#[test]
fn what_the_gpu_reads_and_writes_in_a_protected_window_is_right() {
    program("what_the_gpu_reads_and_writes_in_a_protected_window_is_right", |cuda| {
        let bytes = 8 * MIB;
        let block = pushed_out_under_protection(cuda, bytes, 7);
        let sum = cuda.allocate(8);
        let words = bytes as u64 / 4;
        assert_eq!(cuda.launch("fill", 0, &[block, words / 2, 9]), 0);
        assert_eq!(cuda.launch("checksum", 0, &[block, bytes as u64, sum]), 0);
        assert_eq!(cuda.read(sum, 1), [(words / 2 * 16) as u32]);
        // SAFETY: managed memory, readable by the program, idle.
        let seen = [0, words - 1].map(|at| unsafe { (block as *const u32).add(at as usize).read_volatile() });
        assert_eq!(seen, [9, 7]);
        assert_eq!(
            // SAFETY: as in `pushed_out_under_protection`.
            unsafe { libc::mprotect(block as *mut c_void, bytes, libc::PROT_READ | libc::PROT_WRITE) },
            0
        );
        // SAFETY: as above, and writable again.
        unsafe { (block as *mut u32).write_volatile(11) };
        assert_eq!(cuda.read(block, 2), [11, 9]);
    });
}

#[test]
fn what_the_processor_writes_in_a_protected_window_ends_the_program() {
    let name = "what_the_processor_writes_in_a_protected_window_ends_the_program";
    if role().is_some() {
        let block = pushed_out_under_protection(&Cuda::open(), 4 * MIB, 7);
        println!("written to");
        // SAFETY: memory of this program, of which it has said that it must not be written to.
        unsafe { (block as *mut u32).write_volatile(1) };
        return;
    }
    let host = Host::new("256MiB");
    let output = host.program(name, "main").output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("written to"));
}

#[test]
fn prefetches_move_memory_out_and_back_without_changing_it() {
    program("prefetches_move_memory_out_and_back_without_changing_it", |cuda| {
        let bytes = 16 * MIB;
        let a = cuda.allocate_managed(bytes);
        assert_eq!(cuda.launch("fill", 0, &[a, bytes as u64 / 4, 0x5a5a]), 0);
        assert_eq!(cuda.synchronize(0), 0);
        assert_eq!(moved(), (0, 0), "first touch on the card moves nothing");
        // The newer ABI, to the host; then the older one, back to device 0.
        let code = call!(cuda, "cuMemPrefetchAsync" 12020,
            a => u64, bytes => usize, 2_u64 => u64, 0 => u32, 0 => usize);
        assert_eq!(code, 0);
        assert_eq!(cuda.synchronize(0), 0);
        assert_eq!(moved(), (0, bytes as u64));
        let code = call!(cuda, "cuMemPrefetchAsync" 8000, a => u64, bytes => usize, 0 => i32, 0 => usize);
        assert_eq!(code, 0);
        assert_eq!(cuda.synchronize(0), 0);
        assert_eq!(moved(), (bytes as u64, bytes as u64));
        assert!(cuda.read(a, bytes / 4).iter().all(|&word| word == 0x5a5a));
    });
}

#[test]
fn two_processes_share_one_card() {
    const TEST: &str = "two_processes_share_one_card";
    if role().is_some_and(|role| role == "second") {
        let cuda = Cuda::open();
        let mut address = 0;
        // 256 MiB in all, of which the other process holds 160.
        assert_eq!(call!(cuda, "cuMemAlloc" 3020, &raw mut address => *mut u64, 160 * MIB => usize), 2);
        let managed = cuda.allocate_managed(160 * MIB);
        assert_eq!(cuda.launch("fill", 0, &[managed, 40 * MIB as u64, 4]), 0);
        assert_eq!(cuda.synchronize(0), 0);
        assert!(cuda.read(managed, 40 * MIB).iter().all(|&word| word == 4));
        return;
    }
    program(TEST, |cuda| {
        let mine = cuda.allocate(160 * MIB);
        assert_eq!(cuda.launch("fill", 0, &[mine, 1024, 3]), 0);
        assert_eq!(cuda.synchronize(0), 0);
        // The same program in its second role, on the same host.
        let mut second = std::process::Command::new(std::env::current_exe().unwrap());
        second.args([TEST, "--exact", "--nocapture", "--test-threads=1"]).env("NVSHARE_TEST_ROLE", "second");
        passed(&second.output().unwrap());
        assert_eq!(cuda.read(mine, 1024), [3; 1024]);
    });
}

#[test]
fn a_forked_child_is_not_initialised_and_leaves_its_parent_unharmed() {
    program("a_forked_child_is_not_initialised_and_leaves_its_parent_unharmed", |cuda| {
        let a = cuda.allocate(MIB);
        let init = cuda.look_up("cuInit", 2000, 0);
        let free = cuda.look_up("cuMemFree", 3020, 0);
        // SAFETY: the child calls two driver functions, which must not lock or allocate after a fork, and ends.
        let child = unsafe {
            let init: extern "C" fn(u32) -> u32 = std::mem::transmute(init);
            let free: extern "C" fn(u64) -> u32 = std::mem::transmute(free);
            let child = libc::fork();
            if child == 0 {
                libc::_exit(i32::from(init(0) != 3 || free(a) != 3));
            }
            child
        };
        let mut status = -1;
        // SAFETY: our own child.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child saw another code than CUDA_ERROR_NOT_INITIALIZED, or crashed");
        assert_eq!(cuda.launch("fill", 0, &[a, 16, 1]), 0);
        assert_eq!(cuda.read(a, 16), [1; 16]);
    });
}

#[test]
fn without_a_simulator_there_is_no_device_and_one_line_says_how_to_start_one() {
    const TEST: &str = "without_a_simulator_there_is_no_device_and_one_line_says_how_to_start_one";
    if role().is_some() {
        let cuda = Cuda::load();
        assert_eq!(call!(cuda, "cuInit" 2000, 0 => u32), 100);
        return;
    }
    let host = Host::new("256MiB");
    let mut command = host.program(TEST, "main");
    command.env("NVSHARE_SIM_DIR", host.home().join("nowhere"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("libcuda[")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("nvshare-gpu-sim run"), "{said}");
}
