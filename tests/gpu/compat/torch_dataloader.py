"""A DataLoader whose workers are forked after CUDA was initialised, with pinned memory and copies that overlap."""

import os

import numpy
import torch
import torch.nn.functional as F

from result import Result
from torch_seed import Image, parameters, seed, train


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1024

    def __getitem__(self, index):
        random = numpy.random.default_rng(index)
        return torch.from_numpy(random.standard_normal((3, 32, 32), dtype=numpy.float32)), index % 10, os.getpid()


def main():
    seed()
    result = Result()
    model = Image().to("cuda")
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=64, num_workers=4, pin_memory=True, shuffle=True, persistent_workers=True,
        multiprocessing_context="fork", generator=torch.Generator().manual_seed(1),
    )
    workers, pinned = set(), []

    def batches():
        for _ in range(2):
            for images, targets, pids in loader:
                workers.update(pids.tolist())
                pinned.append(images.is_pinned())
                yield images.to("cuda", non_blocking=True), targets.to("cuda", non_blocking=True)

    losses = train(model, batches(), F.cross_entropy)
    assert len(workers) == 4 and os.getpid() not in workers, workers
    assert all(pinned)
    result.output("losses", losses)
    result.output("weights", *parameters(model))
    torch.cuda.synchronize()
    result.done()


main()
