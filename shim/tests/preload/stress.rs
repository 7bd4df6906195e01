//! Threads that submit work of several kinds as fast as they can, until the input ends.
//! Arguments: a seed, and how many threads.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    io::BufRead,
    mem::transmute,
    ptr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

type Ptr = *mut c_void;
type Launch =
    extern "C" fn(Ptr, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Ptr, Ptr, Ptr) -> c_int;
type Fill = extern "C" fn(u64, c_uint, usize, Ptr) -> c_int;
type Graph = extern "C" fn(Ptr, Ptr) -> c_int;

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> Ptr;
    fn dlsym(handle: Ptr, name: *const c_char) -> Ptr;
}

fn get(name: &CStr) -> Ptr {
    let found = unsafe { dlsym(dlopen(c"libcuda.so.1".as_ptr(), 2), name.as_ptr()) };
    assert!(!found.is_null());
    found
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>().unwrap());
    let (seed, threads) = (arguments.next().unwrap(), arguments.next().unwrap());
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let retain: extern "C" fn(*mut Ptr, c_int) -> c_int = unsafe { transmute(get(c"cuDevicePrimaryCtxRetain")) };
    let mut context = ptr::null_mut();
    assert_eq!(retain(&raw mut context, 0), 0);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (stop, done) = (&stop, &done);
            scope.spawn(move || {
                let launch: Launch = unsafe { transmute(get(c"cuLaunchKernel")) };
                let launch_per_thread: Launch = unsafe { transmute(get(c"cuLaunchKernel_ptsz")) };
                let fill: Fill = unsafe { transmute(get(c"cuMemsetD32Async")) };
                let graph: Graph = unsafe { transmute(get(c"cuGraphLaunch")) };
                let mut random = seed ^ (thread + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                while !stop.load(SeqCst) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let null = ptr::null_mut();
                    match random % 4 {
                        0 => assert_eq!(launch(null, 1, 1, 1, 1, 1, 1, 0, 0x10 as Ptr, null, 5 as Ptr), 5),
                        1 => assert_eq!(launch_per_thread(null, 1, 1, 1, 1, 1, 1, 0, null, null, 6 as Ptr), 6),
                        2 => assert_eq!(fill(0x1000, 7, 1, 0x10 as Ptr), 7),
                        _ => assert_eq!(graph(null, 8 as Ptr), 8),
                    }
                    done.fetch_add(1, SeqCst);
                    for _ in 0..random >> 56 {
                        std::hint::spin_loop();
                    }
                }
            });
        }
        // Ends with the input.
        assert_eq!(std::io::stdin().lock().lines().count(), 0);
        stop.store(true, SeqCst);
    });
    println!("{}", done.load(SeqCst));
}
