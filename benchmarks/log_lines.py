"""Do ranks that print a lot slow their training? Four ranks, 10,000 lines a second in all, against the same in silence.

    python benchmarks/log_lines.py [--logs rank0|all|none] [--seconds 30]

Each rank computes steps, some seconds in silence and some while it prints, in turns, so that what else the machine does
falls on both alike; it should do nothing else all the same. The ratio is the speed while printing over that in silence;
0.95 is the least that is promised. Lines that have come to the ranks' files are counted: none may be missing.
"""

from __future__ import annotations

import argparse
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


def train(seconds: float) -> tuple[tuple[float, float], tuple[float, float], int]:
    """Steps per second, and per second of this process's CPU, in silence and while printing; and the lines printed."""
    torch.set_num_threads(1)
    matrix = torch.rand(256, 256)
    steps, spent, cpu = [0, 0], [0.0, 0.0], [0.0, 0.0]
    printed = 0
    began = time.time()
    while (turn := time.time()) < began + seconds:
        # By the clock, so that all ranks are silent at the same time.
        loud = int(turn / TURN_S) % 2
        said = 0
        used = time.process_time()
        while (now := time.time()) < (turn // TURN_S + 1) * TURN_S:
            matrix = torch.softmax(matrix @ matrix, 0)
            steps[loud] += 1
            while loud and said < (now - turn) * LINES_PER_SECOND / RANKS:
                print(f"<{printed}> step {steps[1]}: loss {1 / steps[1]:.6f}, some words as a training prints them")
                said += 1
                printed += 1
        spent[loud] += now - turn
        cpu[loud] += time.process_time() - used
    return (steps[0] / spent[0], steps[1] / spent[1]), (steps[0] / cpu[0], steps[1] / cpu[1]), printed


def main() -> int:
    """Measure, and say the ratio; 1 where it is too low or a line is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", default="rank0", choices=["rank0", "all", "none"])
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backend = RayBackend(logs=given.logs, log_folder=folder, max_log_bytes=2**30)
        result = launch(train, given.seconds, elastic=Elastic(nproc_per_node=RANKS, backend=backend))
        values = [result[rank].return_value for rank in range(RANKS)]
        missing = 0
        for rank, (_, _, printed) in enumerate(values):
            text = "".join(Path(path).read_text() for path in result.logs[rank])
            missing += printed - len(set(re.findall(r"^<(\d+)> ", text, re.MULTILINE)))
    quiet, loud = (sum(value[0][index] for value in values) for index in range(2))
    own = [sum(value[1][index] for value in values) for index in range(2)]
    lines = sum(value[2] for value in values)
    print(f"logs={given.logs}: {quiet:.1f} steps/s in silence, {loud:.1f} while printing", file=sys.stderr)
    print(f"ratio {loud / quiet:.3f} ({own[1] / own[0]:.3f} by the ranks' own CPU time)", file=sys.stderr)
    print(f"{lines} lines, {missing} missing", file=sys.stderr)
    return int(missing > 0 or loud / quiet < LEAST)


if __name__ == "__main__":
    sys.exit(main())
