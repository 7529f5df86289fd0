"""Do ranks that print a lot slow their training? Four ranks, 10,000 lines a second in all, against the same in silence.

    python benchmarks/log_lines.py [--logs rank0|all|none] [--seconds 36]

Each rank computes steps: in silence, while it prints to /dev/null, and while it prints, in turns of some seconds, so
that what else the machine does falls on all alike. Said are the speeds while printing over that in silence, which is to
be 0.95 at least on a machine with a core for each rank and nothing else to do, and over that while printing to
/dev/null: what it takes to make a line is the function's own. With fewer cores than ranks both show what Python's print
takes of them. Lines in the ranks' files are counted: none may be missing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from kfpytorch_ray import Elastic, RayBackend, launch

RANKS = 4
LINES_PER_SECOND = 10_000
TURN_S = 2.0
LEAST = 0.95
SILENT, NOWHERE, LOGGED = range(3)


def train(seconds: float) -> tuple[list[float], int]:
    """Steps per second in each kind of turn, and the lines printed."""
    torch.set_num_threads(1)
    matrix = torch.rand(256, 256)
    steps, spent = [0, 0, 0], [0.0, 0.0, 0.0]
    printed = 0
    with open(os.devnull, "w", buffering=1) as nowhere:
        began = time.time()
        while (turn := time.time()) < began + seconds:
            # By the clock, so that all ranks do the same at the same time.
            kind = int(turn / TURN_S) % 3
            stream = sys.stdout if kind == LOGGED else nowhere
            said = 0
            while (now := time.time()) < (turn // TURN_S + 1) * TURN_S:
                matrix = torch.softmax(matrix @ matrix, 0)
                steps[kind] += 1
                while kind != SILENT and said < (now - turn) * LINES_PER_SECOND / RANKS:
                    text = (
                        f"<{printed}> step {steps[kind]}: loss {1 / steps[kind]:.6f}, some words as a training has them"
                    )
                    print(text, file=stream)
                    said += 1
                    printed += kind == LOGGED
            spent[kind] += now - turn
    return [number / time_s for number, time_s in zip(steps, spent, strict=True)], printed


def main() -> int:
    """Measure, and say the ratios; 1 where it is too low or a line is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", default="rank0", choices=["rank0", "all", "none"])
    parser.add_argument("--seconds", type=float, default=36.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backend = RayBackend(logs=given.logs, log_folder=folder, max_log_bytes=2**30)
        result = launch(train, given.seconds, elastic=Elastic(nproc_per_node=RANKS, backend=backend))
        values = [result[rank].return_value for rank in range(RANKS)]
        missing = 0
        for rank, (_, printed) in enumerate(values):
            text = "".join(Path(path).read_text() for path in result.logs[rank])
            missing += printed - len(set(re.findall(r"^<(\d+)> ", text, re.MULTILINE)))
    silent, nowhere, logged = (sum(value[0][kind] for value in values) for kind in range(3))
    lines = sum(value[1] for value in values)
    print(f"logs={given.logs}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(f"steps/s: {silent:.1f} in silence, {nowhere:.1f} to /dev/null, {logged:.1f} printed", file=sys.stderr)
    print(f"printed / silence {logged / silent:.3f}, printed / /dev/null {logged / nowhere:.3f}", file=sys.stderr)
    print(f"{lines} lines, {missing} missing", file=sys.stderr)
    return int(missing > 0 or logged / silent < LEAST)


if __name__ == "__main__":
    sys.exit(main())
