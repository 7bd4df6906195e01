"""A CUDA program for the measurements of hand-overs, without a framework: it knows nothing of nvshare.

Commands arrive as lines on standard input, answers leave as JSON lines on standard output:

    blocks COUNT MIB SEED   allocate and fill COUNT blocks of MIB each
    big MIB TOUCHED         allocate one block of MIB and write its first TOUCHED MiB
    check                   every word of every block, by a kernel: milliseconds and wrong words
    sweep-for SECONDS       check again and again
    soak-begin SEED MIB     allocate, write, check, free and fork at random within MIB, until soak-end
    soak-end                how often what was done, and wrong words
    stray MIB               without nvshare: GPU accesses to memory that is protected and leaves
    link MIB                rates of copies from and to pinned memory, GB/s
    quit

On the simulated GPU its built-in kernels are used: sums of equal words in place of words that tell their place.
"""

import ctypes as C
import mmap
import os
import random
import statistics
import threading
import time

from program import serve

MIB = 1 << 20
cuda = C.CDLL("libcuda.so.1")
libc = C.CDLL(None, use_errno=True)
u64, u32, size_t = C.c_uint64, C.c_uint32, C.c_size_t
HOST = -1
NO_BINARY = 209  # CUDA_ERROR_NO_BINARY_FOR_GPU: the simulated GPU runs no PTX
SIMULATED = b"nvshare-sim-module 1\nfill ptr u64 u32\nchecksum ptr u64 ptr\n\0"

HEAD = """
.version 6.4
.target sm_70
.address_size 64
"""
# A grid-wide loop over 32-bit words: %rd4 is the index, %rd7 the address.
LOOP = """
.visible .entry {name}(.param .u64 p0, .param .u64 p1, .param .u32 p2, .param .u64 p3)
{{
  .reg .pred %p<4>;
  .reg .b32 %r<12>;
  .reg .b64 %rd<12>;
  ld.param.u64 %rd1, [p0];
  ld.param.u64 %rd2, [p1];
  ld.param.u32 %r1, [p2];
  ld.param.u64 %rd8, [p3];
  cvta.to.global.u64 %rd3, %rd1;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  cvt.u64.u32 %rd9, %r4;
  mad.wide.u32 %rd4, %r2, %r3, %rd9;
  mov.u32 %r5, %nctaid.x;
  mul.wide.u32 %rd5, %r5, %r3;
  mov.u32 %r9, 0;
LOOP:
  setp.ge.u64 %p1, %rd4, %rd2;
  @%p1 bra END;
  cvt.u32.u64 %r6, %rd4;
  mad.lo.s32 %r7, %r6, -1640531527, %r1;
  shl.b64 %rd6, %rd4, 2;
  add.s64 %rd7, %rd3, %rd6;
  {body}
  add.s64 %rd4, %rd4, %rd5;
  bra LOOP;
END:
  {tail}
  ret;
}}
"""
PTX = (
    HEAD
    + LOOP.format(name="fill", body="st.global.u32 [%rd7], %r7;", tail="")
    + LOOP.format(
        name="check",
        body="ld.global.u32 %r8, [%rd7];\n  setp.ne.u32 %p2, %r8, %r7;\n  @%p2 add.u32 %r9, %r9, 1;",
        tail="setp.eq.u32 %p3, %r9, 0;\n  @%p3 ret;\n  cvta.to.global.u64 %rd10, %rd8;\n"
        "  cvt.u64.u32 %rd11, %r9;\n  red.global.add.u64 [%rd10], %rd11;",
    )
    # Adds p2 to every word; launched over and over it is a kernel that keeps running through a push-out.
    + LOOP.format(name="bump", body="ld.global.u32 %r8, [%rd7];\n  add.u32 %r8, %r8, %r1;\n  st.global.u32 [%rd7], %r8;", tail="")
    + "\0"
).encode()


class CudaError(Exception):
    pass


def check(code, what):
    if code:
        raise CudaError(f"{what}: CUDA error {code}")


