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


def test_elastic_digits_go_on_after_the_kill(short_folder: str) -> None:
    """Rank 1 is killed at epoch 15; the second round begins there, ends accurate, and the deck shows both rounds.

    Or one epoch earlier, where rank 0 had not written the checkpoint yet.
    """
    output = run("elastic_digits.py", TMPDIR=short_folder)
    assert re.search(r"resumed from epoch 1[45] on 2 ranks$", output, re.MULTILINE), output
    assert re.search(r"^round 0: .*rank 1 killed$", output, re.MULTILINE), output
    assert "round 1: rank 0 succeeded, rank 1 succeeded" in output
    assert accuracy_in(output) >= 0.93
    assert "SIGKILL" in Path(short_folder, "elastic_digits.html").read_text()


def test_each_trial_of_a_loop_trains_by_itself() -> None:
    """Three launches on the same agents; a rate that is too low is seen to be worse."""
    output = run("tuning_loop.py")
    trials = {
        float(rate): float(accuracy)
        for rate, accuracy in re.findall(r"^learning rate (\S+): (\S+) ", output, re.MULTILINE)
    }
    assert list(trials) == [0.001, 0.01, 0.1]
    assert trials[0.001] < trials[0.01]
    assert accuracy_in(output) == max(trials.values()) >= 0.93


@pytest.mark.big_examples
@pytest.mark.parametrize(
    ("script", "library"), [("lightning_digits.py", "lightning"), ("accelerate_tiny.py", "accelerate")]
)
def test_other_libraries_find_their_ranks(script: str, library: str) -> None:
    """Both ranks train together, as under torchrun, and learn."""
    pytest.importorskip(library, reason="pip install -e '.[big-examples]'")
    output = run(script)
    assert "ranks: 2" in output
    assert accuracy_in(output) >= 0.9


def test_launch_in_a_script() -> None:
    """Every rank's value comes home."""
    output = run("train_script.py")
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("rank")] == [
        f"rank {rank}" for rank in range(4)
    ]
    assert output.count("'sum': 46") == 4
