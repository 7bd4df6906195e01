"""Running out of memory at a limit, and going on: torch_oom.py [--limit BYTES]"""

import argparse

import torch

from result import Result
from torch_seed import seed

BLOCK = 256 << 20
MOST = 4 << 30


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    seed()
    result = Result()
    a = torch.randn(1024, 1024, device="cuda")
    for attempt in range(2):
        blocks, failed = [], None
        while len(blocks) * BLOCK < MOST:
            try:
                blocks.append(torch.full((BLOCK // 4,), float(attempt), device="cuda"))
            except torch.OutOfMemoryError as error:
                failed = error
                break
        held = len(blocks) * BLOCK
        if options.limit:
            assert failed is not None, f"{held} bytes were given at a limit of {options.limit}"
            assert options.limit // 2 <= held <= options.limit, f"out of memory at {held} bytes of {options.limit}"
            assert "out of memory" in str(failed).lower(), failed
        else:
            assert failed is None, f"this GPU has less than {MOST} bytes free"
        # The blocks that were given work, and so does everything else.
        assert all(block[:: 1 << 20].eq(attempt).all() for block in blocks)
        del blocks
        torch.cuda.empty_cache()
        result.output(f"after attempt {attempt}", a @ a + attempt)
    torch.cuda.synchronize()
    result.done()


main()
