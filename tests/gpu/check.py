"""Checks nvshare on a real GPU, with PyTorch programs, the real driver and prebuilt nvshare binaries.

    sudo python3 tests/gpu/check.py --binaries target/release [--gib 8] [--json OUT]

Run it as root, so that the eBPF sensors attach. It stays far within free GPU memory: it never allocates
more than a quarter of what is free, and pushes memory out by prefetch instead of by oversubscription.
Ends with 0 if every check held, else 1; each check prints the figures it went by.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from agent import Agent
from program import Program, Report, ground

WORKER = Path(__file__).with_name("worker.py")


def started(binaries, run_dir, name):
    """A PyTorch program under the shim."""
    return Program(WORKER, name, run_dir, binaries, run_dir).begun()


def delta(after, before, field):
    return None if after[field] is None or before[field] is None else after[field] - before[field]


def runs(a, b):
    """Lengths of the runs of one program, in the order of time."""
    stamps = sorted([(t, 0) for t in a] + [(t, 1) for t in b])
    lengths, last = [], None
    for _, who in stamps:
        if who == last:
            lengths[-1] += 1
        else:
            lengths.append(1)
            last = who
    return lengths


def counters(report, agent, binaries, run_dir, gib):
    worker = started(binaries, run_dir, "counters")
    size = int(gib * 2**30)
    before = agent.settled(worker)
    fresh = worker.do("fresh", gib)
    cold = agent.settled(worker)
    report.check(
        "a cold start shows faults but no bytes in",
        delta(cold, before, "gpu_faults") > 0 and delta(cold, before, "bytes_in") == 0,
        faults=delta(cold, before, "gpu_faults"), bytes_in=delta(cold, before, "bytes_in"), kernel_ms=round(fresh["kernel_ms"], 1),
    )
    worker.do("sweep", 20)
    resident = agent.settled(worker)
    report.check(
        "resident memory shows no bytes and next to no faults",
        delta(resident, cold, "bytes_in") == 0 and delta(resident, cold, "gpu_faults") < 100,
        faults=delta(resident, cold, "gpu_faults"), bytes_in=delta(resident, cold, "bytes_in"),
    )
    rounds = []
    for _ in range(3):
        pushed = worker.do("push-out")
        out = agent.settled(worker)
        busy_before = agent.metric("nvshare_gpu_fault_service_seconds_total")
        swept = worker.do("sweep", 1)
        back = agent.settled(worker)
        busy = agent.metric("nvshare_gpu_fault_service_seconds_total") - busy_before
        rounds.append({
            "out_bytes": delta(out, resident, "bytes_out"), "in_bytes": delta(back, out, "bytes_in"),
            "faults": delta(back, out, "gpu_faults"), "kernel_s": round(swept["kernel_ms"][0] / 1e3, 4),
            "busy_s": round(busy, 4), "push_out_s": round(pushed["wall_ms"] / 1e3, 3),
        })
        resident = back
    report.check(
        "bytes and faults rise exactly with a push-out and a fault-in",
        all(r["out_bytes"] == size and r["in_bytes"] == size and r["faults"] > 0 for r in rounds),
        size=size, rounds=rounds,
    )
    worst = max(abs(r["busy_s"] / r["kernel_s"] - 1) for r in rounds)
    report.check(
        "the fault thread's busy time is the wall time of a fault-bound kernel within 10 %",
        worst <= 0.10, worst_percent=round(worst * 100, 1),
    )
    report.check("every word is right", worker.do("verify")["wrong_words"] == 0)
    worker.quit()


def side_by_side(report, agent, binaries, run_dir, gib):
    a, b = (started(binaries, run_dir, name) for name in ("a", "b"))
    for worker in (a, b):
        worker.do("fresh", gib)
    for worker in (a, b):
        worker.send("sweep-for", 3)
    shared = [worker.answer()["stamps_ms"] for worker in (a, b)]
    lengths = runs(*shared)
    report.check(
        "two programs that fit run side by side", agent.mode() == "shared" and len(lengths) > 0.2 * sum(lengths),
        mode=agent.mode(), sweeps=[len(s) for s in shared], changes_of_program=len(lengths) - 1,
    )
    agent.ctl("set", "quantum", "500ms")
    agent.ctl("set", "mode", "exclusive")
    time.sleep(0.3)
    for worker in (a, b):
        worker.send("sweep-for", 6)
    turns = [worker.answer()["stamps_ms"] for worker in (a, b)]
    lengths = runs(*turns)
    inner = lengths[1:-1]
    report.check(
        "by hand exclusive: the two alternate", len(lengths) >= 8 and inner and min(inner) > 1 and len(lengths) < 40,
        sweeps=[len(s) for s in turns], turns=len(lengths), sweeps_per_turn=inner,
    )
    status = agent.ctl("status", "--json")
    for worker in (a, b):
        worker.send("sweep-for", 6)
    time.sleep(1.2)
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait()
    killed_ms = time.monotonic() * 1e3
    after = [[t for t in worker.answer()["stamps_ms"] if t > killed_ms] for worker in (a, b)]
    report.check(
        "with the agent killed mid-slice both go on", all(len(s) > 20 for s in after), sweeps_after=[len(s) for s in after],
        first_after_ms=[round(s[0] - killed_ms, 1) if s else None for s in after],
    )
    wrong = [worker.do("verify")["wrong_words"] for worker in (a, b)]
    report.check("nothing was lost", wrong == [0, 0], wrong_words=wrong)
    agent = Agent(binaries, run_dir)
    deadline = time.monotonic() + 15
    while len(agent.ctl("clients", "--json")["clients"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    report.check("a new agent finds both again", len(agent.ctl("clients", "--json")["clients"]) == 2)
    codes = [worker.quit() for worker in (a, b)]
    report.check("both end well", codes == [0, 0], exit_codes=codes)
    return agent, status


def thrash(report, binaries, run_dir, gib):
    """Real driver signals of thrash within free memory.

    The agent is told that the card holds less than both programs have. Each program pushes its memory out and
    faults it back, as if the other had evicted it: real faults, real bytes, on a card that is nearly empty.
    """
    agent = Agent(binaries, run_dir, f'[gpu]\nusable_memory = "{1.5 * gib} GiB"\n')
    try:
        a, b = (started(binaries, run_dir, name) for name in ("thrash-a", "thrash-b"))
        for worker in (a, b):
            worker.do("fresh", gib)
            worker.do("sweep", 50)
        report.check("two programs that do not fit by their sums but move nothing stay shared", agent.mode() == "shared")
        for worker in (a, b):
            worker.send("churn-for", 6)
        churned = [worker.answer()["stamps_ms"] for worker in (a, b)]
        changes = agent.ctl("explain", "--json")
        switch = next((c for c in reversed(changes["changes"]) if c["to"] == "exclusive" and c["from"] == "shared"), None)
        detected = None if switch is None else round(switch["t_ms"] - switch["first_refault_ms"], 1)
        report.check(
            "thrash is detected from the real driver's signals within 500 ms",
            detected is not None and detected <= 500, detected_ms=detected,
            reason=None if switch is None else switch["reason"], rounds=[len(s) for s in churned],
        )
        before = [agent.settled(worker) for worker in (a, b)]
        # Turns end once whole rotations have moved nothing; a turn lasts twenty times what its hand-over costs.
        deadline = time.monotonic() + 90
        while agent.mode() != "shared" and time.monotonic() < deadline:
            for worker in (a, b):
                worker.send("sweep-for", 2)
            for worker in (a, b):
                worker.answer()
        after = [agent.settled(worker) for worker in (a, b)]
        moved = [delta(x, y, "bytes_in") for x, y in zip(after, before)]
        # What the last round had pushed out comes back once; then nothing moves.
        report.check(
            "when the programs stop pushing their memory out, bytes end and the plan is shared again",
            agent.mode() == "shared" and max(moved) <= gib * 2**30, mode=agent.mode(), bytes_in=moved,
        )
        wrong = [worker.do("verify")["wrong_words"] for worker in (a, b)]
        report.check("thrash and turns lost nothing", wrong == [0, 0], wrong_words=wrong)
        for worker in (a, b):
            worker.quit()
        return changes
    finally:
        agent.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="folder with nvshare-agent, nvsharectl, libnvshare.so")
    parser.add_argument("--gib", type=float, default=4.0, help="memory of each program")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--logs", type=Path, help="keep the logs here")
    args = parser.parse_args()
    binaries = args.binaries.resolve()
    ground(binaries, "nvshare-agent", "nvsharectl", "libnvshare.so")
    run_dir = args.logs or Path(tempfile.mkdtemp(prefix="nvshare-gpu-"))
    run_dir.mkdir(parents=True, exist_ok=True)
    report = Report()
    agent = Agent(binaries, run_dir)
    try:
        doctor = agent.ctl("doctor", "--json")
        print(json.dumps(doctor), flush=True)
        counters(report, agent, binaries, run_dir, args.gib)
        agent, status = side_by_side(report, agent, binaries, run_dir, args.gib)
    finally:
        agent.stop()
    changes = thrash(report, binaries, run_dir, args.gib)
    result = {"checks": report.checks, "doctor": doctor, "status": status, "thrash": changes}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    checks = [c for c in report.checks if "check" in c]
    failed = [c["check"] for c in checks if not c["held"]]
    print(f"{len(checks) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
