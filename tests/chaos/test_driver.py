"""Drivers that are interrupted or killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from training import Log

from kfpytorch_ray.testing import LaptopCluster, reached, running_agents, wait_until

SCRIPT = """
import json
import sys
import training
import cloudpickle
from kfpytorch_ray import launch

cloudpickle.register_pickle_by_value(training)
print("started", flush=True)
elastic = training.job(2, nproc=2, **json.loads(sys.argv[3]))
launch(training.train, training.Log(sys.argv[1]), steps=int(sys.argv[2]) or None, elastic=elastic)
print("succeeded", flush=True)
"""


@contextmanager
def driver(cluster: LaptopCluster, log: Log, steps: int = 0, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A script of a user's that launches on the cluster; ``options`` are the backend's."""
    script = Path(log.folder, "script.py")
    script.write_text(SCRIPT)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(script), log.folder, str(steps), json.dumps(options)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.row("the user cancels")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_user_cancels(whole: LaptopCluster, log: Log, signum: signal.Signals) -> None:
    """The script ends with an exit code of failure at once; its workers and nodes are given back."""
    with driver(whole, log) as process:
        wait_until(lambda: reached(step=3, world_size=4), "three steps of four ranks")
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    print(output, process.returncode)
    assert process.returncode not in (0, -signal.SIGKILL)
    assert "succeeded" not in output


@pytest.mark.row("the driver dies")
def test_driver_is_killed(whole: LaptopCluster, log: Log, chance: random.Random) -> None:
    """SIGKILL at any moment of its run: agents and workers end, and nothing stays behind."""
    with driver(whole, log, steps=60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        delay_s = chance.uniform(0, 12)
        print(f"killed after {delay_s:.2f} s")
        time.sleep(delay_s)
        process.kill()


@pytest.mark.row("the driver stands still")
def test_driver_is_stopped_for_a_while(whole: LaptopCluster, log: Log) -> None:
    """Its agents end without it; it goes on with new ones, and blames no node."""
    with driver(whole, log, silence_timeout_s=12.0, max_node_failures=0) as process:
        wait_until(lambda: log.trained(rounds=1, world_size=4), "a round of four ranks")
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: not running_agents(whole.address), "the end of the agents")
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: log.trained(rounds=2, world_size=4), "a second round")
        log.finish()
        output, _ = process.communicate(timeout=60)
    print(output)
    assert "stood still" in output
    assert output.endswith("succeeded\n")
    assert log.at_most_one_step_was_lost()
