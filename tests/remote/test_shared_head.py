"""Two users on one cluster, each with a script that reaches it over HTTP alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kfpytorch_ray import RunLostError, RunStatus, attach
from kfpytorch_ray.testing import HeadCluster, wait_until
from kfpytorch_ray.testing.processes import all_processes, command, is_running

SCRIPT = """
import sys
from kfpytorch_ray import Elastic, RayBackend, launch


def main(address, storage, name, gate):
    def train():
        import threading
        from pathlib import Path

        print(f"{name} has begun", flush=True)
        while not Path(gate).exists():
            threading.Event().wait(0.05)
        return name

    train.__qualname__ = name
    backend = RayBackend(address=address, storage=storage, working_dir="", resources_per_node={"CPU": 4})
    print("returned", launch(train, elastic=Elastic(nnodes=2, backend=backend))[0].return_value, flush=True)


main(*sys.argv[1:])
"""


@dataclass
class Script:
    """A user's script.

    Attributes:
        name: What its function is called.
        gate: A file that lets its function return.
        process: It.
        log: What it has printed.
    """

    name: str
    gate: Path
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def has_begun(self) -> bool:
        assert self.process.poll() is None, self.said()
        return f"{self.name} has begun" in self.said()

    def run_id(self) -> str:
        found = re.search(r"the run (kfr-[a-z0-9-]+) is submitted", self.said())
        assert found is not None, self.said()
        return found[1]


@contextmanager
def script(head: HeadCluster, storage: str, folder: Path, name: str) -> Iterator[Script]:
    file, log, gate = (folder / f"{name}.{kind}" for kind in ("py", "log", "gate"))
    file.write_text(SCRIPT)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(file), head.address, storage, name, str(gate)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Script(name, gate, process, log)
    finally:
        process.kill()
        process.wait()


def driver_of(run_id: str) -> int:
    """The process of a run's driver on the head, without the shell around it."""
    (found,) = (
        process
        for process in all_processes()
        if command(process).startswith("python -m kfpytorch_ray.cluster.remote.driver") and run_id in command(process)
    )
    return found


def test_one_waits_for_the_other_whose_driver_is_killed(head: HeadCluster, new_storage: str, tmp_path: Path) -> None:
    """Both want all nodes at once: one is told behind whom it waits, and has them when the other's driver is killed.

    To the other that is an error with the last lines of its log, and nothing that was staged for it stays.
    """
    with script(head, new_storage, tmp_path, "anna") as anna, script(head, new_storage, tmp_path, "ben") as ben:
        wait_until(lambda: anna.has_begun() or ben.has_begun(), "one of them to begin")
        holder, waiter = (anna, ben) if anna.has_begun() else (ben, anna)
        wait_until(lambda: "Behind: " in waiter.said(), "the other to say why it waits")
        (said, *_) = [line for line in waiter.said().splitlines() if "Behind: " in line]
        assert f"{waiter.name} waits for nodes. 0 of 2 nodes are placed" in said
        assert re.search(rf"Behind: {holder.name} \(run launch-\w+\) with {{CPU: 8}} on 2 nodes\.$", said)
        assert not waiter.has_begun()
        driver = driver_of(holder.run_id())
        os.kill(driver, signal.SIGKILL)
        assert holder.process.wait(120) != 0
        assert not is_running(driver)
        wait_until(waiter.has_begun, "the one that waited to begin")
        waiter.gate.touch()
        assert waiter.process.wait(120) == 0, waiter.said()
        assert f"returned {waiter.name}" in waiter.said()
    last_lines = holder.said().partition("Last lines of its log:\n")[2]
    assert "RunLostError" in holder.said()
    assert f"{holder.name} has begun" in last_lines
    lost = attach(holder.run_id(), storage=new_storage)
    assert lost.status() is RunStatus.FAILED
    with pytest.raises(RunLostError, match="killed"):
        lost.result()
    left = Path(new_storage.removeprefix("file://"), "runs", holder.run_id())
    assert sorted(path.name for path in left.iterdir()) == ["manifest.json", "outcome.json", "records"]
