"""NCCL's own interface, on the library that PyTorch loads: ncclCommInitAll for one GPU, all-reduce on a stream."""

import ctypes

import torch

from result import Result, skip
from torch_seed import seed

FLOAT, SUM = 7, 0


def main():
    seed()
    result = Result()
    torch.cuda.init()
    try:
        nccl = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        skip(f"no NCCL: {error}")
    nccl.ncclGetErrorString.restype = ctypes.c_char_p

    def call(name, *args):
        code = getattr(nccl, name)(*args)
        if code != 0:
            raise RuntimeError(f"{name}: {nccl.ncclGetErrorString(code).decode()}")

    communicator = ctypes.c_void_p()
    call("ncclCommInitAll", ctypes.byref(communicator), ctypes.c_int(1), ctypes.byref(ctypes.c_int(0)))
    for count in (1 << 10, 16 << 20):
        data = torch.randn(count, device="cuda")
        out = torch.zeros_like(data)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        call(
            "ncclAllReduce", ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(count),
            ctypes.c_int(FLOAT), ctypes.c_int(SUM), communicator, ctypes.c_void_p(stream.cuda_stream),
        )
        stream.synchronize()
        assert torch.equal(data, out)
        result.output(f"all-reduce of {count}", out)
    call("ncclCommDestroy", communicator)
    result.done()


main()
