"""Writes docs/compatibility.md from the results of the compatibility suite."""

METHOD = """\
# Compatibility

Programs that were run under `libnvshare.so` on a real GPU, and what came of it. This page is written by
`tests/gpu/compat.py`; nothing in it is edited by hand. What was run when, with the raw results: [measurements](measurements/README.md).

Each program runs with fixed seeds, bare, bare again, and under the shim with a running agent; several programs run at the same time.
Its outputs are hashed.
- **bit-identical**: all outputs have the same bytes bare and under the shim.
- **within its own noise**: two bare runs differ, and the run under the shim differs from a bare one by no more than five times as much.
- **same tests pass**: for test suites: what passes in both bare runs passes under the shim.
- **DIFFERS**, **FAILED**: the shim changes something; the note says what.
- **does not run bare**: nothing follows for the shim.

A block of more than 2 MiB that was made before a program shares memory by CUDA IPC is managed memory, which the driver does not share: `torch-ipc-large`
is expected to fail. `NVSHARE_MANAGED_MIN_BYTES=never` cures it ([shim.md](shim.md)).

*In turns* is a further run in which all programs that run together take turns of 300 ms on the GPU.
"""


def cell(text):
    return " ".join(str(text).replace("|", "\\|").split())


def markdown(host, programs):
    """The page; `programs` are the entries of results.json."""
    lines = [METHOD]
    if host["simulated"]:
        lines.append("**These runs were made on the simulated GPU and say nothing about a real one.**\n")
    packages = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    lines.append(
        f"Run on {host['date']}: {host['gpu'] or 'no NVIDIA GPU'}; kernel {host['kernel']}; Python {host['python']}"
        + (f"; {packages}" if packages else "") + ".\n"
    )
    in_turns = any(program["turns"] for program in programs)
    lines.append("| program | what it does | result |" + (" in turns |" if in_turns else "") + " note |")
    lines.append("|---|---|---|" + ("---|" if in_turns else "") + "---|")
    for program in programs:
        notes = program["note"]
        if program["turns"] and program["turns"] != program["verdict"]:
            notes += f"; in turns: {program['turns_note']}"
        row = [program["name"], program["what"], program["verdict"]]
        if in_turns:
            row.append(program["turns"] or "–")
        lines.append("| " + " | ".join(cell(part) for part in [*row, notes]) + " |")
    return "\n".join(lines) + "\n"
