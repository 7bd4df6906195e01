"""Checks on a real GPU that the agent sees what programs move, exactly, and what looking costs.

    sudo python3 tests/gpu/sensors.py --binaries target/release --out OUT [--mib 2048] [--rounds 6]

Two programs at once move known amounts of managed memory by first touch, demand faults, prefetches and CPU touches, each
its own. The agent's fused figures of each must be what that one did: bytes within 1 %, none of the other's. One program
under the shim takes part, and a third, without it, must show in no client's figures. Then what looking costs: the same
fault-bound and launch-bound loops in a program that the agent watches and in one that it does not, in turns, with the calm
sensors and with sampled event queues; and the agent's own time and memory with ten clients.

It stays within free GPU memory: no program takes more than a quarter of what is free. Ends within five minutes, with 0 if
every check held; OUT holds results.json, the logs and the recording (for `nvshare-agent replay`).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from agent import Agent
from program import Program, Report, ground

WORKER = Path(__file__).with_name("mover.py")
#: Bytes may differ by this share.
TOLERANCE = 0.01
#: (what to do, bytes in, bytes out) in multiples of the program's memory.
STEPS = [
    ("fill", 0, 0),
    ("to-host", 0, 1),
    ("fill", 1, 0),
    ("to-host", 0, 1),
    ("to-gpu", 1, 0),
    ("cpu", 0, 1),
    ("fill", 1, 0),
]
#: Without event queues, and with them as often as they are while pressure is suspected. Of what the probes know, none is sampled.
CALM = "[sensors]\nuvm-events = false\n"
SAMPLING = "[sensors]\nuvm-kprobe = false\n"
#: Sensors that are BPF programs.
BPF = {"uvm-kprobe", "fault-thread", "xid", "cuda-uprobe"}
#: Pairs of passes with each pair of programs.
PAIRS = 12


def started(binaries, run_dir, name, shim=True):
    """A program that moves memory, under the shim or not."""
    return Program(WORKER, name, run_dir, binaries, run_dir if shim else None).begun()


def close(seen, done):
    return seen is not None and abs(seen - done) <= TOLERANCE * max(done, 1 << 20)


def wait_for(what, found, seconds=20):
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.05)


def joined(agent, mover):
    pids = {client["pid"] for client in agent.ctl("clients", "--json")["clients"]}
    return mover.process.pid in pids


def movement(report, binaries, run_dir, base, mib, record, steps):
    """What two programs did, step by step and at once, against the agent's figures of each."""
    agent = Agent(binaries, run_dir, base, record=record)
    try:
        movers = {"a": (started(binaries, run_dir, "a"), mib), "b": (started(binaries, run_dir, "b"), mib * 3 // 4)}
        stranger = started(binaries, run_dir, "stranger", shim=False)
        for mover, size in movers.values():
            wait_for(f"{mover.name} to join", lambda mover=mover: joined(agent, mover))
            mover.do("managed", size)
        stranger.do("managed", mib // 2)
        before = {name: agent.settled(mover) for name, (mover, _) in movers.items()}
        wrong = 0
        for index, (step, came, went) in enumerate(steps):
            for mover, _ in movers.values():
                mover.send(step)
            stranger.send("to-host" if index % 2 else "fill")
            wrong += sum(mover.answer().get("wrong_words", 0) for mover, _ in movers.values())
            stranger.answer()
            after = {name: agent.settled(mover) for name, (mover, _) in movers.items()}
            for name, (_, size) in movers.items():
                done = {"bytes_in": came * (size << 20), "bytes_out": went * (size << 20)}
                seen = {field: (after[name][field] or 0) - (before[name][field] or 0) for field in done}
                held = all(close(seen[field], done[field]) for field in done)
                report.check(f"step {index}, {step} by {name}", held, done=done, seen=seen)
            cpu = {name: (after[name]["cpu_faults"] or 0) - (before[name]["cpu_faults"] or 0) for name in movers}
            faults = {name: (after[name]["gpu_faults"] or 0) - (before[name]["gpu_faults"] or 0) for name in movers}
            if step == "cpu":
                report.check(f"step {index}: CPU touches show as CPU faults", min(cpu.values()) > 0, cpu_faults=cpu)
            elif step == "fill":
                report.check(f"step {index}: GPU accesses show as GPU faults", min(faults.values()) > 0, gpu_faults=faults)
            else:
                report.check(f"step {index}: prefetches show as no GPU faults", max(faults.values()) < 100, gpu_faults=faults)
            before = after
        report.check("nothing was lost", wrong == 0, wrong_words=wrong)
        clients = {client["pid"] for client in agent.ctl("clients", "--json")["clients"]}
        report.check("a program without the shim is no client", stranger.process.pid not in clients)
        status = agent.ctl("status", "--json")
        doctor = agent.ctl("doctor", "--json")
        report.check("no two sensors disagree", doctor["disagreements"] == [], disagreements=doctor["disagreements"])
        for mover, _ in movers.values():
            mover.quit()
        stranger.quit()
        return {"status": status, "doctor": doctor}
    finally:
        agent.stop()


def bounds(ratios):
    """Median, and the bounds between which the mean of the logarithms lies with 90 % (95 % on each side)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = statistics.mean(logs), 1.66 * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "median": round(statistics.median(ratios), 4),
        "mean": round(math.exp(mean), 4),
        "low": round(math.exp(mean - half), 4),
        "high": round(math.exp(mean + half), 4),
        "pairs": len(ratios),
    }


def cost(report, binaries, run_dir, base, mib, rounds, judged):
    """Two equal programs do the same thing in turn, on the same core; the agent's sensors watch one of them. What the BPF
    programs take of everybody's time is added, since the other program bears it too."""
    nowhere = run_dir / "nowhere"
    nowhere.mkdir(exist_ok=True)
    core = {max(os.sched_getaffinity(0))}
    arms = {"calm": CALM, "sampling": SAMPLING}
    found = {arm: {"faults": [], "launches": [], "bpf": []} for arm in arms}
    sampled = 0
    for index in range(rounds):
        for arm in list(arms)[:: 1 if index % 2 else -1]:
            # Fresh programs each time: two of the same kind are not equally fast.
            agent, movers = Agent(binaries, run_dir, base + arms[arm]), []
            try:
                for name, place in (("watched", run_dir), ("apart", nowhere)):
                    movers.append(started(binaries, place, name))
                    os.sched_setaffinity(movers[-1].process.pid, core)
                    movers[-1].do("managed", mib)
                    movers[-1].do("fill")
                watched, apart = movers
                wait_for("the program to join", lambda: joined(agent, watched))
                if arm == "sampling":
                    # An order stands for suspicion; a program that is alone never waits.
                    agent.ctl("set", "mode", "exclusive")
                for mover in movers:
                    # The first pass is of host memory that was never used.
                    mover.do("faults", 1)
                before, begin = bpf_time(agent), time.monotonic()
                for pair in range(PAIRS):
                    order = movers if pair % 2 else movers[::-1]
                    for key, words in (("faults", ("faults", 1)), ("launches", ("launch", 20000))):
                        took = {mover: mover.do(*words) for mover in order}
                        value = (lambda answer: answer["ms"][0]) if key == "faults" else (lambda answer: answer["ns_per_launch"])
                        found[arm][key].append(value(took[watched]) / value(took[apart]))
                found[arm]["bpf"].append((bpf_time(agent) - before) / (time.monotonic() - begin))
                if arm == "sampling":
                    sampled += next(s["run_count"] for s in sensors(agent) if s["sensor"] == "uvm-events")
            finally:
                for mover in movers:
                    mover.quit()
                agent.stop()
    result = {}
    for arm, limit in (("calm", 1.05), ("sampling", 1.10)):
        bpf = max(found[arm]["bpf"])
        result[arm] = {key: bounds(found[arm][key]) for key in ("faults", "launches")} | {"bpf_share": round(bpf, 5)}
        figures = result[arm]["faults"]
        held = figures["median"] + bpf <= limit
        report.check(f"a fault-bound loop with {arm} sensors", held or not judged, **figures, bpf=round(bpf, 5), limit=limit)
        figures = result[arm]["launches"]
        # Within noise: the bounds hold 1, or the middle is no further from it than 1 %.
        held = figures["low"] <= 1 or figures["median"] + bpf <= 1.01
        report.check(f"a launch-bound loop with {arm} sensors", held or not judged, **figures)
    report.check("event queues were sampled", sampled > 0, samples=sampled)
    return {"summary": result, "ratios": found}


def sensors(agent):
    return agent.ctl("doctor", "--json")["sensors"]


def bpf_time(agent):
    """Seconds that the agent's BPF programs have run, on all cores."""
    return sum(s["run_time"] or 0 for s in sensors(agent) if s["sensor"] in BPF) / 1e9


def agent_cost(report, binaries, run_dir, base, clients, seconds, judged):
    """The agent's own time and memory with many clients."""
    agent = Agent(binaries, run_dir, base)
    movers = []
    try:
        for index in range(clients):
            movers.append(started(binaries, run_dir, f"client-{index}"))
            movers[-1].do("managed", 64)
            movers[-1].do("fill")
        wait_for("all clients", lambda: len(agent.ctl("clients", "--json")["clients"]) == clients)
        stat = Path(f"/proc/{agent.process.pid}/stat")

        def ticks():
            fields = stat.read_text().rsplit(") ", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        before, begin = ticks(), time.monotonic()
        time.sleep(seconds)
        share = (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begin)
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        resident = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) << 10
        report.check("the agent's time", share <= 0.01 or not judged, share_of_a_core=round(share, 4), clients=clients, judged=judged)
        report.check("the agent's memory", resident <= 50 << 20 or not judged, mib=round(resident / (1 << 20), 1), judged=judged)
        return {"share_of_a_core": share, "resident_bytes": resident, "clients": clients, "seconds": seconds}
    finally:
        for mover in movers:
            mover.quit()
        agent.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="folder with nvshare-agent, nvsharectl, libnvshare.so")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures, the logs and the recording")
    parser.add_argument("--mib", type=int, default=2048, help="memory of the larger program")
    parser.add_argument("--rounds", type=int, default=4, help=f"rounds of the measurement of cost, of {PAIRS} pairs each")
    parser.add_argument("--clients", type=int, default=10, help="clients for the agent's own cost")
    parser.add_argument("--seconds", type=float, default=20, help="how long the agent's own cost is taken")
    parser.add_argument("--agent-config", type=Path, help="configuration that all agents begin with")
    parser.add_argument("--part", action="append", choices=["movement", "cost", "agent"], help="only this; can be given again [default: all]")
    parser.add_argument("--simulated", action="store_true", help="cost is not judged, and the CPU touches no managed memory")
    args = parser.parse_args()
    binaries, out = args.binaries.resolve(), args.out.resolve()
    ground(binaries, "nvshare-agent", "nvsharectl", "libnvshare.so")
    out.mkdir(parents=True, exist_ok=True)
    base = args.agent_config.read_text() + "\n" if args.agent_config else ""
    report, judged = Report(), not args.simulated
    parts, result = args.part or ["movement", "cost", "agent"], {}
    if "movement" in parts:
        record = out / "recording"
        steps = STEPS[:5] if args.simulated else STEPS
        result["movement"] = movement(report, binaries, out, base, args.mib, record, steps)
        replayed = subprocess.run([str(binaries / "nvshare-agent"), "replay", str(record)], capture_output=True, text=True)
        report.check("the recording replays", replayed.returncode == 0, said=(replayed.stdout + replayed.stderr).strip()[-300:])
    if "cost" in parts:
        result["cost"] = cost(report, binaries, out, base, args.mib // 2, args.rounds, judged)
    if "agent" in parts:
        result["agent"] = agent_cost(report, binaries, out, base, args.clients, args.seconds, judged)
    result["checks"] = report.checks
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = [check["check"] for check in report.checks if not check["held"]]
    print(f"{len(report.checks) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
