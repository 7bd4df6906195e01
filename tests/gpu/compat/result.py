"""What a compatibility program found: hashes and values of its outputs, printed as one line of JSON at the end."""

import hashlib
import json
import math
import os
import sys

MARK = "RESULT "
SAMPLES = 64


def host_bytes(value):
    """The bytes of a tensor, an array or a text, wherever it lies, and a few of its numbers."""
    if isinstance(value, str):
        return value.encode(), []
    if isinstance(value, (bytes, bytearray)):
        return bytes(value), list(value[:SAMPLES])
    import numpy

    if type(value).__module__.split(".")[0] == "torch":
        value = value.detach().cpu().resolve_conj().resolve_neg()
        if value.is_floating_point() and value.dtype.itemsize < 4:
            # NumPy has no bfloat16; widening changes no value.
            value = value.float()
        value = value.numpy()
    elif hasattr(value, "get"):
        value = value.get()
    elif hasattr(value, "copy_to_host"):
        value = value.copy_to_host()
    array = numpy.ascontiguousarray(numpy.asarray(value))
    wide = array.astype(numpy.complex128).ravel()
    step = max(1, wide.size // SAMPLES)
    picked = wide[::step]
    parts = [*picked.real.tolist(), *picked.imag.tolist()] if numpy.iscomplexobj(array) else picked.real.tolist()
    # The norm sees what lies between the samples.
    return array.tobytes() + str(array.shape).encode(), [*parts, float(numpy.linalg.norm(wide))]


class Result:
    def __init__(self):
        self.exact, self.numbers, self.outcomes, self.facts = {}, {}, {}, {}
        self.processes = [os.getpid()]

    def output(self, name, *values):
        """An output of the program: compared bit by bit, or as numbers if the program does not repeat itself."""
        digest, numbers = hashlib.sha256(), []
        for value in values:
            raw, some = host_bytes(value)
            digest.update(raw)
            numbers += some
        assert name not in self.exact, f"{name} is given twice"
        self.exact[name] = digest.hexdigest()
        self.numbers[name] = numbers

    def outcome(self, test, text):
        """How one test of a suite ended: ok, or why not."""
        self.outcomes[test] = text

    def fact(self, name, value):
        """Shown, not compared."""
        self.facts[name] = value

    def process(self, pid):
        """Another process of this program that uses the GPU."""
        self.processes.append(pid)

    def done(self):
        parts = {
            "exact": self.exact, "numbers": self.numbers, "outcomes": self.outcomes,
            "facts": self.facts, "processes": self.processes,
        }
        text = json.dumps(parts, default=str)
        print(f"\n{MARK}{text}", flush=True)


def skip(reason):
    """This machine lacks something that the program needs."""
    print(f"\n{MARK}{json.dumps({'skipped': reason})}", flush=True)
    sys.exit(0)


def near(a, b, relative=1e-6):
    """For checks of a program on its own results."""
    return math.isclose(a, b, rel_tol=relative)
