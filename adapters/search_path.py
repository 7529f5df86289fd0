"""The module search path of this process, for workers on other machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfpytorch_ray.payload import import_root


def search_path(function: Callable[..., Any], working_dir: str) -> tuple[str, ...]:
    """Where modules are found here, and for other machines where that is in the working directory that is sent.

    Args:
        function: Whose modules are to be found.
        working_dir: That is sent; empty if none is.
    """
    root = import_root(function)
    here = list(dict.fromkeys(os.path.abspath(path) for path in (*sys.path, *([root] if root else []))))
    if not working_dir:
        return tuple(here)
    # An environment within the project is of this machine.
    mine = [path for path in here if not Path(path).is_relative_to(sys.prefix)]
    sent = Path(working_dir).absolute()
    return (*here, *(os.path.relpath(path, sent) for path in mine if Path(path).is_relative_to(sent)))
