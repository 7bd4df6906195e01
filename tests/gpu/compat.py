"""Runs programs bare and under the shim on a real GPU and compares what they compute.

    sudo python3 tests/gpu/compat.py --binaries target/release --out OUT [--only NAME ...] [--turns]

Each program runs bare, bare again (to learn how well it repeats itself) and under the shim, with a running agent. With --turns it
runs a fourth time while all of them take turns of 300 ms. None takes more than a few GiB. Results are written as they come: OUT/results.json,
OUT/compatibility.md, OUT/logs.txt. Ends with 0 if no program fails or differs under the shim, else 1.
"""

import argparse
import concurrent.futures
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from agent import Agent
from cases import CASES
from compat_report import markdown
from verdict import BAD, GOOD, Run, first_error, judge

PROGRAMS = Path(__file__).with_name("compat")
sys.path.append(str(PROGRAMS))
from result import MARK  # noqa: E402

BARE, AGAIN, SHIM, TURNS = "bare", "bare again", "shim", "shim, in turns"


class Suite:
    def __init__(self, options, run_dir):
        self.options, self.run_dir = options, run_dir
        self.agent = None
        self.results = {}
        self.runs = {}
        self.memory = Room(room())
        self.lock = threading.Lock()
        self.compiling = threading.Lock()
        self.begin = time.monotonic()

    def seconds_left(self):
        return self.options.budget - (time.monotonic() - self.begin)

    def environment(self, case, arm):
        env = {k: v for k, v in os.environ.items() if not k.startswith("NVSHARE_") or k.startswith("NVSHARE_SIM_")}
        env.pop("LD_PRELOAD", None)
        cache = self.run_dir / "cache"
        env.update(
            PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1", PYTHONHASHSEED="0", CUBLAS_WORKSPACE_CONFIG=":4096:8",
            TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"), TORCHINDUCTOR_COMPILE_THREADS="4",
            TRITON_CACHE_DIR=str(cache / "triton"), CUPY_CACHE_DIR=str(cache / "cupy"), HF_HUB_OFFLINE="1",
        )
        env.update(case.env)
        if arm in (SHIM, TURNS):
            env.update(
                LD_PRELOAD=str(self.options.binaries / "libnvshare.so"), NVSHARE_RUN_DIR=str(self.run_dir),
                NVSHARE_LOG="warn",
            )
            env.update(case.shim_env)
        return env

    def compiled(self, source):
        """A program built by nvcc, once."""
        built = self.run_dir / source.stem
        with self.compiling:
            if built.exists():
                return built
            nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
            if nvcc is None:
                return None
            # Only a whole file gets the name.
            partial = built.with_suffix(".partial")
            command = [
                nvcc, "-O2", "-std=c++17", "-cudart", "static", "--default-stream", "per-thread", "-arch=native",
                "-o", str(partial), str(source),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc: {first_error(done.stderr + done.stdout)}")
            partial.rename(built)
            return built

    def command(self, case, arm):
        source = PROGRAMS / case.program
        if source.suffix == ".cu":
            built = self.compiled(source)
            start = None if built is None else [str(built)]
        else:
            start = [sys.executable, str(source)]
        if start is None:
            return None
        return start + case.args + (case.shim_args if arm in (SHIM, TURNS) else [])

    def run(self, case, arm):
        """One run; an error is part of what it gives."""
        missing = [name for name in case.needs if find_spec(name) is None]
        if missing:
            return Run(skipped=f"{', '.join(missing)} is not installed")
        try:
            command = self.command(case, arm)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return Run(error=str(error))
        if command is None:
            return Run(skipped="there is no nvcc")
        if not self.memory.take(case.gib):
            return Run(skipped=f"it may take {case.gib} GiB, more than half of what is free on this GPU")
        try:
            return self.start(case, arm, command)
        finally:
            self.memory.give_back(case.gib)

    def start(self, case, arm, command):
        limit = min(case.deadline, self.seconds_left())
        if limit < 5:
            return Run(late=True)
        log = self.run_dir / f"{case.name}.{arm.replace(' ', '-').replace(',', '')}.log"
        begin = time.monotonic()
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environment(case, arm),
                cwd=self.run_dir, start_new_session=True,
            )
            code = self.wait(process, limit)
        seconds = round(time.monotonic() - begin, 1)
        text = log.read_text(errors="replace")
        printed = [line for line in text.splitlines() if line.startswith(MARK)]
        result = json.loads(printed[-1][len(MARK):]) if printed else {}
        if code is None:
            if limit < case.deadline:
                return Run(late=True, seconds=seconds)
            return Run(error=f"no end within {limit:.0f} s", seconds=seconds)
        if code != 0 or not printed:
            end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return Run(error=f"{first_error(text)} ({end})", seconds=seconds)
        if "skipped" in result:
            return Run(skipped=result["skipped"], seconds=seconds)
        run = Run(result=result, seconds=seconds)
        if arm in (SHIM, TURNS):
            processes = {process.pid, *result.get("processes", [])}
            if not processes & self.agent.joined():
                run.error = "it ran without ever reaching the agent, so this run says nothing"
        return run

    @staticmethod
    def wait(process, limit):
        """The exit status; None if the program had to be killed, with all that it started."""
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            # So that a Python program writes down where it stands.
            os.killpg(process.pid, signal.SIGABRT)
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()

    def guarded(self, case, arm):
        """One run, of which nothing may stop the others."""
        try:
            return self.run(case, arm)
        except Exception as error:
            return Run(error=f"the suite itself: {type(error).__name__}: {error}")

    def task(self, case, arm):
        run = self.guarded(case, arm)
        with self.lock:
            runs = self.runs.setdefault(case.name, {})
            runs[arm] = run
            complete = len(runs) == 3
        if complete:
            self.record(case, runs, *judge(runs[BARE], runs[AGAIN], runs[SHIM]))

    def task_in_turns(self, case):
        entry = self.results.get(case.name)
        if entry is None or not case.turns or entry["verdict"] not in GOOD:
            return
        run = self.guarded(case, TURNS)
        verdict, note = judge(entry["runs"][BARE], entry["runs"][AGAIN], run)
        with self.lock:
            entry["runs"][TURNS] = run
            entry["turns"] = verdict
            entry["turns_note"] = note
            print(f"{verdict:<22} {case.name}, in turns ({run.seconds:.0f} s): {note}", flush=True)
        self.write()

    def record(self, case, runs, verdict, note):
        with self.lock:
            self.results[case.name] = {
                "what": case.what, "verdict": verdict, "note": note, "turns": None, "turns_note": None, "runs": runs,
            }
            seconds = ", ".join(f"{runs[arm].seconds:.0f}" for arm in (BARE, AGAIN, SHIM))
            print(f"{verdict:<22} {case.name} ({seconds} s): {note}", flush=True)
        self.write()

    def write(self):
        """Everything that is known so far."""
        with self.lock:
            known = [(case, self.results[case.name]) for case in CASES if case.name in self.results]
            entries = []
            for case, entry in known:
                runs = {
                    arm: {"error": run.error, "skipped": run.skipped, "seconds": run.seconds, "facts": run.result.get("facts", {}),
                          "exact": run.result.get("exact", {})}
                    for arm, run in entry["runs"].items()
                }
                entries.append({"name": case.name, **entry, "runs": runs})
            out = self.options.out
            (out / "results.json").write_text(json.dumps({"host": self.host(), "programs": entries}, indent=1) + "\n")
            (out / "compatibility.md").write_text(markdown(self.host(), entries))

    def host(self):
        if not hasattr(self, "_host"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
            try:
                gpu = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
            except (OSError, subprocess.TimeoutExpired):
                gpu = None
            self._host = {
                "gpu": gpu, "kernel": os.uname().release, "python": sys.version.split()[0], "packages": versions(),
                "date": time.strftime("%Y-%m-%d"), "simulated": "NVSHARE_SIM_DIR" in os.environ,
            }
        return self._host

    def keep_logs(self):
        """The ends of all logs, in one file."""
        parts = []
        for log in sorted(self.run_dir.glob("*.log")):
            text = log.read_text(errors="replace")
            limit = 40_000 if log.name == "agent.log" else 6_000
            # The result line is in the JSON already.
            text = "\n".join(line[:2000] for line in text.splitlines() if not line.startswith(MARK))[-limit:]
            if text.strip():
                parts.append(f"== {log.name}\n{text}\n")
        (self.options.out / "logs.txt").write_text("\n".join(parts))


class Room:
    """GPU memory that programs may take together."""

    def __init__(self, gib):
        self.all = self.left = gib
        self.changed = threading.Condition()

    def take(self, gib):
        """Waits until there is room; False if there never will be."""
        if gib > self.all:
            return False
        with self.changed:
            self.changed.wait_for(lambda: self.left >= gib)
            self.left -= gib
        return True

    def give_back(self, gib):
        with self.changed:
            self.left += gib
            self.changed.notify_all()


def room():
    """Half of the GPU's free memory in GiB; no bound where no real GPU can be harmed."""
    if "NVSHARE_SIM_DIR" in os.environ:
        return math.inf
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except OSError as error:
        raise SystemExit(f"there is no NVIDIA GPU to test on: {error}") from None
    if done.returncode != 0:
        raise SystemExit(f"nvidia-smi cannot tell how much memory is free: {done.stderr or done.stdout}")
    return int(done.stdout.strip()) / 1024 / 2


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "transformers", "cupy-cuda13x", "jax", "numba", "numba-cuda", "nvidia-nccl-cu13"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="folder with nvshare-agent, nvsharectl, libnvshare.so")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this program; can be repeated")
    parser.add_argument("--turns", action="store_true", help="also run them while they take turns")
    parser.add_argument("--jobs", type=int, default=10, help="programs at a time")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="stop after this time")
    parser.add_argument("--agent-config", type=Path, help="the agent's configuration, for a simulated GPU")
    parser.add_argument("--list", action="store_true", help="show what would run")
    options = parser.parse_args()
    names = [case.name for case in CASES]
    unknown = [name for name in options.only if name not in names]
    if unknown:
        parser.error(f"no program {', '.join(unknown)}; there are {', '.join(names)}")
    cases = [case for case in CASES if not options.only or case.name in options.only]
    if options.list:
        for case in cases:
            print(f"{case.name:<24} {case.what}")
        return 0
    options.binaries = options.binaries.resolve()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nvshare-compat-") as private:
        suite = Suite(options, Path(private))
        try:
            run_all(suite, cases)
        finally:
            suite.keep_logs()
    bad = [name for name, entry in suite.results.items() if entry["verdict"] in BAD or entry["turns"] in BAD]
    good = [name for name, entry in suite.results.items() if entry["verdict"] in GOOD]
    print(f"{len(good)} as bare, {len(bad)} not, {len(suite.results)} in all; {time.monotonic() - suite.begin:.0f} s")
    return 1 if bad or not good else 0


def run_all(suite, cases):
    config = suite.options.agent_config
    # Without a file of its own the agent would read the machine's.
    suite.agent = Agent(suite.options.binaries, suite.run_dir, config.read_text() if config else "", "off")
    try:
        # The longest first, so that none is left over at the end.
        together = sorted((case for case in cases if not case.alone), key=lambda case: -case.deadline)
        with concurrent.futures.ThreadPoolExecutor(suite.options.jobs) as pool:
            for case in together:
                for arm in (BARE, AGAIN, SHIM):
                    pool.submit(suite.task, case, arm)
        for case in cases:
            if case.alone:
                for arm in (BARE, AGAIN, SHIM):
                    suite.task(case, arm)
        if suite.options.turns:
            suite.agent.ctl("set", "quantum", "300ms")
            suite.agent.ctl("set", "mode", "exclusive")
            with concurrent.futures.ThreadPoolExecutor(suite.options.jobs) as pool:
                list(pool.map(suite.task_in_turns, cases))
    finally:
        suite.agent.stop()


if __name__ == "__main__":
    sys.exit(main())
