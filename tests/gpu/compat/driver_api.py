"""The driver's interface through ctypes, as Triton and others reach it: dlopen, dlsym by exported name."""

import ctypes
import hashlib

from result import Result

cuda = ctypes.CDLL("libcuda.so.1")
u64, size_t, void_p, c_int, c_uint = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint


def call(name, *args):
    code = getattr(cuda, name)(*args)
    if code != 0:
        raise RuntimeError(f"{name} returned {code}")


class Memory:
    def __init__(self, size):
        self.address, self.size = u64(0), size
        call("cuMemAlloc_v2", ctypes.byref(self.address), size_t(size))

    def at(self, offset=0):
        return u64(self.address.value + offset)

    def read(self, stream):
        host = (ctypes.c_uint8 * self.size)()
        call("cuMemcpyDtoHAsync_v2", host, self.at(), size_t(self.size), stream)
        call("cuStreamSynchronize", stream)
        return bytes(host)


def pattern(size, seed):
    block = hashlib.sha256(str(seed).encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def main():
    result = Result()
    device, context, stream = c_int(), void_p(), void_p()
    call("cuInit", c_uint(0))
    call("cuDeviceGet", ctypes.byref(device), c_int(0))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuStreamCreate", ctypes.byref(stream), c_uint(1))
    # Small blocks, blocks around the size at which UVM moves memory, and odd sizes.
    for size in (1 << 12, 65_537, (1 << 21) - 1, 1 << 21, (1 << 21) + 1, 20 << 20, 64 << 20):
        a, b = Memory(size), Memory(size)
        call("cuMemsetD8Async", a.at(), ctypes.c_ubyte(0xA5), size_t(size), stream)
        host = pattern(size // 2, size)
        call("cuMemcpyHtoDAsync_v2", a.at(size // 4), host, size_t(len(host)), stream)
        call("cuMemcpyDtoDAsync_v2", b.at(), a.at(), size_t(size), stream)
        call("cuMemsetD32Async", b.at(), c_uint(0x01020304), size_t(64), stream)
        result.output(f"{size} bytes", a.read(stream), b.read(stream))
        free, total = size_t(), size_t()
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        if not 0 < free.value <= total.value:
            raise RuntimeError(f"cuMemGetInfo tells {free.value} free of {total.value}")
        for memory in (a, b):
            call("cuMemFree_v2", memory.address)
    call("cuStreamDestroy_v2", stream)
    call("cuDevicePrimaryCtxRelease_v2", device)
    result.done()


main()
