"""Files that a function takes or returns, where the process at the other end is on another machine.

A ``FlyteFile`` or ``FlyteDirectory`` is a path until flytekit uploads it, which it does in the task's own process. To a
worker on a cluster a path of this machine means nothing, nor does rank 0's to the driver. So who has the file uploads
it, to where flytekit would.
"""

from __future__ import annotations

from typing import Any

from flytekit import FlyteDirectory, FlyteFile
from flytekit.core.context_manager import FlyteContextManager


def upload_files(value: Any) -> Any:
    """Upload the local files and folders in a value.

    Looks into tuples (named ones too), lists and dicts.

    Returns:
        The value with remote files in the place of local ones; the very same object if there was none.

    Raises:
        Exception: Whatever the upload raises.
    """
    match value:
        case FlyteFile() | FlyteDirectory():
            return _uploaded(value)
        case tuple() | list():
            items = [upload_files(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        case dict():
            entries = {key: upload_files(item) for key, item in value.items()}
            return value if all(entries[key] is item for key, item in value.items()) else entries
        case _:
            return value


def _uploaded(value: FlyteFile | FlyteDirectory) -> FlyteFile | FlyteDirectory:
    access = FlyteContextManager.current_context().file_access
    is_folder = isinstance(value, FlyteDirectory)
    wanted = value.remote_directory if is_folder else value.remote_path
    path = str(value.path)
    # Remote already, or the user said that it is not to be uploaded.
    if value.remote_source is not None or access.is_remote(path) or wanted is False:
        return value
    if is_folder:
        # As flytekit's own transformer does: a folder's contents go into a fresh folder.
        destination = access.put_data(path, str(wanted or access.get_random_remote_directory()), is_multipart=True)
    else:
        destination = access.put_data(path, str(wanted)) if wanted else access.put_raw_data(path)
    return type(value)(path=destination)
