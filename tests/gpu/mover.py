"""A program that moves a known amount of managed memory, through the driver's interface alone. It knows nothing of nvshare.

Commands arrive as lines on standard input, answers leave as JSON lines on standard output:

    managed MIB     allocate managed memory, of at most a quarter of what is free
    fill            write every word on the GPU: first touch, or demand faults for what is on the host
    to-host         move it all to the host (cuMemPrefetchAsync)
    to-gpu          move it all to the GPU (cuMemPrefetchAsync)
    cpu             write a word of every page on the CPU
    faults N        N times to-host and a kernel that writes every word (a fill where none can be loaded); milliseconds of each
    launch N        N launches of an empty kernel, or of a fill of one word where no kernel can be loaded
    quit
"""

import ctypes
import time

from program import serve

cuda = ctypes.CDLL("libcuda.so.1")
CPU = -1  # CU_DEVICE_CPU
PAGE = 4096
KERNELS = b""".version 6.0
.target sm_50
.address_size 64
.visible .entry empty() { ret; }
.visible .entry write(.param .u64 words, .param .u64 count, .param .u32 value)
{
    .reg .u32 %r<7>;
    .reg .u64 %d<6>;
    .reg .pred %end;
    ld.param.u64 %d0, [words];
    ld.param.u64 %d1, [count];
    ld.param.u32 %r0, [value];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3;
    mov.u32 %r5, %nctaid.x;
    mul.lo.u32 %r6, %r5, %r2;
    cvt.u64.u32 %d2, %r4;
    cvt.u64.u32 %d3, %r6;
next:
    setp.ge.u64 %end, %d2, %d1;
    @%end bra done;
    shl.b64 %d4, %d2, 2;
    add.u64 %d5, %d0, %d4;
    st.global.u32 [%d5], %r0;
    add.u64 %d2, %d2, %d3;
    bra next;
done:
    ret;
}
\0"""
#: Threads of the writing kernel: several blocks for each of the largest GPU's multiprocessors.
BLOCKS, THREADS = 1024, 256


def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code != 0:
        raise RuntimeError(f"{name} returned {code}")


class Mover:
    def __init__(self):
        device, context = ctypes.c_int(), ctypes.c_void_p()
        call("cuInit", ctypes.c_uint(0))
        call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        call("cuCtxSetCurrent", context)
        self.device, self.address, self.size, self.value = device, ctypes.c_uint64(), 0, 0
        self.one = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(self.one), ctypes.c_size_t(PAGE))
        self.empty, self.writing = self.kernels()

    @staticmethod
    def kernels():
        module, empty, writing = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        if cuda.cuModuleLoadData(ctypes.byref(module), KERNELS) != 0:
            return None, None
        call("cuModuleGetFunction", ctypes.byref(empty), module, b"empty")
        call("cuModuleGetFunction", ctypes.byref(writing), module, b"write")
        return empty, writing

    def managed(self, mib):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        size = int(mib) << 20
        if size * 4 > free.value:
            raise RuntimeError(f"refusing {size} bytes, more than a quarter of the {free.value} that are free")
        call("cuMemAllocManaged", ctypes.byref(self.address), ctypes.c_size_t(size), ctypes.c_uint(1))
        self.size = size
        return {"bytes": size}

    def wait(self):
        call("cuCtxSynchronize")

    def fill(self):
        self.value += 1
        begin = time.monotonic()
        call("cuMemsetD32_v2", self.address, ctypes.c_uint(self.value), ctypes.c_size_t(self.size // 4))
        self.wait()
        return {"ms": (time.monotonic() - begin) * 1e3}

    def write(self):
        if self.writing is None:
            return self.fill()
        self.value += 1
        words = ctypes.c_uint64(self.address.value), ctypes.c_uint64(self.size // 4), ctypes.c_uint32(self.value)
        parameters = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        begin = time.monotonic()
        self.start(self.writing, BLOCKS, THREADS, parameters)
        self.wait()
        return {"ms": (time.monotonic() - begin) * 1e3}

    @staticmethod
    def start(kernel, blocks, threads, parameters):
        one, none = ctypes.c_uint(1), ctypes.c_void_p()
        size = ctypes.c_uint(blocks), one, one, ctypes.c_uint(threads), one, one
        call("cuLaunchKernel", kernel, *size, ctypes.c_uint(0), none, parameters, none)

    def prefetch(self, device):
        call("cuMemPrefetchAsync", self.address, ctypes.c_size_t(self.size), device, ctypes.c_void_p())
        self.wait()
        return {"bytes": self.size}

    def cpu(self):
        words = (ctypes.c_uint32 * (self.size // 4)).from_address(self.address.value)
        wrong = 0
        for index in range(0, self.size // 4, PAGE // 4):
            wrong += words[index] != self.value
            words[index] = self.value
        return {"bytes": self.size, "wrong_words": wrong}

    def faults(self, count):
        times = []
        for _ in range(int(count)):
            self.prefetch(ctypes.c_int(CPU))
            times.append(self.write()["ms"])
        return {"ms": times}

    def submit(self):
        if self.empty is None:
            call("cuMemsetD32Async", self.one, ctypes.c_uint(1), ctypes.c_size_t(1), ctypes.c_void_p())
        else:
            self.start(self.empty, 1, 1, ctypes.c_void_p())

    def launch(self, count):
        self.submit()
        self.wait()
        begin = time.monotonic_ns()
        for _ in range(int(count)):
            self.submit()
        self.wait()
        return {"ns_per_launch": (time.monotonic_ns() - begin) / int(count), "kernel": self.empty is not None}


def main():
    mover = Mover()
    actions = {
        "managed": mover.managed,
        "fill": mover.fill,
        "to-host": lambda: mover.prefetch(ctypes.c_int(CPU)),
        "to-gpu": lambda: mover.prefetch(mover.device),
        "cpu": mover.cpu,
        "faults": mover.faults,
        "launch": mover.launch,
    }
    serve({"ready": True}, actions.__getitem__)


if __name__ == "__main__":
    main()
