"""Eager training of a transformer and of a convolutional network: losses and weights."""

import torch
import torch.nn.functional as F

from result import Result
from torch_seed import Image, Text, parameters, seed, train


def words(steps):
    for _ in range(steps):
        batch = torch.randint(Text.WORDS, (32, Text.LENGTH), device="cuda")
        yield batch, batch.roll(-1, 1)


def images(steps):
    for _ in range(steps):
        yield torch.randn(64, 3, 64, 64, device="cuda"), torch.randint(10, (64,), device="cuda")


def main():
    seed()
    result = Result()
    model = Text().to("cuda")
    losses = train(model, words(40), lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten()))
    assert losses.isfinite().all() and losses[-1] < losses[0], "the training did not train"
    result.output("transformer losses", losses)
    result.output("transformer weights", *parameters(model))
    model = Image().to("cuda")
    losses = train(model, images(30), F.cross_entropy)
    assert losses.isfinite().all()
    result.output("network losses", losses)
    result.output("network weights", *parameters(model))
    # Memory that comes and goes, so that blocks are split, merged and given back to the driver.
    kept, total = [], torch.zeros((), dtype=torch.float64, device="cuda")
    for step in range(60):
        block = torch.full((1 + (step * 7919) % 30, 1 << 20), float(step), device="cuda")
        total += block.sum(dtype=torch.float64)
        kept.append(block)
        if len(kept) > 8:
            kept.pop(step % 8)
        if step % 20 == 19:
            torch.cuda.empty_cache()
    result.output("blocks", total, *[block[0] for block in kept])
    torch.cuda.synchronize()
    result.done()


if __name__ == "__main__":
    main()
