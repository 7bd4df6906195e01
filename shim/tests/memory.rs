//! What a program sees of its memory under the shim, on the simulated GPU: sums, limits, pools, populating ahead.

use std::{process::Command, time::Duration};

use nvshare_tests::{
    Cuda, SimulatorOptions, call,
    program::{Host, moved, passed, resident, role, shimmed_program},
    wait_until,
};

const MIB: usize = 1 << 20;

/// (free, total) as the program is told.
fn information(cuda: &Cuda) -> (usize, usize) {
    let (mut free, mut total) = (0, 0);
    let code = call!(cuda, "cuMemGetInfo" 3020, &raw mut free => *mut usize, &raw mut total => *mut usize);
    assert_eq!(code, 0);
    (free, total)
}

fn try_allocate(cuda: &Cuda, bytes: usize) -> (u32, u64) {
    let mut address = 0;
    (call!(cuda, "cuMemAlloc" 3020, &raw mut address => *mut u64, bytes => usize), address)
}

fn free(cuda: &Cuda, address: u64) -> u32 {
    call!(cuda, "cuMemFree" 3020, address => u64)
}

fn allocate_async(cuda: &Cuda, bytes: usize, stream: usize) -> (u32, u64) {
    let mut address = 0;
    let code = call!(cuda, "cuMemAllocAsync" 11020,
        &raw mut address => *mut u64, bytes => usize, stream => usize);
    (code, address)
}

fn free_async(cuda: &Cuda, address: u64, stream: usize) -> u32 {
    call!(cuda, "cuMemFreeAsync" 11020, address => u64, stream => usize)
}

/// `CU_POINTER_ATTRIBUTE_IS_MANAGED`, with the code of the query.
fn is_managed(cuda: &Cuda, address: u64) -> (u32, u32) {
    let mut managed = 7_u32;
    let code = call!(cuda, "cuPointerGetAttribute" 4000,
        &raw mut managed => *mut u32, 8 => i32, address => u64);
    (code, managed)
}

/// C17.
#[test]
fn threads_that_allocate_and_free_leave_the_sum_as_it_was() {
    shimmed_program("threads_that_allocate_and_free_leave_the_sum_as_it_was", &[], |cuda| {
        let seed = u64::from(std::process::id());
        println!("seed {seed}");
        let (before, _) = information(cuda);
        let mut context = 0_usize;
        assert_eq!(call!(cuda, "cuCtxGetCurrent" 4000, &raw mut context => *mut usize), 0);
        std::thread::scope(|scope| {
            for thread in 0..16 {
                scope.spawn(move || {
                    let cuda = Cuda::load();
                    assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, context => usize), 0);
                    let mut random = seed ^ (0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(thread));
                    for _ in 0..60 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let bytes = 1 + (random >> 33) as usize % (5 * MIB);
                        match try_allocate(&cuda, bytes) {
                            (0, address) => assert_eq!(free(&cuda, address), 0),
                            // Together the threads may reach the end of the GPU.
                            (code, _) => assert_eq!(code, 2),
                        }
                    }
                });
            }
        });
        assert_eq!(information(cuda).0, before);
    });
}

/// C19 and C20.
#[test]
fn what_is_free_falls_by_what_is_allocated_also_on_a_small_card() {
    const TEST: &str = "what_is_free_falls_by_what_is_allocated_also_on_a_small_card";
    if role().is_some() {
        let cuda = Cuda::open();
        let (before, total) = information(&cuda);
        assert_eq!(total, 64 * MIB);
        assert!(before <= total && before > total / 2, "{before} of {total}");
        let blocks: Vec<u64> = [100, MIB, 10 * MIB].iter().map(|&bytes| cuda.allocate(bytes)).collect();
        assert_eq!(information(&cuda).0, before - 100 - 11 * MIB);
        for block in blocks {
            assert_eq!(free(&cuda, block), 0);
        }
        assert_eq!(information(&cuda).0, before);
        // A framework that takes all that is free gets it, and not a byte more than there is.
        let (code, all) = try_allocate(&cuda, before);
        assert_eq!((code, information(&cuda).0), (0, 0));
        assert_eq!(try_allocate(&cuda, total).0, 2);
        assert_eq!(free(&cuda, all), 0);
        return;
    }
    let host = Host::new("64MiB");
    passed(&host.shimmed(TEST, "main", &host.home().join("nobody")).output().unwrap());
}

