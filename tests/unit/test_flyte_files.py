"""Files in return values: uploaded where flytekit would put them, and nothing else is touched."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
from flytekit import FlyteContextManager, FlyteDirectory, FlyteFile
from flytekit.core.data_persistence import FileAccessProvider
from pydantic import BaseModel

from kfpytorch_ray.flyte_files import upload_files, whole_downloads
from kfpytorch_ray.payload import dump_payload, load_payload


class Trained(NamedTuple):
    model: FlyteFile
    accuracy: float


@dataclass(frozen=True)
class Report:
    model: FlyteFile
    others: list[FlyteFile] = field(default_factory=list)
    loss: float = 0.5


class Card(BaseModel):
    report: Report
    name: str = "digits"


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


def test_files_of_dataclasses_and_of_models_are_uploaded(store: str, tmp_path: Path) -> None:
    """As flytekit's own transformers do with those that it finds in them; what was given stays as it is."""
    first, second = (FlyteFile(written(tmp_path / name, name)) for name in ("a", "b"))
    given = Card(report=Report(first, [second]))
    card = upload_files(given)
    assert [read(file.path) for file in (card.report.model, *card.report.others)] == ["a", "b"]
    assert (type(card), card.name, type(card.report), card.report.loss) == (Card, "digits", Report, 0.5)
    assert given.report.model is first
    assert upload_files(card) is card


def test_a_value_without_local_files_is_the_same_object(store: str) -> None:
    """Output metadata is found by the identity of the value, which may be one that contains itself."""
    endless: list[object] = [{"x": [1, 2]}, FlyteFile("s3://bucket/key")]
    endless.append(endless)
    deep: object = ()
    for _ in range(10_000):
        deep = (deep,)
    for value in (endless, deep):
        assert upload_files(value) is value
    assert load_payload(dump_payload(len, (endless,)))() == 3


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


def test_ranks_that_open_one_file_do_not_cut_it_off(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of a node have the same path; while one downloads, what another reads there is whole."""
    with fsspec.open(f"{store}/data", "w") as file:
        file.write("all of it")
    one = FlyteFile(f"{store}/data")
    other = pickle.loads(pickle.dumps(one))
    seen = []

    def slow(self: FileAccessProvider, remote: str, local: str, **_: object) -> None:
        with open(local, "w") as target:
            target.write("all ")
            target.flush()
            path = Path(one._local_path)
            seen.append(path.read_text() if path.exists() else None)
            target.write("of it")

    monkeypatch.setattr(FileAccessProvider, "get_data", slow)
    with whole_downloads():
        assert [Path(rank).read_text() for rank in (one, other)] == ["all of it"] * 2
    assert seen == [None, "all of it"]
    assert [path.name for path in Path(one._local_path).parent.iterdir()] == [Path(one._local_path).name]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_folders_and_files_are_downloaded_whole(kind: str, store: str) -> None:
    """Through flytekit itself; a folder may be there already, from another rank."""
    with fsspec.open(f"{store}/data/a.txt", "w") as file:
        file.write("line")
    made = FlyteFile(f"{store}/data/a.txt") if kind == "file" else FlyteDirectory.from_source(f"{store}/data")
    other = pickle.loads(pickle.dumps(made))
    with whole_downloads():
        for value in (made, other):
            path = Path(value)
            assert (path if kind == "file" else path / "a.txt").read_text() == "line"


@pytest.mark.parametrize("form", ["full", "linked", "absent", "long name"])
def test_a_folder_that_is_there_takes_what_is_downloaded(form: str, store: str, tmp_path: Path) -> None:
    """As without us: what is new comes beside or in the place of what was there, and nothing else is left."""
    for name, text in (("a", "new"), ("deep/b", "new")):
        with fsspec.open(f"{store}/data/{name}", "w") as file:
            file.write(text)
    target = tmp_path / ("n" * 250 if form == "long name" else "target")
    if form == "full":
        written(target / "a", "old")
        written(target / "deep" / "kept", "old")
    elif form == "linked":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    found: dict[bool, dict[str, str]] = {}
    for whole in (False, True):
        twin = shutil.copytree(target, tmp_path / "twin" / target.name) if form == "full" and not whole else target
        with whole_downloads() if whole else nullcontext():
            FlyteContextManager.current_context().file_access.get_data(f"{store}/data", str(twin), is_multipart=True)
        found[whole] = {str(path.relative_to(twin)): path.read_text() for path in twin.rglob("*") if path.is_file()}
    assert found[True] == found[False]
    assert found[True].items() >= {"a": "new", "deep/b": "new"}.items()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_is_downloaded_into_a_folder_that_is_there(store: str, tmp_path: Path) -> None:
    """By its name; one that cannot be had leaves nothing."""
    with fsspec.open(f"{store}/data", "w") as file:
        file.write("line")
    (tmp_path / "target").mkdir()
    with whole_downloads():
        access = FlyteContextManager.current_context().file_access
        access.get_data(f"{store}/data", str(tmp_path / "target"))
        with pytest.raises(Exception, match="absent"):
            access.get_data(f"{store}/absent", str(tmp_path / "target" / "other"))
    assert [(path.name, path.read_text()) for path in (tmp_path / "target").iterdir()] == [("data", "line")]


def test_a_file_that_was_opened_elsewhere_is_downloaded_here(store: str) -> None:
    """The driver may have looked into it before it launched; its copy is on its own machine."""
    with fsspec.open(f"{store}/data", "w") as file:
        file.write("content")
    value = FlyteFile(f"{store}/data")
    copy = Path(value)
    assert copy.read_text() == "content"
    payload = dump_payload(lambda given: Path(given["file"]).read_text(), ({"file": value},))
    copy.unlink()
    assert load_payload(payload)() == "content"
