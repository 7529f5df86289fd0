"""The examples, run as their README says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kfpytorch_ray.testing import RunningRank, running_ranks
from kfpytorch_ray.testing.processes import parent

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    """An example that runs by itself, undisturbed by what surrounds the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "KFPYTORCH"))}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=EXAMPLES,
        env=clean | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(example: subprocess.Popen[str]) -> str:
    """What it printed, once it has run to its end."""
    with example:
        try:
            output, errors = example.communicate(timeout=240)
        finally:
            example.kill()
    assert example.returncode == 0, output + errors
    return output


def run(*command: str, **variables: str) -> str:
    """The output of an example that ran to its end."""
    return output_of(start(*command, **variables))


def accuracy_in(output: str) -> float:
    accuracy = re.search(r"^accuracy: (\S+)$", output, re.MULTILINE)
    assert accuracy, output
    return float(accuracy[1])


def ranks_of(example: subprocess.Popen[str]) -> list[RunningRank]:
    """Its workers: those of agents on the Ray that it has started."""
    return [rank for rank in running_ranks() if parent(rank.agent.raylet) == example.pid]


@pytest.mark.parametrize("backend", ["ray", "kubeflow"])
def test_digits_are_learned(backend: str, tmp_path: Path) -> None:
    """Real images, two processes, at least 95 of 100 unseen ones recognised, and a deck with the loss curve."""
    # torch elastic's own launcher leaves its folder for logs behind; nothing may stay of a run on Ray.
    variables = {"TMPDIR": str(tmp_path)} if backend == "kubeflow" else {}
    output = run("digits.py", "--backend", backend, **variables)
    deck = re.search(r"^deck: (\S+)$", output, re.MULTILINE)
    assert accuracy_in(output) >= 0.95
    assert "resumed" not in output
    assert deck
    assert "Loss curve" in Path(deck[1]).read_text()


def test_digits_are_learned_although_rank_0_is_killed(
    eventually: Callable[[Callable[[], object], str], None],
) -> None:
    """The next round goes on from the checkpoint that it wrote last, and ends as accurate and with every epoch."""
    epochs = 40
    example = start("digits.py", "--backend", "ray", "--epochs", str(epochs))
    try:
        eventually(lambda: len(past_epoch(3, example)) == 2 or example.poll() is not None, "three epochs on both ranks")
        if example.poll() is None:
            os.kill(past_epoch(3, example)[0].pid, signal.SIGKILL)
    except BaseException:
        example.kill()
        raise
    output = output_of(example)
    resumed = re.search(r"resumed from epoch (\d+)$", output, re.MULTILINE)
    deck = re.search(r"^deck: (\S+)$", output, re.MULTILINE)
    assert resumed, output
    assert 3 <= int(resumed[1]) < epochs
    assert accuracy_in(output) >= 0.95
    assert deck
    assert f"{epochs} epochs on 2 ranks" in Path(deck[1]).read_text()


def past_epoch(epoch: int, example: subprocess.Popen[str]) -> list[RunningRank]:
    """Its workers that have finished this epoch, by rank."""
    return [rank for rank in ranks_of(example) if rank.step is not None and rank.step >= epoch]


def test_launch_in_a_script() -> None:
    """Every rank's value comes home."""
    output = run("train_script.py")
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("rank")] == [
        f"rank {rank}" for rank in range(4)
    ]
    assert output.count("'sum': 46") == 4
