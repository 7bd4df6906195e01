//! Memory that is not a plain block, under the shim: physical memory and mappings, arrays, nodes of graphs, and memory
//! that other processes share.

use nvshare_tests::{
    Cuda, call,
    program::{Host, passed, role, shimmed_program},
};

const MIB: usize = 1 << 20;

fn free_bytes(cuda: &Cuda) -> usize {
    let (mut free, mut total) = (0, 0);
    let code = call!(cuda, "cuMemGetInfo" 3020, &raw mut free => *mut usize, &raw mut total => *mut usize);
    assert_eq!(code, 0);
    free
}

fn try_allocate(cuda: &Cuda, bytes: usize) -> (u32, u64) {
    let mut address = 0;
    (call!(cuda, "cuMemAlloc" 3020, &raw mut address => *mut u64, bytes => usize), address)
}

/// Makes physical memory on device 0.
fn create(cuda: &Cuda, bytes: usize) -> (u32, u64) {
    // Kind 1 (pinned), no handle types, location 1 (device) number 0.
    let (properties, mut handle) = ([1_u64, 1, 0, 0], 0);
    let code = call!(cuda, "cuMemCreate" 10020,
        &raw mut handle => *mut u64, bytes => usize, properties.as_ptr() => *const u64, 0 => u64);
    (code, handle)
}

fn reserve(cuda: &Cuda, bytes: usize) -> u64 {
    let mut address = 0;
    let code = call!(cuda, "cuMemAddressReserve" 10020,
        &raw mut address => *mut u64, bytes => usize, 0 => usize, 0 => u64, 0 => u64);
    assert_eq!(code, 0);
    address
}

fn map(cuda: &Cuda, address: u64, bytes: usize, handle: u64) -> u32 {
    call!(cuda, "cuMemMap" 10020,
        address => u64, bytes => usize, 0 => usize, handle => u64, 0 => u64)
}

fn unmap(cuda: &Cuda, address: u64, bytes: usize) -> u32 {
    call!(cuda, "cuMemUnmap" 10020, address => u64, bytes => usize)
}

fn release(cuda: &Cuda, handle: u64) -> u32 {
    call!(cuda, "cuMemRelease" 10020, handle => u64)
}

/// C24 for mapped memory: counted from its creation until neither a handle nor a mapping holds it.
#[test]
fn physical_memory_is_counted_until_its_last_handle_and_mapping_are_gone() {
    const TEST: &str = "physical_memory_is_counted_until_its_last_handle_and_mapping_are_gone";
    shimmed_program(TEST, &[("NVSHARE_MEMORY_LIMIT", "64MiB")], |cuda| {
        let before = free_bytes(cuda);
        let (code, first) = create(cuda, 40 * MIB);
        assert_eq!((code, free_bytes(cuda)), (0, before - 40 * MIB));
        assert_eq!((create(cuda, 40 * MIB).0, try_allocate(cuda, 40 * MIB).0), (2, 2));
        let address = reserve(cuda, 64 * MIB);
        assert_eq!(map(cuda, address, 40 * MIB, first), 0);
        // ggml's pool releases the handle at once and lives by the mapping.
        assert_eq!(release(cuda, first), 0);
        assert_eq!(free_bytes(cuda), before - 40 * MIB, "mapped memory is still there");
        assert_eq!(cuda.launch("fill", 0, &[address, 10 * MIB as u64, 3]), 0);
        assert_eq!(cuda.synchronize(0), 0);
        let mut again = 0_u64;
        let code = call!(cuda, "cuMemRetainAllocationHandle" 11000,
            &raw mut again => *mut u64, address => u64);
        assert_eq!((code, again), (0, first));
        assert_eq!(unmap(cuda, address, 40 * MIB), 0);
        assert_eq!(free_bytes(cuda), before - 40 * MIB, "a retained handle holds it");
        // Elsewhere it is the same memory.
        assert_eq!(map(cuda, address + 2 * MIB as u64, 40 * MIB, first), 0);
        assert_eq!(cuda.read(address + 2 * MIB as u64, 10), [3; 10]);
        assert_eq!(release(cuda, first), 0);
        assert_eq!(unmap(cuda, address + 2 * MIB as u64, 40 * MIB), 0);
        assert_eq!(free_bytes(cuda), before);

        // Several mappings end with one call, as when PyTorch's expandable segments shrink.
        for piece in 0..4 {
            let (code, handle) = create(cuda, 2 * MIB);
            assert_eq!((code, map(cuda, address + piece * 2 * MIB as u64, 2 * MIB, handle)), (0, 0));
            assert_eq!(release(cuda, handle), 0);
        }
        assert_eq!(free_bytes(cuda), before - 8 * MIB);
        assert_eq!(unmap(cuda, address, 8 * MIB), 0);
        assert_eq!(free_bytes(cuda), before);
        assert_eq!(unmap(cuda, address, 8 * MIB), 1, "the driver's own answer");
        assert_eq!(call!(cuda, "cuMemAddressFree" 10020, address => u64, 64 * MIB => usize), 0);
    });
}

