"""Agents that are kept, without Ray: whoever gives them back does not give up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from kfpytorch_ray.cluster import warm
from kfpytorch_ray.testing import wait_until


@dataclass
class Crew:
    """Stands for agents on a Ray.

    Attributes:
        looks: What a look whether somebody waits for them comes to, one after the other.
        until: When their time is up.
    """

    looks: list[bool | Exception]
    until: float = field(default_factory=lambda: time.monotonic() + 3600)
    released: bool = False

    def is_waited_for(self) -> bool:
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look

    def release(self) -> None:
        self.released = True


def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of ray.shutdown() parts of Ray are gone, and what is asked of them raises anything."""
    kept: list[Any] = []
    monkeypatch.setattr(warm, "_LOOK_S", 0.01)
    monkeypatch.setattr(warm, "_kept", kept)
    watcher = warm._Watcher()
    for looks in ([AttributeError("gcs_client"), False, True], [True]):
        crew = Crew([*looks])
        kept.append(crew)
        watcher.start()
        wait_until(lambda crew=crew: crew.released, "the crew to be given back", 60)
        assert kept == []
