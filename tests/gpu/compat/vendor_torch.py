"""PyTorch's own samples of its operators (OpInfo, as shipped in torch.testing): each operator on the first samples of its list."""

import sys
import time
import types
import unittest

try:
    import expecttest  # noqa: F401
except ImportError:
    # torch.testing imports it for a class that is not used here.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in

import torch
from torch.utils import _pytree

from result import Result
from torch_seed import seed

SAMPLES = 2
# Of the time that the suite gives; the same operators come first in every run.
SECONDS = 45


def operators():
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


def main():
    # torch.testing freezes what this sets.
    seed()
    result = Result()
    torch.ones(1, device="cuda")
    until = time.monotonic() + SECONDS
    reached = 0
    for op in operators():
        if time.monotonic() > until:
            break
        dtype = torch.float32
        if dtype not in op.supported_dtypes("cuda"):
            continue
        reached += 1
        name = f"{op.name}{'.' + op.variant_test_name if op.variant_test_name else ''}"
        torch.manual_seed(0)
        try:
            samples = op.sample_inputs("cuda", dtype, requires_grad=False)
            for number, sample in zip(range(SAMPLES), samples):
                out = op(sample.input, *sample.args, **sample.kwargs)
                tensors = [leaf for leaf in _pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
                # Memory that the operator left unwritten is no result.
                if tensors and "empty" not in op.name:
                    result.output(f"{name} {number}", *[tensor.to_dense() for tensor in tensors])
            torch.cuda.synchronize()
            result.outcome(name, "ok")
        except torch.AcceleratorError:
            # The context is lost.
            raise
        except Exception as error:
            result.outcome(name, f"{type(error).__name__}: {str(error)[:200]}")
    result.fact("operators", reached)
    result.done()


main()
