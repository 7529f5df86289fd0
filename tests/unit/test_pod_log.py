"""A driver's log out of the log of the container that submits it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfpytorch_ray.cluster.kube.pod_log import PodLogTail, driver_part, mark_of
from kfpytorch_ray.errors import ClusterUnreachableError
from kfpytorch_ray.testing import wait_until

RUN = "kfr-one"
BEFORE = "INFO cli.py:41 -- Job submission server address: http://head:8265\n"


class BrokenNamespace:
    """Serves a container's log from its beginning, and breaks off where it is told to."""

    def __init__(self, text: bytes, breaks: list[int], piece: int) -> None:
        self.text = text
        self.breaks = breaks
        self.piece = piece
        self.connections = 0
        self.over = threading.Event()

    @contextmanager
    def log_stream(self, pod: str, container: str) -> Iterator[Iterator[bytes]]:
        assert (pod, container) == ("submitter", "c")
        self.connections += 1
        yield self.pieces(self.breaks.pop(0) if self.breaks else None)

    def pieces(self, limit: int | None) -> Iterator[bytes]:
        text = self.text[:limit]
        for start in range(0, len(text), self.piece):
            yield text[start : start + self.piece]
        if limit is not None:
            message = "cut"
            raise ClusterUnreachableError(message)
        self.over.wait(10)


def followed(namespace: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that a tail has delivered by the time that everything expected has come."""
    monkeypatch.setattr("kfpytorch_ray.cluster.kube.pod_log._PAUSE_S", 0.001)
    got: list[str] = []

    def complete() -> bool:
        got.append(tail.next(0.05))
        return len("".join(got)) >= len(expected)

    with PodLogTail(namespace, lambda: "submitter", "c", RUN) as tail:
        wait_until(complete, "the whole log", 30)
        assert tail.rest(f"{BEFORE}{expected}more\n") == "more\n"
        namespace.over.set()
    return "".join(got)


@settings(max_examples=30, deadline=None)
@given(
    st.text("ab\nü", max_size=30),
    st.lists(st.integers(0, 200), max_size=3),
    st.integers(1, 50),
)
def test_nothing_twice_and_nothing_left_out(text: str, breaks: list[int], piece: int) -> None:
    """Wherever the stream breaks or is cut, also within the mark or a character; what is before is not ours."""
    expected = f"{mark_of(RUN)}{text}"
    namespace = BrokenNamespace(f"{BEFORE}{expected}".encode(), breaks, piece)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert followed(namespace, expected, monkeypatch) == expected


def test_a_log_without_the_mark_is_not_the_drivers() -> None:
    """What the submitting container says of itself is not shown as the run's log."""
    assert driver_part(BEFORE, RUN) == ""
    assert driver_part(f"{BEFORE}{mark_of('kfr-other')}x", RUN) == ""
    assert driver_part(f"{BEFORE}{mark_of(RUN)}x\n", RUN) == f"{mark_of(RUN)}x\n"
