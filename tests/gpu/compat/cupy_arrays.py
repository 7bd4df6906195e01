"""CuPy on one of its allocators: cupy_arrays.py default | managed | async"""

import sys

import cupy

from result import Result

SAXPY = cupy.RawKernel(
    r"""
extern "C" __global__ void saxpy(const float* x, float* y, float a, int n) {
    int i = blockDim.x * blockIdx.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
""",
    "saxpy",
)
HALVES = cupy.ElementwiseKernel("T x", "T y", "y = x / 2", "halves")


def main():
    kind = sys.argv[1]
    if kind == "managed":
        cupy.cuda.set_allocator(cupy.cuda.MemoryPool(cupy.cuda.malloc_managed).malloc)
    elif kind == "async":
        cupy.cuda.set_allocator(cupy.cuda.MemoryAsyncPool().malloc)
    result = Result()
    random = cupy.random.RandomState(seed=0)
    a = random.standard_normal((1024, 1024), dtype=cupy.float32)
    b = random.random_sample((1024, 1024)).astype(cupy.float32)
    result.output("random", a, b)
    result.output("matmul", a @ b)
    result.output("reductions", a.sum(axis=0), b.max(axis=1), a.astype(cupy.float64).sum())
    result.output("sort", cupy.sort(a.ravel()), cupy.argsort(b.ravel()))
    result.output("fft", cupy.fft.rfft(a))
    y = b.copy().ravel()
    SAXPY((y.size // 256,), (256,), (a.ravel(), y, cupy.float32(2.5), cupy.int32(y.size)))
    assert cupy.allclose(y, 2.5 * a.ravel() + b.ravel(), atol=1e-5)
    result.output("raw kernel", y, HALVES(y))
    # Streams that wait for each other, and pinned memory.
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with first:
        big = cupy.arange(8 << 20, dtype=cupy.float32)
        for _ in range(20):
            big = big * 0.5 + 1
        event = first.record()
    second.wait_event(event)
    with second:
        doubled = big * 2
    second.synchronize()
    result.output("two streams", doubled)
    # Blocks that come and go.
    kept = []
    for step in range(60):
        kept.append(cupy.full((1 + (step * 7919) % 30) << 18, step, dtype=cupy.float32))
        if len(kept) > 8:
            kept.pop(step % 8)
        if step % 20 == 19:
            cupy.get_default_memory_pool().free_all_blocks()
    result.output("blocks", *[block[:1000] for block in kept])
    cupy.cuda.Device().synchronize()
    result.done()


main()
