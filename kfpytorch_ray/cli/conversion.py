"""From what is typed on a command line to the value that a function's annotation names.

A text is read as its annotation says; what has parts (lists, dicts, dataclasses) is JSON, whose parts are held against
their annotations in turn. Pure. A ValueError says what was expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any

_TRUE = ("true", "yes", "1", "on")
_FALSE = ("false", "no", "0", "off")
_NONE = ("none", "null")

_UNIONS = (typing.Union, types.UnionType)
_MAPPINGS = (dict, Mapping)
_SEQUENCES: Mapping[Any, Callable[[Iterable[Any]], Any]] = {
    list: list,
    Sequence: list,
    Iterable: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    AbstractSet: set,
}


def from_text(text: str, kind: Any) -> Any:
    """The value of a text.

    Args:
        text: As typed.
        kind: The annotation; ``Any`` where there is none: JSON, or the text itself where it is none.

    Raises:
        ValueError: It is no such value; says what was expected.
    """
    kind = _bare(kind)
    if kind in (Any, object):
        try:
            return json.loads(text)
        except ValueError:
            return text
    if kind is str:
        return text
    if typing.get_origin(kind) in _UNIONS:
        return _first(typing.get_args(kind), text, from_text)
    if kind in (None, types.NoneType):
        return _none(text.lower() in _NONE)
    if (choices := _choices(kind)) is not None:
        return _chosen(text, {str(name): value for name, value in choices.items()})
    if kind in (bool, int, float):
        return _scalar(text, kind)
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        # pathlib.Path, and Flyte's files and folders.
        return kind(text)  # type: ignore[call-arg] # os.PathLike itself is a protocol, which nobody annotates
    try:
        value = json.loads(text)
    except ValueError as error:
        msg = f"expected JSON for {name_of(kind)}: {error}"
        raise ValueError(msg) from error
    return from_json(value, kind)


def from_json(value: Any, kind: Any) -> Any:
    """The value that a piece of JSON stands for.

    Args:
        value: As ``json.loads`` returns it.
        kind: The annotation.

    Raises:
        ValueError: It is no such value; says what was expected.
    """
    kind = _bare(kind)
    origin = typing.get_origin(kind) or kind
    if kind in (Any, object):
        return value
    if origin in _UNIONS:
        return _first(typing.get_args(kind), value, from_json)
    if kind in (None, types.NoneType):
        return _none(value is None)
    if (choices := _choices(kind)) is not None:
        return _chosen(value, {**choices, **{choice: choice for choice in choices.values()}})
    if kind in (bool, int, float, str):
        return _plain(value, kind)
    if origin in _MAPPINGS:
        return _mapping(value, kind)
    if origin in _SEQUENCES:
        return _sequence(value, kind, origin)
    return _object(value, kind)


def name_of(kind: Any) -> str:
    """An annotation as it is written."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _bare(kind: Any) -> Any:
    """An annotation without what is noted beside the type."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return kind


def _first(kinds: tuple[Any, ...], value: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """The value as the first type that takes it; text last, because it takes everything."""
    problems: list[str] = []
    for kind in sorted(kinds, key=lambda kind: _bare(kind) is str):
        with _collected(problems):
            return convert(value, kind)
    # What can be left out is rarely what was meant.
    told = [problem for problem in problems if problem != _NOT_NONE] or problems
    raise ValueError(", or ".join(dict.fromkeys(told)))


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


_NOT_NONE = "expected null"


def _none(is_none: bool) -> None:
    if not is_none:
        raise ValueError(_NOT_NONE)


def _choices(kind: Any) -> dict[Any, Any] | None:
    """The values of a type that lists them, by what they are called; None for other types."""
    if typing.get_origin(kind) is typing.Literal:
        return {choice: choice for choice in typing.get_args(kind)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {**{member.value: member for member in kind}, **dict(kind.__members__)}
    return None


def _chosen(given: Any, choices: Mapping[Any, Any]) -> Any:
    try:
        return choices[given]
    except (KeyError, TypeError):
        names = dict.fromkeys(str(name) for name in choices if not isinstance(name, Enum))
        msg = f"expected one of {', '.join(names)}"
        raise ValueError(msg) from None


def _scalar(text: str, kind: type[Any]) -> Any:
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            msg = "expected true or false"
            raise ValueError(msg)
        return text.lower() in _TRUE
    try:
        return kind(text)
    except ValueError:
        msg = f"expected {'a whole number' if kind is int else 'a number'}"
        raise ValueError(msg) from None


def _plain(value: Any, kind: type[Any]) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and whole:
        return float(value)
    if isinstance(value, kind) and (kind is not int or whole):
        return value
    msg = f"expected {kind.__name__}, not {json.dumps(value)}"
    raise ValueError(msg)


def _mapping(value: Any, kind: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        msg = f"expected a JSON object, not {json.dumps(value)}"
        raise ValueError(msg)
    keys, values = typing.get_args(kind) or (Any, Any)
    # Keys are text in JSON, whatever they stand for.
    key_of = (lambda key: key) if _bare(keys) in (Any, object) else (lambda key: from_text(key, keys))
    return {_within(key, key_of, key): _within(key, from_json, part, values) for key, part in value.items()}


def _sequence(value: Any, kind: Any, origin: Any) -> Any:
    if not isinstance(value, list):
        msg = f"expected a JSON list, not {json.dumps(value)}"
        raise ValueError(msg)
    parts = typing.get_args(kind) or (Any,)
    if origin is tuple and typing.get_args(kind) and parts[-1] is not Ellipsis:
        if len(parts) != len(value):
            msg = f"expected {len(parts)} values, not {len(value)}"
            raise ValueError(msg)
    else:
        parts = (parts[0],) * len(value)
    pairs = zip(value, parts, strict=True)
    return _SEQUENCES[origin](_within(index, from_json, part, of) for index, (part, of) in enumerate(pairs))


def _object(value: Any, kind: Any) -> Any:
    """The value of a class that JSON does not know."""
    if isinstance(kind, type) and issubclass(kind, os.PathLike) and isinstance(value, str):
        return kind(value)  # type: ignore[call-arg] # as above
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(value, kind)
    if hasattr(kind, "model_validate"):
        # pydantic's models; their ValidationError is a ValueError.
        return kind.model_validate(value)
    msg = f"a value of type {name_of(kind)} cannot be given on a command line"
    raise ValueError(msg)


def _dataclass(value: Any, kind: Any) -> Any:
    if not isinstance(value, dict):
        msg = f"expected a JSON object with the fields of {kind.__name__}, not {json.dumps(value)}"
        raise ValueError(msg)
    hints = typing.get_type_hints(kind, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    needed = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    problems = [f"{name!r} is no field of {kind.__name__}" for name in value if name not in known]
    problems += [f"the field {name!r} of {kind.__name__} is missing" for name in needed if name not in value]
    if problems:
        raise ValueError("; ".join(problems))
    return kind(**{name: _within(name, from_json, part, hints[name]) for name, part in value.items()})


def _within(part: Any, convert: Callable[..., Any], *arguments: Any) -> Any:
    """A part of a value; what is wrong with it says where it is."""
    try:
        return convert(*arguments)
    except ValueError as error:
        msg = f"[{part!r}] {error}"
        raise ValueError(msg) from error
