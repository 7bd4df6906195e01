"""Hand-overs on a real GPU: how fast memory moves, and that no word of it is ever wrong.

    sudo python3 tests/gpu/handover.py --binaries target/release [--sizes 1,4,16] [--soak 1000] [--json OUT]

Two programs at a time are taken the GPU from and given it back by an agent that does exactly what a measurement wants; the last part
runs under the real agent. All of it stays within free memory: a size that would not fit four times into 85 % of the GPU's free memory,
or into 60 % of the host's, is left out. Under 4 minutes: what would take longer is left out, too. Figures are written after each part. Ends
with 0 if every check held.

Parts (all by default; choose with --parts): facts, over-allocator, agent, soak, rates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from agent import Agent
from program import Program, Report, ground
from scripted import ALL, Gone, ScriptedAgent

WORKER = Path(__file__).with_name("handover_worker.py")
GIB, MIB = 1 << 30, 1 << 20
STEPS = ("protect:5", "prefetch:5", "wait:5", "host:5", "panic:5", "vanish:5", "stall:30")
ENGINES = ("protected", "plain", "demand")


class Client:
    """A program under the shim with an agent of its own."""

    count = 0

    def __init__(self, options, name, **environment):
        Client.count += 1
        self.agent = ScriptedAgent(options.logs / f"run-{Client.count}")
        name = f"{name}-{Client.count}"
        self.program = Program(WORKER, name, options.logs, options.binaries, self.agent.run_dir, **environment)
        self.agent.greet()
        self.program.begun()

    def quit(self):
        # The gate opens with the session's end.
        self.agent.hang_up()
        return self.program.quit()


def memory():
    """Free memory of the GPU, without a context that stays; and what the host has available."""
    code = (
        "import ctypes as C; c=C.CDLL('libcuda.so.1'); c.cuInit(0); x=C.c_void_p(); c.cuDevicePrimaryCtxRetain(C.byref(x),0);"
        "c.cuCtxSetCurrent(x); f=C.c_size_t(); t=C.c_size_t(); print(c.cuMemGetInfo_v2(C.byref(f),C.byref(t)), f.value, t.value)"
    )
    status, free, total = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    if status:
        sys.exit(f"no usable GPU: CUDA error {status}")
    available = next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    return free, total, available


def together(*work):
    """Runs all at the same time; their results, and the seconds until the last is done."""
    results, errors = [None] * len(work), []

    def one(index):
        try:
            results[index] = work[index]()
        except Exception as error:
            errors.append(error)

    began = time.perf_counter()
    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, time.perf_counter() - began


def rate(moved):
    return moved[0] / moved[1] / 1e9 if moved[1] else 0.0


def facts(options, report):
    program = Program(WORKER, "bare", options.logs).begun()
    link = program.do("link", options.link)
    stray = program.do("stray", 64 if not program.ready["simulated"] else 8)
    program.quit()
    report.figures.update(link=link, stray=stray)
    wrong = stray["wrong_words"] + stray.get("through_the_window", {}).get("wrong_words", 0)
    report.check("GPU accesses to memory that leaves under protection are right", wrong == 0, **stray)
    print(f"      the link with pinned memory: in {link['in']:.1f} GB/s, out {link['out']:.1f} GB/s", flush=True)


def rates(options, report, size):
    """In, out and both at once, of two programs of `size` bytes each, the engines by turns."""
    count = max(1, size // (256 * MIB)) if size >= 256 * MIB else 4
    pairs, figures, wrong = {}, {}, 0
    clients = []
    try:
        for by in ("protected", "plain"):
            pairs[by] = [Client(options, f"{by}-{size // MIB}", NVSHARE_HANDOVER=by) for _ in "ab"]
            clients += pairs[by]
        for n, client in enumerate(clients):
            client.program.send("blocks", count, size // count // MIB, 1000 * n + 1)
        for client in clients:
            client.program.answer()
        found = {by: {k: [] for k in ("first_out", "out", "in", "both", "both_s", "drain_ms", "gate_ms")} for by in pairs}
        demand = []
        for by, (a, b) in pairs.items():
            # Host pages are allocated now, once.
            found[by]["first_out"] += [rate(a.agent.take()), rate(b.agent.take())]
            b.agent.give()
        for _ in range(options.rounds):
            for by, (a, b) in pairs.items():
                into = found[by]
                moved, seconds, opened = a.agent.give()
                into["in"].append(moved / seconds / 1e9)
                into["gate_ms"].append(opened * 1e3)
                moved, seconds, drain = a.agent.take()
                into["out"].append(moved / seconds / 1e9)
                into["drain_ms"].append(drain * 1e3)
                # One leaves, one comes.
                (back, out), seconds = together(a.agent.give, b.agent.take)
                into["both"].append((back[0] + out[0]) / seconds / 1e9)
                into["both_s"].append(seconds)
                (out, back), seconds = together(a.agent.take, b.agent.give)
                into["both"].append((back[0] + out[0]) / seconds / 1e9)
                into["both_s"].append(seconds)
            # Of a plain pair: nothing is brought back ahead, the program's own kernels fault it in.
            a = pairs["plain"][0]
            a.agent.give(0)
            answer = a.program.do("check")
            wrong += answer["wrong_words"]
            demand.append(answer["bytes"] / answer["ms"] / 1e6)
            # What came back by faults is known again once it was brought back, which moves nothing now.
            a.agent.take()
            epoch = a.agent.grant()
            a.agent.resumed(epoch)
            a.agent.moved(epoch)
            a.agent.take()
        for client in clients:
            client.agent.give()
            wrong += client.program.do("check")["wrong_words"]
        figures = {by: {k: round(statistics.median(v), 2) for k, v in of.items()} for by, of in found.items()}
        figures["demand"] = {"in": round(statistics.median(demand), 2)}
        figures["spread"] = {by: {k: [round(min(v), 2), round(max(v), 2)] for k, v in of.items()} for by, of in found.items()}
    finally:
        for client in clients:
            client.quit()
    protected, plain = figures["protected"], figures["plain"]
    base = 2 * (size / plain["out"] + size / figures["demand"]["in"]) / 1e9
    figures["round_trip_s"] = {"protected": round(2 * protected["both_s"], 4), "demand in and plain out": round(base, 4)}
    name = f"{size / GIB:g} GiB each" if size >= GIB else f"{size // MIB} MiB each"
    report.figures.setdefault("rates", {})[name] = figures
    print(f"      {name}: " + json.dumps({k: v for k, v in figures.items() if k != "spread"}), flush=True)
    report.check(f"no word is wrong, {name}", wrong == 0, wrong_words=wrong)
    link = report.figures.get("link")
    if link and not options.simulated:
        share = [protected["out"] / link["out"], protected["in"] / link["in"]]
        report.check(f"protected is at least 80 % of the link each way, {name}", min(share) >= 0.8, share=[round(s, 3) for s in share])
        gain = protected["both"] / max(protected["out"], protected["in"])
        report.check(f"both ways at once is at least 1.5 times one way, {name}", gain >= 1.5, gain=round(gain, 2))
        times = base / (2 * protected["both_s"])
        report.check(f"the round trip of both is at least 4 times as fast, {name}", times >= 4, times=round(times, 1))


def over_allocator(options, report, size, touched):
    client = Client(options, "over-allocator", NVSHARE_HANDOVER="protected")
    try:
        client.program.do("big", size // MIB, touched // MIB)
        before = memory()[2]
        out = client.agent.take()
        host = before - memory()[2]
        back = client.agent.give()
        wrong = client.program.do("check")["wrong_words"]
    finally:
        client.quit()
    held = out[0] == touched and back[0] == touched and host < touched + touched // 2 + GIB and wrong == 0
    report.check(
        f"of {size // MIB} MiB allocated and {touched // MIB} touched, what was touched moves and nothing else is made", held,
        out=out[0], back=back[0], host_memory_taken=host, wrong_words=wrong,
    )


def soak(options, report, by, fail, hand_overs):
    """Hand-overs at random under a program that does things at random."""
    import random

    seed = options.seed
    rng = random.Random(f"{seed} {by} {fail}")
    variables = {"NVSHARE_HANDOVER": by, **({"NVSHARE_TEST_FAIL": fail} if fail else {})}
    client = Client(options, f"soak-{by}-{(fail or 'none').split(':')[0]}", **variables)
    agent, program = client.agent, client.program
    moved, killed, drained = [0, 0], 0, 0
    began = time.monotonic()
    try:
        program.do("soak-begin", seed, options.soak_mib)
        for _ in range(hand_overs):
            some = ALL if rng.randrange(2) else rng.randrange(options.soak_mib * MIB)
            epoch = agent.revoke(some)
            if rng.randrange(50) == 0:
                # The agent is killed, at whatever step this is.
                agent.greet()
                killed += 1
                continue
            outcome, _, out = agent.revoked(epoch)
            drained += outcome == "drained"
            moved[1] += out
            if rng.randrange(12) == 0:
                agent.displaced(rng.randrange(2), rng.randrange(2))
            if out and rng.randrange(2):
                agent.moved(epoch)
            epoch = agent.grant(ALL if rng.randrange(2) else rng.randrange(options.soak_mib * MIB))
            if rng.randrange(4):
                moved[0] += agent.resumed(epoch)[0]
        agent.resumed(agent.grant())
        done = program.do("soak-end")
    except (Gone, RuntimeError) as error:
        done = {"errors": [str(error)], "wrong_words": -1, "hang": False}
    finally:
        code = client.quit()
    held = done["wrong_words"] == 0 and not done["errors"] and not done["hang"] and code == 0 and drained > hand_overs // 2
    if by != "demand" and fail is None:
        held = held and min(moved) > 0
    return held, {
        "engine": by, "failing": fail, "hand_overs": hand_overs, "drained": drained, "agent_killed": killed,
        "GiB_in_out": [round(m / GIB, 1) for m in moved], "seconds": round(time.monotonic() - began, 1), "exit": code, **done,
    }


def soaks(options, report):
    runs = [(by, None, options.soak) for by in ENGINES] + [("protected", step, max(options.soak // 16, 20)) for step in STEPS]
    results = []
    # Three at a time: each is small.
    for begin in range(0, len(runs), 3):
        part, _ = together(*[lambda run=run: soak(options, report, *run) for run in runs[begin:begin + 3]])
        results += part
    for held, figures in results:
        name = f"{figures['hand_overs']} hand-overs, {figures['engine']}"
        report.check(name + (f", failing {figures['failing']}" if figures["failing"] else "") + ": no word is wrong", held, **figures)


def real_agent(options, report, size):
    run_dir = options.logs / "agent"
    run_dir.mkdir()
    agent = Agent(options.binaries, run_dir, options.agent_config)
    programs = []
    try:
        for name in ("one", "two"):
            programs.append(Program(WORKER, f"agent-{name}", options.logs, options.binaries, run_dir, NVSHARE_TEST_EVACUATE="1").begun())
        for n, program in enumerate(programs):
            program.do("blocks", 4, size // 4 // MIB, 77 + n)
        agent.ctl("set", "quantum", "200ms")
        agent.ctl("set", "mode", "exclusive")
        for program in programs:
            program.send("sweep-for", 6)
        swept = [program.answer() for program in programs]
        metrics = {n: agent.metric(f"nvshare_handover_moved_{n}_total") for n in ("bytes", "seconds")}
        cost = agent.ctl("status", "--json")["gpus"][0].get("handover_s")
        agent.ctl("set", "mode", "shared")
        wrong = [program.do("check")["wrong_words"] + answer["wrong_words"] for program, answer in zip(programs, swept)]
        codes = [program.quit() for program in programs]
        programs = []
        moved_by = {line.split(" are ")[1].split(" here")[0] for log in options.logs.glob("agent-*.log")
                    for line in log.read_text().splitlines() if "hand-overs are" in line}
    finally:
        for program in programs:
            program.quit()
        agent.stop()
    report.figures["agent"] = {"swept": swept, **metrics, "handover_s": cost, "moved_by": sorted(moved_by)}
    gbps = metrics["bytes"] / metrics["seconds"] / 1e9 if metrics["seconds"] else 0
    report.check(
        "under the real agent memory moves at every turn, and no word is wrong",
        wrong == [0, 0] and codes == [0, 0] and metrics["bytes"] >= 4 * size, wrong_words=wrong, exit_codes=codes,
        moved_gib=round(metrics["bytes"] / GIB, 2), rate_gbps=round(gbps, 1), proven=sorted(moved_by), cost_s=cost,
        sweeps=[answer["sweeps"] for answer in swept],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="folder with nvshare-agent, nvsharectl, libnvshare.so")
    parser.add_argument("--parts", default="facts,over-allocator,agent,soak,rates")
    parser.add_argument("--sizes", default="1,4,16", help="GiB of each program, such as 1,4,16 or 0.03")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", type=int, default=1024, help="MiB of a pinned copy")
    parser.add_argument("--over", default="16,2", help="GiB allocated, GiB touched by the over-allocator")
    parser.add_argument("--soak", type=int, default=1000, help="hand-overs of each engine")
    parser.add_argument("--soak-mib", type=int, default=256, help="memory of each program of the soak")
    parser.add_argument("--agent-gib", type=float, default=4.0, help="memory of each program under the real agent")
    parser.add_argument("--agent-config", help="configuration of the agent, a file")
    parser.add_argument("--seed", type=int, default=os.getpid())
    parser.add_argument("--simulated", action="store_true", help="no demands on speed")
    parser.add_argument("--budget", type=float, default=230, help="seconds in all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--logs", type=Path, help="keep the logs here")
    options = parser.parse_args()
    options.binaries = options.binaries.resolve()
    ground(options.binaries, "nvshare-agent", "nvsharectl", "libnvshare.so")
    options.logs = options.logs or Path(tempfile.mkdtemp(prefix="nvshare-handover-"))
    options.logs.mkdir(parents=True, exist_ok=True)
    options.agent_config = Path(options.agent_config).read_text() if options.agent_config else None
    parts = options.parts.split(",")
    report, began = Report(), time.monotonic()
    free, total, available = memory()
    print(f"seed {options.seed}; GPU {free / GIB:.1f} of {total / GIB:.1f} GiB free; host {available / GIB:.1f} GiB available", flush=True)
    report.figures.update(seed=options.seed, free=free, total=total, available=available)

    def left():
        return options.budget - (time.monotonic() - began)

    def save():
        report.figures["seconds"] = round(time.monotonic() - began, 1)
        if options.json:
            options.json.write_text(json.dumps({"checks": report.checks, **report.figures}, indent=1) + "\n")

    def leave_out(what, why):
        print(f"      {what} is left out: {why}", flush=True)
        report.figures.setdefault("left_out", []).append(f"{what}: {why}")

    def part(name, run, seconds):
        if name not in parts:
            return
        if seconds > left():
            return leave_out(name, f"it takes some {seconds:.0f} s and {left():.0f} are left")
        begin = time.monotonic()
        try:
            run()
        except Exception as error:
            report.check(f"{name} runs to its end", False, error=f"{type(error).__name__}: {error}"[-1500:])
        print(f"      {name}: {time.monotonic() - begin:.1f} s", flush=True)
        save()

    part("facts", lambda: facts(options, report), 10)
    over, touched = (int(float(text) * GIB) // MIB * MIB for text in options.over.split(","))
    if over < 0.5 * free and touched < 0.25 * available:
        part("over-allocator", lambda: over_allocator(options, report, over, touched), 10)
    else:
        leave_out("over-allocator", "too little memory")
    agent_bytes = int(options.agent_gib * GIB) // (4 * MIB) * 4 * MIB
    if 2 * agent_bytes < 0.5 * min(free, available):
        part("agent", lambda: real_agent(options, report, agent_bytes), 15)
    else:
        leave_out("agent", "too little memory")
    part("soak", lambda: soaks(options, report), 30)
    for size in (int(float(text) * GIB) // (4 * MIB) * 4 * MIB for text in options.sizes.split(",")):
        if 4 * size > min(0.85 * free, 0.6 * available):
            leave_out(f"{size / GIB:g} GiB each", "not four times in free memory")
        else:
            # Mostly the host's pages: 4 GB/s, four programs.
            part("rates", lambda size=size: rates(options, report, size), 8 + 3 * size / GIB)
    failed = [c["check"] for c in report.checks if not c["held"]]
    save()
    print(f"{len(report.checks) - len(failed)} passed, {len(failed)} failed, {report.figures['seconds']} s; logs in {options.logs}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
