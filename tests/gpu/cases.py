"""Which programs the compatibility suite runs, and how."""

from dataclasses import dataclass, field

MIB, GIB = 1 << 20, 1 << 30


@dataclass
class Case:
    name: str
    what: str
    program: str
    args: list = field(default_factory=list)
    # What a run under the shim gets besides.
    shim_args: list = field(default_factory=list)
    shim_env: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    # Python packages without which it is skipped.
    needs: tuple = ()
    # GPU memory that a run may take in all, its context included.
    gib: int = 3
    # Seconds, from a cold disk.
    deadline: int = 90
    # Whether others would disturb it.
    alone: bool = False
    # Whether it is also run while programs take turns.
    turns: bool = True


def torch(name, what, program, **rest):
    return Case(name, what, program, needs=("torch",), **rest)


CASES = [
    Case("driver", "driver interface through ctypes: allocations, fills, copies, streams", "driver_api.py", deadline=60),
    torch("torch-training", "PyTorch: eager training of a transformer", "torch_train.py"),
    torch(
        "torch-async-allocator", "the same with `backend:cudaMallocAsync`", "torch_train.py",
        env={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
    ),
    torch(
        "torch-expandable", "the same with `expandable_segments:True`", "torch_train.py",
        env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ),
    torch("torch-libraries", "PyTorch: cuBLAS, cuSOLVER, cuFFT, cuSPARSE, cuRAND", "torch_libraries.py"),
    torch("torch-compile", "`torch.compile` and a Triton kernel", "torch_compile.py", deadline=150),
    torch("torch-graphs", "CUDA graphs: capture, replay, `make_graphed_callables`", "torch_graphs.py"),
    torch("torch-dataloader", "DataLoader with 4 forked workers and pinned memory", "torch_dataloader.py"),
    torch("torch-two", "two training processes at once", "torch_two.py"),
    torch("torch-ipc-small", "a tensor of 256 KiB shared with another process (CUDA IPC)", "torch_ipc.py", args=["256KiB"]),
    torch("torch-ipc-large", "a tensor of 64 MiB shared with another process (CUDA IPC)", "torch_ipc.py", args=["64MiB"]),
    torch(
        "torch-ipc-large-plain", "the same with `NVSHARE_MANAGED_MIN_BYTES=never`", "torch_ipc.py", args=["64MiB"],
        shim_env={"NVSHARE_MANAGED_MIN_BYTES": "never"},
    ),
    torch("torch-ipc-event", "a CUDA event shared with another process", "torch_ipc.py", args=["event"]),
    Case(
        "transformers", "Hugging Face transformers: a small Llama generates text, with and without a static cache",
        "transformers_generate.py", needs=("torch", "transformers"), deadline=120,
    ),
    Case("cupy", "CuPy: arrays, cuBLAS, RawKernel, streams", "cupy_arrays.py", args=["default"], needs=("cupy",)),
    Case("cupy-managed", "the same on CuPy's managed memory pool", "cupy_arrays.py", args=["managed"], needs=("cupy",)),
    Case("cupy-async", "the same on CuPy's stream-ordered pool", "cupy_arrays.py", args=["async"], needs=("cupy",)),
    Case("cupy-graph", "CuPy: a stream captured into a graph", "cupy_graph.py", needs=("cupy",)),
    Case(
        "jax", "JAX: jit training, with a pool of a tenth of the card", "jax_train.py", needs=("jax",),
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": ".10", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}, deadline=120,
        gib=16,
    ),
    Case(
        "jax-no-pool", "the same without preallocation", "jax_train.py", needs=("jax",),
        env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}, deadline=120,
    ),
    Case("numba", "Numba: kernels, streams, managed and pinned arrays", "numba_kernels.py", needs=("numba",)),
    Case("runtime-threads", "C++, static runtime, per-thread default streams: threads, streams, events", "runtime.cu", args=["threads"]),
    Case("runtime-graphs", "C++: graphs by capture and by hand, cooperative launch", "runtime.cu", args=["graphs"]),
    Case("runtime-memory", "C++: pitched, pinned, mapped and stream-ordered memory, `cudaMemGetInfo`", "runtime.cu", args=["memory"]),
    Case("runtime-ipc", "C++: a block of 64 KiB and an event shared with a started process", "runtime.cu", args=["ipc"]),
    torch("nccl-torch", "`torch.distributed` on NCCL, one process", "torch_nccl.py"),
    torch("nccl-api", "NCCL's own interface: `ncclCommInitAll`, all-reduce", "nccl_api.py"),
    torch(
        "memory-told", "free and total memory as PyTorch, the runtime and NVML tell it", "memory_told.py",
        args=["--alone"], alone=True, turns=False,
    ),
    torch(
        "memory-limit", "the same under `NVSHARE_MEMORY_LIMIT=8GiB`: the limit is the size of the card", "memory_told.py",
        shim_args=["--limit", str(8 * GIB)], shim_env={"NVSHARE_MEMORY_LIMIT": "8GiB"},
    ),
    torch(
        "memory-limit-nvml", "NVML tells the same limit", "memory_told.py", args=["--nvml"],
        shim_args=["--limit", str(8 * GIB)], shim_env={"NVSHARE_MEMORY_LIMIT": "8GiB"},
    ),
    torch(
        "out-of-memory", "`torch.OutOfMemoryError` at a limit of 2 GiB, and life after it", "torch_oom.py",
        shim_args=["--limit", str(2 * GIB)], shim_env={"NVSHARE_MEMORY_LIMIT": "2GiB"}, gib=5,
    ),
    torch(
        "torch-opinfo", "PyTorch's own operator samples (`torch.testing`, OpInfo)", "vendor_torch.py", deadline=150,
        turns=False,
    ),
    Case(
        "numba-tests", "numba-cuda's own tests: driver interface, IPC, streams, threads", "vendor_numba.py",
        needs=("numba", "numba_cuda"), deadline=150, turns=False,
    ),
]
