from __future__ import annotations

from typing import Any

import pytest
from flytekit import task

from kfpytorch_ray import BackendUnavailableError, ConfigError, Elastic, PyTorch, RayBackend, WorkerFailedError, launch
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult


def train(x: int, y: int = 0) -> int:
    return x + y


def test_a_launch_is_planned_from_the_call(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Function and inputs are the caller's, the rest is Elastic's; the result is the backend's."""
    result = ElasticResult((0,), lambda rank: ElasticWorkerResult(3, []))
    monkeypatch.setattr(double, "answer", staticmethod(lambda plan: result))
    assert launch(train, 1, elastic=Elastic("1:2", 4, backend="double"), y=2) is result
    (plan,) = double.plans
    assert (plan.function, plan.args, plan.kwargs) == (train, (1,), {"y": 2})
    assert (plan.min_nodes, plan.max_nodes, plan.nproc_per_node) == (1, 2, 4)
    assert plan.resources.amounts == {"CPU": 4.0}
    assert plan.name == "train"
    assert plan.flyte.raw_output_prefix
    assert plan.run_id.startswith("launch-")


def test_every_launch_has_a_run_id_of_its_own(double: Any) -> None:
    """Two launches of one process do not meet."""
    for _ in range(2):
        launch(train, 1, elastic=Elastic(backend="double"))
    assert len({plan.run_id for plan in double.plans}) == 2


def test_every_launch_has_a_place_for_checkpoints(double: Any) -> None:
    """A folder of its own, named by the run, under the raw output prefix; nothing to begin with."""
    launch(train, 1, elastic=Elastic(backend="double"))
    (plan,) = double.plans
    assert plan.flyte.checkpoint_dest == f"{plan.flyte.raw_output_prefix.rstrip('/')}/checkpoints/{plan.run_id}"
    assert plan.flyte.checkpoint_src is None


def test_errors_are_raised_as_they_are(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a task nothing is turned into Flyte's errors."""

    def fail(plan: Any) -> ElasticResult:
        raise WorkerFailedError("rank 0", 1.0)

    monkeypatch.setattr(double, "answer", staticmethod(fail))
    with pytest.raises(WorkerFailedError):
        launch(train, 1, elastic=Elastic(backend="double"))


def test_all_problems_of_a_launch_are_reported_at_once() -> None:
    """Config and function alike."""
    with pytest.raises(ConfigError, match="3 problems"):
        launch(42, elastic=Elastic(nnodes="0", nproc_per_node=0))  # type: ignore[arg-type]


def test_a_flyte_task_is_refused_with_the_way_out() -> None:
    """It would launch workers in every worker."""
    with pytest.raises(ConfigError, match="task_function"):
        launch(task(task_config=Elastic())(train), 1)


def test_only_elastic_jobs_are_launched() -> None:
    """A PyTorch job needs a task."""
    with pytest.raises(ConfigError, match=r"(?s)is no Elastic.*Why:.*Fix:"):
        launch(train, 1, elastic=PyTorch(num_workers=1))  # type: ignore[arg-type]


def test_a_secret_among_the_workers_variables_is_not_shown() -> None:
    """Not where a config is printed, nor where the wrong thing is given for one."""
    backend = RayBackend(env={"TOKEN": "hidden"}, runtime_env={"env_vars": {"TOKEN": "hidden"}})
    assert "hidden" not in repr(Elastic(backend=backend))
    with pytest.raises(ConfigError) as caught:
        launch(train, 1, elastic=backend)  # type: ignore[arg-type]
    assert "hidden" not in str(caught.value)


def test_an_unknown_backend_is_an_error() -> None:
    """As for tasks."""
    with pytest.raises(BackendUnavailableError):
        launch(train, 1, elastic=Elastic(backend="slurm"))
