"""Compares what a program computed bare, bare again, and under the shim.

A program's result has four parts: `exact` (hashes of its outputs), `numbers` (values of the same outputs, for when a program does
not repeat itself bit by bit), `outcomes` (tests by name, for test suites) and `facts` (shown, not compared).
"""

from dataclasses import dataclass, field

IDENTICAL = "bit-identical"
NOISE = "within its own noise"
SAME_TESTS = "same tests pass"
DIFFERS = "DIFFERS"
FAILED = "FAILED"
NOT_BARE = "does not run bare"
SKIPPED = "skipped"
NOT_RUN = "not run"

GOOD = {IDENTICAL, NOISE, SAME_TESTS}
BAD = {DIFFERS, FAILED}

# Two bare runs tell how far apart runs are, but only roughly: they may happen to be close.
NOISE_FACTOR = 5.0


@dataclass
class Run:
    """One run of a program. `error` is None if it ended well, `result` is what it printed. A `late` one was not begun."""

    error: str | None = None
    late: bool = False
    skipped: str | None = None
    result: dict = field(default_factory=dict)
    seconds: float = 0.0


def deviation(a, b):
    """The largest difference between two lists of numbers, relative to their size; None if they cannot be compared."""
    if len(a) != len(b):
        return None
    scale = max((abs(x) for x in a), default=0.0) or 1.0
    worst = 0.0
    for x, y in zip(a, b):
        if x != x and y != y:
            continue
        difference = abs(x - y) / scale
        if difference != difference:
            return None
        worst = max(worst, difference)
    return worst


def judge_outputs(bare, again, shim):
    """Verdict and note for programs that compute something."""
    exact = [run.result.get("exact", {}) for run in (bare, again, shim)]
    numbers = [run.result.get("numbers", {}) for run in (bare, again, shim)]
    if not (exact[0].keys() == exact[1].keys() == exact[2].keys()):
        return DIFFERS, f"other outputs: {sorted(exact[0])} bare, {sorted(exact[2])} under the shim"
    noisy, worst = [], 0.0
    for name in exact[0]:
        if exact[2][name] == exact[0][name] == exact[1][name]:
            continue
        own, ours = (deviation(numbers[0].get(name, []), n.get(name, [])) for n in numbers[1:])
        if exact[0][name] == exact[1][name]:
            far = "" if ours is None else f" (by {ours:.2g})"
            return DIFFERS, f"{name}{far}, while bare runs repeat themselves"
        if own is None or ours is None or not numbers[0].get(name):
            return DIFFERS, f"{name} differs in shape or is not a number"
        if ours > NOISE_FACTOR * own:
            return DIFFERS, f"{name} by {ours:.2g}, two bare runs by {own:.2g}"
        noisy.append(name)
        worst = max(worst, ours)
    if noisy:
        return NOISE, f"two bare runs differ too: {', '.join(noisy)} (by at most {worst:.2g} here)"
    return IDENTICAL, f"{len(exact[0])} outputs"


def judge_tests(bare, again, shim):
    """Verdict and note for test suites: nothing that passes bare, twice, may fail under the shim."""
    before, once_more, after = (run.result["outcomes"] for run in (bare, again, shim))
    steady = [name for name, outcome in before.items() if outcome == "ok" and once_more.get(name) == "ok"]
    lost = [name for name in steady if after.get(name, "ok") != "ok"]
    ran = [name for name in steady if name in after]
    if not ran:
        return FAILED, "none of the tests that pass bare has run under the shim"
    note = f"{len(ran)} tests pass"
    others = len([name for name in before if name not in steady])
    if others:
        note += f", {others} do not pass bare"
    if len(ran) < len(steady):
        note += f", {len(steady) - len(ran)} were not reached in time"
    if lost:
        return FAILED, f"{len(lost)} of {len(ran)} tests: {lost[0]}: {after[lost[0]]}" + (
            "; " + ", ".join(lost[1:6]) if len(lost) > 1 else ""
        )
    return SAME_TESTS, note


def common(run, *runs):
    """A run with only those outputs that all have: a suite may have been stopped by its time."""
    names = set.intersection(*(set(other.result.get("exact", {})) for other in runs))
    parts = {part: {name: run.result[part][name] for name in sorted(names)} for part in ("exact", "numbers")}
    return Run(result=parts)


def judge(bare, again, shim):
    """Verdict and note."""
    for run in (bare, again, shim):
        if run.skipped is not None:
            return SKIPPED, run.skipped
    if bare.late or again.late or shim.late:
        return NOT_RUN, "the time of the suite was up"
    for run in (bare, again):
        if run.error is not None:
            return NOT_BARE, run.error
    if shim.error is not None:
        return FAILED, shim.error
    if bare.result.get("outcomes"):
        verdict, note = judge_tests(bare, again, shim)
        if verdict == FAILED or not bare.result.get("exact"):
            return verdict, note
        outputs, about = judge_outputs(*(common(run, bare, again, shim) for run in (bare, again, shim)))
        return (DIFFERS if outputs == DIFFERS else verdict), f"{note}; outputs {outputs}: {about}"
    if not bare.result.get("exact"):
        return FAILED, "the program gave no outputs to compare"
    return judge_outputs(bare, again, shim)


def first_error(text):
    """The line of a log that says what went wrong: of a Python traceback the last, else the first that names an error."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    # Behind a traceback come its frames, indented, and then the error.
    inside, found = False, None
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and not line.startswith((" ", "\t")):
            inside, found = False, line
    if found is None:
        words = ("error", "fatal", "abort", "fail", "terminate called", "segmentation")
        found = next((line for line in lines if any(word in line.lower() for word in words)), None)
    return (found or (lines[-1] if lines else "no output")).strip()[:200]
