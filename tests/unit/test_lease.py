"""A run's lease: kept by one side, watched by the other, over a folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.remote.lease import LeaseKeeper, LeaseWatch
from kfpytorch_ray.runs import LEASE, MANIFEST, OUTCOME
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

WATCHER = """
import signal, sys
from kfpytorch_ray.cluster.interruption import interruptible
from kfpytorch_ray.cluster.remote.lease import LeaseWatch
from kfpytorch_ray.storage import Storage

watch = LeaseWatch(Storage(sys.argv[1]), float(sys.argv[2]))
with interruptible():
    try:
        with watch:
            print("watching", flush=True)
            signal.pause()
    except SystemExit:
        print(watch.reason, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """Of a run that has not ended."""
    folder = Storage(str(tmp_path / "run"))
    folder.write(MANIFEST, b"{}")
    return folder


@pytest.fixture
def watcher(folder: Storage) -> Iterator[subprocess.Popen[str]]:
    """A process that ends when the lease, of 1 s, has run out."""
    with subprocess.Popen(
        [sys.executable, "-c", WATCHER, folder.uri, "1"], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lease_that_nobody_keeps_ends_the_run(watcher: subprocess.Popen[str]) -> None:
    """By SIGTERM, so that it is stopped in order, and it knows why."""
    assert line(watcher) == "watching"
    assert "no sign of life" in line(watcher)
    assert watcher.wait(60) == 0


def test_a_lease_that_is_kept_lets_it_run(folder: Storage, watcher: subprocess.Popen[str]) -> None:
    """Many changes later it still runs; after the last one it ends."""
    with LeaseKeeper(folder, 1.0):
        assert line(watcher) == "watching"
        seen: set[bytes | None] = set()

        def many() -> bool:
            seen.add(folder.read(LEASE))
            return len(seen) > 8

        wait_until(many, "many signs of life")
        assert watcher.poll() is None
    assert "no sign of life" in line(watcher)


def test_without_a_lease_nothing_is_written_or_watched(folder: Storage) -> None:
    """A run without one needs no thread."""
    keeper, watch = LeaseKeeper(folder, None), LeaseWatch(folder, None)
    with keeper, watch:
        assert folder.names() == [MANIFEST]
    assert watch.reason == ""


def test_the_lease_of_a_run_that_has_ended_is_not_written_anew(folder: Storage) -> None:
    """Whoever took its result has removed it; nobody has told this process."""
    others = set(threading.enumerate())
    with LeaseKeeper(folder, 0.2):
        wait_until(lambda: LEASE in folder.names(), "the first sign of life")
        folder.write(OUTCOME, b"{}")
        wait_until(lambda: set(threading.enumerate()) <= others, "the keeper to notice")
        folder.remove(LEASE)
    with LeaseKeeper(folder, 0.2):
        pass
    assert folder.names() == [MANIFEST, OUTCOME]


def test_a_run_that_was_removed_does_not_come_back(folder: Storage) -> None:
    """As by a clean-up."""
    folder.remove()
    with LeaseKeeper(folder, 0.2):
        pass
    assert folder.names() == []


def test_a_storage_that_fails_for_a_while(folder: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sign of life that cannot be written is said and tried again."""
    lost = tmp_path / "run" / "lost"
    lost.write_text("a file where the folder should be")
    with LeaseKeeper(folder.folder("lost"), 0.2):
        wait_until(lambda: "cannot be written" in caplog.text or "Why:" in caplog.text, "a failure to be said")
        lost.unlink()
        folder.folder("lost").write(MANIFEST, b"{}")
        wait_until((lost / LEASE).exists, "the next try")


def test_the_signal_goes_to_this_process_alone(folder: Storage) -> None:
    """Its children are stopped by it, each in its way."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        with LeaseWatch(folder, 0.1):
            wait_until(lambda: received, "the signal")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
