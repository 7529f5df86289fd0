"""Storages that cannot be used, on either side or at some point: each is told as what it is, and nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from flytekit import FlyteFile

from kfpytorch_ray import Elastic, RayBackend, StorageError, launch
from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.cluster.remote.probe import probe
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import HeadCluster

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


@contextmanager
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
    before = len(head.jobs())
    with (
        disk(tmp_path / "read-only", "ro") as storage,
        pytest.raises(StorageError, match=r"(?s)question cannot be written.*Read-only file system.*Fix:"),
    ):
        launch_on(head, storage)
    assert len(head.jobs()) == before


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
