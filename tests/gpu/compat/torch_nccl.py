"""torch.distributed on NCCL, one process: collectives, and training under DistributedDataParallel."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F

from result import Result
from torch_seed import parameters, seed, train


def main():
    seed()
    result = Result()
    with tempfile.TemporaryDirectory() as private:
        store = dist.FileStore(os.path.join(private, "store"), 1)
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
        data = torch.randn(4 << 20, device="cuda")
        before = data.clone()
        dist.all_reduce(data)
        gathered = torch.empty_like(data)
        dist.all_gather_into_tensor(gathered, data)
        dist.broadcast(data, 0)
        dist.barrier()
        assert torch.equal(data, before) and torch.equal(gathered, before)
        result.output("collectives", data)
        model = torch.nn.Linear(1024, 1024).to("cuda")
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])

        def batches():
            for _ in range(20):
                inputs = torch.randn(64, 1024, device="cuda")
                yield inputs, inputs.flip(1)

        result.output("losses", train(wrapped, batches(), F.mse_loss))
        result.output("weights", *parameters(model))
        torch.cuda.synchronize()
        dist.destroy_process_group()
    result.done()


main()