class Device:
    def __init__(self):
        check(cuda.cuInit(0), "cuInit")
        self.context = C.c_void_p()
        check(cuda.cuDevicePrimaryCtxRetain(C.byref(self.context), 0), "retain")
        self.enter()
        module, self.is_simulated = C.c_void_p(), False
        code = cuda.cuModuleLoadData(C.byref(module), PTX)
        if code == NO_BINARY:
            self.is_simulated = True
            code = cuda.cuModuleLoadData(C.byref(module), SIMULATED)
        check(code, "module")
        names = {"fill": b"fill", "check": b"checksum"} if self.is_simulated else {"fill": b"fill", "check": b"check", "bump": b"bump"}
        self.kernels = {}
        for name, symbol in names.items():
            self.kernels[name] = C.c_void_p()
            check(cuda.cuModuleGetFunction(C.byref(self.kernels[name]), module, symbol), name)

    def enter(self):
        check(cuda.cuCtxSetCurrent(self.context), "set current")

    def stream(self):
        stream = C.c_void_p()
        check(cuda.cuStreamCreate(C.byref(stream), 1), "stream")
        return stream

    def allocate(self, size, managed=False):
        address = u64()
        if managed:
            check(cuda.cuMemAllocManaged(C.byref(address), size_t(size), 1), "allocate managed")
        else:
            check(cuda.cuMemAlloc_v2(C.byref(address), size_t(size)), f"allocate {size}")
        return address.value

    def free(self, address):
        check(cuda.cuMemFree_v2(u64(address)), "free")

    def set(self, address, word, words, stream=None):
        check(cuda.cuMemsetD32Async(u64(address), u32(word), size_t(words), stream), "memset")

    def launch(self, name, arguments, stream=None):
        values = (C.c_void_p * len(arguments))(*[C.cast(C.byref(a), C.c_void_p) for a in arguments])
        code = cuda.cuLaunchKernel(self.kernels[name], 1056, 1, 1, 256, 1, 1, 0, stream, values, None)
        check(code, f"launch {name}")

    def fill(self, address, words, seed, stream=None):
        if self.is_simulated:
            self.launch("fill", [u64(address), u64(words), u32(seed)], stream)
        else:
            self.launch("fill", [u64(address), u64(words), u32(seed), u64(0)], stream)

    def wrong(self, address, words, seed, out, stream=None):
        """Wrong words (on the simulated GPU: 1 if the sum is wrong)."""
        self.set(out, 0, 2, stream)
        if self.is_simulated:
            self.launch("check", [u64(address), u64(words * 4), u64(out)], stream)
        else:
            self.launch("check", [u64(address), u64(words), u32(seed), u64(out)], stream)
        found = u64()
        check(cuda.cuMemcpyDtoHAsync_v2(C.byref(found), u64(out), size_t(8), stream), "read")
        self.wait(stream)
        if self.is_simulated:
            return int(found.value != (seed * words) % 2**64)
        return found.value

    def wait(self, stream=None):
        check(cuda.cuStreamSynchronize(stream), "wait")

    def prefetch(self, address, size, to, stream):
        check(cuda.cuMemPrefetchAsync(u64(address), size_t(size), to, stream), "prefetch")


def protect(address, size, writable):
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if libc.mprotect(C.c_void_p(address), size_t(size), access) != 0:
        raise OSError(C.get_errno(), "mprotect")


