from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from kfpytorch_ray.errors import PayloadError, ResultError
from kfpytorch_ray.payload import dump_payload, dump_result, load_payload, load_result
from kfpytorch_ray.results import ElasticWorkerResult


def add(left: int, right: int = 0, *, times: int = 1) -> int:
    return (left + right) * times


def test_a_call_comes_back_with_its_inputs() -> None:
    """The loaded payload makes the call that was dumped, with positional and keyword inputs."""
    assert load_payload(dump_payload(add, (1,), {"right": 2, "times": 3}))() == 9


def test_nested_functions_and_lambdas_can_be_sent() -> None:
    """Functions that pickle refuses travel by value."""
    factor = 5

    def scale(value: int) -> int:
        return value * factor

    assert load_payload(dump_payload(scale, (2,)))() == 10
    assert load_payload(dump_payload(lambda: factor))() == 5


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((threading.Lock(),), {}, "'left' (position 0)"),
        ((1,), {"right": threading.Lock()}, "'right'"),
        ((1,), {"times": (i for i in range(3))}, "'times'"),
    ],
)
def test_an_input_that_cannot_be_pickled_is_named(args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    """The message says which input, of what type, of which function."""
    with pytest.raises(PayloadError) as caught:
        dump_payload(add, args, kwargs)
    message = str(caught.value)
    assert words in message
    assert "add()" in message
    assert "Why:" in message
    assert "Fix:" in message
    assert caught.value.__cause__ is not None


def test_a_function_that_cannot_be_pickled_is_named_with_its_variable() -> None:
    """The message says which variable that the function uses is to blame."""
    guard = threading.Lock()

    def train() -> bool:
        return guard.locked()

    with pytest.raises(
        PayloadError, match=r"train\(\) cannot be pickled: its variable 'guard' is of type _thread.lock"
    ):
        dump_payload(train)


class MuteError(Exception):
    """Says nothing of itself."""

    def __str__(self) -> str:
        raise AttributeError("code")


@pytest.mark.parametrize("error", [KeyError("gone"), MuteError()])
def test_a_class_that_raises_anything_in_its_reduce_is_named_too(error: Exception) -> None:
    """User classes may raise exceptions that have nothing to do with pickle."""

    class Handle:
        def __reduce__(self) -> Any:
            raise error

    with pytest.raises(PayloadError, match="Handle"):
        dump_payload(add, (Handle(),))


def test_payload_errors_survive_pickling() -> None:
    """The error can cross processes."""
    with pytest.raises(PayloadError) as caught:
        dump_payload(add, (threading.Lock(),))
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(caught.value))))
    assert str(again) == str(caught.value)


def test_results_come_back() -> None:
    """Value, decks and metadata make the round trip."""
    assert load_result(dump_result(ElasticWorkerResult({"a": 1}, []), rank=0)) == ElasticWorkerResult({"a": 1}, [])


def test_a_result_that_cannot_be_pickled_names_rank_and_type() -> None:
    """The message says whose return value it was and of what type."""
    with pytest.raises(ResultError, match=r"return value of rank 3 cannot be pickled: it is of type _thread\.lock"):
        dump_result(ElasticWorkerResult(threading.Lock(), []), rank=3)
