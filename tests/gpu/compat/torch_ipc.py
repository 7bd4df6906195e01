"""Sharing with a spawned process: torch_ipc.py 256KiB | 64MiB | event"""

import sys

import torch

from result import Result
from torch_seed import seed

SIZES = {"256KiB": 256 << 10, "64MiB": 64 << 20}
PATIENCE = 60


def use(inbox, outbox):
    """The other process: changes a tensor in place, or waits for an event."""
    try:
        kind, value = inbox.get(timeout=PATIENCE)
        if kind == "event":
            event = torch.cuda.Event.from_ipc_handle(torch.device("cuda", 0), value)
            event.synchronize()
            outbox.put(("done", event.query()))
        else:
            value.mul_(2)
            torch.cuda.synchronize()
            outbox.put(("done", value.double().sum().item()))
            del value
        # The memory stays mapped until the owner has looked.
        inbox.get(timeout=PATIENCE)
    except Exception as error:
        outbox.put(("error", f"{type(error).__name__}: {error}"))


def main():
    what = sys.argv[1]
    seed()
    result = Result()
    context = torch.multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    other = context.Process(target=use, args=(inbox, outbox), daemon=True)
    other.start()
    if what == "event":
        event = torch.cuda.Event(interprocess=True)
        a = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
        event.record()
        inbox.put(("event", event.ipc_handle()))
    else:
        shared = torch.arange(SIZES[what] // 4, device="cuda", dtype=torch.float32) % 1000
        torch.cuda.synchronize()
        inbox.put(("tensor", shared))
    state, answer = outbox.get(timeout=PATIENCE)
    if state != "done":
        raise RuntimeError(f"in the other process: {answer}")
    if what == "event":
        assert answer is True, "the event is not complete in the other process"
        result.output("work before the event", a)
    else:
        # Written by the other process.
        assert shared[3].item() == 6.0, f"the other process's work is not seen: {shared[:4].tolist()}"
        assert shared.double().sum().item() == answer
        result.output("shared tensor", shared)
    inbox.put("end")
    other.join(timeout=PATIENCE)
    assert other.exitcode == 0, f"the other process ended with {other.exitcode}"
    result.done()


if __name__ == "__main__":
    main()
