"""What a program is told about the size of the GPU and about free memory, on every way: memory_told.py [--nvml] [--alone | --limit BYTES]

What is free changes with every program on the card, unless this one is alone on it or has a limit of its own.
"""

import argparse
import ctypes

import torch

from result import Result, skip

MIB = 1 << 20
BLOCK = 1 << 30
# What the driver itself takes or gives back beside a large block.
SLACK = 64 * MIB


def device_total():
    cuda = ctypes.CDLL("libcuda.so.1")
    total = ctypes.c_size_t()
    code = cuda.cuDeviceTotalMem_v2(ctypes.byref(total), ctypes.c_int(0))
    assert code == 0, f"cuDeviceTotalMem returned {code}"
    return total.value


def nvml_memory():
    try:
        import pynvml
    except ImportError:
        skip("nvidia-ml-py is not installed")
    pynvml.nvmlInit()
    memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    return {"total": memory.total, "free": memory.free, "used": memory.used}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nvml", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    result = Result()
    torch.cuda.init()
    torch.ones(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0).total_memory
    told = {"cuMemGetInfo": total, "properties": properties, "cuDeviceTotalMem": device_total()}
    for name, value in told.items():
        result.fact(f"{name} MiB", value // MIB)
    assert len(set(told.values())) == 1, f"the size of the GPU depends on who asks: {told}"
    assert free <= total
    if options.limit:
        assert total == options.limit, f"told {total} bytes at a limit of {options.limit}"
    if options.nvml:
        nvml = nvml_memory()
        result.fact("NVML MiB", {name: value // MIB for name, value in nvml.items()})
        if options.limit:
            assert nvml["total"] == options.limit, f"NVML tells {nvml['total'] // MIB} MiB, everybody else {total // MIB} MiB"
        else:
            # NVML counts what the driver keeps for itself.
            assert total <= nvml["total"] <= total * 1.05

    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    block = torch.ones(BLOCK // 4, device="cuda")
    torch.cuda.synchronize()
    during, _ = torch.cuda.mem_get_info()
    result.output("block", block[:: 1 << 16], block.sum(dtype=torch.float64))
    del block
    torch.cuda.empty_cache()
    after, _ = torch.cuda.mem_get_info()
    result.fact("free MiB before, with 1 GiB, after", [value // MIB for value in (before, during, after)])
    if options.alone or options.limit:
        assert abs(before - during - BLOCK) <= SLACK, f"1 GiB more in use, {(before - during) // MIB} MiB less free"
        assert abs(after - before) <= SLACK, f"{(before - after) // MIB} MiB did not come back"
    result.done()


main()
