"""What is typed behind ``--arg`` becomes what the function's annotations name."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from flytekit.types.file import FlyteFile
from pydantic import BaseModel

from kfpytorch_ray.cli.arguments import bind
from kfpytorch_ray.cli.conversion import from_json, from_text
from kfpytorch_ray.errors import ConfigError


class Precision(enum.Enum):
    HALF = "fp16"
    FULL = "fp32"


@dataclass
class Optimizer:
    name: str
    lr: float = 0.1


@dataclass
class Config:
    epochs: int
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("sgd"))
    layers: tuple[int, ...] = ()
    folder: Path | None = None


class Model(BaseModel):
    width: int


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("-1_000", int, -1000),
        ("3", float, 3.0),
        ("1e-3", float, 0.001),
        ("yes", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        ("3", str, "3"),
        ('"quoted"', str, '"quoted"'),
        ("", str, ""),
        ("data/x", Path, Path("data/x")),
        ("null", Optional[int], None),  # noqa: UP045
        ("None", int | None, None),
        ("4", Optional[int], 4),  # noqa: UP045
        ("none", Optional[str], None),  # noqa: UP045
        ("4", Union[str, int], 4),  # noqa: UP007
        ("four", int | str, "four"),
        ("true", bool | int, True),
        ("7", Annotated[int, "a note"], 7),
        ("adam", Literal["adam", "sgd"], "adam"),
        ("2", Literal[1, 2], 2),
        ("fp16", Precision, Precision.HALF),
        ("FULL", Precision, Precision.FULL),
        ("[1, 2]", list[int], [1, 2]),
        ("[1, 2]", Sequence[float], [1.0, 2.0]),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ('[1, "a"]', tuple[int, str], (1, "a")),
        ("[1, 1]", set[int], {1}),
        ("[]", list, []),
        ('["fp16"]', list[Precision], [Precision.HALF]),
        ('{"a": [1]}', dict[str, list[int]], {"a": [1]}),
        ('{"1": 0.5}', Mapping[int, float], {1: 0.5}),
        ('{"a": 1}', dict, {"a": 1}),
        ('{"epochs": 2}', Config, Config(2)),
        (
            '{"epochs": 2, "optimizer": {"name": "adam", "lr": 1}, "layers": [8, 4], "folder": "out"}',
            Config,
            Config(2, Optimizer("adam", 1.0), (8, 4), Path("out")),
        ),
        ('{"width": 3}', Model, Model(width=3)),
        ("3", Any, 3),
        ('{"a": null}', Any, {"a": None}),
        ("plain text", Any, "plain text"),
    ],
)
def test_a_text_becomes_the_annotated_value(text: str, kind: Any, value: Any) -> None:
    """Of the very type, too: True is not 1, and 3 is not 3.0."""
    converted = from_text(text, kind)
    assert converted == value
    assert type(converted) is type(value)


def test_flytes_files_are_named_by_their_path() -> None:
    """As ``pyflyte run`` takes them."""
    assert from_text("s3://bucket/x", FlyteFile).path == "s3://bucket/x"


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("3.5", int, "a whole number"),
        ("fast", float, "a number"),
        ("2", bool, "true or false"),
        ("x", Optional[int], "a whole number"),  # noqa: UP045
        ("rmsprop", Literal["adam", "sgd"], "one of adam, sgd"),
        ("fp8", Precision, "one of fp16, fp32, HALF, FULL"),
        ("[1, 2", list[int], r"JSON for list\[int\]"),
        ("[1, true]", list[int], r"\[1\] expected int, not true"),
        ('{"a": ["x"]}', dict[str, list[int]], r"\['a'\] \[0\] expected int"),
        ("[1]", tuple[int, int], "2 values, not 1"),
        ("3", list[int], "a JSON list"),
        ("3", dict[str, int], "a JSON object"),
        ("{}", Config, "'epochs' of Config is missing"),
        ('{"epochs": 1, "optimizer": {"nam": 1}}', Config, "'nam' is no field of Optimizer"),
        ('{"epochs": "1"}', Config, r"\['epochs'\] expected int, not \"1\""),
        ("3", Config, "fields of Config"),
        ('{"width": "wide"}', Model, "width"),
        ("3", Callable, "cannot be given on a command line"),
    ],
)
def test_what_does_not_fit_says_what_was_expected(text: str, kind: Any, told: str) -> None:
    """And where, within lists, dicts and dataclasses."""
    with pytest.raises(ValueError, match=told):
        from_text(text, kind)


def test_json_is_held_against_annotations_too() -> None:
    """A list for a number is no number."""
    with pytest.raises(ValueError, match="expected float"):
        from_json([1], float)


def train(epochs: int, config: Config, untyped, *, lr: float = 0.1) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    pass


def test_arguments_are_bound_by_name() -> None:
    """In any order; what has a default may be left out."""
    bound = bind(train, [("untyped", "[1]"), ("config", '{"epochs": 1}'), ("epochs", "3")])
    assert bound.args == ()
    assert bound.kwargs == {"epochs": 3, "config": Config(1), "untyped": [1]}


def test_all_problems_of_all_arguments_are_said_at_once() -> None:
    """Unknown, missing, twice, and of the wrong type."""
    given = [("epoch", "3"), ("config", "{"), ("lr", "1"), ("lr", "2")]
    with pytest.raises(ConfigError, match="5 problems") as caught:
        bind(train, given)
    text = str(caught.value)
    for told in (
        "'lr' is given 2 times",
        "'epoch' is no argument of it: it takes epochs, config, untyped, lr",
        "config='{': expected JSON for Config",
        "'epochs' is missing (int): give --arg epochs=VALUE",
        "'untyped' is missing: give",
    ):
        assert told in text


def test_what_a_function_takes_by_position_only_is_given_by_name_here() -> None:
    """The command line has names only; what comes before the last one given has its default."""

    def first(a: int = 1, b: int = 2, /, c: int = 3) -> None:
        pass

    bound = bind(first, [("b", "5"), ("c", "6")])
    assert (bound.args, bound.kwargs) == ((1, 5), {"c": 6})
    assert bind(first, []).args == ()


def test_a_function_that_takes_everything_is_given_everything() -> None:
    """``**kwargs`` has no annotations by name."""

    def takes(a: int, **rest: Any) -> None:
        pass

    assert bind(takes, [("a", "1"), ("b", "x=y"), ("c", "[2]")]).kwargs == {"a": 1, "b": "x=y", "c": [2]}


def test_annotations_that_are_not_there_at_run_time_leave_json() -> None:
    """As under ``if TYPE_CHECKING``."""

    def takes(a: Missing) -> None:  # type: ignore[name-defined] # noqa: F821
        pass

    assert bind(takes, [("a", "3")]).kwargs == {"a": 3}
