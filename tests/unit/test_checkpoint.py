from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from flytekit.core.checkpointer import SyncCheckpoint
from fsspec.implementations.memory import MemoryFileSystem

from kfpytorch_ray import checkpoint, heartbeat
from kfpytorch_ray.checkpoint import WorkerCheckpoint
from kfpytorch_ray.flyte_files import whole_downloads
from kfpytorch_ray.heartbeat import PAGE_VARIABLE, HeartbeatPage


@pytest.fixture(params=["path", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where this attempt writes: a local path, a local URI, an object store."""
    prefixes = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}
    return f"{prefixes[request.param]}/new"


@pytest.fixture
def earlier(place: str) -> str:
    """Where an earlier attempt wrote."""
    return f"{place[:-4]}/old"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeartbeatPage]:
    """This process is the only worker of an agent with this page."""
    (tmp_path / "agent").mkdir()
    path = tmp_path / "agent" / heartbeat.PAGE_NAME
    monkeypatch.setenv(PAGE_VARIABLE, f"{path}:0")
    heartbeat._own_slot.cache_clear()
    with HeartbeatPage.create(path, 1) as page:
        page.start_round(0)
        yield page
    heartbeat._own_slot.cache_clear()


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def content_of(folder: Path | None) -> dict[str, str]:
    assert folder is not None
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def restored_from(place: str) -> dict[str, str]:
    later = WorkerCheckpoint(place)  # its downloads go with it
    return content_of(later.restore())


def test_it_is_flytekits_checkpoint(place: str, earlier: str) -> None:
    """Code that asks for flytekit's class, or reads the two attributes that upstream reads, goes on working."""
    ours = WorkerCheckpoint(place, earlier)
    assert isinstance(ours, SyncCheckpoint)
    assert (ours._checkpoint_dest, ours._checkpoint_src) == (place, earlier)
    assert WorkerCheckpoint(place, "")._checkpoint_src is None


@pytest.mark.parametrize("has_source", [False, True])
def test_nothing_to_restore_is_an_empty_answer(place: str, earlier: str, has_source: bool) -> None:
    """In the first round, and in a retry of an attempt that wrote nothing."""
    ours = WorkerCheckpoint(place, earlier if has_source else None)
    assert ours.prev_exists() is False
    assert ours.restore() is None
    assert ours.restore("/nowhere") is None
    assert ours.read() is None


def test_empty_folders_are_nothing(tmp_path: Path) -> None:
    """A local run makes the folder before anything is written to it."""
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "sub").mkdir(parents=True)
    ours = WorkerCheckpoint(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (ours.prev_exists(), ours.restore(), ours.read()) == (False, None, None)


def test_a_round_reads_what_the_round_before_wrote(place: str) -> None:
    """Every rank of every round has the same place."""
    WorkerCheckpoint(place).write(b"epoch 3")
    after = WorkerCheckpoint(place)
    assert after.prev_exists() is True
    assert after.read() == b"epoch 3"


def test_a_retry_reads_what_the_earlier_attempt_wrote(place: str, earlier: str) -> None:
    """Until it has written a checkpoint of its own, which is newer; also where flytekit's class had written it."""
    SyncCheckpoint(earlier).write(b"earlier attempt")
    ours = WorkerCheckpoint(place, earlier)
    assert ours.prev_exists() is True
    assert ours.read() == b"earlier attempt"
    ours.write(b"this attempt")
    assert WorkerCheckpoint(place, earlier).read() == b"this attempt"


def test_flytekit_reads_what_we_wrote(place: str) -> None:
    """A retry may meet the checkpoint in the task's own context, as forked workers do."""
    WorkerCheckpoint(place).write(b"epoch 3")
    WorkerCheckpoint(place).write(b"epoch 4")
    assert SyncCheckpoint(f"{place}er", place).read() == b"epoch 4"


def test_a_later_restore_is_not_a_stale_one(place: str, tmp_path: Path) -> None:
    """Whoever wrote in between: this process or another rank."""
    ours = WorkerCheckpoint(place)
    ours.save(folder_of(tmp_path / "a", model="1", only_first="x"))
    assert content_of(ours.restore()) == {"model": "1", "only_first": "x"}
    ours.save(folder_of(tmp_path / "b", model="2"))
    assert content_of(ours.restore()) == {"model": "2", "only_first": "x"}
    WorkerCheckpoint(place).save(folder_of(tmp_path / "c", model="3"))
    assert content_of(ours.restore()) == {"model": "3", "only_first": "x"}


def test_the_first_checkpoint_of_an_attempt_replaces_the_download_of_the_earlier(place: str, earlier: str) -> None:
    """No file of the earlier attempt is mixed with those of this one."""
    WorkerCheckpoint(earlier).write(b"old")
    ours = WorkerCheckpoint(place, earlier)
    assert ours.read() == b"old"
    files, path = fsspec.core.url_to_fs(f"{place}/other", auto_mkdir=True)
    with files.open(path, "wb") as file:
        file.write(b"new")
    assert ours.read() == b"new"


class CachingStore(MemoryFileSystem):
    """An object store whose listings are cached in the process, as those of S3 are."""

    protocol = "cachingstore"
    listings: ClassVar[dict[str, list[str]]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("cachingstore:/")))

    def find(self, path: str, *args: Any, **kwargs: Any) -> list[str]:
        return self.listings.setdefault(path, super().find(path, *args, **kwargs))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listings.clear()


def test_a_cached_listing_does_not_hide_a_checkpoint() -> None:
    """A rank that has looked too early finds what another rank wrote since."""
    fsspec.register_implementation("cachingstore", CachingStore, clobber=True)
    name = uuid.uuid4().hex
    ours = WorkerCheckpoint(f"cachingstore://{name}")
    assert ours.read() is None
    MemoryFileSystem().pipe_file(f"/{name}/checkpoint", b"another rank's")
    assert ours.read() == b"another rank's"


def test_files_folders_and_readers_are_saved(place: str, tmp_path: Path) -> None:
    """As flytekit saves them: a file by its name, a folder's content, a reader under one name."""
    (tmp_path / "model.tar.gz").write_text("file")
    nested = folder_of(tmp_path / "shards", a="1")
    folder_of(nested / "deep" / "er", b="2")
    ours = WorkerCheckpoint(place)
    ours.save(tmp_path / "model.tar.gz")
    ours.save(str(nested))
    with (tmp_path / "model.tar.gz").open("rb") as reader:
        ours.save(reader)
    saved = restored_from(place)
    assert saved == {"model.tar.gz": "file", "a": "1", "deep/er/b": "2", SyncCheckpoint.TMP_DST_PATH: "file"}


def test_it_is_restored_to_the_folder_that_is_given(place: str, tmp_path: Path) -> None:
    """A path or its name; the folder has to exist."""
    ours = WorkerCheckpoint(place)
    ours.write(b"x")
    for name, form in (("one", str), ("two", Path)):
        (tmp_path / name).mkdir()
        assert ours.restore(form(tmp_path / name)) == tmp_path / name
        assert (tmp_path / name / SyncCheckpoint.TMP_DST_PATH).read_bytes() == b"x"
    with pytest.raises(ValueError, match=r"cannot be restored(?s:.*)Why:(?s:.*)Fix:"):
        ours.restore(tmp_path / "absent")


def test_a_folder_that_was_restored_to_before_takes_what_is_newer(place: str, tmp_path: Path) -> None:
    """Under the Flyte context of a worker, too: the next round restores to the folder of the one before."""
    ours = WorkerCheckpoint(place)
    (tmp_path / "folder").mkdir()
    for round_index in (b"0", b"1"):
        ours.write(round_index)
        with whole_downloads():
            ours.restore(tmp_path / "folder")
        assert (tmp_path / "folder" / SyncCheckpoint.TMP_DST_PATH).read_bytes() == round_index


def test_reading_several_files_is_refused_with_the_way_out(place: str, tmp_path: Path) -> None:
    """``read()`` is for one file."""
    ours = WorkerCheckpoint(place)
    ours.save(folder_of(tmp_path / "shards", a="1", b="2"))
    with pytest.raises(ValueError, match=r"Expected exactly one checkpoint - found 2: a, b(?s:.*)Fix:.*restore"):
        ours.read()


def test_what_is_no_file_cannot_be_saved(place: str) -> None:
    """The message says what can be, with the words of flytekit's."""
    with pytest.raises(ValueError, match=r"valid path or IOBase type(?s:.*)Fix:.*write"):
        WorkerCheckpoint(place).save(b"bytes")  # type: ignore[arg-type]


def test_every_save_is_progress(place: str, tmp_path: Path, page: HeartbeatPage) -> None:
    """A rank that writes checkpoints has not hung; reading is no progress."""
    ours = WorkerCheckpoint(place)
    seen = []
    saves: list[Any] = [
        lambda: ours.write(b"x"),
        lambda: ours.save(io.BytesIO(b"y")),
        lambda: ours.save(folder_of(tmp_path / "shards", a="1")),
    ]
    assert ours.read() is None
    assert page.read()[0].progressed_at is None
    for save in saves:
        save()
        seen.append(page.read()[0].progressed_at or 0.0)
    assert 0.0 < seen[0] < seen[1] < seen[2]


def test_a_save_that_fails_is_no_progress(tmp_path: Path, page: HeartbeatPage) -> None:
    """The error is the user's to see; nothing is left of the attempt."""
    ours = WorkerCheckpoint(str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError):
        ours.save(tmp_path / "absent")
    assert page.read()[0].progressed_at is None
    assert not ours.prev_exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_downloads_go_with_the_agent(tmp_path: Path, page: HeartbeatPage) -> None:
    """A worker that is killed cleans nothing up; its agent's folder is removed whatever happens."""
    ours = WorkerCheckpoint(str(tmp_path / "new"))
    ours.write(b"x")
    restored = ours.restore()
    assert restored is not None
    assert (tmp_path / "agent") in restored.parents


def test_downloads_go_with_the_process_where_there_is_no_agent(tmp_path: Path) -> None:
    """As flytekit's do."""
    ours = WorkerCheckpoint(str(tmp_path / "new"))
    ours.write(b"x")
    restored = ours.restore()
    assert restored is not None
    del ours
    assert not restored.exists()


# Workers that are killed while they write. The step at which one dies is given by the call of the operating system
# that it does not come back from.

KILLED = """
import os, pathlib, signal, sys
from kfpytorch_ray.checkpoint import WorkerCheckpoint
place, source, function, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def die(event, arguments):
    global count
    if event == function and any(".new." in str(argument) or ".partial-" in str(argument) for argument in arguments):
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)

ours = WorkerCheckpoint(place)
sys.addaudithook(die)
ours.save(pathlib.Path(source))
print("saved")
"""


def save_in_a_process(place: str, source: Path, function: str, count: int, rank: int = 0) -> int:
    """Exit code of a process that saves, and is killed before the ``count``-th such call on its way to the place."""
    command = [sys.executable, "-c", KILLED, place, str(source), function, str(count)]
    environment = {**os.environ, "RANK": str(rank)}
    return subprocess.run(command, env=environment, check=False, capture_output=True, timeout=120).returncode


@pytest.mark.parametrize(
    ("function", "count"),
    # open: while it copies (the first, the second and the third file) and while it flushes; os.rename: before it
    # counts as written, and before the first, the second and the third file is in its place.
    [("open", 0), ("open", 1), ("open", 2), ("open", 4), *(("os.rename", count) for count in range(4))],
)
def test_a_worker_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path, function: str, count: int) -> None:
    """The former or the new one, never a mixture, and none of the files that were on their way."""
    place = str(tmp_path / "new")
    names = ("a", "b", "c")
    former = dict.fromkeys(names, "former")
    newer = dict.fromkeys(names, "newer")
    WorkerCheckpoint(place).save(folder_of(tmp_path / "former", **former))
    source = folder_of(tmp_path / "source", **newer)
    assert save_in_a_process(place, source, function, count) == -signal.SIGKILL

    restored = restored_from(place)
    written = function == "os.rename" and count > 0
    assert restored == (newer if written else former)