/// C21.
#[test]
fn a_question_that_the_driver_refuses_is_refused_and_leaves_its_outputs() {
    shimmed_program("a_question_that_the_driver_refuses_is_refused_and_leaves_its_outputs", &[], |cuda| {
        let (mut free, mut total, mut context) = (71_usize, 72_usize, 0_usize);
        assert_eq!(call!(cuda, "cuCtxPopCurrent" 4000, &raw mut context => *mut usize), 0);
        let code =
            call!(cuda, "cuMemGetInfo" 3020, &raw mut free => *mut usize, &raw mut total => *mut usize);
        assert_eq!((code, free, total), (201, 71, 72));
        assert_eq!(try_allocate(cuda, 4 * MIB).0, 201);
        assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, context => usize), 0);
        assert_eq!(try_allocate(cuda, 4 * MIB).0, 0);
        assert!(information(cuda).0 > 0);
    });
}

/// C22.
#[test]
fn each_gpu_has_its_own_sum_and_limit() {
    const TEST: &str = "each_gpu_has_its_own_sum_and_limit";
    if role().is_some() {
        let cuda = Cuda::open();
        let (mut first, mut second) = (0_usize, 0_usize);
        assert_eq!(call!(cuda, "cuCtxGetCurrent" 4000, &raw mut first => *mut usize), 0);
        let code = call!(cuda, "cuDevicePrimaryCtxRetain" 7000, &raw mut second => *mut usize, 1 => i32);
        assert_eq!(code, 0);
        assert_eq!(try_allocate(&cuda, 40 * MIB).0, 0);
        assert_eq!(try_allocate(&cuda, 40 * MIB).0, 2, "the limit is 64 MiB on each GPU");
        let left = information(&cuda);
        assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, second => usize), 0);
        assert_eq!(try_allocate(&cuda, 40 * MIB).0, 0);
        assert_eq!(try_allocate(&cuda, 40 * MIB).0, 2);
        assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, first => usize), 0);
        assert_eq!(information(&cuda), left);
        let mut total = 0_usize;
        assert_eq!(call!(cuda, "cuDeviceTotalMem" 3020, &raw mut total => *mut usize, 1 => i32), 0);
        assert_eq!(total, 64 * MIB);
        return;
    }
    let host =
        Host::with(&SimulatorOptions { gpus: 2, memory: "128MiB".into(), ..SimulatorOptions::default() });
    let mut command: Command = host.shimmed(TEST, "main", &host.home().join("nobody"));
    passed(&command.env("NVSHARE_MEMORY_LIMIT", "64MiB").output().unwrap());
}

/// One way to allocate: bytes to code and address.
type Make<'a> = &'a dyn Fn(usize) -> (u32, u64);

/// C24, for the kinds that the simulated driver has; `memory_kinds.rs` has the others.
#[test]
fn a_limit_holds_for_the_sum_of_every_kind() {
    let limit = [("NVSHARE_MEMORY_LIMIT", "64MiB")];
    shimmed_program("a_limit_holds_for_the_sum_of_every_kind", &limit, |cuda| {
        let (stream, mut pool) = (cuda.stream(1), 0_usize);
        let properties = pool_properties();
        let code = call!(cuda, "cuMemPoolCreate" 11020,
            &raw mut pool => *mut usize, properties.as_ptr() => *const u64);
        assert_eq!(code, 0);
        let managed: Make<'_> = &|bytes| {
            let mut address = 0;
            let code = call!(cuda, "cuMemAllocManaged" 6000,
                &raw mut address => *mut u64, bytes => usize, 1 => u32);
            (code, address)
        };
        let pitch: Make<'_> = &|bytes| {
            let (mut address, mut row) = (0, 0_usize);
            let code = call!(cuda, "cuMemAllocPitch" 3020, &raw mut address => *mut u64,
                &raw mut row => *mut usize, 1024 => usize, bytes / 1024 => usize, 4 => u32);
            assert!(code != 0 || row == 1024);
            (code, address)
        };
        let from_pool: Make<'_> = &|bytes| {
            let mut address = 0;
            let code = call!(cuda, "cuMemAllocFromPoolAsync" 11020,
                &raw mut address => *mut u64, bytes => usize, pool => usize, stream => usize);
            (code, address)
        };
        let unnamed: Make<'_> = &|bytes| allocate_async(cuda, bytes, stream);
        let plain: Make<'_> = &|bytes| try_allocate(cuda, bytes);
        for (name, make) in [
            ("managed", managed),
            ("pitch", pitch),
            ("pool", from_pool),
            ("async", unnamed),
            ("plain", plain),
        ] {
            let before = information(cuda).0;
            let (code, address) = make(40 * MIB);
            assert_eq!(code, 0, "{name}");
            assert_eq!(information(cuda).0, before - 40 * MIB, "{name} is not counted");
            for (other, make) in [("plain", plain), ("async", unnamed), ("managed", managed)] {
                assert_eq!(make(40 * MIB).0, 2, "{other} beside {name}");
            }
            assert_eq!(free(cuda, address), 0, "{name}");
            assert_eq!(information(cuda).0, before, "{name} stays counted");
        }
    });
}

