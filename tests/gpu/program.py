"""Programs that a measurement drives: orders go in as lines, answers come out as lines of JSON. Both ends, and the
report of what held."""

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
from pathlib import Path


def ground(binaries, *names):
    """Ends with a reason if the measurement cannot be made here."""
    missing = [name for name in names if not (binaries / name).exists()]
    if missing:
        sys.exit(f"{binaries} has no {', '.join(missing)}; build them with `cargo build --release` and give target/release")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        sys.exit(f"no NVIDIA driver here ({error}); this needs a machine with an NVIDIA GPU")


class Program:
    """`worker` as a process, under the shim if there is a `run_dir` of an agent; its log is in `logs`."""

    def __init__(self, worker, name, logs, binaries=None, run_dir=None, **environment):
        # What the caller's shell says to the shim is not meant for these.
        env = {k: v for k, v in os.environ.items() if not k.startswith("NVSHARE_") or k.startswith("NVSHARE_SIM_")}
        env.update(PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1", **environment)
        if run_dir is not None:
            env.update(LD_PRELOAD=str(binaries / "libnvshare.so"), NVSHARE_RUN_DIR=str(run_dir), NVSHARE_LOG="info")
        self.name = name
        self.log = open(Path(logs) / f"{name}.log", "w")
        self.process = subprocess.Popen(
            [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env,
        )
        #: What it said of itself.
        self.ready = None

    def begun(self):
        self.ready = self.answer()
        return self

    def send(self, *words):
        self.process.stdin.write(" ".join(str(w) for w in words) + "\n")
        self.process.stdin.flush()

    def answer(self, patience=100):
        if not select.select([self.process.stdout], [], [], patience)[0]:
            raise RuntimeError(f"{self.name} does not answer: {self.last_words()}")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait(10)}: {self.last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def last_words(self):
        return Path(self.log.name).read_text()[-2000:]

    def do(self, *words):
        self.send(*words)
        return self.answer()

    def quit(self):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            return self.process.wait(60)
        self.process.kill()
        return self.process.wait()


def serve(ready, action):
    """The program's end: says `ready`, then carries out each order with what `action` gives for its name."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        name, *words = line.split() or ["quit"]
        if name == "quit":
            break
        try:
            answer = action(name)(*words)
        except Exception as error:  # who drives this must see why, and decide
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


class Report:
    """What was checked, and the figures."""

    def __init__(self):
        self.checks, self.figures = [], {}

    def check(self, name, held, **figures):
        self.checks.append({"check": name, "held": bool(held), **figures})
        print(f"{'PASS' if held else 'FAIL'}  {name}: " + ", ".join(f"{k}={v}" for k, v in figures.items()), flush=True)