def test_the_process_of_that_test_saves_when_it_is_left_alone(tmp_path: Path) -> None:
    """So that its deaths are what it shows."""
    source = folder_of(tmp_path / "source", a="1")
    assert save_in_a_process(str(tmp_path / "new"), source, "open", 1000) == 0
    assert restored_from(str(tmp_path / "new")) == {"a": "1"}


def test_a_single_file_is_read_after_such_a_death(tmp_path: Path) -> None:
    """``read()`` wants exactly one file, and finds it; the next write leaves nothing of the broken one behind."""
    place = str(tmp_path / "new")
    WorkerCheckpoint(place).write(b"former")
    source = tmp_path / SyncCheckpoint.TMP_DST_PATH
    source.write_bytes(b"newer")
    assert save_in_a_process(place, source, "open", 1) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".new.*"))) == 1
    assert WorkerCheckpoint(place).read() == b"former"
    assert SyncCheckpoint("unused", place).read() == b"former"
    WorkerCheckpoint(place).write(b"newest")
    assert WorkerCheckpoint(place).read() == b"newest"
    assert list(tmp_path.glob(".new.*")) == []


def test_what_another_rank_is_writing_is_left_alone(tmp_path: Path) -> None:
    """Only a rank's own broken writes are removed: those of others may not be broken."""
    place = str(tmp_path / "new")
    source = folder_of(tmp_path / "source", a="1")
    assert save_in_a_process(place, source, "os.rename", 0, rank=1) == -signal.SIGKILL
    WorkerCheckpoint(place).write(b"x")
    assert len(list(tmp_path.glob(".new.partial-1-*"))) == 1
    assert save_in_a_process(place, source, "open", 1000, rank=1) == 0
    assert list(tmp_path.glob(".new.*")) == []


