"""Asks a real driver what the shim relies on, and what its constants come from. No shim, no agent, one process.

    python3 tests/gpu/driver_facts.py [--json OUT]

Takes seconds and at most 5 GiB of GPU memory; it refuses if less than twice that is free.
"""

import argparse
import ctypes as C
import json
import statistics
import sys
import threading
import time

MIB = 1 << 20
cuda = C.CDLL("libcuda.so.1")
u64 = C.c_uint64
clock = time.perf_counter


class Location(C.Structure):
    _fields_ = [("kind", C.c_int), ("id", C.c_int)]


class PoolProperties(C.Structure):
    _fields_ = [("kind", C.c_int), ("handles", C.c_int), ("location", Location), ("rest", C.c_ubyte * 72)]


def check(code, what):
    if code:
        sys.exit(f"{what}: CUDA error {code}")


def median(run, times):
    """Medians of each component of what `run` returns, in microseconds."""
    rows = [run() for _ in range(times)]
    return [round(statistics.median(column) * 1e6, 1) for column in zip(*rows)]


class Driver:
    def __init__(self):
        check(cuda.cuInit(0), "cuInit")
        self.context, self.stream, self.own = C.c_void_p(), C.c_void_p(), C.c_void_p()
        check(cuda.cuDevicePrimaryCtxRetain(C.byref(self.context), 0), "retain")
        check(cuda.cuCtxSetCurrent(self.context), "set current")
        for stream in (self.stream, self.own):
            check(cuda.cuStreamCreate(C.byref(stream), 1), "stream")

    def information(self):
        free, total = C.c_size_t(), C.c_size_t()
        check(cuda.cuMemGetInfo_v2(C.byref(free), C.byref(total)), "cuMemGetInfo")
        return free.value, total.value

    def plain(self, size):
        address = u64()
        check(cuda.cuMemAlloc_v2(C.byref(address), C.c_size_t(size)), "cuMemAlloc")
        return address

    def managed(self, size, populate=False):
        address = u64()
        check(cuda.cuMemAllocManaged(C.byref(address), C.c_size_t(size), 1), "cuMemAllocManaged")
        if populate:
            check(cuda.cuMemPrefetchAsync(address, C.c_size_t(size), 0, self.own), "prefetch")
        return address

    def life(self, make, size):
        """Seconds of allocation, first touch of everything, and free."""
        begin = clock()
        address = make(size)
        made = clock()
        cuda.cuMemsetD8Async(address, 1, C.c_size_t(size), self.stream)
        cuda.cuStreamSynchronize(self.stream)
        touched = clock()
        cuda.cuMemFree_v2(address)
        return made - begin, touched - made, clock() - touched

    def pool(self, kind):
        pool, properties = C.c_void_p(), PoolProperties(kind, 0, Location(1, 0))
        return cuda.cuMemPoolCreate(C.byref(pool), C.byref(properties)), pool

    def captured(self, work):
        """(code of the work, code of the end of a capture around it)."""
        check(cuda.cuStreamBeginCapture_v2(self.stream, 0), "begin capture")
        code, graph = work(), C.c_void_p()
        return [code, cuda.cuStreamEndCapture(self.stream, C.byref(graph))]


def memory(driver):
    """What a block costs, plain, managed by faults, and managed and populated by a prefetch on a stream of its own."""
    rows = {}
    for size in (4096, 65536, MIB, 2 * MIB, 4 * MIB, 20 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB):
        kinds = {
            "plain": driver.plain,
            "faults": driver.managed,
            "populated": lambda size: driver.managed(size, True),
        }
        rows[size] = {name: median(lambda: driver.life(make, size), 9) for name, make in kinds.items()}

    def asked():
        begin = clock()
        driver.information()
        return (clock() - begin,)

    free = driver.information()[0]
    block = driver.managed(1024 * MIB)
    unpopulated = free - driver.information()[0]
    check(cuda.cuMemPrefetchAsync(block, C.c_size_t(1024 * MIB), 0, driver.own), "prefetch")
    cuda.cuStreamSynchronize(driver.own)
    populated = free - driver.information()[0]
    cuda.cuMemFree_v2(block)
    return {
        "alloc_touch_free_us": rows,
        "cuMemGetInfo_us": median(asked, 200)[0],
        "used_by_1GiB_untouched": unpopulated,
        "used_by_1GiB_populated": populated,
    }