class Soak:
    """Two threads that do things at random, and one that frees what they are done with."""

    def __init__(self, device, seed, limit):
        self.device, self.limit = device, limit // 2
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.left_over, self.errors = [], []
        self.done = dict.fromkeys(("allocations", "writes", "checks", "frees", "forks", "wrong_words"), 0)
        work = [threading.Thread(target=self.guarded, args=(self.work, seed * 2 + n)) for n in range(2)]
        self.threads = [*work, threading.Thread(target=self.guarded, args=(self.free,))]
        for thread in self.threads:
            thread.start()

    def guarded(self, run, *args):
        try:
            self.device.enter()
            run(*args)
        except Exception as error:
            self.errors.append(repr(error))
            self.stop.set()

    def count(self, what, by=1):
        with self.lock:
            self.done[what] += by

    def work(self, seed):
        rng, device = random.Random(seed), self.device
        stream, out = device.stream(), device.allocate(4096)
        blocks, held = [], 0

        def verify(block):
            address, words, pattern, _ = block
            self.count("wrong_words", device.wrong(address, words, pattern, out, stream))
            self.count("checks")

        while not self.stop.is_set():
            choice = rng.randrange(8)
            if choice < 2 or not blocks:
                size = rng.randrange(MIB, max(self.limit // 6, 3 * MIB)) // 4 * 4
                if held + size > self.limit:
                    continue
                words, pattern = size // 4, rng.randrange(1, 1 << 31)
                address = device.allocate(size)
                device.set(address, 0, words, stream)
                device.fill(address, words, pattern, stream)
                blocks.append((address, words, pattern, size))
                held += size
                self.count("allocations")
            elif choice == 2:
                block = blocks.pop(rng.randrange(len(blocks)))
                verify(block)
                held -= block[3]
                with self.lock:
                    self.left_over.append(block[0])
            elif choice < 5:
                at = rng.randrange(len(blocks))
                address, words, _, size = blocks[at]
                pattern = rng.randrange(1, 1 << 31)
                if rng.randrange(2):
                    device.set(address, 7, words, stream)
                device.fill(address, words, pattern, stream)
                blocks[at] = (address, words, pattern, size)
                self.count("writes")
            elif choice == 5 and rng.randrange(12) == 0:
                child = os.fork()
                if child == 0:
                    os._exit(0)
                if os.waitpid(child, 0)[1] != 0:
                    raise RuntimeError("a forked child did not end well")
                self.count("forks")
            else:
                verify(rng.choice(blocks))
        for block in blocks:
            verify(block)
            device.free(block[0])

    def free(self):
        while not self.stop.is_set() or self.left_over:
            with self.lock:
                address = self.left_over.pop() if self.left_over else None
            if address is None:
                time.sleep(0.0005)
                continue
            self.device.free(address)
            self.count("frees")

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        return dict(self.done, errors=self.errors, hang=any(t.is_alive() for t in self.threads))


class Worker:
    def __init__(self):
        self.device = Device()
        self.out = self.device.allocate(4096)
        self.blocks, self.soak = [], None

    def do_blocks(self, count, mib, seed):
        device, words = self.device, int(mib) * MIB // 4
        for n in range(int(count)):
            address = device.allocate(words * 4)
            # A write of the whole block through the interface, then the words that tell their place.
            device.set(address, 0, words)
            device.fill(address, words, int(seed) + n)
            self.blocks.append((address, words, int(seed) + n))
        device.wait()
        return {"bytes": int(count) * words * 4}

    def do_big(self, mib, touched):
        device, words = self.device, int(touched) * MIB // 4
        address = device.allocate(int(mib) * MIB)
        device.set(address, 0, words)
        device.fill(address, words, 99)
        device.wait()
        self.blocks.append((address, words, 99))
        return {"bytes": int(mib) * MIB}

    def do_check(self):
        begin = time.perf_counter()
        wrong = sum(self.device.wrong(address, words, seed, self.out) for address, words, seed in self.blocks)
        return {"ms": (time.perf_counter() - begin) * 1e3, "wrong_words": wrong, "bytes": sum(w for _, w, _ in self.blocks) * 4}

    def do_sweep_for(self, seconds):
        end, sweeps, wrong, times = time.monotonic() + float(seconds), 0, 0, []
        while time.monotonic() < end:
            answer = self.do_check()
            sweeps, wrong = sweeps + 1, wrong + answer["wrong_words"]
            times.append(answer["ms"])
        return {"sweeps": sweeps, "wrong_words": wrong, "median_ms": statistics.median(times), "worst_ms": max(times)}

    def do_soak_begin(self, seed, mib):
        self.soak = Soak(self.device, int(seed), int(mib) * MIB)
        return {}

    def do_soak_end(self):
        return self.soak.end()

    def do_link(self, mib):
        size, device = int(mib) * MIB, self.device
        pinned, plain, stream = C.c_void_p(), device.allocate(size), device.stream()
        check(cuda.cuMemHostAlloc(C.byref(pinned), size_t(size), 0), "pinned memory")
        rates = {"in": [], "out": []}
        for _ in range(5):
            for way, copy in (
                ("in", lambda: cuda.cuMemcpyHtoDAsync_v2(u64(plain), pinned, size_t(size), stream)),
                ("out", lambda: cuda.cuMemcpyDtoHAsync_v2(pinned, u64(plain), size_t(size), stream)),
            ):
                begin = time.perf_counter()
                check(copy(), "copy")
                device.wait(stream)
                rates[way].append(size / (time.perf_counter() - begin) / 1e9)
        cuda.cuMemFreeHost(pinned)
        device.free(plain)
        return {way: statistics.median(found) for way, found in rates.items()}

    def do_stray(self, mib):
        """GPU accesses while memory leaves under protection, and a kernel that is left running through it."""
        device, size = self.device, int(mib) * MIB
        words, own, mover = size // 4, device.stream(), device.stream()
        address = device.allocate(size, managed=True)
        facts = {}

        def out(is_protected):
            if is_protected:
                protect(address, size, False)
            device.prefetch(address, size, HOST, mover)
            device.wait(mover)

        def timed(work):
            begin = time.perf_counter()
            work()
            device.wait(own)
            return round((time.perf_counter() - begin) * 1e3, 2)

        device.fill(address, words, 5, own)
        device.wait(own)
        wrong = 0
        for name, is_protected in (("warm", False), ("plain", False), ("protected", True)):
            out(is_protected)
            read = timed(lambda: device.wrong(address, words, 5, self.out, own))
            out(is_protected)
            write = timed(lambda: device.fill(address, words, 6, own))
            out(is_protected)
            memset = timed(lambda: device.set(address, 6, words, own))
            device.fill(address, words, 5, own)
            wrong += device.wrong(address, words, 5, self.out, own)
            protect(address, size, True)
            wrong += device.wrong(address, words, 5, self.out, own)
            facts[name] = {"read_ms": read, "write_ms": write, "memset_ms": memset}
        facts["wrong_words"] = wrong
        if not device.is_simulated:
            passes = 0
            device.set(address, 0, words, own)
            device.wait(own)
            for _ in range(10):
                protect(address, size, False)
                for _ in range(20):
                    device.launch("bump", [u64(address), u64(words), u32(1), u64(0)], own)
                    passes += 1
                # The kernels write while everything leaves.
                device.prefetch(address, size, HOST, mover)
                device.wait(mover)
                device.wait(own)
                protect(address, size, True)
            found = (u32 * words)()
            check(cuda.cuMemcpyDtoH_v2(found, u64(address), size_t(size)), "read")
            # Every 997th word: a loop over all of them takes minutes here.
            wrong = sum(found[n] != passes for n in range(0, words, 997))
            facts["through_the_window"] = {"passes": passes, "wrong_words": wrong}
        device.free(address)
        return facts


def main():
    worker = Worker()
    ready = {"ready": True, "simulated": worker.device.is_simulated}
    serve(ready, lambda name: getattr(worker, "do_" + name.replace("-", "_")))


if __name__ == "__main__":
    main()
