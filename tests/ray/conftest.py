"""Real Ray on this machine: one for the tests that can share it, and a check that every test leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 120.0

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until ``condition`` holds; fail after a deadline that only a hang can reach."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for: {what}"
        time.sleep(0.02)


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], str], None]:
    """``wait_until`` for tests."""
    return wait_until


def leftovers() -> set[str]:
    """What a launch leaves if it is careless: fork servers, workers, folders, shared memory."""
    found = {str(path) for parent in ("/tmp", "/dev/shm") for path in Path(parent).glob("kfpytorch_ray-*")}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"kfpytorch_ray.cluster.guardian" in command:
            found.add(f"{process.name}: {command.decode(errors='replace')}")
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with the processes and files that were there before it."""
    before = leftovers()
    yield
    wait_until(lambda: leftovers() <= before, "the end of what the test started")


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder with a path short enough for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray that this process started, as a script's ``ray.init()`` does."""
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(address="local", num_cpus=8, include_dashboard=False, _temp_dir=folder)
    yield
    assert [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"] == []
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
