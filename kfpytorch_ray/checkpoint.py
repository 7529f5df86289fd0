"""``flytekit.current_context().checkpoint`` of a worker: flytekit's, made to survive rounds as well as retries.

flytekit restores only what an earlier attempt of the task left. A launch also has rounds, which all write to the same
place: so what lies there comes first. Writing counts as progress, and where the place is a local folder, a worker that
is killed while it writes leaves the former checkpoint whole. Installed by kfpytorch_ray.flyte_worker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from io import IOBase
from pathlib import Path
from typing import IO, Any, cast

from flytekit.core.checkpointer import SyncCheckpoint
from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider

from kfpytorch_ray import heartbeat


class WorkerCheckpoint(SyncCheckpoint):  # type: ignore[misc] # flytekit ships no types
    """The checkpoint of one rank; every rank of every round has the same place.

    The place has to be one that all nodes reach: an object store, or a folder that they share. Ranks that write the
    same file name overwrite each other, so usually rank 0 writes and every rank reads::

        checkpoint = flytekit.current_context().checkpoint
        saved = checkpoint.read()                # None in the first round of the first attempt
        start = 0 if saved is None else pickle.loads(saved)
        for step in range(start, steps):
            ...
            if rank == 0:
                checkpoint.write(pickle.dumps(step + 1))

    Not safe for threads, as flytekit's.

    Args:
        checkpoint_dest: Where this attempt of the task writes, in all its rounds. A URI or a local folder.
        checkpoint_src: Where an earlier attempt of the task wrote. None or empty: there was none.
    """

    _td: tempfile.TemporaryDirectory[str]

    def __init__(self, checkpoint_dest: str, checkpoint_src: str | None = None) -> None:
        super().__init__(checkpoint_dest, checkpoint_src)
        folder = heartbeat.agent_folder()
        if folder is not None:
            # A worker that is killed cleans nothing up.
            self._td.cleanup()
            self._td = tempfile.TemporaryDirectory(prefix="checkpoint-", dir=folder)

    def prev_exists(self) -> bool:
        """Whether there is something to restore, of a round of this attempt or of an earlier attempt."""
        return self._newest() is not None

    def restore(self, path: Path | str | None = None) -> Path | None:
        """Download the newest checkpoint: what a round of this attempt wrote, else what the earlier attempt did.

        Every call downloads what is there now, unlike flytekit's, which gives its first download again.

        Args:
            path: An existing local folder. None: a temporary one, which the next call empties.

        Returns:
            The folder; None where nothing has been written yet, which is no error.

        Raises:
            ValueError: ``path`` is not a folder.
        """
        place = self._newest()
        if place is None:
            return None
        target: Path
        if path is None:
            target = Path(self._td.name) / self.SRC_LOCAL_FOLDER
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        else:
            target = Path(path)
        if not target.is_dir():
            msg = (
                f"A checkpoint cannot be restored to {str(path)!r}.\n"
                "Why: it is restored to a folder, and there is no such folder.\n"
                "Fix: make the folder first, or call restore() without a path."
            )
            raise ValueError(msg)
        _file_access().download_directory(place, str(target))
        self._prev_download_path = target
        return target

    def read(self) -> bytes | None:
        """The newest checkpoint where it is a single file, as ``write()`` makes it.

        Returns:
            Its content; None where nothing has been written yet.

        Raises:
            ValueError: There are several files.
        """
        folder = self.restore()
        files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
        if len(files) > 1:
            names = ", ".join(path.relative_to(cast(Path, folder)).as_posix() for path in files[:5])
            msg = (
                f"Expected exactly one checkpoint - found {len(files)}: {names}.\n"
                "Why: read() returns the content of one file, and several have been saved to this place.\n"
                "Fix: use restore(), which returns the folder with all of them, or save to one name only."
            )
            raise ValueError(msg)
        return files[0].read_bytes() if files else None

    def save(self, cp: Path | str | IO[bytes]) -> None:
        """Write a checkpoint; files of the same names are replaced and others stay.

        Args:
            cp: A local file, a local folder, of which the content is written, or an open binary file.

        Raises:
            ValueError: ``cp`` is none of these.
        """
        if not isinstance(cp, (Path, str, IOBase)):
            msg = (
                f"A checkpoint cannot be saved from a {type(cp).__name__}.\n"
                "Why: it is a file, a folder or what can be read from an open file. A valid path or IOBase type.\n"
                "Fix: give the path, or write(...) the bytes."
            )
            raise ValueError(msg)
        local = _local_path(self._checkpoint_dest)
        if local is None:
            # Object stores show an object only once it is complete.
            super().save(cp)
        else:
            _replace_files(local, lambda folder: self._copy(cp, folder))
        heartbeat.beat()

    def _newest(self) -> str | None:
        places: tuple[str | None, ...] = (self._checkpoint_dest, self._checkpoint_src)
        return next((place for place in places if place and _has_files(place)), None)

    def _copy(self, cp: Path | str | IO[bytes], folder: Path) -> None:
        if not isinstance(cp, (Path, str)):
            with (folder / self.TMP_DST_PATH).open("wb") as target:
                shutil.copyfileobj(cp, target)
        elif Path(cp).is_dir():
            shutil.copytree(cp, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(cp, folder / Path(cp).name)


def _file_access() -> FileAccessProvider:
    return FlyteContextManager.current_context().file_access


def _has_files(place: str) -> bool:
    local = _local_path(place)
    if local is not None:
        _finish_replacing(local)
    files: Any = _file_access().get_filesystem_for_path(place)
    # Listings are cached by some, and another process may have written since.
    files.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        return bool(files.find(place))
    return False


def _local_path(place: str) -> Path | None:
    files: Any = _file_access().get_filesystem_for_path(place)
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    return Path(files._strip_protocol(place)) if "file" in protocols else None


# A write to a local folder: everything is copied to a folder beside it, which is then renamed to one that counts as
# written, and its files are moved into place. Whoever comes after a writer that was killed in between moves the rest.


def _replace_files(place: Path, fill: Callable[[Path], None]) -> None:
    rank = os.environ.get("RANK", "0")
    place.mkdir(parents=True, exist_ok=True)
    # Beside the place and not in it, where whoever reads it would take them for checkpoints.
    for abandoned in _beside(place, f"partial-{rank}-"):
        shutil.rmtree(abandoned, ignore_errors=True)
    _finish_replacing(place)
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-{rank}-", dir=place.parent))
    try:
        fill(partial)
        for path in _files_in(partial):
            _flush(path)
            _make_room(place / path.relative_to(partial))
        partial.rename(place.with_name(f".{place.name}.written-{time.time_ns():020d}-{uuid.uuid4().hex}"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _finish_replacing(place)


def _finish_replacing(place: Path) -> None:
    for written in _beside(place, "written-"):
        for path in _files_in(written):
            target = place / path.relative_to(written)
            # Another process may be at the same, and be ahead.
            _make_room(target)
            with contextlib.suppress(FileNotFoundError):
                path.replace(target)
        shutil.rmtree(written, ignore_errors=True)


def _make_room(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        msg = f"a file cannot take the place of the folder {target}"
        raise IsADirectoryError(msg)


def _beside(place: Path, kind: str) -> list[Path]:
    try:
        names = sorted(os.listdir(place.parent))
    except FileNotFoundError:
        return []
    return [place.with_name(name) for name in names if name.startswith(f".{place.name}.{kind}")]


def _files_in(folder: Path) -> list[Path]:
    return [Path(parent) / name for parent, _, names in os.walk(folder) for name in sorted(names)]


def _flush(path: Path) -> None:
    """A rename may reach the disk before the content does, and a node may lose its power between the two."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
