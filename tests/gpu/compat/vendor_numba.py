"""numba-cuda's own tests, as shipped in its package: the modules that deal with the driver, memory, streams and processes.

Not among them: tests of managed memory that allocate as much as the card has, or more.
"""

import importlib
import sys
import time
import types
import unittest

import numba_on_numpy  # noqa: F401
from result import Result, skip

DRIVER = (
    "array_attr context_stack cuda_array_slicing cuda_auto_context cuda_devicerecord cuda_driver cuda_memory cuda_ndarray "
    "deallocations detect emm_plugins events host_alloc init is_fp16 linker module_callbacks pinned profiler reset_device "
    "select_device streams"
).split()
PROGRAMS = (
    "ipc multithreads multiprocessing cuda_array_interface stream_api cooperative_groups array array_args constmem sm "
    "localmem matmul laplace transpose reduction sync forall gufunc record_dtype"
).split()
SECONDS = 75


def stand_in(name):
    """A module whose contents exist and do nothing: for what numba.cuda.testing imports and these tests do not use."""
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: type(attribute, (), {})
        sys.modules[name] = module


class Outcomes(unittest.TestResult):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def told(self, test, text):
        # A test that has failed in its set-up and in itself is told once.
        self.result.outcomes.setdefault(test.id(), text)

    def addSuccess(self, test):
        self.told(test, "ok")

    def addFailure(self, test, error):
        self.told(test, f"failed: {str(error[1]).strip()[:200]}")

    def addError(self, test, error):
        self.told(test, f"{error[0].__name__}: {str(error[1]).strip()[:200]}")

    def addSkip(self, test, reason):
        self.told(test, f"skipped: {reason}")

    def addExpectedFailure(self, test, error):
        self.told(test, "expected failure")

    def addUnexpectedSuccess(self, test):
        self.told(test, "unexpected success")

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.told(test, f"{error[0].__name__}: {str(error[1]).strip()[:200]}")


def each(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from each(test)
        else:
            yield test


def wanted(test):
    """Whether a test stays within free memory and needs nothing but this card."""
    name = test.id().lower()
    return not any(word in name for word in ("oversub", "managed_alloc", "filecheck"))


def main():
    for name in ("filecheck", "filecheck.matcher", "filecheck.options", "filecheck.parser", "filecheck.finput"):
        stand_in(name)
    from numba import cuda

    if not cuda.is_available():
        skip("Numba finds no GPU")
    result = Result()
    outcomes = Outcomes(result)
    until = time.monotonic() + SECONDS
    absent = []
    for package, names in (("cudadrv", DRIVER), ("cudapy", PROGRAMS)):
        for name in names:
            if time.monotonic() > until:
                break
            path = f"numba.cuda.tests.{package}.test_{name}"
            try:
                suite = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(path))
            except ImportError as error:
                absent.append(f"{name}: {error}")
                continue
            # As a suite of its own: class fixtures run once for each module.
            unittest.TestSuite(test for test in each(suite) if wanted(test)).run(outcomes)
    result.fact("modules that this version lacks", absent)
    result.done()


# Its tests start processes, which import this file.
if __name__ == "__main__":
    main()
