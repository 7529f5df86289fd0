"""A run's lease: kept by one side, watched by the other, over a folder."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kfpytorch_ray.cluster.remote import lease
from kfpytorch_ray.cluster.remote.lease import LeaseKeeper, LeaseWatch
from kfpytorch_ray.errors import StorageError
from kfpytorch_ray.runs import LEASE, MANIFEST, OUTCOME
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

WATCHER = """
import sys, time
from kfpytorch_ray.cluster.interruption import interruptible
from kfpytorch_ray.cluster.remote.lease import LeaseWatch
from kfpytorch_ray.storage import Storage

watch = LeaseWatch(Storage(sys.argv[1]), float(sys.argv[2]))
with interruptible():
    try:
        with watch:
            print("watching", flush=True)
            # Not signal.pause(): a signal just before it is noticed by nobody.
            while True:
                time.sleep(0.05)
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


@pytest.fixture
def sigterms() -> Iterator[list[int]]:
    """Those that this process receives."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lease_that_nobody_keeps_ends_the_run(watcher: subprocess.Popen[str]) -> None:
    """By SIGTERM, so that it is stopped in order, and it knows why."""
    assert line(watcher) == "watching"
    assert "no sign of life" in line(watcher)
    assert watcher.wait(60) == 0


def test_a_lease_that_is_kept_lets_it_run(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, sigterms: list[int]
) -> None:
    """For many leases; a lease after the last sign of life it ends. By a clock that waits for both sides."""
    now = 0.0
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now))
    keeper, watch = LeaseKeeper(folder, 60.0), LeaseWatch(folder, 60.0)
    for _ in range(8):
        keeper._do()
        for _ in range(4):
            watch._do()
            now += 15
        assert (watch.reason, sigterms) == ("", [])
    watch._do()
    assert (watch.reason, sigterms) == ("", [])
    now += 1
    watch._do()
    assert "no sign of life" in watch.reason
    wait_until(lambda: sigterms, "the signal")


class Outage(Storage):
    """A storage, and a clock by which it is away for a while.

    Args:
        uri: Of the folder.
        raises: Whether a read meanwhile raises at once; else it answers when the storage is back.
    """

    def __init__(self, uri: str, *, raises: bool) -> None:
        super().__init__(uri)
        self.raises = raises
        self.now = 0.0
        self.lasts_until = 0.0

    def read(self, name: str) -> bytes | None:
        """As a storage."""
        if self.now < self.lasts_until:
            if self.raises:
                msg = "cannot be read\nWhy: it is away\nFix: wait"
                raise StorageError(msg)
            self.now = self.lasts_until
        return super().read(name)


@pytest.mark.parametrize("raises", [True, False], ids=["that raises", "that blocks"])
def test_a_storage_that_is_away_for_longer_than_the_lease(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, sigterms: list[int], *, raises: bool
) -> None:
    """Nobody can keep a lease meanwhile, so nobody is silent; the silence before and after it counts."""
    storage = Outage(folder.uri, raises=raises)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: storage.now))
    LeaseKeeper(folder, 60.0)._do()
    watch = LeaseWatch(storage, 60.0)
    watch._do()
    storage.lasts_until = 600.0
    while storage.now < storage.lasts_until:
        storage.now += 15
        with contextlib.suppress(StorageError):
            watch._do()
    for _ in range(4):
        watch._do()
        assert (watch.reason, sigterms) == ("", [])
        storage.now += 15
    storage.now += 1
    watch._do()
    assert "no sign of life" in watch.reason
    wait_until(lambda: sigterms, "the signal")


@pytest.mark.parametrize(("read_s", "fails_every"), [(40.0, 0), (0.0, 4)], ids=["slow", "failing now and then"])
def test_a_poor_storage_does_not_hide_that_nobody_keeps_the_lease(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, sigterms: list[int], read_s: float, fails_every: int
) -> None:
    """Reads that take most of a lease, or fail often: between them time goes on."""
    storage = Outage(folder.uri, raises=bool(fails_every))
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: storage.now))
    LeaseKeeper(folder, 60.0)._do()
    watch = LeaseWatch(storage, 60.0)
    watch._do()
    for look in range(1, 12):
        storage.now += 15
        away = look % fails_every == 0 if fails_every else True
        storage.lasts_until = storage.now + (read_s or 1) if away else 0.0
        with contextlib.suppress(StorageError):
            watch._do()
    assert "no sign of life" in watch.reason
    wait_until(lambda: sigterms, "the signal")


def test_a_keeper_gives_many_signs_of_life(folder: Storage) -> None:
    """Each is another one."""
    seen: set[bytes | None] = set()

    def many() -> bool:
        seen.add(folder.read(LEASE))
        return len(seen) > 8

    with LeaseKeeper(folder, 1.0):
        wait_until(many, "many signs of life")


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


def test_the_signal_goes_to_this_process_alone(folder: Storage, sigterms: list[int]) -> None:
    """Its children are stopped by it, each in its way."""
    with LeaseWatch(folder, 0.1):
        wait_until(lambda: sigterms, "the signal")
    assert sigterms == [signal.SIGTERM]
