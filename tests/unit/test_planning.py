from __future__ import annotations

import dataclasses
import logging
from typing import Any

import flytekit
import flytekitplugins.kfpytorch as upstream
import pytest
from flytekit import Resources
from flytekit.core.checkpointer import SyncCheckpoint
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray import ConfigError, Elastic, Master, PyTorch, RestartPolicy, RunPolicy, Worker
from kfpytorch_ray.plan import Contract, NodeResources
from kfpytorch_ray.planning import (
    Call,
    flyte_context_of,
    node_resources,
    plan_elastic,
    plan_pytorch,
    warn_of_unreservable,
)
from kfpytorch_ray.task_arguments import TaskArguments, nothing_asked


def train(x: int) -> int:
    return x


def call(resources: ResourceSpec | None = None, environment: dict[str, str] | None = None, **changes: Any) -> Call:
    beside = TaskArguments(resources or nothing_asked(), environment=environment or {})
    plain = Call("train", "f123", train, (), {"x": 1}, flytekit.current_context(), beside)
    return dataclasses.replace(plain, **changes)


def spec(requests: Resources | None = None, limits: Resources | None = None) -> ResourceSpec:
    return ResourceSpec(requests=requests or Resources(), limits=limits or Resources())


def test_an_elastic_job_is_planned_field_by_field() -> None:
    """Every field of the config arrives in the plan."""
    config = Elastic("2:4", 8, "fork", 3, 5, {"join_timeout": 60, "timeout": 30}, run_policy=RunPolicy(None, 1, 77))
    plan = plan_elastic(config, call(environment={"A": "1"}))
    assert (plan.name, plan.run_id, plan.function, plan.kwargs) == ("train", "f123", train, {"x": 1})
    assert (plan.min_nodes, plan.max_nodes, plan.nproc_per_node) == (2, 4, 8)
    assert (plan.start_method, plan.monitor_interval_s, plan.max_restarts) == ("fork", 3, 5)
    assert plan.rdzv_configs == {"join_timeout": 60, "timeout": 30}
    assert (plan.join_timeout_s, plan.deadline_s) == (60.0, 77.0)
    assert plan.environment == {"A": "1"}
    assert plan.contract is Contract.TORCHRUN
    assert plan.resources == NodeResources({"CPU": 8.0})


@pytest.mark.parametrize("policy", [None, RunPolicy(), RunPolicy(active_deadline_seconds=0)])
def test_a_job_without_a_deadline_may_run_for_ever(policy: RunPolicy | None) -> None:
    """0 is none, as upstream through Flyte."""
    assert plan_elastic(Elastic(run_policy=policy), call()).deadline_s is None
    assert plan_pytorch(PyTorch(run_policy=policy), call()).deadline_s is None


@pytest.mark.parametrize(
    ("rdzv_configs", "expected"), [({}, 900.0), ({"timeout": 40}, 40.0), ({"join_timeout": "15", "timeout": 40}, 15.0)]
)
def test_the_join_timeout_is_the_rendezvous_one(rdzv_configs: dict[str, Any], expected: float) -> None:
    """``join_timeout``, else ``timeout``, else upstream's 15 minutes."""
    assert plan_elastic(Elastic(rdzv_configs=rdzv_configs), call()).join_timeout_s == expected


@pytest.mark.parametrize(
    ("resources", "amounts"),
    [
        (None, {"CPU": 4.0}),
        (spec(), {"CPU": 4.0}),
        (spec(Resources(cpu="500m", mem="4Gi", gpu="2")), {"CPU": 0.5, "memory": 4 * 2**30, "GPU": 2.0}),
        (spec(Resources(cpu=2, mem=1024)), {"CPU": 2.0, "memory": 1024.0}),
        (spec(None, Resources(cpu=1.5, gpu="1")), {"CPU": 1.5, "GPU": 1.0}),
        (spec(Resources(cpu="1"), Resources(cpu="9", mem="1G")), {"CPU": 1.0, "memory": 1e9}),
        (spec(Resources(gpu="0", mem="1Ki")), {"CPU": 4.0, "memory": 1024.0}),
        (ResourceSpec.from_multiple_resource(Resources(cpu=("1", "2"), mem="1Mi")), {"CPU": 1.0, "memory": 2.0**20}),
        (spec(Resources(cpu=("3", "4"))), {"CPU": 3.0}),
    ],
)
def test_resources_of_a_node_are_requests_else_limits(
    resources: ResourceSpec | None, amounts: dict[str, float]
) -> None:
    """Kubernetes quantities become Ray amounts, kind by kind; without a CPU number each worker gets one."""
    assert node_resources(resources, workers=4).amounts == amounts


def test_amounts_that_are_no_quantities_are_listed() -> None:
    """All of them, each with its value."""
    with pytest.raises(ConfigError, match="2 problems") as caught:
        node_resources(spec(Resources(cpu="four", mem="4 apples")), workers=1)
    assert "cpu='four'" in str(caught.value)
    assert "mem='4 apples'" in str(caught.value)


