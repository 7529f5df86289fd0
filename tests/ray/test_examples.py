"""The examples, run as their README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command: str) -> str:
    """The output of an example that ran to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "KFPYTORCH"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=clean, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["ray", "kubeflow"])
def test_digits_are_learned(backend: str) -> None:
    """Real images, two processes, at least 95 of 100 unseen ones recognised, and a deck with the loss curve."""
    output = run("digits.py", "--backend", backend)
    accuracy = re.search(r"^accuracy: (\S+)$", output, re.MULTILINE)
    deck = re.search(r"^deck: (\S+)$", output, re.MULTILINE)
    assert accuracy
    assert float(accuracy[1]) >= 0.95
    assert deck
    assert "Loss curve" in Path(deck[1]).read_text()


def test_launch_in_a_script() -> None:
    """Every rank's value comes home."""
    output = run("train_script.py")
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("rank")] == [
        f"rank {rank}" for rank in range(4)
    ]
    assert output.count("'sum': 46") == 4
