"""Files that a function takes or returns, where the process at the other end is on another machine.

A ``FlyteFile`` or ``FlyteDirectory`` is a path until flytekit uploads it, which it does in the task's own process. To a
worker on a cluster a path of this machine means nothing, nor does rank 0's to the driver. So who has the file uploads
it, to where flytekit would.

Files that are remote are downloaded when they are opened, to a path that was chosen before the value was pickled: all
ranks of a node have the same.

All functions that are given a value look into tuples (named ones too), lists, dicts, dataclasses and pydantic's models.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from flytekit import FlyteDirectory, FlyteFile
from flytekit.core.context_manager import FlyteContextManager

_PLAIN = frozenset({bool, bytes, complex, float, int, str, type(None)})
"""Most of what long lists hold."""


def upload_files(value: Any, staged_prefix: str = "") -> Any:
    """Upload the local files and folders in a value.

    Args:
        value: What a function takes or returns.
        staged_prefix: Where files lie that will not stay: those below it are uploaded as local ones are.

    Returns:
        The value with remote files in the place of local ones; the very same object if there was none.

    Raises:
        Exception: Whatever the upload raises.
    """
    # Most values have no file in them, and some contain themselves.
    if all(_stays(file, staged_prefix) for file in _files_in(value)):
        return value
    return _with_uploaded(value, staged_prefix)


def _files_in(value: Any) -> Iterator[FlyteFile | FlyteDirectory]:
    seen = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, FlyteFile | FlyteDirectory):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            waiting.extend(part for _, part in _parts(item) if type(part) not in _PLAIN)


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """What is looked into, by index, key or field; nothing of any other value."""
    match value:
        case tuple() | list():
            return enumerate(value)
        case dict():
            return value.items()
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif isinstance(fields := getattr(kind, "model_fields", None), Mapping):
        names = [*fields]
    else:
        return ()
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _with_uploaded(value: Any, staged_prefix: str) -> Any:
    if isinstance(value, FlyteFile | FlyteDirectory):
        return value if _stays(value, staged_prefix) else _uploaded(value, staged_prefix)
    new = {at: _with_uploaded(part, staged_prefix) for at, part in _parts(value)}
    if all(new[at] is part for at, part in _parts(value)):
        return value
    match value:
        case tuple() | list():
            return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
        case dict():
            return new
    twin = copy.copy(value)
    for name, part in new.items():
        # Also where it is frozen.
        object.__setattr__(twin, name, part)
    return twin


def _stays(file: FlyteFile | FlyteDirectory, staged_prefix: str) -> bool:
    """Whether a file is remote already, for good, or the user said that it is not to be uploaded."""
    if _is_staged(file, staged_prefix):
        return False
    is_remote = FlyteContextManager.current_context().file_access.is_remote
    return file.remote_source is not None or is_remote(str(file.path)) or _destination(file) is False


def _is_staged(file: FlyteFile | FlyteDirectory, staged_prefix: str) -> bool:
    return bool(staged_prefix) and str(file.remote_source or file.path).startswith(f"{staged_prefix}/")


def _destination(file: FlyteFile | FlyteDirectory) -> Any:
    """Where the user wants it; None: anywhere; False: nowhere."""
    return file.remote_directory if isinstance(file, FlyteDirectory) else file.remote_path


def _uploaded(value: FlyteFile | FlyteDirectory, staged_prefix: str) -> FlyteFile | FlyteDirectory:
    access = FlyteContextManager.current_context().file_access
    path, wanted = str(value.path), _destination(value)
    if _is_staged(value, staged_prefix):
        path, wanted = value.download(), None
    if isinstance(value, FlyteDirectory):
        # As flytekit's own transformer does: a folder's contents go into a fresh folder.
        destination = access.put_data(path, str(wanted or access.get_random_remote_directory()), is_multipart=True)
        return _remote_folder(type(value), destination) if access.is_remote(destination) else type(value)(destination)
    return type(value)(path=access.put_data(path, str(wanted)) if wanted else access.put_raw_data(path))


def _remote_folder(kind: type[FlyteDirectory], uri: str) -> FlyteDirectory:
    """A folder that is downloaded when it is opened, wherever that is: by its path alone flytekit would not."""
    local = FlyteContextManager.current_context().file_access.get_random_local_path()
    folder = kind(local, downloader=partial(_get_where_it_is_opened, uri, local, is_multipart=True))
    folder._remote_source = uri
    return folder


def _get_where_it_is_opened(*args: Any, **kwargs: Any) -> None:
    FlyteContextManager.current_context().file_access.get_data(*args, **kwargs)


@contextlib.contextmanager
def whole_downloads() -> Iterator[None]:
    """Under the Flyte context of now, have files appear when they are whole, also those of folders.

    flytekit writes to the path itself: of two ranks that open one file, the second would cut it off beneath the first.
    """
    context = FlyteContextManager.current_context()
    access = copy.copy(context.file_access)
    access.get_data = partial(_get_whole, context.file_access.get_data)
    with FlyteContextManager.with_context(context.with_file_access(access)):
        yield


def _get_whole(
    get_data: Callable[..., Any], remote_path: str, local_path: str, is_multipart: bool = False, **kwargs: Any
) -> None:
    target = os.path.realpath(local_path)
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    # On the file system of the target: what is moved to another one is written there bit by bit.
    inside = os.path.isdir(target) and (os.path.ismount(target) or not os.access(parent, os.W_OK))
    beside = target if inside else parent
    with tempfile.TemporaryDirectory(prefix=".", dir=beside) as scratch:
        whole = os.path.join(scratch, "whole")
        if os.path.isdir(target) and not is_multipart:
            # A file goes into a folder that is there.
            os.mkdir(whole)
        get_data(remote_path, whole, is_multipart=is_multipart, **kwargs)
        _move(whole, target)


def _move(source: str, target: str) -> None:
    """Put a file in the place of another one; a folder's files to those that are there."""
    if not os.path.isdir(source):
        os.replace(source, target)
        return
    os.makedirs(target, exist_ok=True)
    for name in os.listdir(source):
        _move(os.path.join(source, name), os.path.join(target, name))


def forget_downloads(value: Any) -> None:
    """Have files and folders that another machine has downloaded be downloaded here."""
    for file in _files_in(value):
        if file.remote_source is not None and file._downloaded and not os.path.exists(_local_path(file)):
            file._downloaded = False


def _local_path(value: FlyteFile | FlyteDirectory) -> str:
    return str(getattr(value, "_local_path", value.path))
