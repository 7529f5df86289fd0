"""Files that a function takes or returns, where the process at the other end is on another machine.

A ``FlyteFile`` or ``FlyteDirectory`` is a path until flytekit uploads it, which it does in the task's own process. To a
worker on a cluster a path of this machine means nothing, nor does rank 0's to the driver. So who has the file uploads
it, to where flytekit would.

Files that are remote are downloaded when they are opened, to a path that was chosen before the value was pickled: all
ranks of a node have the same.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from flytekit import FlyteDirectory, FlyteFile
from flytekit.core.context_manager import FlyteContextManager


def upload_files(value: Any, staged_prefix: str = "") -> Any:
    """Upload the local files and folders in a value.

    Looks into tuples (named ones too), lists and dicts.

    Args:
        value: What a function takes or returns.
        staged_prefix: Where files lie that will not stay: those below it are uploaded as local ones are.

    Returns:
        The value with remote files in the place of local ones; the very same object if there was none.

    Raises:
        Exception: Whatever the upload raises.
    """
    match value:
        case FlyteFile() | FlyteDirectory():
            return _uploaded(value, staged_prefix)
        case tuple() | list():
            items = [upload_files(item, staged_prefix) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        case dict():
            entries = {key: upload_files(item, staged_prefix) for key, item in value.items()}
            return value if all(entries[key] is item for key, item in value.items()) else entries
        case _:
            return value


def _uploaded(value: FlyteFile | FlyteDirectory, staged_prefix: str) -> FlyteFile | FlyteDirectory:
    access = FlyteContextManager.current_context().file_access
    is_folder = isinstance(value, FlyteDirectory)
    wanted = value.remote_directory if is_folder else value.remote_path
    path = str(value.path)
    if staged_prefix and str(value.remote_source or path).startswith(f"{staged_prefix}/"):
        path, wanted = value.download(), None
    # Remote already, or the user said that it is not to be uploaded.
    elif value.remote_source is not None or access.is_remote(path) or wanted is False:
        return value
    if is_folder:
        # As flytekit's own transformer does: a folder's contents go into a fresh folder.
        destination = access.put_data(path, str(wanted or access.get_random_remote_directory()), is_multipart=True)
        return _remote_folder(type(value), destination) if access.is_remote(destination) else type(value)(destination)
    return type(value)(path=access.put_data(path, str(wanted)) if wanted else access.put_raw_data(path))


def _remote_folder(kind: type[FlyteDirectory], uri: str) -> FlyteDirectory:
    """A folder that is downloaded when it is opened, wherever that is: by its path alone flytekit would not."""
    local = FlyteContextManager.current_context().file_access.get_random_local_path()
    folder = kind(local, downloader=_FolderDownload(uri, local))
    folder._remote_source = uri
    return folder


@dataclass(frozen=True, slots=True)
class _FolderDownload:
    remote: str
    local: str

    def __call__(self) -> None:
        get_data = FlyteContextManager.current_context().file_access.get_data
        _get_whole(get_data, self.remote, self.local, is_multipart=True)


@contextlib.contextmanager
def whole_downloads() -> Iterator[None]:
    """Under the Flyte context of now, have files and folders appear when they are whole.

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
    partial_path = f"{local_path}.{uuid.uuid4().hex}"
    os.makedirs(os.path.dirname(os.path.abspath(local_path)), exist_ok=True)
    get_data(remote_path, partial_path, is_multipart=is_multipart, **kwargs)
    if not is_multipart:
        os.replace(partial_path, local_path)
        return
    try:
        # An empty folder may be there already.
        os.rename(partial_path, local_path)
    except OSError:
        # Another rank was faster.
        shutil.rmtree(partial_path)


def forget_downloads(value: Any) -> None:
    """Have files and folders that another machine has downloaded be downloaded here.

    Looks where ``upload_files`` does.
    """
    match value:
        case FlyteFile() | FlyteDirectory():
            if value.remote_source is not None and value._downloaded and not os.path.exists(_local_path(value)):
                value._downloaded = False
        case tuple() | list():
            for item in value:
                forget_downloads(item)
        case dict():
            for item in value.values():
                forget_downloads(item)


def _local_path(value: FlyteFile | FlyteDirectory) -> str:
    return str(getattr(value, "_local_path", value.path))