def test_disk_space_is_said_to_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    """Ray has no such resource, and nothing is dropped in silence."""
    with caplog.at_level(logging.WARNING):
        warn_of_unreservable(spec(Resources(ephemeral_storage="10Gi")))
        warn_of_unreservable(spec(Resources(cpu="1")))
        warn_of_unreservable(None)
    (record,) = caplog.records
    assert "10Gi" in record.getMessage()


def test_a_pytorch_job_has_one_process_per_replica() -> None:
    """Master and workers are nodes of one worker each, under the operator's environment."""
    plan = plan_pytorch(PyTorch(worker=Worker(replicas=3)), call(resources=spec(Resources(cpu="2"))))
    assert (plan.min_nodes, plan.max_nodes, plan.nproc_per_node) == (4, 4, 1)
    assert plan.contract is Contract.OPERATOR
    assert plan.resources == NodeResources({"CPU": 2.0})
    assert plan.first_node_resources is None
    assert plan_pytorch(PyTorch(num_workers=2), call()).max_nodes == 3
    assert plan_pytorch(PyTorch(num_workers=0), call()).max_nodes == 1


def test_replicas_have_resources_of_their_own_or_the_tasks() -> None:
    """A role that says its resources gets those, the other the task's."""
    config = PyTorch(master=Master(limits=Resources(cpu="1")), worker=Worker(replicas=1, requests=Resources(gpu="1")))
    plan = plan_pytorch(config, call(resources=spec(Resources(cpu="7"))))
    assert plan.resources == NodeResources({"CPU": 1.0, "GPU": 1.0})
    assert plan.first_node_resources == NodeResources({"CPU": 1.0})


@pytest.mark.parametrize(
    ("policy", "run_policy", "expected"),
    [
        (None, RunPolicy(backoff_limit=3), 0),
        (RestartPolicy.NEVER, RunPolicy(backoff_limit=3), 0),
        (RestartPolicy.FAILURE, RunPolicy(backoff_limit=3), 3),
        (RestartPolicy.FAILURE, RunPolicy(backoff_limit=0), 0),
        (RestartPolicy.FAILURE, None, 0),
        (upstream.RestartPolicy.NEVER, upstream.RunPolicy(backoff_limit=3), 0),
        (upstream.RestartPolicy.FAILURE, upstream.RunPolicy(backoff_limit=3), 3),
    ],
)
def test_restarts_of_a_pytorch_job_follow_its_policies(policy: Any, run_policy: Any, expected: int) -> None:
    """Nothing restarts unless a replica may, and then as often as backoff_limit says; upstream's enums count too."""
    config = PyTorch(worker=Worker(replicas=1, restart_policy=policy), run_policy=run_policy)
    assert plan_pytorch(config, call()).max_restarts == expected


def test_checkpoints_are_the_attempts(tmp_path: Any) -> None:
    """Workers write where this attempt writes, and read where an earlier one left off."""
    context = flytekit.current_context().builder()
    context.checkpoint = SyncCheckpoint(str(tmp_path / "new"), str(tmp_path / "old"))
    flyte = flyte_context_of(context.build())
    assert (flyte.checkpoint_dest, flyte.checkpoint_src) == (str(tmp_path / "new"), str(tmp_path / "old"))
    assert flyte_context_of(flytekit.current_context()).checkpoint_dest is None


def test_a_task_without_checkpoints_gets_none() -> None:
    """A place of its own is for ``launch()``."""
    assert plan_elastic(Elastic(), call()).flyte.checkpoint_dest is None


def test_the_execution_is_the_platforms_for_fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned workers know the execution from the environment; a local run sets none, as upstream."""
    context = flytekit.current_context()
    assert flyte_context_of(context).execution_id == {}
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f123")
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_PROJECT", "p")
    assert flyte_context_of(context).execution_id == {
        "FLYTE_INTERNAL_EXECUTION_ID": "f123",
        "FLYTE_INTERNAL_EXECUTION_PROJECT": "p",
    }


def test_forked_workers_inherit_the_execution_of_this_process() -> None:
    """A fork sees its parent's context, also where it is flytekit's local one."""
    inherited = flyte_context_of(flytekit.current_context(), inherited=True).execution_id
    assert inherited["FLYTE_INTERNAL_EXECUTION_ID"] == flytekit.current_context().execution_id.name
    assert len(inherited) == 3


def test_launches_of_one_task_do_not_share_their_checkpoints(tmp_path: Any) -> None:
    """Each has a folder of its own below the task's place, and below what the attempt before left."""
    context = flytekit.current_context().builder()
    context.checkpoint = SyncCheckpoint(str(tmp_path / "now"), "s3://bucket/before/")
    places = [plan_elastic(Elastic(), call(context=context.build(), keeps_checkpoints=True)).flyte for _ in range(2)]
    assert [place.checkpoint_dest for place in places] == [f"{tmp_path}/now/launch-{number}" for number in range(2)]
    assert [place.checkpoint_src for place in places] == [f"s3://bucket/before/launch-{number}" for number in range(2)]
    task = plan_elastic(Elastic(), call(context=context.build())).flyte
    assert (task.checkpoint_dest, task.checkpoint_src) == (f"{tmp_path}/now", "s3://bucket/before/")
