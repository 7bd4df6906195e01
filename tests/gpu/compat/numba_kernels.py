"""Numba: compiled kernels, streams, events, shared memory, atomics, pinned, mapped and managed arrays."""

import math

import numba_on_numpy  # noqa: F401
import numpy
from numba import cuda, float32, int32

from result import Result, skip

THREADS = 256


@cuda.jit
def wave(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] = math.sin(x[i]) * 2 + x[i]


@cuda.jit
def block_sums(x, out):
    shared = cuda.shared.array(THREADS, float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    shared[t] = x[i] if i < x.size else 0.0
    cuda.syncthreads()
    width = THREADS // 2
    while width > 0:
        if t < width:
            shared[t] += shared[t + width]
        cuda.syncthreads()
        width //= 2
    if t == 0:
        out[cuda.blockIdx.x] = shared[0]


@cuda.jit
def histogram(values, bins):
    i = cuda.grid(1)
    if i < values.size:
        cuda.atomic.add(bins, values[i], int32(1))


def main():
    if not cuda.is_available():
        skip("Numba finds no GPU")
    result = Result()
    random = numpy.random.default_rng(0)
    count = 4 << 20
    blocks = count // THREADS
    x = random.standard_normal(count, dtype=numpy.float32)

    on_gpu = cuda.to_device(x)
    out = cuda.device_array_like(on_gpu)
    wave[blocks, THREADS](on_gpu, out)
    result.output("kernel", out)
    sums = cuda.device_array(blocks, dtype=numpy.float32)
    block_sums[blocks, THREADS](on_gpu, sums)
    result.output("shared memory", sums)

    values = cuda.to_device(random.integers(0, 64, count).astype(numpy.int32))
    bins = cuda.to_device(numpy.zeros(64, dtype=numpy.int32))
    histogram[blocks, THREADS](values, bins)
    counted = bins.copy_to_host()
    assert counted.sum() == count
    result.output("atomics", counted)

    pinned = cuda.pinned_array(count, dtype=numpy.float32)
    pinned[:] = x
    streams = [cuda.stream() for _ in range(4)]
    quarter = count // 4
    back = cuda.pinned_array(count, dtype=numpy.float32)
    for number, stream in enumerate(streams):
        part = slice(number * quarter, (number + 1) * quarter)
        a = cuda.to_device(pinned[part], stream=stream)
        b = cuda.device_array(quarter, dtype=numpy.float32, stream=stream)
        wave[quarter // THREADS, THREADS, stream](a, b)
        b.copy_to_host(back[part], stream=stream)
    begin, end = cuda.event(), cuda.event()
    begin.record(streams[0])
    for stream in streams:
        stream.synchronize()
    end.record(streams[0])
    end.synchronize()
    assert cuda.event_elapsed_time(begin, end) >= 0
    result.output("streams and pinned memory", back)

    managed = cuda.managed_array(count, dtype=numpy.float32)
    managed[:] = x
    wave[blocks, THREADS](managed, managed)
    cuda.synchronize()
    result.output("managed memory", numpy.array(managed))
    mapped = cuda.mapped_array(count, dtype=numpy.float32)
    mapped[:] = x
    wave[blocks, THREADS](mapped, mapped)
    cuda.synchronize()
    result.output("mapped memory", numpy.array(mapped))
    free, total = cuda.current_context().get_memory_info()
    assert 0 < free <= total
    result.done()


main()
