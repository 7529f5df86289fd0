"""Pickling what crosses a process boundary: the call that every rank makes, and what it brings home.

A call is one pickle: the function with its inputs bound. When something cannot be pickled the message names the
variable of the function, the input or the part of the result that is to blame, because pickle itself names only a
type. Used by every backend.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle

from kfpytorch_ray.errors import PayloadError, ResultError, explain, text_of
from kfpytorch_ray.flyte_files import forget_downloads
from kfpytorch_ray.results import ElasticWorkerResult

PICKLE_PROTOCOL = 5


def dump_payload(function: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> bytes:
    """Pickle the call ``function(*args, **kwargs)``.

    Functions of ``__main__``, nested functions and lambdas travel by value, those of importable modules by name.

    Raises:
        PayloadError: The function or an input cannot be pickled. Says which.
    """
    try:
        return _dump(functools.partial(function, *args, **kwargs))
    except Exception as error:
        raise PayloadError(_blame(function, args, kwargs, error)) from error


def load_payload(data: bytes) -> Callable[[], Any]:
    """The call that ``dump_payload`` pickled, ready to be made, also where its files were opened before elsewhere."""
    call: functools.partial[Any] = cloudpickle.loads(data)
    forget_downloads((call.args, call.keywords))
    return call


def dump_result(result: ElasticWorkerResult, rank: int) -> bytes:
    """Pickle what a rank brings home.

    Raises:
        ResultError: The return value, the decks or the output metadata cannot be pickled.
    """
    try:
        return _dump(result)
    except Exception as error:
        raise ResultError(blame_result(result, rank, error), time.time()) from error


def load_result(data: bytes) -> ElasticWorkerResult:
    """What ``dump_result`` pickled."""
    result: ElasticWorkerResult = cloudpickle.loads(data)
    return result


def blame_result(result: ElasticWorkerResult, rank: int, error: Exception) -> str:
    """The message for a result whose pickling failed with ``error``."""
    parts = {"return value": result.return_value, "decks": result.decks, "output metadata": result.om}
    for label, value in parts.items():
        if reason := _why_not(value):
            return explain(
                f"The {label} of rank {rank} cannot be pickled: it is of type {_type_name(value)}.",
                reason,
                "Return a value that can be pickled, such as a state dict or a path.",
            )
    return explain(f"The result of rank {rank} cannot be pickled.", text_of(error), "Return simpler values.")


def import_root(function: Callable[..., Any]) -> str | None:
    """The folder from which a function's module is imported; None where it is no module's file.

    Workers need it on their search path. It may have left this process's: flytekit puts a workflow file's folder
    there only while it loads the file.
    """
    module = sys.modules.get(getattr(inspect.unwrap(function), "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    if module.__name__ == "__main__":
        return str(Path(file).resolve().parent)
    path = Path(file).resolve().with_suffix("")
    names = module.__name__.split(".")
    located = path.parent.parts if path.name == "__init__" else path.parts
    if list(located[-len(names) :]) != names:
        return None
    return str(Path(*located[: -len(names)]))


@contextlib.contextmanager
def importable(function: Callable[..., Any]) -> Iterator[None]:
    """Have the folder of a function's module on this process's search path, which spawned processes copy."""
    root = import_root(function)
    added = root is not None and root not in sys.path
    if added:
        sys.path.append(str(root))
    try:
        yield
    finally:
        if added:
            sys.path.remove(str(root))


def _dump(value: Any) -> bytes:
    data: bytes = cloudpickle.dumps(value, protocol=PICKLE_PROTOCOL)
    return data


def _blame(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    for label, value in _inputs(function, args, kwargs):
        if reason := _why_not(value):
            return explain(
                f"{label} of {_name(function)} cannot be pickled: it is of type {_type_name(value)}.",
                reason,
                "Pass a value that can be pickled (a path, a configuration) and make the rest inside the function.",
            )
    if not (reason := _why_not(function)):
        return explain(
            f"The call of {_name(function)} cannot be pickled.",
            text_of(error),
            "Pass inputs that can be pickled together.",
        )
    culprits = [
        f"its variable {name!r} is of type {_type_name(value)}"
        for name, value in _variables(function)
        if _why_not(value)
    ]
    return explain(
        f"The function {_name(function)} cannot be pickled" + (f": {', '.join(culprits)}." if culprits else "."),
        reason,
        "Make such objects inside the function, or pass what is needed to make them.",
    )


def _inputs(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    for position, value in enumerate(args):
        named = f" {names[position]!r}" if position < len(names) else ""
        yield f"The input{named} (position {position})", value
    for name, value in kwargs.items():
        yield f"The input {name!r}", value


def _variables(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """What the function uses from around it: closure first, then module globals."""
    try:
        around = inspect.getclosurevars(inspect.unwrap(function))
    except (TypeError, ValueError):
        return
    yield from around.nonlocals.items()
    yield from around.globals.items()


def _why_not(value: Any) -> str | None:
    """Why a value cannot be pickled; None if it can."""
    try:
        _dump(value)
    except Exception as error:  # noqa: BLE001 - a class may raise anything from __reduce__
        return text_of(error)
    return None


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__qualname__', None) or type(function).__qualname__}()"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
