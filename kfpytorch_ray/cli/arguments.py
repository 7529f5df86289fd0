"""``--arg NAME=VALUE`` against a function's signature: every problem at once, before anything runs."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfpytorch_ray.cli.conversion import from_text, name_of
from kfpytorch_ray.errors import ConfigError

_BY_POSITION = inspect.Parameter.POSITIONAL_ONLY
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a function is called with.

    Attributes:
        args: By position: those that can be given in no other way.
        kwargs: By name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def bind(function: Callable[..., Any], given: Sequence[tuple[str, str]]) -> Arguments:
    """Arguments for a function from names and texts.

    Args:
        function: That is called with them.
        given: As typed, in order.

    Raises:
        ConfigError: Names are unknown, missing or given twice, or values are not what the annotations say; lists all.
    """
    parameters = inspect.signature(function).parameters
    kinds = _annotations(function)
    named = {name: one for name, one in parameters.items() if one.kind not in _COLLECTING}
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    texts = dict(given)
    problems = [f"{name!r} is given {count} times" for name, count in Counter(n for n, _ in given).items() if count > 1]
    if unknown := [name for name in texts if name not in named and not takes_any]:
        takes = f"it takes {', '.join(named)}" if named else "it takes none"
        problems += [f"{name!r} is no argument of it: {takes}" for name in unknown]
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name in unknown:
            continue
        kind = kinds.get(name, Any) if name in named else Any
        try:
            values[name] = from_text(text, kind)
        except ValueError as error:
            problems.append(f"{name}={text!r}: {error}")
    for name, one in named.items():
        if name not in texts and one.default is inspect.Parameter.empty:
            kind = f" ({name_of(kinds[name])})" if name in kinds else ""
            problems.append(f"{name!r} is missing{kind}: give --arg {name}=VALUE")
    if problems:
        raise ConfigError(f"Arguments of {function.__qualname__}", tuple(problems))
    return _called(named, values)


def _called(named: Mapping[str, inspect.Parameter], values: Mapping[str, Any]) -> Arguments:
    by_position = [name for name, one in named.items() if one.kind is _BY_POSITION]
    given = [name for name in by_position if name in values]
    last = by_position.index(given[-1]) + 1 if given else 0
    args = tuple(values.get(name, named[name].default) for name in by_position[:last])
    return Arguments(args, {name: value for name, value in values.items() if name not in by_position})


def _annotations(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The types of a function's arguments; none where its annotations name what is not there at run time."""
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}
