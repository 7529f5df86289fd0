"""The user's modules on their way by the storage, and the command that names them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.kube.code import CODE, receive, send
from kfpytorch_ray.cluster.kube.entrypoint import DRIVER, entrypoint
from kfpytorch_ray.cluster.remote.working_dir import survey
from kfpytorch_ray.errors import IntegrityError
from kfpytorch_ray.storage import Digest, Storage


def project(folder: Path) -> Path:
    """With a package, a link, an empty folder, and what patterns leave out."""
    made = folder / "project"
    for name, text in (
        ("train.py", "import package"),
        ("package/__init__.py", "ü = 1"),
        ("data/big.bin", "0" * 100_000),
        ("kept.txt", "k"),
        (".gitignore", "data/"),
        ("notes.tmp", "t"),
    ):
        made.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        made.joinpath(name).write_text(text)
    made.joinpath("linked.py").symlink_to("train.py")
    made.joinpath("empty").mkdir()
    return made


def test_what_is_sent_arrives(tmp_path: Path) -> None:
    """Files, what links lead to and empty folders; what patterns leave out stays here."""
    here, storage, there = project(tmp_path), Storage(str(tmp_path / "storage")), tmp_path / "there"
    digest = send(survey(here, ("*.tmp",)), ("*.tmp",), storage)
    there.mkdir()
    receive(storage, digest, there)
    arrived = {str(path.relative_to(there)) for path in there.rglob("*")}
    assert arrived == {".gitignore", "train.py", "linked.py", "package", "package/__init__.py", "empty", "kept.txt"}
    assert there.joinpath("package/__init__.py").read_text() == "ü = 1"
    assert there.joinpath("linked.py").read_text() == "import package"
    assert not there.with_suffix(".zip").exists()


def test_what_was_changed_on_its_way_is_not_unpacked(tmp_path: Path) -> None:
    """The hash came by another way."""
    here, storage, there = project(tmp_path), Storage(str(tmp_path / "storage")), tmp_path / "there"
    digest = send(survey(here, ()), (), storage)
    storage.write(CODE, (storage.read(CODE) or b"") + b"x")
    there.mkdir()
    with pytest.raises(IntegrityError):
        receive(storage, digest, there)
    assert not list(there.iterdir())


@pytest.mark.parametrize("folder", ["s3://bucket/runs/kfr-a", "file:///a $b/'c' &d;e*/runs/kfr-a"])
def test_the_command_is_the_same_after_two_shells(folder: str) -> None:
    """The submitting pod's bash reads it unquoted, Ray quotes what that made of it, the head's sh reads it again."""
    command = entrypoint("kfr-a", folder, "ab" * 32, Digest("cd" * 32, 7))
    once = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], check=True, capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    twice = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {shlex.join(once)}"], check=True, capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    assert twice == ["python", "-m", DRIVER, "kfr-a", f"{folder}#{'ab' * 32}", f"{'cd' * 32}:7"]
