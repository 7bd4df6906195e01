"""A program that moves a known amount of managed memory, through the driver's interface alone. It knows nothing of nvshare.

Commands arrive as lines on standard input, answers leave as JSON lines on standard output:

    managed MIB     allocate managed memory, of at most a quarter of what is free
    fill            write every word on the GPU: first touch, or demand faults for what is on the host
    to-host         move it all to the host (cuMemPrefetchAsync)
    to-gpu          move it all to the GPU (cuMemPrefetchAsync)
    cpu             write a word of every page on the CPU
    faults N        N times to-host and fill; milliseconds of each fill
    launch N        N launches of an empty kernel, or of a fill of one word where no kernel can be loaded
    quit
"""

import ctypes
import json
import sys
import time

cuda = ctypes.CDLL("libcuda.so.1")
CPU = -1  # CU_DEVICE_CPU
PAGE = 4096
EMPTY = b".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry empty() { ret; }\n\0"


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
        self.kernel = self.empty_kernel()

    @staticmethod
    def empty_kernel():
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        if cuda.cuModuleLoadData(ctypes.byref(module), EMPTY) != 0:
            return None
        call("cuModuleGetFunction", ctypes.byref(function), module, b"empty")
        return function

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
            times.append(self.fill()["ms"])
        return {"ms": times}

    def submit(self):
        if self.kernel is None:
            call("cuMemsetD32Async", self.one, ctypes.c_uint(1), ctypes.c_size_t(1), ctypes.c_void_p())
        else:
            one = ctypes.c_uint(1)
            none = ctypes.c_void_p()
            call("cuLaunchKernel", self.kernel, one, one, one, one, one, one, ctypes.c_uint(0), none, none, none)

    def launch(self, count):
        self.submit()
        self.wait()
        begin = time.monotonic_ns()
        for _ in range(int(count)):
            self.submit()
        self.wait()
        return {"ns_per_launch": (time.monotonic_ns() - begin) / int(count), "kernel": self.kernel is not None}


def main():
    mover = Mover()
    print(json.dumps({"ready": True}), flush=True)
    actions = {
        "managed": mover.managed,
        "fill": mover.fill,
        "to-host": lambda: mover.prefetch(ctypes.c_int(CPU)),
        "to-gpu": lambda: mover.prefetch(mover.device),
        "cpu": mover.cpu,
        "faults": mover.faults,
        "launch": mover.launch,
    }
    for line in sys.stdin:
        words = line.split()
        if not words or words[0] == "quit":
            break
        try:
            answer = actions[words[0]](*words[1:])
        except Exception as error:  # the checker must see why, and decide
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
