"""A PyTorch program for the checks and measurements on a real GPU. It knows nothing of nvshare.

Commands arrive as lines on standard input, answers leave as JSON lines on standard output, so that the
checker can look at the driver's counters between two steps:

    fresh GIB          allocate and write GIB of memory never touched before
    push-out           move it all to the host (cuMemPrefetchAsync), as an eviction would
    sweep N            add 1 to every word, N times, each time waiting for the GPU; stamps every sweep
    sweep-for SECONDS  the same for so long
    churn-for SECONDS  push-out and sweep in turn, for so long
    launch N [WARM]    N tiny kernels, after WARM (20,000) unmeasured ones; nanoseconds each
    add N              N additions of two matrices of 256 MiB; milliseconds each
    matmul N           N products of bf16 matrices, 8192 x 8192; milliseconds each
    train N            N steps of training a small transformer; milliseconds each
    infer N            N forward passes of it without gradients; milliseconds each
    verify             check every word
    quit
"""

import ctypes
import sys
import time

import torch

from program import serve

cuda = ctypes.CDLL("libcuda.so.1")
CPU = -1  # CU_DEVICE_CPU


def check(code, what):
    if code != 0:
        raise RuntimeError(f"{what} returned {code}")


IS_MANAGED = 8  # CU_POINTER_ATTRIBUTE_IS_MANAGED


def is_managed(tensor):
    """Whether the driver says that a tensor lies in managed memory."""
    managed = ctypes.c_uint(0)
    pointer = ctypes.c_uint64(tensor.data_ptr())
    check(cuda.cuPointerGetAttribute(ctypes.byref(managed), IS_MANAGED, pointer), "pointer attribute")
    return managed.value != 0


def each_ms(count, work):
    """Milliseconds of each of `count` calls of `work`, with the GPU's work included."""
    torch.cuda.synchronize()
    begin = time.monotonic_ns()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return {"ms": (time.monotonic_ns() - begin) / 1e6 / count}


class Model:
    """A transformer small enough that its kernels are short, as in much of what shares a GPU."""

    WIDTH, HEADS, LAYERS, BATCH, LENGTH = 512, 8, 4, 16, 128

    def __init__(self):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(
            self.WIDTH, self.HEADS, 4 * self.WIDTH, dropout=0.0, batch_first=True
        )
        self.model = torch.nn.TransformerEncoder(layer, self.LAYERS, enable_nested_tensor=False).to("cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.input = torch.randn(self.BATCH, self.LENGTH, self.WIDTH, device="cuda")
        self.target = torch.randn_like(self.input)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = self.model(self.input)
        loss = torch.nn.functional.mse_loss(output.float(), self.target)
        loss.backward()
        self.optimizer.step()

    def forward(self):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            self.model(self.input)


class Worker:
    def __init__(self):
        self.words = None
        self.expected = 0
        # What measurements work on, made by the first one that needs it.
        self.model = None
        self.matrices = {}

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

    def launch(self, count, warm=20_000):
        """Tiny launches, as fast as the host can submit them."""
        one = torch.ones(1, device="cuda")
        for _ in range(int(warm)):
            one.add_(1)
        torch.cuda.synchronize()
        begin = time.monotonic_ns()
        for _ in range(int(count)):
            one.add_(1)
        torch.cuda.synchronize()
        return {"ns_per_launch": round((time.monotonic_ns() - begin) / int(count), 1)}

    def pair(self, rows, dtype):
        """Two square matrices, refused if the card does not have twice their memory free."""
        if dtype not in self.matrices:
            element = torch.empty(0, dtype=dtype).element_size()
            free, _total = torch.cuda.mem_get_info()
            if 6 * rows * rows * element > free:
                raise RuntimeError("refusing to allocate more than half of what is free on the card")
            torch.manual_seed(1)
            self.matrices[dtype] = [torch.randn(rows, rows, device="cuda").to(dtype) for _ in range(2)]
        return self.matrices[dtype]

    def add(self, count):
        a, b = self.pair(8192, torch.float32)
        a.add_(b, alpha=0.0)
        return each_ms(int(count), lambda: a.add_(b, alpha=0.0))

    def matmul(self, count):
        a, b = self.pair(8192, torch.bfloat16)
        out = torch.mm(a, b)
        return each_ms(int(count), lambda: torch.mm(a, b, out=out))

    def trained(self):
        if self.model is None:
            self.model = Model()
            for _ in range(10):
                self.model.step()
                self.model.forward()
        self.model.forward()
        return self.model

    def train(self, count):
        model = self.trained()
        model.step()
        return each_ms(int(count), model.step)

    def infer(self, count):
        return each_ms(int(count), self.trained().forward)

    def verify(self):
        wrong = int((self.words != self.expected).sum().item())
        return {"wrong_words": wrong, "expected": self.expected}


def main():
    worker = Worker()
    torch.cuda.init()
    one = torch.ones(1, device="cuda")
    ready = {
        "ready": True, "torch": torch.__version__, "python": sys.version.split()[0],
        "gpu": torch.cuda.get_device_name(0), "managed": is_managed(one),
    }
    actions = {
        "fresh": worker.fresh,
        "push-out": worker.push_out,
        "sweep": worker.sweep,
        "sweep-for": worker.sweep_for,
        "churn-for": worker.churn_for,
        "launch": worker.launch,
        "add": worker.add,
        "matmul": worker.matmul,
        "train": worker.train,
        "infer": worker.infer,
        "verify": worker.verify,
    }
    serve(ready, actions.__getitem__)


if __name__ == "__main__":
    main()