/// `CUmemPoolProps` of a plain pool on device 0.
fn pool_properties() -> [u64; 11] {
    let mut properties = [0; 11];
    // Type 1 (pinned) and no handle; then location 1 (device) with number 0.
    properties[0] = 1;
    properties[1] = 1;
    properties
}

#[test]
fn allocations_in_stream_order_are_managed_and_the_default_pool_is_the_one_they_come_from() {
    const TEST: &str =
        "allocations_in_stream_order_are_managed_and_the_default_pool_is_the_one_they_come_from";
    shimmed_program(TEST, &[], |cuda| {
        let stream = cuda.stream(1);
        let (code, address) = allocate_async(cuda, 8 * MIB, stream);
        assert_eq!((code, is_managed(cuda, address)), (0, (0, 1)));
        let pools = ["cuDeviceGetDefaultMemPool", "cuDeviceGetMemPool"].map(|name| {
            let function = cuda.look_up(name, 11020, 0);
            // SAFETY: both functions have this type.
            let function: extern "C" fn(*mut usize, i32) -> u32 = unsafe { std::mem::transmute(function) };
            let mut pool = 0_usize;
            assert_eq!(function(&raw mut pool, 0), 0);
            pool
        });
        assert_eq!(pools[0], pools[1]);
        // CU_MEMPOOL_ATTR_USED_MEM_CURRENT: the figure that frameworks show.
        let mut used = 0_u64;
        let code = call!(cuda, "cuMemPoolGetAttribute" 11020,
            pools[0] => usize, 7 => i32, &raw mut used => *mut u64);
        assert_eq!((code, used), (0, 8 * MIB as u64));
        assert_eq!(cuda.launch("fill", stream, &[address, 2 * MIB as u64, 5]), 0);
        assert_eq!(cuda.synchronize(stream), 0);
        assert!(cuda.read(address, 2 * MIB).iter().all(|&word| word == 5));
        assert_eq!(free_async(cuda, address, stream), 0);
        assert_eq!(cuda.synchronize(stream), 0);
        assert_eq!(call!(cuda, "cuMemPoolDestroy" 11020, pools[0] => usize), 1, "a default pool");

        // A pool of the program is managed too, and is the current one once the program says so.
        let (mut pool, mut current) = (0_usize, 0_usize);
        let code = call!(cuda, "cuMemPoolCreate" 11020,
            &raw mut pool => *mut usize, pool_properties().as_ptr() => *const u64);
        assert_eq!(code, 0);
        assert_eq!(call!(cuda, "cuDeviceSetMemPool" 11020, 0 => i32, pool => usize), 0);
        assert_eq!(call!(cuda, "cuDeviceGetMemPool" 11020, &raw mut current => *mut usize, 0 => i32), 0);
        assert_eq!(current, pool);
        let (code, address) = allocate_async(cuda, 6 * MIB, stream);
        assert_eq!((code, is_managed(cuda, address)), (0, (0, 1)));
        let code = call!(cuda, "cuMemPoolGetAttribute" 11020,
            pool => usize, 7 => i32, &raw mut used => *mut u64);
        assert_eq!((code, used), (0, 6 * MIB as u64));
        assert_eq!(free_async(cuda, address, stream), 0);
        assert_eq!(cuda.synchronize(stream), 0);
        // Destroyed, it gives way to the default one.
        assert_eq!(call!(cuda, "cuMemPoolDestroy" 11020, pool => usize), 0);
        assert_eq!(call!(cuda, "cuDeviceGetMemPool" 11020, &raw mut current => *mut usize, 0 => i32), 0);
        assert_eq!(current, pools[0]);
        assert_eq!(allocate_async(cuda, 6 * MIB, stream).0, 0);
    });
}

