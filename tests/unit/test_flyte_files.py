"""Files in return values: uploaded where flytekit would put them, and nothing else is touched."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
from flytekit import FlyteContextManager, FlyteDirectory, FlyteFile
from flytekit.core.data_persistence import FileAccessProvider

from kfpytorch_ray.flyte_files import upload_files


class Trained(NamedTuple):
    model: FlyteFile
    accuracy: float


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A raw output prefix in memory, which is no path of this machine."""
    prefix = f"memory://outputs{tmp_path}"
    context = FlyteContextManager.current_context()
    access = FileAccessProvider(local_sandbox_dir=str(tmp_path / "sandbox"), raw_output_prefix=prefix)
    FlyteContextManager.push_context(context.with_file_access(access).build())
    yield prefix
    FlyteContextManager.pop_context()


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def read(uri: str) -> str:
    with fsspec.open(uri, "r") as file:
        return str(file.read())


def test_local_files_become_remote_ones(store: str, tmp_path: Path) -> None:
    """Wherever they stand in the value; the other parts stay the very same objects."""
    model = FlyteFile(written(tmp_path / "model.pt", "weights"))
    folder = FlyteDirectory(str(Path(written(tmp_path / "logs" / "a.txt", "line")).parent))
    kept = object()
    trained, (logs, other) = upload_files((Trained(model, 0.5), [{"logs": folder}, kept]))
    assert isinstance(trained, Trained)
    assert trained.model.path.startswith(store)
    assert read(trained.model.path) == "weights"
    assert trained.accuracy == 0.5
    assert str(logs["logs"].remote_source).startswith(store)
    assert Path(logs["logs"].download(), "a.txt").read_text() == "line"
    assert other is kept


def test_a_destination_of_the_users_is_kept(store: str, tmp_path: Path) -> None:
    """``remote_path`` says where to; False says not at all."""
    wanted = f"{store}/named.pt"
    path = written(tmp_path / "model.pt", "weights")
    assert upload_files(FlyteFile(path, remote_path=wanted)).path == wanted
    assert read(wanted) == "weights"
    stays = FlyteFile(path, remote_path=False)
    assert upload_files(stays) is stays


def test_a_value_without_local_files_is_the_same_object(store: str) -> None:
    """Output metadata is found by the identity of the value."""
    value = ({"x": [1, 2]}, FlyteFile("s3://bucket/key"))
    assert upload_files(value) is value


def test_what_was_staged_is_uploaded_again(store: str, tmp_path: Path) -> None:
    """An input that a function hands back outlives the folder that it came in; other remote files stay."""
    written(tmp_path / "folder" / "a.txt", "text")
    staged = upload_files((FlyteFile(f"{tmp_path}/folder/a.txt"), FlyteDirectory(f"{tmp_path}/folder")))
    arrived = pickle.loads(pickle.dumps(staged))
    other = FlyteFile(f"{store}-not/file")
    file, folder, kept = upload_files((*arrived, other), store)
    assert Path(file.download()).read_text() == Path(folder.download(), "a.txt").read_text() == "text"
    assert len({str(one.remote_source) for one in (*arrived, file, folder)}) == 4
    assert kept is other
