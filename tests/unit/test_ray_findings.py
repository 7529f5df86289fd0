from __future__ import annotations

import logging
from typing import Any

import flytekitplugins.kfpytorch as upstream
import pytest
from flytekit import Resources, task

from kfpytorch_ray import (
    CleanPodPolicy,
    ConfigError,
    Elastic,
    Master,
    PyTorch,
    RayBackend,
    RestartPolicy,
    RunPolicy,
    Worker,
)
from kfpytorch_ray.adapters.ray_findings import find
from kfpytorch_ray.backends import Findings

WITH_LIMIT = RunPolicy(backoff_limit=2)


def pytorch(master: Any = None, run_policy: RunPolicy | None = None, **worker: Any) -> PyTorch:
    return PyTorch(master=master or Master(), worker=Worker(replicas=1, **worker), run_policy=run_policy)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Elastic(), RayBackend()),
        (Elastic("1:4", 8, rdzv_configs={"join_timeout": 5, "timeout": 5}), RayBackend()),
        (Elastic(rdzv_configs={}), RayBackend(resources_per_node={"CPU": 1, "GPU": 0.5, "disk": 0})),
        (Elastic(run_policy=RunPolicy(active_deadline_seconds=5)), RayBackend(stop_grace_s=0, env={"A": "1"})),
        (pytorch(), RayBackend()),
        (pytorch(run_policy=WITH_LIMIT, restart_policy=RestartPolicy.FAILURE), RayBackend()),
        (pytorch(Master(restart_policy=RestartPolicy.FAILURE), WITH_LIMIT), RayBackend()),
        (pytorch(Master(restart_policy=RestartPolicy.NEVER), restart_policy=RestartPolicy.NEVER), RayBackend()),
        (upstream.Elastic(nnodes=2), RayBackend()),
        (upstream.PyTorch(worker=upstream.Worker(replicas=1)), RayBackend()),
    ],
)
def test_what_ray_honours_is_not_complained_of(config: Any, options: RayBackend) -> None:
    """Sound configs, ours and upstream's, give no problem and no warning."""
    assert find(config, options) == Findings()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (RayBackend(resources_per_node={"CPU": -1}), "RayBackend(resources_per_node): 'CPU'"),
        (RayBackend(resources_per_node={"GPU": "8"}), "RayBackend(resources_per_node): 'GPU'"),  # type: ignore[dict-item]
        (RayBackend(resources_per_node={"GPU": True}), "RayBackend(resources_per_node): 'GPU'"),
        (RayBackend(resources_per_node={"CPU": float("nan")}), "RayBackend(resources_per_node): 'CPU'"),
        (RayBackend(resources_per_node="5"), "RayBackend(resources_per_node)"),  # type: ignore[arg-type]
        (RayBackend(stop_grace_s=-0.1), "RayBackend(stop_grace_s)"),
        (RayBackend(checkpoint_grace_s=-1), "RayBackend(checkpoint_grace_s)"),
        (RayBackend(grow_cooldown_s=float("inf")), "RayBackend(grow_cooldown_s)"),
        (RayBackend(silence_timeout_s=0), "RayBackend(silence_timeout_s)"),
        (RayBackend(silence_timeout_s=None), "RayBackend(silence_timeout_s)"),  # type: ignore[arg-type]
        (RayBackend(hang_timeout_s=0), "RayBackend(hang_timeout_s)"),
        (RayBackend(max_node_failures=-1), "RayBackend(max_node_failures)"),
        (RayBackend(max_node_failures=1.5), "RayBackend(max_node_failures)"),  # type: ignore[arg-type]
        (RayBackend(stop_grace_s="5"), "RayBackend(stop_grace_s)"),  # type: ignore[arg-type]
        (RayBackend(carried_environment="HF_*"), "RayBackend(carried_environment)"),  # type: ignore[arg-type]
        (RayBackend(preload="transformers"), "RayBackend(preload)"),  # type: ignore[arg-type]
        (RayBackend(env={"A": 1}), "RayBackend(env)"),  # type: ignore[dict-item]
    ],
)
@pytest.mark.parametrize("config", [Elastic(), pytorch()], ids=["elastic", "pytorch"])
def test_options_that_cannot_work_are_problems(config: Any, options: RayBackend, words: str) -> None:
    """Each wrong option gives one problem that names it, for both kinds of job."""
    (problem,) = find(config, options).problems
    assert words in problem


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (pytorch(Master(image="mine:1")), "master.image"),
        (pytorch(image="mine:1"), "worker.image"),
        (pytorch(Master(restart_policy=RestartPolicy.ALWAYS)), "master.restart_policy ALWAYS"),
        (pytorch(restart_policy=RestartPolicy.ALWAYS), "worker.restart_policy ALWAYS"),
        (pytorch(restart_policy=RestartPolicy.FAILURE), "backoff_limit"),
        (pytorch(Master(restart_policy=RestartPolicy.FAILURE)), "backoff_limit"),
        (
            pytorch(Master(restart_policy=RestartPolicy.FAILURE), WITH_LIMIT, restart_policy=RestartPolicy.NEVER),
            "both roles",
        ),
        (pytorch(run_policy=RunPolicy(), restart_policy=RestartPolicy.FAILURE), "backoff_limit"),
        (
            upstream.PyTorch(worker=upstream.Worker(replicas=1, restart_policy=upstream.RestartPolicy.ALWAYS)),
            "worker.restart_policy ALWAYS",
        ),
    ],
)
def test_what_would_change_results_is_a_problem(config: Any, words: str) -> None:
    """An image or a restart policy that Ray cannot honour refuses the task, and the field is named."""
    (problem,) = find(config, RayBackend()).problems
    assert words in problem
    assert find(config, RayBackend()).warnings == ()