def pools(driver):
    """Whether pools of managed memory exist, and how they behave."""
    code, pool = driver.pool(2)
    if code:
        return {"create": code}
    address, flag, current = u64(), C.c_uint(7), C.c_void_p()

    def allocate():
        return cuda.cuMemAllocFromPoolAsync(C.byref(address), C.c_size_t(64 * MIB), pool, driver.stream)

    facts = {"create": code, "allocate": allocate()}
    facts["is_managed"] = [cuda.cuPointerGetAttribute(C.byref(flag), 8, address), flag.value]
    facts["ipc_handle"] = cuda.cuIpcGetMemHandle((C.c_char * 64)(), address)
    facts["free"] = cuda.cuMemFreeAsync(address, driver.stream)
    used = u64(1)
    cuda.cuStreamSynchronize(driver.stream)
    facts["used_after_free"] = [cuda.cuMemPoolGetAttribute(pool, 7, C.byref(used)), used.value]
    # The current pool is a notion per kind of memory: this does not redirect cuMemAllocAsync.
    facts["make_current"] = cuda.cuDeviceSetMemPool(0, pool)
    cuda.cuDeviceGetMemPool(C.byref(current), 0)
    facts["is_current"] = current.value == pool.value
    facts["captured_allocate_free"] = driver.captured(
        lambda: allocate() or cuda.cuMemFreeAsync(address, driver.stream)
    )

    def again():
        begin = clock()
        check(allocate(), "pool")
        made = clock()
        check(cuda.cuMemFreeAsync(address, driver.stream), "free")
        cuda.cuStreamSynchronize(driver.stream)
        return made - begin, clock() - made

    threshold = u64(1 << 62)
    cuda.cuMemPoolSetAttribute(pool, 4, C.byref(threshold))
    facts["reuse_alloc_free_us"] = median(again, 20)
    return facts


def captures(driver):
    """What another thread may do while a stream is captured in GLOBAL mode, by that thread's own mode: [code of the call,
    code of the end of the capture]. 900 and 901 mean that the capture is broken."""
    block = driver.managed(2 * MIB)
    calls = {
        "cuCtxSynchronize": lambda: cuda.cuCtxSynchronize(),
        "cuStreamSynchronize of another stream": lambda: cuda.cuStreamSynchronize(driver.own),
        "cuMemAllocManaged": lambda: cuda.cuMemAllocManaged(C.byref(u64()), C.c_size_t(2 * MIB), 1),
        "cuMemPrefetchAsync": lambda: cuda.cuMemPrefetchAsync(block, C.c_size_t(MIB), 0, driver.own),
    }
    facts = {}
    for mode, name in enumerate(("global", "thread_local", "relaxed")):
        for call, run in calls.items():
            codes = []

            def elsewhere():
                cuda.cuCtxSetCurrent(driver.context)
                cuda.cuThreadExchangeStreamCaptureMode(C.byref(C.c_int(mode)))
                codes.append(run())

            def work():
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
                return codes[0]

            facts[f"{call}, {name}"] = driver.captured(work)
    return facts


