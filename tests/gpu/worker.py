"""A PyTorch program for the checks on a real GPU. It knows nothing of nvshare.

Commands arrive as lines on standard input, answers leave as JSON lines on standard output, so that the
checker can look at the driver's counters between two steps:

    fresh GIB          allocate and write GIB of memory never touched before
    push-out           move it all to the host (cuMemPrefetchAsync), as an eviction would
    sweep N            add 1 to every word, N times, each time waiting for the GPU; stamps every sweep
    sweep-for SECONDS  the same for so long
    churn-for SECONDS  push-out and sweep in turn, for so long
    launch N           N tiny kernels; nanoseconds each
    verify             check every word
    quit
"""

import ctypes
import json
import sys
import time

import torch

cuda = ctypes.CDLL("libcuda.so.1")
CPU = -1  # CU_DEVICE_CPU


def check(code, what):
    if code != 0:
        raise RuntimeError(f"{what} returned {code}")


class Worker:
    def __init__(self):
        self.words = None
        self.expected = 0

    def fresh(self, gib):
        count = int(float(gib) * 2**30) // 4
        free, _total = torch.cuda.mem_get_info()
        if count * 4 > free:
            raise RuntimeError("refusing to allocate more than is free on the card")
        self.words = torch.empty(count, dtype=torch.int32, device="cuda")
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.words.fill_(7)
        end.record()
        torch.cuda.synchronize()
        self.expected = 7
        return {"bytes": count * 4, "kernel_ms": start.elapsed_time(end)}

    def push_out(self):
        size = self.words.numel() * 4
        begin = time.monotonic()
        pointer = ctypes.c_uint64(self.words.data_ptr())
        check(cuda.cuMemPrefetchAsync(pointer, ctypes.c_size_t(size), CPU, ctypes.c_void_p(0)), "prefetch")
        torch.cuda.synchronize()
        return {"bytes": size, "wall_ms": (time.monotonic() - begin) * 1e3}

    def sweep(self, count):
        stamps, kernel_ms = [], []
        for _ in range(int(count)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.words.add_(1)
            end.record()
            torch.cuda.synchronize()
            self.expected += 1
            kernel_ms.append(start.elapsed_time(end))
            stamps.append(time.monotonic() * 1e3)
        return {"kernel_ms": kernel_ms, "stamps_ms": stamps}

    def sweep_for(self, seconds):
        """Like sweep, for so many seconds, with work sized to a few milliseconds a sweep."""
        stamps = []
        until = time.monotonic() + float(seconds)
        while time.monotonic() < until:
            self.words.add_(1)
            torch.cuda.synchronize()
            self.expected += 1
            stamps.append(time.monotonic() * 1e3)
        return {"stamps_ms": stamps}

    def churn_for(self, seconds):
        """Pushes everything out and faults it back, again and again: what a thrashing program suffers."""
        stamps = []
        until = time.monotonic() + float(seconds)
        while time.monotonic() < until:
            self.push_out()
            self.words.add_(1)
            torch.cuda.synchronize()
            self.expected += 1
            stamps.append(time.monotonic() * 1e3)
        return {"stamps_ms": stamps}

    def launch(self, count):
        """Tiny launches, as fast as the host can submit them."""
        one = torch.ones(1, device="cuda")
        for _ in range(20_000):
            one.add_(1)
        torch.cuda.synchronize()
        begin = time.monotonic_ns()
        for _ in range(int(count)):
            one.add_(1)
        torch.cuda.synchronize()
        return {"ns_per_launch": round((time.monotonic_ns() - begin) / int(count), 1)}

    def verify(self):
        wrong = int((self.words != self.expected).sum().item())
        return {"wrong_words": wrong, "expected": self.expected}


def main():
    worker = Worker()
    torch.cuda.init()
    torch.ones(1, device="cuda")
    print(json.dumps({"ready": True, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0)}), flush=True)
    actions = {
        "fresh": worker.fresh,
        "push-out": worker.push_out,
        "sweep": worker.sweep,
        "sweep-for": worker.sweep_for,
        "churn-for": worker.churn_for,
        "launch": worker.launch,
        "verify": worker.verify,
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