@pytest.mark.parametrize("config", [Elastic, pytorch], ids=["elastic", "pytorch"])
@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (RunPolicy(ttl_seconds_after_finished=0), "run_policy.ttl_seconds_after_finished"),
        (RunPolicy(clean_pod_policy=CleanPodPolicy.NONE), "run_policy.clean_pod_policy"),
        (RunPolicy(backoff_limit=0), "run_policy.backoff_limit"),
    ],
)
def test_what_has_no_effect_is_said(config: Any, policy: RunPolicy, words: str) -> None:
    """Each field of the run policy that Ray ignores gives one warning that names it, also where its value is 0."""
    findings = find(config(run_policy=policy), RayBackend())
    (warning,) = findings.warnings
    assert words in warning
    assert findings.problems == ()


def test_rendezvous_settings_without_effect_are_listed() -> None:
    """One warning names all of them, and none that is honoured."""
    config = Elastic(
        rdzv_configs={"timeout": 5, "join_timeout": 5, "last_call_timeout": 5, "close_timeout": 5, "read_timeout": 5}
    )
    (warning,) = find(config, RayBackend()).warnings
    assert "rdzv_configs close_timeout, read_timeout have no effect" in warning
    assert "join_timeout" not in warning


def test_everything_ignored_is_said_at_once() -> None:
    """Warnings do not hide each other."""
    policy = RunPolicy(CleanPodPolicy.ALL, ttl_seconds_after_finished=1, backoff_limit=1)
    assert len(find(Elastic(rdzv_configs={"x": 1}, run_policy=policy), RayBackend()).warnings) == 4


def test_all_problems_of_a_pytorch_task_are_reported_at_once() -> None:
    """The definition of the task lists those of the options, of both replicas, and those any backend has."""
    config = PyTorch(
        master=Master(image="a:1", restart_policy=RestartPolicy.ALWAYS),
        worker=Worker(image="b:1", replicas=1, restart_policy=RestartPolicy.FAILURE),
        run_policy=RunPolicy(active_deadline_seconds=-1),
        backend=RayBackend(resources_per_node={"CPU": -1, "GPU": -1}, stop_grace_s=-1, env={"A": 1}),  # type: ignore[dict-item]
    )
    with pytest.raises(ConfigError) as caught:

        @task(task_config=config)
        def train() -> None: ...

    assert len(caught.value.problems) == 9
    message = str(caught.value)
    for words in (
        *("active_deadline_seconds=-1", "'CPU'", "'GPU'", "stop_grace_s", "RayBackend(env)"),
        *("master.image", "master.restart_policy", "worker.image", "backoff_limit", "9 problems"),
    ):
        assert words in message


def test_all_problems_of_an_elastic_task_are_reported_at_once() -> None:
    """The definition of the task lists those of the options beside those any backend has."""
    config = Elastic(nnodes=0, nproc_per_node=0, backend=RayBackend(stop_grace_s=-1, env={"A": 1}))  # type: ignore[dict-item]
    with pytest.raises(ConfigError) as caught:

        @task(task_config=config)
        def train() -> None: ...

    assert len(caught.value.problems) == 4


def test_warnings_are_logged_when_the_task_is_defined(caplog: pytest.LogCaptureFixture) -> None:
    """Each is said once, and the task can be used."""
    with caplog.at_level(logging.WARNING):

        @task(task_config=Elastic(run_policy=RunPolicy(ttl_seconds_after_finished=5), backend="ray"))
        def train() -> None: ...

    assert sum("ttl_seconds_after_finished has no effect on Ray" in message for message in caplog.messages) == 1
    assert train.task_type == "python-task"


@pytest.mark.parametrize("rdzv_configs", ["timeout=5", {1: 2}])
def test_what_the_checks_refuse_does_not_stop_the_findings(rdzv_configs: Any) -> None:
    """A config that is wrong elsewhere is still looked at, so that all problems can be reported at once."""
    find(Elastic(rdzv_configs=rdzv_configs), RayBackend())


def test_fork_is_said_to_be_served_by_a_fork_server() -> None:
    """Workers on Ray inherit nothing, whatever the start method is called."""
    (warning,) = find(Elastic(start_method="fork"), RayBackend()).warnings
    assert "fork server" in warning


def test_resources_given_twice_are_a_problem() -> None:
    """Those of the backend would silently win over those of a role."""
    config = pytorch(Master(requests=Resources(cpu="2")))
    (problem,) = find(config, RayBackend(resources_per_node={"CPU": 1})).problems
    assert "resources_per_node" in problem