def test_ranks_write_to_the_same_place_at_once(tmp_path: Path) -> None:
    """Each its own files, over and over; every file is one that was saved."""
    place = str(tmp_path / "new")
    code = (
        "import pathlib, sys\nfrom kfpytorch_ray.checkpoint import WorkerCheckpoint\n"
        "ours = WorkerCheckpoint(sys.argv[1])\nsource = pathlib.Path(sys.argv[2])\n"
        "for step in range(100):\n"
        "    for name in (source.name, 'shared'):\n"
        "        (source / name).write_text(str(step))\n"
        "    ours.save(source)\n"
    )
    processes = []
    for rank in range(3):
        source = folder_of(tmp_path / f"rank{rank}")
        command = [sys.executable, "-c", code, place, str(source)]
        processes.append(subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}))
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert restored_from(place) == dict.fromkeys(("rank0", "rank1", "rank2", "shared"), "99")
    assert list(tmp_path.glob(".new.*")) == []


def test_a_folder_in_the_way_is_said_before_anything_is_replaced(tmp_path: Path) -> None:
    """The former checkpoint stays, and the next save is not disturbed."""
    ours = WorkerCheckpoint(str(tmp_path / "new"))
    folder_of(tmp_path / "former" / "b", x="1")
    ours.save(folder_of(tmp_path / "former", a="former"))
    with pytest.raises(IsADirectoryError, match="b"):
        ours.save(folder_of(tmp_path / "clash", a="newer", b="a file"))
    assert content_of(ours.restore()) == {"a": "former", "b/x": "1"}
    ours.save(folder_of(tmp_path / "good", a="newest"))
    assert content_of(ours.restore()) == {"a": "newest", "b/x": "1"}


def test_content_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that loses its power has a checkpoint or none, but no empty one."""
    flushed: list[str] = []
    flush = checkpoint._flush

    def note(path: Path) -> None:
        flushed.append(path.name)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", note)
    WorkerCheckpoint(str(tmp_path / "new")).save(folder_of(tmp_path / "shards", a="1", b="2"))
    assert flushed == ["a", "b"]
