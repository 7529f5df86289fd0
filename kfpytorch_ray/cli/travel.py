"""What of this machine a file's function needs on another one, where the options do not say it."""

from __future__ import annotations

import os
from pathlib import Path

import cloudpickle

from kfpytorch_ray.cli.targets import Target
from kfpytorch_ray.notices import tell


def working_dir_for(target: Target, address: str | None) -> str | None:
    """The working directory to send, where none is named.

    The current directory, as everywhere, where the file is below it; else the folder that the file is imported from.
    A home or root folder is nobody's project and is never sent: a function of such a file travels by value.

    Args:
        target: What is launched.
        address: Of the Ray, where one is named, or whatever says that it is elsewhere. One on this machine alone needs
            nothing.

    Returns:
        What the backend's ``working_dir`` takes; None leaves it to the backend.
    """
    if target.root is None or (address or os.environ.get("RAY_ADDRESS") or "local") == "local":
        return None
    here = Path.cwd()
    if target.root.is_relative_to(here) and not _is_nobodys(here):
        return None
    if not _is_nobodys(target.root):
        return str(target.root)
    tell(
        f"{target.root} is not sent to other machines, so {target.module.__name__} travels by value, without what lies "
        "beside it. Give it a folder of its own, or name one: --working-dir DIR"
    )
    cloudpickle.register_pickle_by_value(target.module)
    return ""


def _is_nobodys(folder: Path) -> bool:
    return str(folder) in ("/", os.path.expanduser("~"))