/// C24 for arrays and for graphs that allocate.
#[test]
fn arrays_and_the_memory_of_graphs_count_against_the_limit() {
    const TEST: &str = "arrays_and_the_memory_of_graphs_count_against_the_limit";
    shimmed_program(TEST, &[("NVSHARE_MEMORY_LIMIT", "64MiB")], |cuda| {
        let before = free_bytes(cuda);
        // 2048 x 1280 texels of four floats: 40 MiB. Format 0x20 is float; format and channels share a word.
        let (flat, mut array) = ([2048_u64, 1280, 4 << 32 | 0x20], 0_u64);
        let make = |array: &mut u64| {
            call!(cuda, "cuArrayCreate" 3020,
                std::ptr::from_mut(array) => *mut u64, flat.as_ptr() => *const u64)
        };
        assert_eq!(make(&mut array), 0);
        assert_eq!(free_bytes(cuda), before - 40 * MIB);
        assert_eq!((make(&mut 0), try_allocate(cuda, 40 * MIB).0), (2, 2));
        assert_eq!(call!(cuda, "cuArrayDestroy" 2000, array => u64), 0);
        assert_eq!(free_bytes(cuda), before);
        let solid = [1024_u64, 1024, 4, 1 << 32 | 0x20, 0];
        let code = call!(cuda, "cuMipmappedArrayCreate" 5000,
            &raw mut array => *mut u64, solid.as_ptr() => *const u64, 2 => u32);
        assert_eq!((code, free_bytes(cuda)), (0, before - 18 * MIB), "16 MiB, and a level of an eighth");
        assert_eq!(call!(cuda, "cuMipmappedArrayDestroy" 5000, array => u64), 0);
        assert_eq!(free_bytes(cuda), before);

        let (mut graph, mut node) = (0_usize, 0_usize);
        assert_eq!(call!(cuda, "cuGraphCreate" 10000, &raw mut graph => *mut usize, 0 => u32), 0);
        let add = |node: &mut usize, bytes: usize| {
            // A pool of kind 1 on device 0, then (from word 11 on) no accesses, the size, and room for the address.
            let mut parameters = [0_u64; 16];
            (parameters[0], parameters[1], parameters[13]) = (1, 1, bytes as u64);
            let code = call!(cuda, "cuGraphAddMemAllocNode" 11040,
                std::ptr::from_mut(node) => *mut usize, graph => usize, std::ptr::null() => *const usize,
                0 => usize, parameters.as_mut_ptr() => *mut u64);
            (code, parameters[14])
        };
        let (code, address) = add(&mut node, 40 * MIB);
        assert!(code == 0 && address != 0);
        assert_eq!(free_bytes(cuda), before - 40 * MIB, "what the driver says that graphs hold");
        assert_eq!((add(&mut node, 40 * MIB).0, try_allocate(cuda, 40 * MIB).0), (2, 2));
        assert_eq!(try_allocate(cuda, 20 * MIB).0, 0);
    });
}

fn share(cuda: &Cuda, address: u64) -> u32 {
    let mut handle = [0_u64; 8];
    call!(cuda, "cuIpcGetMemHandle" 4010, handle.as_mut_ptr() => *mut u64, address => u64)
}

fn is_managed(cuda: &Cuda, address: u64) -> bool {
    let mut managed = 7_u32;
    let code = call!(cuda, "cuPointerGetAttribute" 4000,
        &raw mut managed => *mut u32, 8 => i32, address => u64);
    assert_eq!(code, 0);
    managed == 1
}

/// C27: what can be shared is shared; what cannot is refused as by the driver, said once, and avoided from then on.
#[test]
fn a_large_block_is_refused_as_by_the_driver_and_later_ones_can_be_shared() {
    const TEST: &str = "a_large_block_is_refused_as_by_the_driver_and_later_ones_can_be_shared";
    let Some(said) = shimmed_program(TEST, &[], |cuda| {
        let large = cuda.allocate(8 * MIB);
        assert!(is_managed(cuda, large));
        assert_eq!(share(cuda, large), 1, "CUDA_ERROR_INVALID_VALUE, the driver's own");
        assert_eq!(share(cuda, large), 1);
        let later = cuda.allocate(8 * MIB);
        assert!(!is_managed(cuda, later), "memory of a program that shares memory is pageable");
        assert_eq!(share(cuda, later), 0);
    }) else {
        return;
    };
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("CUDA IPC")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("NVSHARE_MANAGED_MIN_BYTES"), "{said}");
}

#[test]
fn a_small_block_can_be_shared_by_default() {
    let Some(said) = shimmed_program("a_small_block_can_be_shared_by_default", &[], |cuda| {
        // What PyTorch takes from the driver for its small tensors.
        assert_eq!(share(cuda, cuda.allocate(2 * MIB)), 0);
    }) else {
        return;
    };
    assert!(!said.contains("CUDA IPC"), "{said}");
}

#[test]
fn the_memory_of_one_of_several_ranks_can_be_shared() {
    const TEST: &str = "the_memory_of_one_of_several_ranks_can_be_shared";
    shimmed_program(TEST, &[("WORLD_SIZE", "2")], |cuda| {
        let block = cuda.allocate(64 * MIB);
        assert!(!is_managed(cuda, block));
        assert_eq!(share(cuda, block), 0);
    });
}

#[test]
fn every_block_stays_on_the_device_if_the_user_wants_that() {
    const TEST: &str = "every_block_stays_on_the_device_if_the_user_wants_that";
    if role().is_some() {
        let cuda = Cuda::open();
        assert!(!is_managed(&cuda, cuda.allocate(64 * MIB)));
        let (stream, mut address) = (cuda.stream(1), 0);
        let code = call!(cuda, "cuMemAllocAsync" 11020,
            &raw mut address => *mut u64, 8 * MIB => usize, stream => usize);
        assert_eq!(code, 0);
        assert!(!is_managed(&cuda, address));
        return;
    }
    let host = Host::new("256MiB");
    let mut command = host.shimmed(TEST, "main", &host.home().join("nobody"));
    passed(&command.env("NVSHARE_MANAGED_MIN_BYTES", "never").output().unwrap());
}
