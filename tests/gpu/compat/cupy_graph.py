"""CuPy: work of a stream captured into a graph and launched many times."""

import cupy

from result import Result

STEP = cupy.ElementwiseKernel("float32 x, float32 a", "float32 y", "y = y * 0.5f + x * a", "step")


def main():
    result = Result()
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.arange(4 << 20, dtype=cupy.float32)
    y = cupy.zeros_like(x)
    cupy.cuda.Device().synchronize()
    with stream:
        STEP(x, cupy.float32(0.25), y)
        stream.synchronize()
        y.fill(0)
        stream.synchronize()
        stream.begin_capture()
        for _ in range(4):
            STEP(x, cupy.float32(0.25), y)
        graph = stream.end_capture()
    for _ in range(25):
        graph.launch(stream)
    stream.synchronize()
    assert float(y[2]) != 0.0
    result.output("after 25 launches", y)
    result.done()


main()
