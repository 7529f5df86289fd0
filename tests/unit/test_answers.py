"""Answers are taken as they come."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from kfpytorch_ray.cluster.answers import Answers


class Ref:
    """As Ray's reference: a future of its value."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.answer


def test_each_is_taken_once_in_the_order_in_which_they_come() -> None:
    """Errors are answers, too; one that was there before it was expected is not missed."""
    answers = Answers()
    first, second, third = Ref(), Ref(), Ref()
    first.answer.set_result(None)
    for ref in (first, second, third):
        answers.expect(ref)
    third.answer.set_exception(RuntimeError("gone"))
    assert answers.take(0) == [first, third]
    assert answers.take(0) == []
    second.answer.set_result(True)
    assert answers.take(600) == [second]


def test_who_waits_is_woken() -> None:
    """By an answer that comes from another thread."""
    answers, ref, taken = Answers(), Ref(), []
    answers.expect(ref)
    waiting = threading.Thread(target=lambda: taken.extend(answers.take(600)))
    waiting.start()
    ref.answer.set_result(None)
    waiting.join(60)
    assert taken == [ref]
