"""``FILE:FUNCTION``: the function that is to be launched, from a path or a dotted module, and what surrounds it.

A file is imported under the name by which workers will import it again: its path below the folder that a search path
would name, the first one above it that is no package. That folder is what workers need.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from flytekit import PythonFunctionTask
from flytekit.core.base_task import Task
from flytekit.core.workflow import WorkflowBase

from kfpytorch_ray.errors import ConfigError, explain


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be launched.

    Attributes:
        function: What every rank calls.
        module: That it was found in.
        root: Folder from which a file's module is imported; None for a dotted module.
        task: The Flyte task whose function it is; None for a plain function.
    """

    function: Callable[..., Any]
    module: ModuleType
    root: Path | None = None
    task: PythonFunctionTask[Any] | None = None


def find_target(text: str) -> Target:
    """Import what ``FILE:FUNCTION`` names.

    Raises:
        ConfigError: It is not of that form, cannot be imported, or is nothing that can be launched.
    """
    where, colon, name = text.rpartition(":")
    if not (where and colon and name):
        raise _wrong(text, "expected FILE:FUNCTION, such as train.py:main or package.module:main")
    if where.endswith(".py") or os.sep in where:
        path = Path(where).resolve()
        if not path.is_file():
            raise _wrong(text, f"there is no file {where!r}")
        root = _root_of(path)
        module = _imported(text, _module_name(text, path, root), root, path)
        return _target(text, module, name, root)
    return _target(text, _imported(text, where, Path.cwd(), None), name, None)


def _target(text: str, module: ModuleType, name: str, root: Path | None) -> Target:
    try:
        found: Any = operator.attrgetter(name)(module)
    except AttributeError:
        has = ", ".join(_launchable(module)) or "nothing that could be launched"
        raise _wrong(text, f"{module.__name__} has no {name!r}; it has {has}") from None
    if isinstance(found, PythonFunctionTask):
        return Target(found.task_function, module, root, found)
    if isinstance(found, Task | WorkflowBase):
        raise _wrong(
            text, f"{name} is a {type(found).__name__}: expected a function or a function's task; pyflyte runs the rest"
        )
    if not callable(found):
        raise _wrong(text, f"{name} is of type {type(found).__name__}: expected a function")
    return Target(found, module, root)


def _launchable(module: ModuleType) -> list[str]:
    """Functions and tasks that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, PythonFunctionTask) or (inspect.isfunction(value) and value.__module__ == module.__name__)
        )
    ]


def _root_of(path: Path) -> Path:
    """The folder that a search path needs for a file to be imported: above its packages."""
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        folder = folder.parent
    return folder


def _module_name(text: str, path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    names = parts[:-1] if parts[-1] == "__init__" else parts
    if any("." in name for name in names) or path.suffix != ".py":
        raise _wrong(text, f"{path.name!r} cannot be imported: expected a name ending in .py, without other dots")
    return ".".join(names)


def _imported(text: str, name: str, root: Path, path: Path | None) -> ModuleType:
    if str(root) not in sys.path:
        # First, as for `python FILE`.
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise _wrong(text, _import_failure(name, error)) from error
    found = getattr(module, "__file__", None)
    if path is not None and (found is None or Path(found).resolve() != path):
        raise _wrong(
            text,
            explain(
                f"{path} cannot be imported as {name!r}.",
                f"Another module has this name: {found or 'one that is built in'}.",
                "Rename the file.",
            ),
        )
    return module


def _import_failure(name: str, error: Exception) -> str:
    """Why the user's module cannot be imported, with the lines of theirs that led there."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name!r} in {Path.cwd()} or on Python's search path"
    theirs = _beyond_import(error.__traceback__)
    lines = traceback.format_exception(type(error), error, theirs)
    return f"{name} cannot be imported:\n{''.join(lines).rstrip()}"


def _beyond_import(at: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this module and of the import machinery that it begins with."""
    while at is not None and (
        at.tb_frame.f_code.co_filename in (__file__, importlib.__file__)
        or at.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        at = at.tb_next
    return at


def _wrong(text: str, problem: str) -> ConfigError:
    return ConfigError(text, (problem,))