#[test]
fn what_goes_with_its_context_is_no_longer_counted() {
    shimmed_program("what_goes_with_its_context_is_no_longer_counted", &[], |cuda| {
        let (mut primary, mut other) = (0_usize, 0_usize);
        assert_eq!(call!(cuda, "cuCtxGetCurrent" 4000, &raw mut primary => *mut usize), 0);
        let kept = cuda.allocate(8 * MIB);
        let before = information(cuda).0;
        let code = call!(cuda, "cuCtxCreate" 3020, &raw mut other => *mut usize, 0 => u32, 0 => i32);
        assert_eq!(code, 0);
        let _lost = [cuda.allocate(20 * MIB), cuda.allocate(4096), cuda.allocate_managed(5 * MIB)];
        assert_eq!(information(cuda).0, before - 25 * MIB - 4096);
        assert_eq!(call!(cuda, "cuCtxDestroy" 4000, other => usize), 0);
        assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, primary => usize), 0);
        assert_eq!(information(cuda).0, before, "only what the context held has gone");
        assert_eq!(free(cuda, kept), 0);

        // A reset takes everything, and the program goes on with what it has then.
        let empty = information(cuda).0;
        cuda.allocate(30 * MIB);
        assert_eq!(allocate_async(cuda, 8 * MIB, 0).0, 0);
        assert_eq!(call!(cuda, "cuDevicePrimaryCtxReset" 11000, 0 => i32), 0);
        let code = call!(cuda, "cuDevicePrimaryCtxRetain" 7000, &raw mut primary => *mut usize, 0 => i32);
        assert_eq!(code, 0);
        assert_eq!(call!(cuda, "cuCtxSetCurrent" 4000, primary => usize), 0);
        assert_eq!(information(cuda).0, empty);
        let (code, address) = allocate_async(cuda, 8 * MIB, 0);
        assert_eq!((code, is_managed(cuda, address)), (0, (0, 1)));
    });
}

/// C25.
#[test]
fn a_free_of_what_the_shim_never_saw_gets_the_drivers_own_answer() {
    shimmed_program("a_free_of_what_the_shim_never_saw_gets_the_drivers_own_answer", &[], |cuda| {
        let stream = cuda.stream(1);
        assert_eq!((free(cuda, 0xdead_0000), free_async(cuda, 0xdead_0000, stream)), (1, 1));
        let address = cuda.allocate(4 * MIB);
        let before = information(cuda).0;
        assert_eq!(free(cuda, address + 512), 1, "inside a block");
        assert_eq!(information(cuda).0, before, "a refused free changes the sum");
        assert_eq!(free(cuda, address), 0);
        assert_eq!(free(cuda, address), 1, "freed twice");
        assert_eq!(information(cuda).0, before + 4 * MIB);
    });
}

/// C26.
#[test]
fn pointer_attributes_are_the_drivers_in_both_forms() {
    shimmed_program("pointer_attributes_are_the_drivers_in_both_forms", &[], |cuda| {
        let (large, small) = (cuda.allocate(8 * MIB), cuda.allocate(4096));
        for (address, managed) in [(large, 1), (small, 0), (cuda.allocate_managed(4096), 1)] {
            assert_eq!(is_managed(cuda, address), (0, managed));
            // Memory type, managed, device ordinal: in one call.
            let (mut kind, mut listed, mut ordinal) = (7_u32, 7_u32, 7_i32);
            let places = [(&raw mut kind).cast::<u8>(), (&raw mut listed).cast(), (&raw mut ordinal).cast()];
            let code = call!(cuda, "cuPointerGetAttributes" 7000,
                3 => u32, [2_i32, 8, 9].as_ptr() => *const i32, places.as_ptr() => *const *mut u8,
                address => u64);
            assert_eq!((code, kind, listed & 0xff, ordinal), (0, 2, managed, 0));
        }
        let mut managed = 7_u32;
        let code = call!(cuda, "cuPointerGetAttribute" 4000,
            &raw mut managed => *mut u32, 8 => i32, 0xdead_0000 => u64);
        assert_eq!((code, managed), (1, 7), "an unknown address leaves the output");
    });
}

#[test]
fn a_fresh_block_is_on_the_gpu_before_it_is_touched_unless_it_is_a_giant() {
    const TEST: &str = "a_fresh_block_is_on_the_gpu_before_it_is_touched_unless_it_is_a_giant";
    if role().is_some() {
        let cuda = Cuda::open();
        let populated = |bytes: usize| {
            let wait = || Ok((resident() == bytes as u64).then_some(()));
            wait_until("memory to be populated", Duration::from_secs(20), wait).unwrap();
        };
        let block = cuda.allocate(3 * MIB);
        populated(4 * MIB);
        let giant = cuda.allocate(128 * MIB);
        let next = cuda.allocate(5 * MIB);
        // Had the giant been populated, it would have been before the next block.
        populated(10 * MIB);
        assert_eq!(cuda.launch("fill", 0, &[block, 1024, 1]), 0);
        assert_eq!(cuda.synchronize(0), 0);
        assert_eq!(moved(), (0, 0), "populating is no eviction and no refault");
        for address in [block, giant, next] {
            assert_eq!(free(&cuda, address), 0);
        }
        assert_eq!(resident(), 0);
        return;
    }
    let host = Host::new("512MiB");
    passed(&host.shimmed(TEST, "main", &host.home().join("nobody")).output().unwrap());
}