def cheaper_blocks(driver):
    """What could make large managed blocks cheaper, and what it would cost: freeing on another thread, populating with several
    threads, and blocks out of a managed pool."""
    size, count = 20 * MIB, 50
    scratch = driver.plain(1024 * MIB)

    def free_behind_work(address):
        """Milliseconds that another thread's free takes behind some 100 ms of work, and that a launch made meanwhile takes."""
        for _ in range(250):
            check(cuda.cuMemsetD8Async(scratch, 2, C.c_size_t(1024 * MIB), driver.stream), "memset")
        took = []

        def free():
            cuda.cuCtxSetCurrent(driver.context)
            begin = clock()
            check(cuda.cuMemFree_v2(address), "free")
            took.append(clock() - begin)

        thread = threading.Thread(target=free)
        thread.start()
        time.sleep(0.005)
        begin = clock()
        check(cuda.cuMemsetD8Async(scratch, 3, C.c_size_t(4), driver.own), "memset")
        launched = clock() - begin
        thread.join()
        cuda.cuCtxSynchronize()
        return [round(took[0] * 1e3, 1), round(launched * 1e3, 1)]

    def populating(threads):
        """Microseconds for each of many blocks that several threads populate."""
        block, streams = driver.managed(threads * count * size), [C.c_void_p() for _ in range(threads)]
        for stream in streams:
            check(cuda.cuStreamCreate(C.byref(stream), 1), "stream")

        def work(at):
            cuda.cuCtxSetCurrent(driver.context)
            for piece in range(at * count, (at + 1) * count):
                address = u64(block.value + piece * size)
                check(cuda.cuMemPrefetchAsync(address, C.c_size_t(size), 0, streams[at]), "prefetch")
            cuda.cuStreamSynchronize(streams[at])

        workers = [threading.Thread(target=work, args=(at,)) for at in range(threads)]
        begin = clock()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = clock() - begin
        cuda.cuMemFree_v2(block)
        return round(took / (threads * count) * 1e6, 1)

    def many(make):
        """Microseconds for each of many blocks that live at the same time: allocation, first touch, free, and the free's rest."""
        begin = clock()
        blocks = [make(size) for _ in range(count)]
        made = clock()
        for block in blocks:
            cuda.cuMemsetD8Async(block, 1, C.c_size_t(size), driver.stream)
            cuda.cuStreamSynchronize(driver.stream)
        touched = clock()
        for block in blocks:
            check(cuda.cuMemFree_v2(block), "free")
        freed = clock()
        cuda.cuCtxSynchronize()
        cuda.cuStreamSynchronize(driver.stream)
        times = (made - begin, touched - made, freed - touched, clock() - freed)
        return [round(seconds / count * 1e6, 1) for seconds in times]

    code, pool = driver.pool(2)

    def pooled(size):
        address = u64()
        check(cuda.cuMemAllocFromPoolAsync(C.byref(address), C.c_size_t(size), pool, driver.own), "pool")
        check(cuda.cuMemPrefetchAsync(address, C.c_size_t(size), 0, driver.own), "prefetch")
        return address

    kinds = {"plain": driver.plain, "managed": lambda size: driver.managed(size, True)}
    if not code:
        kinds["pooled"] = pooled
    facts = {
        "free_and_launch_behind_work_ms": {
            "plain": free_behind_work(driver.plain(size)),
            "managed": free_behind_work(driver.managed(size, True)),
        },
        "populate_20MiB_us_by_threads": {threads: populating(threads) for threads in (1, 2, 4)},
        "alloc_touch_free_rest_of_50_us": {name: many(make) for name, make in kinds.items()},
    }
    cuda.cuMemFree_v2(scratch)
    return facts


def look_ups():
    """(found, status) of names that are not base names."""
    facts = {}
    for name in (b"cuMemAlloc", b"cuMemAlloc_v2", b"cuLaunchKernel_ptsz", b"cuGetProcAddress_v2", b""):
        found, status = C.c_void_p(), C.c_int(99)
        code = cuda.cuGetProcAddress_v2(name, C.byref(found), 13000, u64(0), C.byref(status))
        facts[name.decode()] = [code, bool(found.value), status.value]
    return facts


def sharing(driver):
    """Codes of cuIpcGetMemHandle."""
    handle = (C.c_char * 64)()
    return {
        "plain": cuda.cuIpcGetMemHandle(handle, driver.plain(2 * MIB)),
        "managed": cuda.cuIpcGetMemHandle(handle, driver.managed(4 * MIB)),
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", metavar="OUT", help="also write the facts to this file")
    options = arguments.parse_args()
    driver = Driver()
    if driver.information()[0] < 10 * 1024 * MIB:
        sys.exit("less than 10 GiB of GPU memory are free; nothing was tried")
    version = C.c_int()
    cuda.cuDriverGetVersion(C.byref(version))
    facts = {
        "driver_version": version.value,
        "memory": memory(driver),
        "cheaper_blocks": cheaper_blocks(driver),
        "pools": pools(driver),
        "captures": captures(driver),
        "look_ups": look_ups(),
        "sharing": sharing(driver),
    }
    text = json.dumps(facts, indent=1)
    print(text)
    if options.json:
        with open(options.json, "w") as out:
            out.write(text + "\n")


if __name__ == "__main__":
    main()
