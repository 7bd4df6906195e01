"""Two training programs at the same time: neither may see the other."""

import json
import subprocess
import sys
from pathlib import Path

from result import MARK, Result


def main():
    result = Result()
    program = Path(__file__).with_name("torch_train.py")
    both = [subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for number, process in enumerate(both):
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"program {number} ended with {process.returncode}")
        printed = json.loads(next(line for line in output.splitlines() if line.startswith(MARK))[len(MARK):])
        result.process(process.pid)
        for name in printed["exact"]:
            result.exact[f"{name} of {number}"] = printed["exact"][name]
            result.numbers[f"{name} of {number}"] = printed["numbers"][name]
    result.done()


main()
