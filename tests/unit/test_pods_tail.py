"""Following the pods of a job whose API server is away for a moment."""

from __future__ import annotations

from typing import Any, final

import pytest

from kfpytorch_ray.cluster.kube import pods_log
from kfpytorch_ray.cluster.kube.pods_log import PodsTail
from kfpytorch_ray.errors import ClusterUnreachableError


class Log:
    """Stands for that of a job with one pod, which is not answered for at first."""

    def __init__(self) -> None:
        self.failures = 2

    def pods(self) -> list[str]:
        if self.failures:
            self.failures -= 1
            raise ClusterUnreachableError("the API server does not answer")
        return ["train-worker-0"]

    def tail(self, pod: str) -> Any:
        return Tail()


@final
class Tail:
    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_: object) -> None: ...

    def next(self, timeout_s: float) -> str:
        return "a line\n"


def test_an_api_server_that_is_away_does_not_end_who_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For how long it may be, the run's own looks decide."""
    monkeypatch.setattr(pods_log, "_LOOK_S", 0.0)
    log: Any = Log()
    with PodsTail(log) as tail:
        assert [tail.next(0.0) for _ in range(3)] == ["", "", "a line\n"]
