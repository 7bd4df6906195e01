"""CUDA graphs in PyTorch: capture with allocations inside, replay, and graphed callables in training."""

import torch
import torch.nn.functional as F

from result import Result
from torch_seed import parameters, seed


def network():
    return torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 512)).to("cuda")


def main():
    seed()
    result = Result()
    model = network()
    static = torch.zeros(64, 512, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        # More than the smallest segment, so that memory is allocated while the stream is captured.
        wide = model(static).repeat(64, 4)
        out = (wide * 2).sum(dim=0)
    outputs = []
    for step in range(100):
        static.copy_(torch.randn(64, 512, device="cuda"))
        graph.replay()
        if step % 10 == 0:
            outputs.append(out.clone())
    result.output("replays", *outputs)
    # The last replay again, without the graph.
    with torch.no_grad():
        torch.testing.assert_close(out, (model(static).repeat(64, 4) * 2).sum(dim=0), rtol=1e-4, atol=1e-2)

    model = network()
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn(64, 512, device="cuda"),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        inputs = torch.randn(64, 512, device="cuda")
        optimizer.zero_grad(set_to_none=False)
        loss = F.mse_loss(graphed(inputs), inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    result.output("graphed training", torch.stack(losses), *parameters(model))

    # Other allocations beside a capture in relaxed mode.
    static = torch.ones(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        twice = static * 2
    graph.replay()
    result.output("relaxed capture", twice)
    torch.cuda.synchronize()
    result.done()


main()
