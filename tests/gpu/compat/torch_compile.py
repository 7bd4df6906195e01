"""torch.compile, with and without CUDA graphs, and a Triton kernel of the program's own."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from result import Result
from torch_seed import parameters, seed


@triton.jit
def scaled_add(a, b, out, scale, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(out + at, tl.load(a + at, mask=inside) * scale + tl.load(b + at, mask=inside), mask=inside)


def network():
    return torch.nn.Sequential(
        torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.LayerNorm(1024), torch.nn.Linear(1024, 512)
    ).to("cuda")


def main():
    seed()
    result = Result()
    a, b = torch.randn(5_000_001, device="cuda"), torch.randn(5_000_001, device="cuda")
    out = torch.empty_like(a)
    scaled_add[(triton.cdiv(a.numel(), 1024),)](a, b, out, 3.0, a.numel(), BLOCK=1024)
    torch.testing.assert_close(out, a * 3.0 + b)
    result.output("triton kernel", out)

    model = network()
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        inputs = torch.randn(256, 512, device="cuda")
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(compiled(inputs), inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    result.output("compiled training", torch.stack(losses), *parameters(model))

    model = network().eval()
    fast = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        outputs = [fast(torch.randn(128, 512, device="cuda")).clone() for _ in range(8)]
    result.output("compiled into graphs", *outputs)
    torch.cuda.synchronize()
    result.done()


main()
