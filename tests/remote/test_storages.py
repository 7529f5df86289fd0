"""What lies between the two sides: storages that cannot be used, here or there or at some point, and a large result."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from flytekit import FlyteFile

from kfpytorch_ray import Elastic, RayBackend, StorageError, launch
from kfpytorch_ray.cluster.remote import driver
from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.cluster.remote.probe import probe
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import HeadCluster, wait_until

READ_ONLY = """#!/bin/sh
exec unshare --mount sh -c 'mount --bind {0} {0} && mount -o remount,bind,ro {0} && exec {1} "$@"' sh "$@"
"""
"""A Python to which a folder is read-only."""


@cache
def no_mounts() -> str:
    """Why this machine mounts nothing; empty where it does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting needs root on Linux"
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"this machine refuses mounts: {done.stderr.strip()}" if done.returncode else ""


needs_mounts = pytest.mark.skipif(bool(no_mounts()), reason=no_mounts() or "mounts")


def left_in(folder: Path) -> list[str]:
    """Files of launches."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("runs/**/*") if path.is_file())


def launch_on(head: HeadCluster, storage: Path, *inputs: object, **options: object) -> int:
    backend = RayBackend(address=head.address, storage=storage.as_uri(), working_dir="", **options)  # type: ignore[arg-type]
    return int(launch(lambda *_inputs: 42, *inputs, elastic=Elastic(backend=backend))[0].return_value)


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """One of its own, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@needs_mounts
def test_not_writable_here(head: HeadCluster, tmp_path: Path) -> None:
    """The first write says so, before anything is submitted."""
    with (
        disk(tmp_path / "read-only", "ro") as storage,
        pytest.raises(StorageError, match=r"(?s)question cannot be written.*Read-only file system.*Fix:"),
    ):
        launch_on(head, storage)
    assert not [job for job in head.jobs() if str(storage) in job["entrypoint"]]


def test_what_cannot_be_cleaned_up_does_not_hide_why(head: HeadCluster, tmp_path: Path) -> None:
    """Where nothing can be written, nothing can be removed either."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"(?s)question cannot be written.*Not a directory"):
        probe(JobClient(head.address), Storage(str(tmp_path / "file" / "storage")), {}, fresh=True)


@needs_mounts
def test_not_writable_there(head: HeadCluster, tmp_path: Path) -> None:
    """The cluster reads what was written here and cannot answer."""
    storage, folder = tmp_path / "storage", tmp_path / "bin"
    storage.mkdir()
    folder.mkdir()
    (folder / "python").write_text(READ_ONLY.format(storage, sys.executable))
    (folder / "python").chmod(0o755)
    variables = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    with pytest.raises(StorageError, match=r"(?s)cluster cannot use the storage.*Read-only file system.*Fix:"):
        launch_on(head, storage, runtime_env={"env_vars": variables})
    assert [path for path in storage.rglob("*") if path.is_file()] == []


@needs_mounts
def test_disk_full_while_staging(head: HeadCluster, tmp_path: Path) -> None:
    """Of the call, or of a file among its inputs; what fits is launched afterwards."""
    (tmp_path / "input").write_bytes(bytes(2**21))
    with disk(tmp_path / "small", "size=1m") as small:
        with pytest.raises(StorageError, match=r"(?s)request\.pkl cannot be written.*No space left.*Fix:"):
            launch_on(head, small, bytes(2**21))
        assert left_in(small) == []
        with pytest.raises(StorageError, match=r"(?s)inputs cannot be uploaded.*No space left.*Fix:"):
            launch_on(head, small, FlyteFile(str(tmp_path / "input")))
        assert left_in(small) == []
        assert launch_on(head, small, bytes(2**10)) == 42


SIZE_BYTES = 2**30
MOST_BYTES = 1.5 * SIZE_BYTES
"""Half of it is for Python, Ray and torch."""

LARGE = """
import sys
from pathlib import Path
from kfpytorch_ray import Elastic, RayBackend, launch


def main(address, storage, size_bytes, path):
    def work():
        import torch

        return torch.full((size_bytes // 4,), 7, dtype=torch.int32)

    there = {"env_vars": {"PATH": path}}
    backend = RayBackend(address=address, storage=storage, working_dir="", runtime_env=there)
    result = launch(work, elastic=Elastic(backend=backend))
    value = result[0].return_value
    # It can be written to, and all of it is looked at.
    value[0] += 1
    assert value.nbytes == size_bytes and [int(one) for one in value.aminmax()] == [7, 8]
    print(Path("/proc/self/status").read_text())


main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
"""


def lacking(folder: Path) -> str:
    """What this machine has too little of; empty if nothing."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) * 1024 < 8 * SIZE_BYTES:
        return f"less than {8 * SIZE_BYTES >> 30} GiB of memory are available"
    for place in (Path("/dev/shm"), folder):
        if shutil.disk_usage(place).free < 4 * SIZE_BYTES:
            return f"less than {4 * SIZE_BYTES >> 30} GiB are free in {place}"
    return ""


def most_memory(status: str) -> int:
    """The most memory that a process has had in RAM, in bytes, from its /proc/PID/status; 0 for one that has none."""
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


MEASURING = """#!{python}
import os, sys

process = os.spawnv(os.P_NOWAIT, {python!r}, [{python!r}, *sys.argv[1:]])
_, status, used = os.wait4(process, 0)
with open({told!r}, "a") as told:
    print(used.ru_maxrss, *sys.argv[1:], file=told)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A Python that tells the most memory that a process of it has had in RAM, as the kernel knows it at its end."""


def test_a_large_result_is_in_memory_once(head: HeadCluster, new_storage: str, tmp_path: Path) -> None:
    """A gibibyte: on the head, where it comes from the object store, and here, where it comes from a file."""
    if reason := lacking(tmp_path):
        pytest.skip(reason)
    (tmp_path / "script.py").write_text(LARGE)
    folder, told = tmp_path / "bin", tmp_path / "told"
    folder.mkdir()
    (folder / "python").write_text(MEASURING.format(python=sys.executable, told=str(told)))
    (folder / "python").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"

    def drivers() -> list[int]:
        lines = [line.split() for line in told.read_text().splitlines()] if told.exists() else []
        return [int(line[0]) * 1024 for line in lines if line[1:3] == ["-m", driver.__name__]]

    arguments = [sys.executable, str(tmp_path / "script.py"), head.address, new_storage, str(SIZE_BYTES), path]
    script = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)
    assert script.returncode == 0, script.stderr
    wait_until(drivers, "the driver to end")
    (there,) = drivers()
    assert SIZE_BYTES < there < MOST_BYTES
    assert SIZE_BYTES < most_memory(script.stdout) < MOST_BYTES
