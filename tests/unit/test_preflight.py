from __future__ import annotations

import logging
from typing import Any

import pytest

from kfpytorch_ray import BackendUnavailableError, ConfigError, Elastic, KubeflowBackend
from kfpytorch_ray.backends import Findings
from kfpytorch_ray.preflight import admit


def test_problems_of_all_sources_are_one_error(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, caller and backend: all that is wrong is said at once."""
    monkeypatch.setattr(double, "findings", Findings(problems=("double wants a GPU",)))
    with pytest.raises(ValueError, match="Elastic: 3 problems") as caught:
        admit(Elastic(nnodes="0", backend="double"), problems=("the pod template clashes",))
    assert isinstance(caught.value, ConfigError)
    assert "double wants a GPU" in str(caught.value)
    assert "the pod template clashes" in str(caught.value)


def test_a_backend_of_the_wrong_type_is_reported_with_the_rest() -> None:
    """It does not hide the other problems."""
    with pytest.raises(ConfigError, match="2 problems"):
        admit(Elastic(nnodes="0", backend=42))  # type: ignore[arg-type]


def test_warnings_are_said_once(double: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What the backend ignores is logged, each thing once."""
    monkeypatch.setattr(double, "findings", Findings(warnings=("no decks", "no decks", "no images")))
    with caplog.at_level(logging.WARNING, logger="kfpytorch_ray"):
        job = admit(Elastic(backend="double"))
    assert [record.getMessage() for record in caplog.records] == ["no decks", "no images"]
    assert job.choice.name == "double"


def test_a_fork_server_is_refused_by_kubeflow_only(double: Any) -> None:
    """The start method is known, but not to every backend."""
    with pytest.raises(ConfigError, match="Bad start method"):
        admit(Elastic(start_method="forkserver", backend=KubeflowBackend()))
    assert admit(Elastic(start_method="forkserver", backend="double")).choice.name == "double"


def test_an_unknown_backend_is_one_problem_among_others() -> None:
    """A typo in the backend does not hide what else is wrong; alone it stays an error of its own."""
    with pytest.raises(ConfigError, match="3 problems") as caught:
        admit(Elastic(nnodes="0", nproc_per_node=0, backend="rya"))
    assert "'rya'" in str(caught.value)
    with pytest.raises(BackendUnavailableError, match="kubeflow, ray"):
        admit(Elastic(backend="rya"))
